"""Optimizers by dotted path: any of torch's, and those of torchao with states of 8 bits.

In: `optimizer` of a recipe. Out: the optimizer, and its learning rates as plain numbers, which
torchao keeps in tensors and torch does not.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchao.optim.subclass_8bit import OptimState8bit


@OptimState8bit.implements(torch.ops.aten.new_empty.default)
def _(function: Any, types: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """Do what torchao (to 0.15) lacks for a state to be saved while the training goes on."""
    state, shape = arguments[:2]
    device = keywords.get("device") or state.device
    return OptimState8bit.zeros(shape, state.signed, state.block_size, device)


def groups(model: nn.Module, spec: dict[str, Any], rates: dict[str, float]) -> list[Any]:
    """Return what the optimizer `spec` {_component_, lr, ...} is to train: the parameters, or a
    group for each factor of `rates` {pattern: factor on lr}, by the first pattern that is found in
    a name. Raises ValueError for a pattern that no trained parameter has."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    by_factor: dict[float, list[Tensor]] = {}
    unused = set(rates)
    for name, parameter in trained.items():
        fits = [pattern for pattern in rates if re.search(pattern, name)]
        unused -= set(fits)
        by_factor.setdefault(rates[fits[0]] if fits else 1.0, []).append(parameter)
    if unused:
        raise ValueError(f"rates: {min(unused)!r} fits no parameter that trains")
    if not rates:
        return list(trained.values())
    return [{"params": each, "lr": factor * spec["lr"]} for factor, each in by_factor.items()]


def rates(optimizer: Optimizer) -> list[float]:
    """Return the learning rate of each group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def set_rates(optimizer: Optimizer, values: list[float]) -> None:
    """Set the learning rate of each group, in place where it is a tensor."""
    for group, value in zip(optimizer.param_groups, values, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value
