"""One optimizer step's forward and backward passes, played with tensors that have no content.

In: a recipe's decoder on the meta device and the shape of a forward. Out: bytes by what they are
for, at the moment when most is in use. Tensors have shapes and no memory (FakeTensorMode), and
account is kept of which of them exist at the same time; FSDP2's gathered weights and reduced
gradients come and go as they do in torch.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as recomputed
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from speechfuse.train import backbone
from speechfuse.train import model as models
from speechfuse.train.backbone import DTYPES
from speechfuse.train.head import linear_cross_entropy


def local_shape(parameter: Tensor, shards: int) -> tuple[int, ...]:
    """What the first rank has of a parameter, which no rank has more of."""
    return (ceil(parameter.shape[0] / shards), *parameter.shape[1:])


def numel_of(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def bytes_of(value: Any) -> int:
    """Of a tensor, also of one that is made of others (quantized states)."""
    if not isinstance(value, Tensor):
        return 0
    if is_traceable_wrapper_subclass(value):
        return sum(bytes_of(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.untyped_storage().nbytes()


class Live(TorchDispatchMode):
    """Bytes of the tensors made under it that still exist, by `kind`; `peak`: when most did."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = "activations"
        self.bytes: Counter[str] = Counter()
        self.total = 0
        self.peak: dict[str, int] = {}
        self._known: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not is_traceable_wrapper_subclass(tensor):
                self._note(tensor)
        return result

    def ignore(self, tensor: Tensor) -> None:
        """Leave out what was there before."""
        self._known[tensor.untyped_storage()._cdata] = "", 0

    def rename(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor as another kind from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._known and (old := self._known[key])[1]:
            self.bytes[old[0]] -= old[1]
            self.bytes[kind] += old[1]
            self._known[key] = kind, old[1]

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = self.kind, size
        self.bytes[self.kind] += size
        self.total += size
        if self.total > sum(self.peak.values()):
            self.peak = {kind: count for kind, count in self.bytes.items() if count}
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        kind, size = self._known.pop(key)
        self.bytes[kind] -= size
        self.total -= size

    @contextmanager
    def counting_as(self, kind: str) -> Iterator[None]:
        self.kind, before = kind, self.kind
        yield
        self.kind = before


class _Scored(nn.Module):
    """The head where every position has a label, which is the most there can be."""

    def __init__(self, model: Any, live: Live) -> None:
        super().__init__()
        head = backbone.head_of(model)
        self.chunk, self.live = head.chunk, live
        own = "weight" in dict(head.named_parameters())
        if own:
            self.weight = head.weight
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        self._owner = [self if own else embeddings[0]]

    def forward(self, hidden: Tensor) -> Tensor:
        with self.live.counting_as("head"):
            labels = torch.zeros(hidden.shape[:2].numel(), dtype=torch.long)
            chosen = hidden.flatten(0, 1)[torch.zeros_like(labels)]
            return linear_cross_entropy(
                chosen, self._owner[0].weight, labels, labels, 2, self.chunk
            )


class Rehearsal:
    """One optimizer step's forward and backward passes, with tensors that have no content."""

    def __init__(
        self, job: Any, model: Any, rows: int, length: int, shards: int | None, gpu: bool
    ) -> None:
        """`shards`: ranks that FSDP2 divides the weights among; None: without FSDP2."""
        self.job, self.model, self.rows, self.length = job, model, rows, length
        self.shards, self.gpu = shards, gpu
        self.live, self.fake = Live(), FakeTensorMode()
        self.dtype = DTYPES[job.dtype if shards is None else job.compute_dtype]
        self._recompute()
        self.buffers = _fill_buffers(model)
        with self.fake:
            backbone.set_head(model, _Scored(model, self.live))
            for module in list(model.modules()):
                for name, old in list(module.named_parameters(recurse=False)):
                    new = torch.empty(old.shape, dtype=self.dtype, device="cpu")
                    self.live.ignore(new)
                    setattr(module, name, nn.Parameter(new, old.requires_grad))
                for name, old in list(module.named_buffers(recurse=False)):
                    setattr(module, name, self.fake.from_tensor(old))
                    self.live.ignore(getattr(module, name))
        self.groups = {layer: list(layer.parameters()) for layer in backbone.layers_of(model)}
        inner = {id(p) for group in self.groups.values() for p in group}
        self.groups[model] = [p for p in model.parameters() if id(p) not in inner]
        self.gathered: dict[nn.Module, Tensor] = {}
        self.reduced: dict[nn.Module, Tensor] = {}
        self.sent: Tensor | None = None

    def _recompute(self) -> None:
        every = models.RECOMPUTED[self.job.activation_checkpointing]
        for number, layer in enumerate(backbone.layers_of(self.model), 1):
            again = partial(
                recomputed, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
            if every and number % every == 0:
                layer.forward = again
            elif self.job.compile:
                # what the compiler keeps for the backward pass is about what is costly to make
                layer.forward = partial(again, context_fn=_products_kept)

    def play(self, again: bool) -> dict[str, int]:
        """Bytes by kind when most is in use; `again`: there are gradients to begin with, as in
        every micro-batch but the first."""
        if self.shards is not None:
            for layer in backbone.layers_of(self.model):
                layer.register_forward_pre_hook(self._before)
                layer.register_forward_hook(self._after)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(
                lambda p: self.live.rename(p.grad, "gradients")
            )
        dense = not self.gpu or self.job.attention == "dense"
        with self.fake, self.live:
            if again:
                self._begin_with_gradients(trained)
            tokens = torch.zeros(self.rows, self.length, dtype=torch.long)
            positions, labels, documents = (tokens.clone() for _ in range(3))
            # flex attention keeps blocks of the mask, which are few
            mask = documents[:, :, None] == labels[:, None, :] if dense else None
            self._gather(self.model)
            self.model(tokens, mask=mask, input_pos=positions).sum().backward()
            for module in self.groups:
                self._reduce(module)
        return self.live.peak

    def _begin_with_gradients(self, trained: list[nn.Parameter]) -> None:
        with self.live.counting_as("gradients"):
            if self.shards is None:
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
                return
            for module, group in self.groups.items():
                own = sum(numel_of(local_shape(p, self.shards)) for p in group if p.requires_grad)
                self.reduced[module] = torch.empty(own, dtype=DTYPES[self.job.dtype])

    def _before(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._gather(layer)
        first = inputs[0]
        if first.requires_grad:
            first = _Passing.apply(first, lambda: self._reduce(layer))
        return (first, *inputs[1:])

    def _after(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        del self.gathered[layer]
        if output.requires_grad:
            output.register_hook(lambda gradient: self._gather(layer))

    def _gather(self, module: nn.Module) -> None:
        """The whole weights of a group: they arrive in one piece and are copied out of it."""
        if self.shards is None or module in self.gathered:
            return
        with self.live.counting_as("gathered weights"):
            size = sum(p.numel() for p in self.groups[module])
            # on a GPU the next group is under way before this one is used
            arriving = [torch.empty(size, dtype=self.dtype) for _ in range(1 + self.gpu)]
            self.gathered[module] = torch.empty(size, dtype=self.dtype)
            del arriving[0]

    def _reduce(self, module: nn.Module) -> None:
        """Sum a group's gradients over the ranks; this rank keeps its part."""
        if self.shards is None or module not in self.gathered:
            return
        shards, wide = self.shards, torch.float32
        trained = [p for p in self.groups[module] if p.grad is not None]
        self.sent = None
        with self.live.counting_as("reduced gradients"):
            own = sum(numel_of(local_shape(p, shards)) for p in trained)
            self.sent = torch.empty(own * shards, dtype=wide)
            for parameter in trained:
                parameter.grad = None
            with self.live.counting_as("gradients"):
                part = torch.empty(own, dtype=wide).to(DTYPES[self.job.dtype])
            self.reduced.setdefault(module, part)
        del self.gathered[module]


class _Passing(torch.autograd.Function):
    """Nothing, but the backward pass calls `then` when it comes by."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, then: Callable[[], None]) -> Tensor:
        ctx.then = then
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.then()
        return gradients[0], None


def _products_kept() -> Any:
    products = (
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    )
    return create_selective_checkpoint_contexts(list(products))


def _fill_buffers(model: nn.Module) -> int:
    """Make the tables of positions, which a model on the meta device lacks; their bytes."""
    module: Any
    for module in model.modules():
        if hasattr(module, "rope_init"):
            with torch.device("cpu"):
                module.rope_init()
    return sum(bytes_of(buffer) for buffer in model.buffers())
