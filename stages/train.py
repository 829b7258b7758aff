"""Train: stage 1, stage 2, or a base model, as the recipe's YAML says.

    python -m stages.train recipes/demo/stage1.yaml runtime.ranks=2 key=value ...
    tune run --nproc_per_node 2 stages/train.py --config recipes/demo/stage1.yaml key=value ...

In: a checkpoint and datasets made by the jobs of stages/. Out: a run folder (see
speechfuse.train.loop). More than one rank are started with torchrun, after all that can be refused
was; on several machines start torchrun yourself. Every key of the YAML is checked; `--help` lists
them.
"""

import os
import sys
from contextlib import redirect_stdout
from io import StringIO

from speechfuse import config, failures
from speechfuse.hub import data as hub_data
from speechfuse.train.config import Finetune, set_allocator
from speechfuse.train.preflight import assumed


def main(job: Finetune) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank that trained on would keep the folder locked
        failures.end_with_parent()
    paths = [spec["path"] for spec in job.datasets if "path" in spec]
    folders: dict[str, str | None] = dict.fromkeys(
        path for path in paths if not hub_data.PATH.fullmatch(path)
    )
    if not job.runtime.dry_run and (lacks := assumed.missing(job, folders)):
        raise ValueError("; ".join(lacks))  # before torch and torchtune are imported
    set_allocator()
    import torch.distributed as dist

    from speechfuse.train import loop

    if job.runtime.ranks != 1 and "RANK" not in os.environ:
        return launch(job, job.runtime.ranks)
    loop.join(job.runtime.device, mixed=job.compute_dtype != job.dtype)
    loop.run(job)
    # not where it fails: a rank would wait for the others, and torchrun could not see that it has
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(job: Finetune, ranks: int) -> None:
    """Replace this process by torchrun, unless there is nothing to train. Everything is checked
    before: here a mistake is one sentence, under torchrun it would be a traceback of each rank."""
    from speechfuse.train import gpus
    from speechfuse.train.plan import plan_run

    if ranks < 1:
        raise ValueError(f"runtime.ranks={ranks}: at least 1 is needed")
    gpus.check_ranks(job.runtime.device, ranks)
    printed, plan = StringIO(), None
    try:
        with redirect_stdout(printed):  # rank 0 prints it again
            plan = plan_run(job, 0, ranks)
    finally:
        print("" if plan else printed.getvalue(), end="")
    if plan is None:
        return
    # seconds that ranks have to save their state after SIGTERM
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    torchrun = ["-m", "speechfuse.train.torchrun", "--standalone", f"--nproc-per-node={ranks}"]
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "stages.train", *sys.argv[1:]])


if __name__ == "__main__":
    config.main(main, Finetune, __doc__)
