"""The head of a decoder: hidden states to logits, or straight to losses without their logits.

In: hidden states and the head's weight; for losses also the label of every position and the group
it counts for. Out: logits, or one sum of cross-entropies a group. A vocabulary of 128,771 and
16,000 targets would be 8 GB of logits in fp32, and as much again for their gradient; here at most
`chunk` targets have logits at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from speechfuse.samples.view import IGNORE


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, where the logits are: the backward pass only scales
    them, and no product with the vocabulary is done twice."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, groups: Tensor, count: int, chunk: int
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        sums = torch.zeros(count, dtype=wide, device=hidden.device)
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if to_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if to_weight else None
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(hidden[part], weight).to(wide)
            logits -= logits.logsumexp(1, keepdim=True)
            label = labels[part, None]
            sums.index_add_(0, groups[part], -logits.gather(1, label).squeeze(1))
            if hidden_grad is None and weight_grad is None:
                continue
            # the gradient of a cross-entropy: the probabilities, less 1 at the label
            probabilities = logits.exp_()
            probabilities.scatter_add_(1, label, torch.full_like(label, -1, dtype=wide))
            gradient = probabilities.to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(gradient, weight, out=hidden_grad[part])
            if weight_grad is not None:
                weight_grad += gradient.T @ hidden[part]
            del logits, probabilities, gradient  # or those of two chunks exist at once
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        # on a GPU this waits for nothing: it stops the device when it gets there
        torch._assert_async((gradient == gradient[0]).all(), "groups of a loss must weigh the same")
        scaled = (
            None if saved is None else saved * gradient[0].to(saved.dtype)
            for saved in ctx.saved_tensors
        )
        return *scaled, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, groups: Tensor, count: int, chunk: int
) -> Tensor:
    """Sum the cross-entropies of `hidden` (n, width) times `weight` (vocabulary, width) against
    `labels` (n), by `groups` (n; int64 in 0..count-1) -> (count), float32 or wider.

    Log-softmax and the sum over chunks of the weight's gradient are in float32, the products in the
    dtype of `hidden` and `weight`. All groups must get the same gradient, as they do when their sum
    is the loss: anything else is an error in the backward pass.
    """
    if not torch.is_grad_enabled():  # which the forward of a Function cannot see
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels, groups, count, chunk)


class Head(nn.Module):
    """The head that replaces a decoder's last linear layer and has its weight, under the same name.

    It gives logits, (rows, length, vocabulary), as that layer did. Inside `with head.scoring(...)`
    the decoder's forward gives sums of losses instead: they are computed here, and not after the
    forward, because only within it does FSDP2 have the whole weight together.
    """

    def __init__(self, output: nn.Linear | TiedLinear, chunk: int) -> None:
        """`output`: the layer that is replaced; TiedLinear has no weight but the embedding's."""
        super().__init__()
        if chunk < 1:
            raise ValueError(f"loss_chunk={chunk}: at least 1 target at a time is needed")
        self.chunk = chunk
        tied = isinstance(output, TiedLinear)
        if not tied:
            self.weight = output.weight
        # in a list, or the embedding would be a part of this module and have two names
        self._owner: list[Any] = [output.tied_module if tied else self]
        self._score: Callable[[Tensor, Tensor], Tensor] | None = None

    def follow(self, old: nn.Module, new: nn.Module) -> None:
        """Share the weight of the embedding `new`, which replaces `old`, if that of `old` was
        shared."""
        if self._owner[0] is old:
            self._owner[0] = new

    @contextmanager
    def scoring(self, labels: Tensor, groups: Tensor, count: int) -> Iterator[None]:
        """Make the forward give `count` sums of losses until the end of the block.

        `labels` and `groups`: (rows, length); where a label is IGNORE there is no loss.
        """
        with self.scored_by(partial(self._sums, labels, groups, count)):
            yield

    @contextmanager
    def scored_by(self, score: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Make the forward give score(hidden states, weight) until the end of the block."""
        self._score = score
        try:
            yield
        finally:
            self._score = None

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self._owner[0].weight
        return F.linear(hidden, weight) if self._score is None else self._score(hidden, weight)

    def _sums(
        self, labels: Tensor, groups: Tensor, count: int, hidden: Tensor, weight: Tensor
    ) -> Tensor:
        targets = (labels.flatten() != IGNORE).nonzero().squeeze(1)
        hidden, labels, groups = (e.flatten(0, 1)[targets] for e in (hidden, labels, groups))
        return linear_cross_entropy(hidden, weight, labels, groups, count, self.chunk)
