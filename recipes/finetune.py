"""Train: stage 1, stage 2, or a base model, as the recipe's YAML says.

    torchrun --nproc-per-node 2 recipes/finetune.py recipes/demo/stage1.yaml key=value ...

In: a checkpoint and datasets made by the jobs of stages/. Out: a run folder (see
speechfuse.train.loop). It also runs without torchrun, as one process. Every key of the YAML is
checked; `--help` lists them.
"""

import os
from typing import Any

import torch
import torch.distributed as dist

from speechfuse import config
from speechfuse.train import loop


def main(job: loop.Finetune) -> None:
    alone = "RANK" not in os.environ
    if alone and job.compute_dtype == job.dtype:
        loop.run(job)
        return
    # mixed precision is FSDP2's, which needs a process group, be it of one
    place: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
    if torch.cuda.is_available() and job.runtime.device != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # gloo for what the background thread that writes states has to agree on
        dist.init_process_group("cpu:gloo,cuda:nccl", **place)
    else:
        dist.init_process_group("gloo", **place)
    try:
        loop.run(job)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    config.main(main, loop.Finetune, __doc__)
