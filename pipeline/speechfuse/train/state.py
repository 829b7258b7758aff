"""Training state: what exact resuming needs, written by torch's distributed checkpointing.

In: a model (plain or sharded by FSDP2) and its optimizer. Out: <folder>/step_<n>/, complete when
its `.metadata` file exists, because distributed checkpointing writes that last; the newest two are
kept. Weights and moments are copied at once and written while the training goes on. The data's
position is the step itself; the state of the random number generators (dropout of adapters) is
saved for each rank.
"""

import shutil
import warnings
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.optim import Optimizer

from speechfuse import failures

# a run of one process has no process group, and needs none
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
# frozen weights are the checkpoint's; not strict, else moments not there are an error
TRAINED = dcp_state.StateDictOptions(ignore_frozen_params=True, strict=False)
# how long ranks wait while others read or write a disk; one that has died ends the run at once
PATIENCE = timedelta(hours=12)
KEEP = 2  # the newest complete state survives the writing of the next


def complete_steps(folder: Path) -> list[int]:
    """Return the steps whose state is complete, oldest first."""
    return sorted(int(p.parent.name.removeprefix("step_")) for p in folder.glob("step_*/.metadata"))


def broadcast_from_rank0(value: Any) -> Any:
    """Return rank 0's value on every rank: on a shared disk they may see different files."""
    shared = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    return shared[0]


def rank() -> int:
    """Return the number of this rank; 0 for a process without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def _rng_states() -> dict[str, Tensor]:
    """Return the states of this rank's random number generators by the names in a saved state."""
    states = {f"cpu_{rank()}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"cuda_{rank()}"] = torch.cuda.get_rng_state()
    return states


class States:
    """The states of one run, for every rank to call alike."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
        self.folder, self.model, self.optimizer = folder, model, optimizer
        self._writing: tuple[int, Future[Any]] | None = None
        # collectives of the background thread must not meet those of the training
        self._group = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def save(self, step: int) -> None:
        """Begin to write the state after `step` optimizer steps, when the one before is written."""
        self.wait()
        if broadcast_from_rank0(step in complete_steps(self.folder)):
            return
        weights, moments = dcp_state.get_state_dict(self.model, self.optimizer, options=TRAINED)
        content = {"model": weights, "optimizer": moments, "chance": _rng_states()}
        place = self.folder / f"step_{step}"
        future = dcp.async_save(content, checkpoint_id=place, process_group=self._group)
        assert isinstance(future, Future)  # what staging without a stager of our own gives
        self._writing = step, future

    def wait(self) -> None:
        """Return when the state that is being written is on disk, and delete all but the newest
        two. Raises ValueError where it could not be written: those before are as they were."""
        if self._writing is None:
            return
        (step, future), self._writing = self._writing, None
        try:
            future.result()
        except (Exception, CheckpointException) as error:  # as which a full disk comes, too
            if rank() == 0:
                shutil.rmtree(self.folder / f"step_{step}", ignore_errors=True)
            whole = complete_steps(self.folder)
            before = f"that of step {whole[-1]} is whole" if whole else "there is none before it"
            code = failures.errno_of(error)
            raise ValueError(
                f"{self.folder}: the state of step {step} could not be written "
                f"({failures.DISK[code] if code else _first_cause(error)}); {before}: run again to "
                "resume"
            ) from error
        if rank() == 0:
            for old in complete_steps(self.folder)[:-KEEP]:
                shutil.rmtree(self.folder / f"step_{old}")

    def restore_weights(self, at_most: int) -> int:
        """Load the weights alone of the newest state of step `at_most` or before. Returns its step,
        0 when there is none."""
        steps = [step for step in complete_steps(self.folder) if step <= at_most]
        if not steps:
            return 0
        content = {"model": dcp_state.get_model_state_dict(self.model, options=TRAINED)}
        dcp.load(content, checkpoint_id=self.folder / f"step_{steps[-1]}")
        dcp_state.set_model_state_dict(self.model, content["model"], options=TRAINED)
        return steps[-1]

    def restore(self) -> int:
        """Load the newest complete state and delete incomplete ones, which a kill has left. Returns
        its step, 0 when there is none. Raises ValueError where it cannot be read, as 8-bit states
        whose blocks another number of ranks would cut."""
        steps = broadcast_from_rank0(complete_steps(self.folder))
        if rank() == 0:
            for path in self.folder.glob("step_*"):
                if int(path.name.removeprefix("step_")) not in steps:
                    shutil.rmtree(path)
                    print(f"{path} is dropped: a stop came before it was written to its end")
        if not steps:
            return 0
        place = self.folder / f"step_{steps[-1]}"
        weights, moments = dcp_state.get_state_dict(self.model, self.optimizer, options=TRAINED)
        saved = dcp.FileSystemReader(place).read_metadata().state_dict_metadata
        # a rank that the saved run did not have has no state of a generator to go on from
        rngs = {name: value for name, value in _rng_states().items() if f"chance.{name}" in saved}
        # weights that had not begun to train (new_rows_first) have no moments
        for name in list(moments["state"]):
            if not any(key.startswith(f"optimizer.state.{name}.") for key in saved):
                del moments["state"][name]  # type: ignore[arg-type, union-attr]
        content: dict[str, Any] = {"model": weights, "optimizer": moments, "chance": rngs}
        try:
            dcp.load(content, checkpoint_id=place)
        except (Exception, CheckpointException) as error:
            written = sum(name.startswith("chance.cpu_") for name in saved)
            here = dist.get_world_size() if dist.is_initialized() else 1
            cure = "8-bit states divide among few numbers of ranks: go on with as many as before"
            if here == written:
                cure = "it is damaged: delete it to go on from the one before"
            raise ValueError(
                f"{place}, written by {written} ranks, cannot be read by {here} "
                f"({_first_cause(error)}); {cure}"
            ) from error
        both = {"model_state_dict": content["model"], "optim_state_dict": content["optimizer"]}
        dcp_state.set_state_dict(self.model, self.optimizer, **both, options=TRAINED)
        for name, value in rngs.items():
            set_state = torch.set_rng_state if name.startswith("cpu") else torch.cuda.set_rng_state
            set_state(value)
        return steps[-1]


def _first_cause(error: BaseException) -> str:
    """Return the innermost reason, in a line."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return " ".join(str(error).split())[-200:] or type(error).__name__
