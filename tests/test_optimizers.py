"""Optimizers as recipes name them: they train sharded weights, and their states come back bit by
bit from a save in the background."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torchao.optim.subclass_8bit import OptimState8bit
from torchtune.training import get_cosine_schedule_with_warmup

from speechfuse import config
from speechfuse.train import optimizers
from speechfuse.train.state import States

FUSED = {"_component_": "torch.optim.AdamW", "lr": 1e-2, "fused": True}
EIGHT_BITS = {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-2}


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    """A group of one rank; and torchao's step not compiled, which takes half a minute."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
    dist.destroy_process_group()


def make(spec: dict[str, Any], dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)).to(dtype)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    return model, config.instantiate(spec, params=list(model.parameters()))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = model(torch.randn(8, 64)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [(FUSED, torch.float32), (FUSED, torch.bfloat16), (EIGHT_BITS, torch.float32)],
)
def test_a_restored_state_trains_on_as_if_undisturbed(tmp_path: Path, spec, dtype):
    model, optimizer = make(spec, dtype)
    first = train(model, optimizer, range(3))
    weights, moments = get_state_dict(model, optimizer)
    saving = dcp.async_save({"model": weights, "optimizer": moments}, checkpoint_id=tmp_path)
    undisturbed = train(model, optimizer, range(3, 6))  # must not reach what is being written
    saving.result()
    assert undisturbed[-1] < first[0]
    again, fresh = make(spec, dtype)
    content: dict[str, Any] = dict(
        zip(("model", "optimizer"), get_state_dict(again, fresh), strict=True)
    )
    dcp.load(content, checkpoint_id=tmp_path)
    set_state_dict(
        again, fresh, model_state_dict=content["model"], optim_state_dict=content["optimizer"]
    )
    assert train(again, fresh, range(3, 6)) == undisturbed
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs.full_tensor())


def test_what_cannot_update_sharded_weights_is_refused_and_that_alone():
    for optimizer in (torch.optim.Adafactor, torch.optim.Rprop, torch.optim.AdamW, torch.optim.SGD):
        spec = {"_component_": f"torch.optim.{optimizer.__name__}", "lr": 1e-3}
        optimizers.check(spec, sharded=False)
        refused = False
        try:
            optimizers.check(spec, sharded=True)
        except ValueError:
            refused = True
        try:
            train(*make(spec, torch.float32), range(1))
            works = True
        except RuntimeError:
            works = False
        assert refused is not works, f"{spec}: torch has changed"


def test_ranks_share_no_code_that_torchao_compiles(monkeypatch):
    monkeypatch.setattr(torch._functorch.config, "enable_autograd_cache", True)
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    optimizers.make(FUSED, parameters)
    assert torch._functorch.config.enable_autograd_cache
    optimizers.make(EIGHT_BITS, parameters)
    assert not torch._functorch.config.enable_autograd_cache


def test_a_state_that_other_ranks_cannot_read_is_refused_in_a_sentence(tmp_path, monkeypatch):
    model, optimizer = make(EIGHT_BITS, torch.float32)
    train(model, optimizer, range(1))
    states = States(tmp_path, model, optimizer)
    states.save(1)
    states.wait()

    def cut(*_: Any, **__: Any) -> None:
        raise CheckpointException("load", {0: (ValueError("Invalid start or end"), None)})

    monkeypatch.setattr(dcp, "load", cut)
    with pytest.raises(
        ValueError, match=r"step_1, written by 1 ranks, cannot be read by 1 .*damag"
    ):
        states.restore()
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(
        ValueError, match=r"cannot be read by 3 .*Invalid start.*8-bit states divide"
    ):
        states.restore()


def test_states_of_8_bits_take_a_quarter():
    model, optimizer = make(EIGHT_BITS, torch.float32)
    train(model, optimizer, range(1))
    weight = model[0].weight
    state = optimizer.state[weight]["exp_avg"].to_local()
    assert isinstance(state, OptimState8bit)
    assert state.codes.nbytes + state.scale.nbytes < 0.26 * weight.to_local().nbytes


@pytest.mark.parametrize("spec", [FUSED, EIGHT_BITS])
def test_rates_are_numbers_that_schedules_do_not_reach(spec):
    model, optimizer = make(spec, torch.float32)
    peaks = optimizers.rates(optimizer)
    get_cosine_schedule_with_warmup(optimizer, 5, 10)  # fills a rate that is a tensor with 0
    assert peaks == pytest.approx([1e-2])
    optimizers.set_rates(optimizer, [0.5])
    assert optimizers.rates(optimizer) == [0.5]
    assert type(optimizers.rates(optimizer)[0]) is float
    before = model[0].weight.full_tensor().clone()
    train(model, optimizer, range(1))  # torchao refuses a rate that is no longer a tensor
    moved = (model[0].weight.full_tensor() - before).abs().max().item()
    assert moved == pytest.approx(0.5, rel=0.1), "Adam's first step is the rate"
