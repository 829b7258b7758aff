"""Training state: what exact resuming needs, written by torch's distributed checkpointing.

In: a model (plain or sharded by FSDP2) and its optimizer. Out: <folder>/step_<n>/, complete when
its `.metadata` file exists, because distributed checkpointing writes that last. The data's position
is the step itself: batches are a pure function of (seed, step).
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

# a run of one process has no process group, and needs none
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
KEEP = 2  # the newest complete state survives the writing of the next


def complete_steps(folder: Path) -> list[int]:
    """Steps whose state is complete, oldest first."""
    return sorted(int(p.parent.name.removeprefix("step_")) for p in folder.glob("step_*/.metadata"))


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Write the state after `step` optimizer steps; then drop all but the newest two. Call on every
    rank."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / f"step_{step}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        for old in complete_steps(folder)[:-KEEP]:
            shutil.rmtree(folder / f"step_{old}")


def restore(folder: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Load the newest complete state into `model` and `optimizer`; returns its step, 0 when there
    is none."""
    steps = complete_steps(folder)
    if not steps:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    content: dict[str, Any] = {"model": weights, "optimizer": moments}
    dcp.load(content, checkpoint_id=folder / f"step_{steps[-1]}")
    set_state_dict(
        model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"]
    )
    return steps[-1]
