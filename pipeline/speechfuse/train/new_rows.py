"""The rows of the sound tokens in embedding and head: trained alone at first, and watched.

In: a model (plain, or sharded by FSDP2) with the checkpoint's weights, and the layout of its sound
tokens. Out: for the first steps of a run gradients of no other weight, with the other rows of both
matrices exactly as they were; for the first hundred steps numbers for metrics.jsonl, and from its
lines a verdict in words on whether the new rows learn. In every step, on every rank:

    backward; rows.before_step(step); clip; optimizer.step(); rows.after_step(step)
    metrics.add(..., **rows.measure(step))
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from speechfuse.tokens.vocabulary import SoundLayout
from speechfuse.train.backbone import embedding_of, head_of

WATCHED = 100  # steps


def _local(tensor: Tensor) -> Tensor:
    """What of it lies on this rank, in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass
class _Matrix:
    """Embedding or head: the part of its rows that this rank has, of which `new` are new."""

    parameter: nn.Parameter
    new: slice
    begin: Tensor  # the new rows as they were before the first step
    kept: tuple[Tensor, Tensor] | None = None  # the old rows, while they may not move

    @classmethod
    def of(cls, parameter: nn.Parameter, ids: range) -> "_Matrix":
        first, local = 0, _local(parameter)
        if isinstance(parameter, DTensor):
            for number, placement in enumerate(parameter.placements):
                if isinstance(placement, Shard):
                    assert placement.dim == 0
                    mesh = parameter.device_mesh
                    # as torch.chunk cuts: all of one size but the last, or the last few
                    share = -(-len(parameter) // mesh.size(number))
                    first = min(len(parameter), mesh.get_local_rank(number) * share)
        start, stop = (min(max(row - first, 0), len(local)) for row in (ids.start, ids.stop))
        return cls(parameter, slice(start, stop), local[start:stop].clone())

    def split(self, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Old rows before the new ones, new ones, and old ones behind them."""
        local = _local(whole)
        return local[: self.new.start], local[self.new], local[self.new.stop :]


def _squares(rows: Tensor) -> Tensor:
    return rows.float().square().sum(dtype=torch.float64)


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows.float(), dim=1)


class NewRows:
    """The sound tokens' rows of one model; to be made before a state is restored."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, layout: SoundLayout | None, first: int = 0) -> None:
        """`first`: steps that train these rows alone. ValueError when there are none to train."""
        self.first, self.layout = first, layout
        self._trained = [p for p in model.parameters() if p.requires_grad]
        parts: dict[str, Any] = {"embedding": embedding_of(model), "head": head_of(model)}
        found = {name: getattr(part, "weight", None) for name, part in parts.items()}
        self._matrices = {
            name: _Matrix.of(weight, range(layout.ids.start, layout.ids.stop))
            for name, weight in found.items()
            if layout and weight is not None
        }
        self._own = [m for m in self._matrices.values() if m.parameter.requires_grad]
        if first and not self._own:
            raise ValueError(
                f"new_rows_first={first}, but "
                + (
                    "freeze holds embedding and head: leave tok_embeddings and output out of it"
                    if layout
                    else "the checkpoint has no sound tokens: run expand_vocab on it"
                )
                + ", or set new_rows_first=0"
            )
        self._gradients: list[Tensor] = []

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """After the backward pass, before gradients are clipped; `step` counts from 1.

        The old rows' gradients stay where only their rows are held: the optimizer then knows their
        size once they may move. Without it their first steps would be several times too large.
        """
        if self._matrices and step <= WATCHED:
            self._gradients = self._measure_gradients()
        if step > self.first:
            return
        own = {id(matrix.parameter) for matrix in self._own}
        for parameter in self._trained:
            if id(parameter) not in own:
                parameter.grad = None
        for matrix in self._own:
            if matrix.kept is None:
                before, _, behind = matrix.split(matrix.parameter)
                matrix.kept = before.clone(), behind.clone()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """After the optimizer has stepped, or has left the step out."""
        for matrix in self._own:
            if matrix.kept is not None:
                before, _, behind = matrix.split(matrix.parameter)
                for rows, kept in zip((before, behind), matrix.kept, strict=True):
                    rows.copy_(kept)
                if step >= self.first:
                    matrix.kept = None

    def _measure_gradients(self) -> list[Tensor]:
        """Sums of squares on this rank: of the new rows, and of all else that trains."""
        gradients = [p.grad for p in self._trained if p.grad is not None]
        new = [m.split(m.parameter.grad)[1] for m in self._own if m.parameter.grad is not None]
        zero = torch.zeros((), dtype=torch.float64, device=_local(self._trained[0]).device)
        of_new = sum((_squares(rows) for rows in new), zero)
        return [of_new, sum((_squares(_local(g)) for g in gradients), zero) - of_new]

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, float]:
        """After the step, on every rank alike. Of the first hundred steps: norms of the gradients
        (new rows, all else), and of each matrix the mean norm of a new and of an old row, how many
        new rows are not what they were before step 1 (weight decay moves them too), and how far
        they have gone on average, as a share of their norm then."""
        if not self._matrices or step > WATCHED or not self._gradients:
            return {}
        sums = list(self._gradients)
        for matrix in self._matrices.values():
            before, new, behind = matrix.split(matrix.parameter)
            gone = _norms(new.float() - matrix.begin.float())
            sums += [
                _norms(new).sum(),
                _norms(before).sum() + _norms(behind).sum(),
                (new != matrix.begin).any(1).sum(),
                (gone / _norms(matrix.begin).clamp_min(1e-12)).sum(),
            ]
        total = torch.stack([each.double() for each in sums])
        parameter = next(iter(self._matrices.values())).parameter
        if dist.is_initialized():
            dist.all_reduce(total)
            # every copy of the model (HSDP) has told the same
            shards = (
                [
                    parameter.device_mesh.size(number)
                    for number, placement in enumerate(parameter.placements)
                    if isinstance(placement, Shard)
                ]
                if isinstance(parameter, DTensor)
                else [1]
            )
            total /= dist.get_world_size() / math.prod(shards)
        new_gradient, rest, *values = total.tolist()
        assert self.layout
        count = len(self.layout.ids)
        result = {"grad_norm_new": new_gradient**0.5, "grad_norm_rest": max(0.0, rest) ** 0.5}
        for number, (name, matrix) in enumerate(self._matrices.items()):
            norm_new, norm_old, moved, gone_share = values[4 * number : 4 * number + 4]
            result |= {
                f"{name}_norm_new": norm_new / count,
                f"{name}_norm_old": norm_old / (len(matrix.parameter) - count),
                f"{name}_moved": moved,
                f"{name}_gone": gone_share / count,
            }
        return result

    def verdict(self, lines: list[dict[str, Any]]) -> str | None:
        """Whether the new rows learn, in words, from the first lines of a run's metrics.jsonl; None
        where there are no new rows."""
        measured = [line for line in lines[:WATCHED] if "embedding_moved" in line]
        if self.layout is None or not measured:
            return None
        last, count = measured[-1], len(self.layout.ids)
        names = [name for name in ("embedding", "head") if f"{name}_moved" in last]
        losses = [
            line["loss_sound"]
            for line in measured
            if "loss_sound" in line and "quarantined" not in line
        ]
        said = "; ".join(
            f"{name}: {last[f'{name}_moved']:,.0f} of {count:,} rows have moved, by "
            f"{last[f'{name}_gone']:.1%} of their norm, which is {last[f'{name}_norm_new']:.3g} "
            f"(old rows {last[f'{name}_norm_old']:.3g})"
            for name in names
        )
        return f"new rows after {last['step']} steps: {self._judged(losses, last, names)}; {said}"

    def _judged(self, losses: list[float], last: dict[str, Any], names: list[str]) -> str:
        assert self.layout
        if still := [name for name in names if not last[f"{name}_moved"]]:
            return (
                f"they do NOT learn: not one row of {' and '.join(still)} has moved; look whether "
                "freeze holds them (tok_embeddings, output), and whether so small a learning rate "
                "is lost in dtype=bf16"
            )
        if not losses:
            return "no target was a sound token, so that no loss says whether they learn"
        few = max(1, min(10, len(losses) // 4))
        begin, end = sum(losses[:few]) / few, sum(losses[-few:]) / few
        guess = math.log(self.layout.codes)
        course = f"the loss of sound tokens went from {begin:.2f} to {end:.2f}"
        beside = f"ln({self.layout.codes}) = {guess:.2f}, which guessing among the codes gives"
        if begin < guess and end < guess:
            return f"they have learned before: {course}, both below {beside}"
        if end < guess:
            return f"they learn: {course}, below {beside}"
        if end < begin - 0.1:
            return f"they begin to learn: {course}, still above {beside}"
        return (
            f"they do NOT learn: {course}, above {beside}; try a higher learning rate, a shorter "
            "warm-up, or another initialize of expand_vocab"
        )
