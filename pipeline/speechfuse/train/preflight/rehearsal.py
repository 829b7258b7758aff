"""Simulate the forward and backward passes of one optimizer step to find its peak of memory.

In: a recipe, its decoder on the meta device and the shape of a forward. Out: bytes by what they are
for, at the moment when most are in use. Tensors are fake (FakeTensorMode: shapes, no memory), and
those alive at the same time are counted. FSDP2's gathered weights and reduced gradients are
allocated and freed where FSDP2 does it. FSDP2 itself with torch's FSDPMemTracker counts the same to
about 1 %, but needs a process group of the planned size, which a rank of torchrun cannot make, and
a GPU to plan for GPUs.
"""

import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from speechfuse.audio.decoding import SAMPLE_RATE
from speechfuse.fusion.adapters import count
from speechfuse.train import backbone
from speechfuse.train import model as models
from speechfuse.train.backbone import DTYPES
from speechfuse.train.config import Finetune
from speechfuse.train.head import linear_cross_entropy

PRODUCTS = [  # results that the compiler keeps for the backward pass, about
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def local_shape(parameter: Tensor, shards: int) -> tuple[int, ...]:
    """Return the shape of the first rank's shard, which is the largest."""
    return (ceil(parameter.shape[0] / shards), *parameter.shape[1:])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made under it while they are alive, by `kind`.

    `peak`: bytes by kind when the total was highest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "activations"
        self.bytes: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._kinds: dict[int, str] = {}  # by id of the storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {id(t.untyped_storage()) for t in _plain_tensors((args, kwargs))}
        for tensor in _plain_tensors(result):
            if id(tensor.untyped_storage()) not in self._kinds.keys() | old:
                self.count_as(self.kind, tensor)
        return result

    def count_as(self, kind: str, tensor: Tensor) -> None:
        """Count `tensor` as `kind` from now on."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._kinds:
            self.bytes[self._kinds[key]] -= size
        else:
            weakref.finalize(storage, self._free, key, size)
        self._kinds[key] = kind
        self.bytes[kind] += size
        if self.bytes.total() > self.peak.total():
            self.peak = +self.bytes

    def _free(self, key: int, size: int) -> None:
        self.bytes[self._kinds.pop(key)] -= size

    @contextmanager
    def counting_as(self, kind: str) -> Iterator[None]:
        self.kind, before = kind, self.kind
        yield
        self.kind = before


def _plain_tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree, but for those made of others (as quantized states are)."""
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return [tensor for tensor in leaves if not is_traceable_wrapper_subclass(tensor)]


class Rehearsal:
    """One optimizer step of `job` on `model`, which it changes: its weights become fake."""

    def __init__(self, job: Finetune, model: Any, shards: int | None, gpu: bool) -> None:
        """`shards`: ranks that FSDP2 divides the weights among; None: without FSDP2."""
        self.model, self.shards, self.gpu = model, shards, gpu
        self.live, self.fake = LiveBytes(), FakeTensorMode()
        self.stored = DTYPES[job.dtype]
        self.dtype = self.stored if shards is None else DTYPES[job.compute_dtype]
        # flex attention keeps blocks of the mask, which are few
        self.dense_mask = not gpu or job.attention == "dense"
        _recompute(model, job.activation_checkpointing, job.compile)
        backbone.head_of(model).forward = self._losses
        if job.adapter:
            backbone.embedding_of(model).forward = self._heard
        backbone.fill_positions(model, torch.device("cpu"))
        self.buffer_bytes = sum(buffer.untyped_storage().nbytes() for buffer in model.buffers())
        inner = getattr(backbone.embedding_of(model), "encoder", None)
        encoder = {id(p) for p in inner.parameters()} if inner else set()
        with self.fake:
            for module in list(model.modules()):
                for name, old in list(module.named_parameters(recurse=False)):
                    dtype = old.dtype if id(old) in encoder else self.dtype
                    new = torch.empty(old.shape, dtype=dtype, device="cpu")
                    setattr(module, name, nn.Parameter(new, old.requires_grad))
                for name, old in list(module.named_buffers(recurse=False)):
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    setattr(module, name, new if old.is_meta else self.fake.from_tensor(old))
        self.groups = {layer: list(layer.parameters()) for layer in backbone.layers_of(model)}
        in_layers = {id(p) for group in self.groups.values() for p in group}
        self.groups[model] = [p for p in model.parameters() if id(p) not in in_layers]
        self.own_sizes = {  # of this rank's gradients
            module: sum(prod(local_shape(p, shards or 1)) for p in group if p.requires_grad)
            for module, group in self.groups.items()
        }
        self.gathered: dict[nn.Module, Tensor] = {}
        self.gradients: dict[nn.Module, Tensor] = {}
        self.sent: Tensor | None = None

    def play(self, rows: int, length: int, again: bool) -> dict[str, int]:
        """Return the bytes by kind when most are in use, of a forward of `rows` x `length` tokens.

        `again`: gradients exist to begin with, as in every micro-batch but the first.
        """
        for layer in backbone.layers_of(self.model) if self.shards else ():
            layer.register_forward_pre_hook(lambda layer, _: self._gather(layer))
            layer.register_forward_hook(lambda layer, *_: self._release(layer))
            layer.register_full_backward_pre_hook(lambda layer, _: self._gather(layer))
            layer.register_full_backward_hook(self._after_backward)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(
                lambda p: self.live.count_as("gradients", p.grad)
            )
        with warnings.catch_warnings(), self.fake, self.live:
            warnings.simplefilter("ignore")  # of slow kernels, and of hooks without input gradients
            if again and self.shards is None:
                with self.live.counting_as("gradients"):
                    for parameter in trained:
                        parameter.grad = torch.empty_like(parameter)
            elif again:
                self.gradients = {module: self._own_gradients(module) for module in self.groups}
            tokens = torch.zeros(rows, length, dtype=torch.long)
            positions, labels, documents = (tokens.clone() for _ in range(3))
            mask = documents[:, :, None] == labels[:, None, :] if self.dense_mask else None
            self._gather(self.model)
            self.model(tokens, mask=mask, input_pos=positions).sum().backward()
            for module in self.groups:
                self._reduce(module)
        return dict(self.live.peak)

    def _heard(self, tokens: Tensor) -> Tensor:
        """Embed a batch whose every place is a vector of speech, the most there can be; an encoder
        makes the frames from recordings that fill its window."""
        door = backbone.embedding_of(self.model)
        rows, length = tokens.shape
        frames = torch.zeros(rows, length * door.adapter.stack, door.adapter.width)
        if encoder := door.encoder:
            each = count(round(encoder.window * SAMPLE_RATE), encoder.steps)
            made = encoder.silence(ceil(frames.shape[:2].numel() / each))
            frames += made.flatten(0, 1)[: frames.shape[:2].numel()].reshape(frames.shape)
        vectors = door.adapter(frames.to(self.dtype), torch.full((rows,), frames.shape[1]))
        vectors, _ = door.adapter.prompted(vectors, tokens == 0)
        return vectors[:, :length] + F.embedding(tokens, door.weight)

    def _losses(self, hidden: Tensor) -> Tensor:
        """Compute the head's losses where every position has a label, the most there can be."""
        head = backbone.head_of(self.model)
        with self.live.counting_as("head"):
            labels = torch.zeros(hidden.shape[:2].numel(), dtype=torch.long)
            chosen, weight = hidden.flatten(0, 1)[torch.zeros_like(labels)], head._owner[0].weight
            return linear_cross_entropy(chosen, weight, labels, labels, 2, head.chunk)

    def _after_backward(self, layer: nn.Module, gradients: tuple[Tensor | None], _: Any) -> None:
        # without a gradient of the input torch calls this before the layer's own backward
        if gradients[0] is not None:
            self._reduce(layer)

    def _gather(self, module: nn.Module) -> None:
        """Allocate the whole weights of a group: they arrive in one piece and are copied."""
        if self.shards is None or module in self.gathered:
            return
        with self.live.counting_as("gathered weights"):
            size = sum(p.numel() for p in self.groups[module])
            # on a GPU the next group is under way before this one is used
            arriving = torch.empty((1 + self.gpu) * size, dtype=self.dtype)
            self.gathered[module] = torch.empty(size, dtype=self.dtype)
            del arriving

    def _release(self, module: nn.Module) -> None:
        del self.gathered[module]

    def _reduce(self, module: nn.Module) -> None:
        """Sum a group's gradients over the ranks; this rank keeps its shard."""
        if self.shards is None or module not in self.gathered:
            return
        self.sent = None
        with self.live.counting_as("reduced gradients"):
            self.sent = torch.empty(self.own_sizes[module] * self.shards, dtype=torch.float32)
            for parameter in self.groups[module]:
                parameter.grad = None
            self.gradients.setdefault(module, self._own_gradients(module))
        self._release(module)

    def _own_gradients(self, module: nn.Module) -> Tensor:
        """Allocate this rank's gradients of a group: summed in float32, kept as the weights are."""
        with self.live.counting_as("gradients"):
            return torch.empty(self.own_sizes[module], dtype=torch.float32).to(self.stored)


def _recompute(model: Any, mode: str, compiled: bool) -> None:
    """Drop activations in the forward pass as training does; compiled layers keep PRODUCTS."""
    every = models.RECOMPUTED[mode]
    for number, layer in enumerate(backbone.layers_of(model), 1):
        again = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        if every and number % every == 0:
            layer.forward = again
        elif compiled:
            contexts = partial(create_selective_checkpoint_contexts, PRODUCTS)
            layer.forward = partial(again, context_fn=contexts)
