"""Losses without whole logits: values and gradients against torch's own, memory, tied heads."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.modules import TiedLinear

from speechfuse.samples.view import IGNORE
from speechfuse.train import losses
from speechfuse.train.head import Head, linear_cross_entropy


def inputs(targets: int, width: int, vocabulary: int, dtype=torch.float32) -> tuple:
    torch.manual_seed(0)
    hidden = torch.randn(targets, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, vocabulary, (targets,)), torch.arange(targets) % 2


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_values_and_gradients_are_those_of_whole_logits(chunk):
    hidden, weight, labels, groups = inputs(10, 6, 17)
    sums = linear_cross_entropy(hidden, weight, labels, groups, 2, chunk)
    whole = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    torch.testing.assert_close(sums, torch.stack([whole[::2].sum(), whole[1::2].sum()]))
    ours = torch.autograd.grad(3 * sums.sum(), (hidden, weight))
    theirs = torch.autograd.grad(3 * whole.sum(), (hidden, weight))
    torch.testing.assert_close(ours, theirs)


def test_gradients_pass_gradcheck():
    hidden, weight, labels, groups = inputs(7, 3, 5, torch.float64)

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, groups, 2, 3).sum()

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, weight, labels, groups = inputs(7, 3, 5)
    pair = [hidden, weight]
    expected = torch.autograd.grad(
        linear_cross_entropy(*pair, labels, groups, 2, 3).sum(), pair[1 - frozen]
    )
    pair[frozen] = pair[frozen].detach()
    linear_cross_entropy(*pair, labels, groups, 2, 3).sum().backward()
    assert pair[frozen].grad is None
    torch.testing.assert_close(pair[1 - frozen].grad, expected[0])


def test_groups_that_weigh_differently_are_an_error():
    sums = linear_cross_entropy(*inputs(8, 3, 5), 2, 4)
    with pytest.raises(RuntimeError, match="weigh the same"):
        (sums[0] + 2 * sums[1]).backward()


def test_the_weights_gradient_is_summed_in_float32():
    """4,096 chunks of one target: a sum in bf16 would stop growing when a part is 1/256 of it."""
    hidden = torch.ones(4096, 2, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(4096, dtype=torch.long)
    linear_cross_entropy(hidden, weight, labels, labels, 1, 1).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert weight.grad[1].tolist() == [1024, 1024]  # 4,096 times a probability of 1/4


class Bytes(TorchDispatchMode):
    """The bytes of all storages that were made inside and are not freed: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def _freed(self, key: int, size: int) -> None:
        self.now -= size
        self._seen.discard(key)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._seen:
                    self._seen.add(key)
                    self.now += size
                    weakref.finalize(storage, self._freed, key, size)
        self.most = max(self.most, self.now)
        return result


def peak(loss, hidden, weight) -> int:
    with Bytes() as counted:
        loss().backward()
    hidden.grad = weight.grad = None
    return counted.most


def test_peak_memory_is_that_of_a_chunk():
    hidden, weight, labels, groups = inputs(1024, 8, 4000)
    logits = 1024 * 4000 * 4

    def whole():
        return F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")

    def chunked(size):
        return lambda: linear_cross_entropy(hidden, weight, labels, groups, 2, size).sum()

    before = peak(whole, hidden, weight)
    assert before > 2 * logits, "the whole logits and their gradient must be counted"
    after = peak(chunked(64), hidden, weight)
    # 64 of 1,024 targets; logits, one temporary of theirs, and the two gradients
    assert after < 0.2 * logits
    assert peak(chunked(1024), hidden, weight) > 10 * after


class Decoder(nn.Module):
    """As torchtune's decoder ends: the output layer's result, in float32."""

    def __init__(self, tied: bool, chunk: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(11, 6)
        output = TiedLinear(self.tok_embeddings) if tied else nn.Linear(6, 11, bias=False)
        self.output = Head(output, chunk)

    def forward(self, tokens, mask=None, input_pos=None):
        return self.output(self.tok_embeddings(tokens)).float()


@pytest.mark.parametrize("tied", [True, False])
def test_next_token_is_cross_entropy_apart_for_text_and_sound(tied):
    model = Decoder(tied)
    tokens = torch.randint(0, 11, (3, 8))
    labels = torch.randint(0, 11, (3, 8)).masked_fill(torch.rand(3, 8) < 0.4, IGNORE)
    sound = (labels > 6) & (torch.rand(3, 8) < 0.9)
    batch = {"tokens": tokens, "labels": labels, "mask": None, "input_pos": None, "sound": sound}
    found = losses.next_token(model, batch)
    sum([value for value, _ in found.values()]).backward()
    ours = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    logits = model(tokens)
    assert logits.shape == (3, 8, 11), "without labels the head gives logits"
    for name, where in (("text", ~sound), ("sound", sound)):
        kept = where & (labels != IGNORE)
        assert found[name][1] == kept.sum() > 0
        expected = F.cross_entropy(logits[kept], labels[kept], reduction="sum")
        torch.testing.assert_close(found[name][0], expected)
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    torch.testing.assert_close(ours, [parameter.grad for parameter in model.parameters()])


def test_a_batch_without_targets_has_losses_and_gradients_of_zero():
    """A rank with nothing to train still takes part in what the ranks do together."""
    model = Decoder(False)
    nothing = torch.full((2, 4), IGNORE)
    batch = {"tokens": nothing.abs() % 11, "labels": nothing, "sound": nothing > 0}
    found = losses.next_token(model, {**batch, "mask": None, "input_pos": None})
    assert [(value.item(), count.item()) for value, count in found.values()] == [(0, 0), (0, 0)]
    sum([value for value, _ in found.values()]).backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_the_heads_weight_has_the_name_of_the_layer_it_replaces(tied):
    names = set(Decoder(tied).state_dict()) - {"tok_embeddings.weight"}
    assert names == (set() if tied else {"output.weight"})


def test_a_chunk_of_no_targets_is_refused():
    with pytest.raises(ValueError, match="loss_chunk=0"):
        Decoder(True, 0)
