"""How much memory of a GPU a training takes, part by part, before it is started.

In: a recipe, the shape of one forward and the number of ranks. Out: bytes of one rank. Weights,
gradients and the optimizer's state follow from the shapes; what a step needs beside them comes from
a rehearsal with fake tensors. No weight is loaded and no GPU is needed.
"""

from collections import Counter
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from speechfuse.train import backbone, optimizers
from speechfuse.train import model as models
from speechfuse.train.backbone import DTYPES
from speechfuse.train.config import Finetune
from speechfuse.train.preflight.rehearsal import LiveBytes, Rehearsal, local_shape

ROWS = 256  # an optimizer's state is measured on so many rows of a matrix, and on twice as many


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank. `step`: what else is held at the peak, {purpose: bytes}; gradients that
    exist at that moment are part of it. `gradients`: the bytes of all gradients."""

    weights: int
    gradients: int
    optimizer: int
    step: dict[str, int]

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + sum(self.step.values())


def of(job: Finetune, rows: int, length: int, passes: int, ranks: int, gpu: bool) -> Memory:
    """Return the memory of `job` on each of `ranks` ranks, on a GPU or on the CPU, where an
    optimizer step is `passes` forwards of `rows` x `length` tokens."""
    model = backbone.empty(job.model, job.dtype, job.loss_chunk, job.adapter, job.encoder)
    models.freeze(model, job.freeze, job.keep)
    sharded = ranks > 1 or job.compute_dtype != job.dtype or dist.is_initialized()
    shards = (job.shard_group or ranks) if sharded else None
    shapes = {p: local_shape(p, shards or 1) for p in model.parameters()}
    trained = [shape for p, shape in shapes.items() if p.requires_grad]
    size = DTYPES[job.dtype].itemsize
    gradients = size * sum(map(prod, trained))
    parts = backbone.embedding_of(model), backbone.head_of(model)
    matrices = {part.weight for part in parts if hasattr(part, "weight")}
    holds = job.new_rows_only or job.new_rows_first > 0  # copies of their old rows
    copies = sum(prod(shapes[p]) for p in matrices if p.requires_grad) * holds
    rehearsal = Rehearsal(job, model, shards, gpu)
    peaks = [
        rehearsal.play(rows, length, again=passes > 1),
        {"gradients": gradients, "update": optimizer_extra(job, trained, gpu)},
    ]
    return Memory(
        sum(prod(shape) * p.element_size() for p, shape in shapes.items())
        + size * copies
        + rehearsal.buffer_bytes,
        gradients,
        optimizer_bytes(job, trained),
        max(peaks, key=lambda peak: sum(peak.values())),
    )


def optimizer_bytes(job: Finetune, shapes: list[tuple[int, ...]]) -> int:
    """Return the bytes of the optimizer's state for parameters of these shapes.

    The state is made for small parameters (large matrices cut to fewer rows), measured and scaled
    up. This is right for any optimizer whose state grows with the number of rows.
    """
    total = 0
    for shape, count in Counter(shapes).items():
        unit = ROWS * ceil(ROWS / prod(shape[1:]))  # blocks of quantized states divide it
        few = unit + shape[0] % unit if shape[0] > 3 * unit else shape[0]
        state = _stepped(job, (few, *shape[1:]))[0]
        if few < shape[0]:
            more = _stepped(job, (few + unit, *shape[1:]))[0]
            state += (more - state) * ((shape[0] - few) // unit)
        total += count * state
    return total


def optimizer_extra(job: Finetune, shapes: list[tuple[int, ...]], gpu: bool) -> int:
    """Return the bytes that an update needs beside parameters, gradients and state."""
    largest = max(shapes, key=prod)
    small = (min(largest[0], ROWS), *largest[1:])
    _, extra, optimizer = _stepped(job, small)
    size, place, defaults = prod(largest), type(optimizer).__module__, optimizer.defaults
    if place.startswith("torchao."):
        return size * 8  # compiled: the two moments in fp32, of one parameter after the other
    if gpu and place.startswith("torch.optim") and not defaults.get("fused"):
        if defaults.get("foreach") is not False:
            size = sum(map(prod, shapes))  # torch then updates all parameters at once
    return extra * size // prod(small)


def _stepped(job: Finetune, shape: tuple[int, ...]) -> tuple[int, int, torch.optim.Optimizer]:
    """Return the bytes of state after a real step of the optimizer on one parameter, the most that
    a second step had in use beside it, and the optimizer."""
    parameter = nn.Parameter(torch.zeros(shape, dtype=DTYPES[job.dtype]))
    optimizer = optimizers.make(job.optimizer, [parameter])
    live = LiveBytes()
    parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
        with live:
            optimizer.step()
    state = sum(_bytes_of(value) for value in optimizer.state[parameter].values())
    return state, live.peak.total(), optimizer


def _bytes_of(value: Any) -> int:
    """Return the bytes of a tensor or of those it is made of (quantized states); else 0."""
    if not isinstance(value, Tensor):
        return 0
    if is_traceable_wrapper_subclass(value):
        return sum(_bytes_of(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.untyped_storage().nbytes()
