"""Talk to a trained model: a page, and a server that speaks OpenAI's protocol.

    python -m stages.serve recipes/demo/serve.yaml port=8123
    python -m stages.serve recipes/demo/serve.yaml open=true

In: the epoch that the report chose, or `checkpoint`, under the name of the report's folder; all
other epochs beside the report by RUN/epoch_N. Out: http://127.0.0.1:PORT with the page at / and the
protocol at /v1, until SIGTERM or Ctrl-C. It listens to this machine alone unless `host` says
otherwise.
"""

from speechfuse import config
from speechfuse.quantizer.spec import check_files
from speechfuse.serve.config import Serve


def main(job: Serve) -> None:
    check_files(job.quantizer, job.whisper)
    from speechfuse.serve import app  # a web framework with it

    app.run(job)


if __name__ == "__main__":
    config.main(main, Serve, __doc__)
