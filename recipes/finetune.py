"""Train: stage 1, stage 2, or a base model, as the recipe's YAML says.

    torchrun --nproc-per-node 2 recipes/finetune.py recipes/demo/stage1.yaml key=value ...

In: a checkpoint and datasets made by the jobs of stages/. Out: a run folder (see
speechfuse.train.loop). It also runs without torchrun, as one process. Every key of the YAML is
checked; `--help` lists them.
"""

import torch.distributed as dist

from speechfuse import config
from speechfuse.train import loop


def main(job: loop.Finetune) -> None:
    loop.join(job)
    loop.run(job)
    # not where it fails: a rank would wait for the others, and torchrun could not see that it has
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    config.main(main, loop.Finetune, __doc__)
