"""The rows of the sound tokens in embedding and head: trained alone at first, and watched
(their first values: tokens/initialization.py).

In: a model (plain, or sharded by FSDP2) with the checkpoint's weights, and the layout of its sound
tokens. Out: for the first steps of a run gradients of no other weight, with the other rows of both
matrices exactly as they were; for the first hundred steps two numbers for metrics.jsonl, and from
its lines a sentence on whether the new rows learn. In every step, on every rank:

    backward; rows.before_step(step); clip; optimizer.step(); rows.after_step(step)
    metrics.add(..., **rows.measure(step))
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from speechfuse.tokens.vocabulary import EXPAND, SoundLayout
from speechfuse.train.backbone import embedding_of, head_of

WATCHED = 100  # steps


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is on this rank, not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Matrix:
    """Embedding or head: this rank's part of its rows, of which `new` are new. `initial`: the new
    rows before the first step; `frozen`: the old rows, while they may not change."""

    def __init__(self, parameter: nn.Parameter, ids: range) -> None:
        first, local = 0, _local(parameter)
        if isinstance(parameter, DTensor):
            layout = parameter.shape, parameter.device_mesh, parameter.placements
            _, (first, _) = compute_local_shape_and_global_offset(*layout)
        start, stop = (min(max(row - first, 0), len(local)) for row in (ids.start, ids.stop))
        self.parameter, self.new = parameter, slice(start, stop)
        self.initial = local[self.new].clone()
        self.frozen: list[Tensor] | None = None

    def old_rows(self, of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the rows of the weight (or `of` its gradient) before the new ones, and those
        behind them."""
        local = _local(self.parameter if of is None else of)
        return local[: self.new.start], local[self.new.stop :]

    def moved(self) -> int:
        """Count the new rows of this rank that are not what they were before the first step."""
        return int((_local(self.parameter)[self.new] != self.initial).any(1).sum())


class NewRows:
    """The sound tokens' rows of one model; to be made before a state is restored."""

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, layout: SoundLayout | None, first: int = 0, only: bool = False
    ) -> None:
        """`first`: steps that train these rows alone; `only`: the other rows of both matrices stay
        as they are in all steps. Raises ValueError if there are none to train."""
        self.first, self.only, self.layout = first, only, layout
        parts = {"embedding": embedding_of(model), "head": head_of(model)}
        self._matrices = {
            name: _Matrix(part.weight, layout.ids)
            for name, part in parts.items()
            if layout and hasattr(part, "weight")
        }
        self._own = [m for m in self._matrices.values() if m.parameter.requires_grad]
        own = {id(matrix.parameter) for matrix in self._own}
        self._others = [p for p in model.parameters() if id(p) not in own]
        if (first or only) and not self._own:
            frozen = "freeze holds embedding and head: leave tok_embeddings and output out of it"
            absent = f"the checkpoint has no sound tokens: {EXPAND}"
            reason = frozen if layout else absent
            raise ValueError(
                f"new_rows_first={first}, new_rows_only={only}, but {reason}, or set "
                "new_rows_first=0 and new_rows_only=false"
            )

    def count_trained(self, parameters: list[nn.Parameter]) -> int:
        """Return how many numbers of `parameters`, those that ask for gradients, are to change."""
        new = len(self.layout.ids) if self.layout else 0
        old = sum((len(m.parameter) - new) * m.parameter.shape[1] for m in self._own)
        return sum(p.numel() for p in parameters) - old * self.only

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Drop the gradients of all other weights in the first steps. Call it after the backward
        pass, before gradients are clipped; `step` counts from 1.

        The old rows' gradients stay where only their rows are frozen: the optimizer then knows
        their size once they may change. Without it their first steps would be several times too
        large.
        """
        if step <= self.first:
            for parameter in self._others:
                parameter.grad = None
        elif not self.only:
            return
        for matrix in self._own:
            if matrix.frozen is None:
                matrix.frozen = [rows.clone() for rows in matrix.old_rows()]
            if self.only and matrix.parameter.grad is not None:  # not a part of the norm either
                for rows in matrix.old_rows(matrix.parameter.grad):
                    rows.zero_()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Put the old rows back as they were in the first steps. Call it after the optimizer has
        stepped, or a guard has left the step out."""
        for matrix in self._own:
            if matrix.frozen is not None:
                for rows, values in zip(matrix.old_rows(), matrix.frozen, strict=True):
                    rows.copy_(values)
                if step >= self.first and not self.only:
                    matrix.frozen = None

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, float]:
        """Count the new rows of each matrix that are not what they were before step 1 (weight decay
        changes them too); empty after the first hundred steps. Call it on every rank, after the
        step."""
        if not self.layout or step > WATCHED:
            return {}
        counts = [[m.moved(), len(m.initial)] for m in self._matrices.values()]
        device = self._matrices["embedding"].initial.device
        sums = torch.tensor(counts, dtype=torch.float64, device=device)
        if dist.is_initialized():
            dist.all_reduce(sums)  # over every copy of the model too (HSDP)
        moved = (sums[:, 0] / sums[:, 1] * len(self.layout.ids)).tolist()
        return {f"{name}_moved": rows for name, rows in zip(self._matrices, moved, strict=True)}

    def verdict(self, lines: list[dict[str, Any]]) -> str | None:
        """Say in a sentence whether the new rows learn, from the first lines of a run's
        metrics.jsonl; None where there are no new rows."""
        measured = [line for line in lines[:WATCHED] if "embedding_moved" in line]
        if self.layout is None or not measured:
            return None
        about = f"new rows after {measured[-1]['step']} steps: "
        if still := [name for name in self._matrices if not measured[-1][f"{name}_moved"]]:
            return (
                f"{about}they do NOT learn: not one row of {' and '.join(still)} has moved; look "
                "whether freeze holds them (tok_embeddings, output), and whether so small a "
                "learning rate is lost in dtype=bf16"
            )
        good = [line for line in measured if "quarantined" not in line]
        losses = [line["loss_sound"] for line in good if "loss_sound" in line]
        if not losses:
            return f"{about}no target was a sound token, so that no loss says whether they learn"
        few = max(1, min(10, len(losses) // 4))
        begin, end = sum(losses[:few]) / few, sum(losses[-few:]) / few
        guess, cure = math.log(self.layout.codes), ""
        if end < guess:
            outcome = "have learned before" if begin < guess else "learn"
        elif end < begin - 0.1:
            outcome = "begin to learn"
        else:
            outcome = "do NOT learn"
            cure = "; try a higher learning rate, a shorter warm-up, or another initialize"
            cure += " of expand_vocab"
        return (
            f"{about}they {outcome}: the loss of sound tokens went from {begin:.2f} to {end:.2f}, "
            f"where guessing among the codes gives ln({self.layout.codes}) = {guess:.2f}{cure}"
        )
