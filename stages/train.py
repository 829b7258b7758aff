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

import torch.distributed as dist

from speechfuse import config
from speechfuse.train import loop
from speechfuse.train.config import Finetune


def main(job: Finetune) -> None:
    if job.runtime.ranks != 1 and "RANK" not in os.environ:
        return launch(job)
    loop.join(job)
    loop.run(job)
    # not where it fails: a rank would wait for the others, and torchrun could not see that it has
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(job: Finetune) -> None:
    """Become torchrun. An error is one sentence here, there a traceback of every rank."""
    ranks = job.runtime.ranks
    if ranks < 1:
        raise ValueError(f"runtime.ranks={ranks}: at least 1 is needed")
    said, starts = StringIO(), False
    try:
        with redirect_stdout(said):  # rank 0 says it again
            found = loop.check_and_plan(job, 0, ranks)
        starts = found is not None and not job.runtime.dry_run
    finally:
        print(said.getvalue() if not starts else "", end="")
    if not starts:
        return
    # seconds that ranks have to save their state after SIGTERM
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "stages.train", *sys.argv[1:]])


if __name__ == "__main__":
    config.main(main, Finetune, __doc__)
