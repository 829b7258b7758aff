"""Optimizers by dotted path: any of torch's, and those of torchao with states of 8 bits.

In: `optimizer` of a recipe. Out: the optimizer, and its learning rates as plain numbers, which
torchao keeps in tensors and torch does not. What cannot train is refused by `check`.
"""

import re
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.optim import Optimizer
from torchao.optim.subclass_8bit import OptimState8bit

from speechfuse import config

# their updates are not for weights that FSDP2 has sharded (torch 2.13)
WHOLE_ONLY = (torch.optim.Adafactor, torch.optim.Rprop)


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


def make(spec: dict[str, Any], parameters: list[Any]) -> Optimizer:
    """Return the optimizer that `optimizer` of a recipe describes, for parameters or `groups`.

    torchao compiles its updates. Torch's cache of compiled code takes the parts of a weight on
    different ranks for one thing, though their shapes, types and devices differ
    (pytorch/pytorch#188390), so that a rank would run what another one compiled: it stays off.
    """
    if spec.get("_component_", "").startswith("torchao."):
        torch._functorch.config.enable_autograd_cache = False
    return config.instantiate(spec, params=parameters)


def check(spec: dict[str, Any], sharded: bool) -> None:
    """Raise ValueError for an optimizer that cannot be made or makes no step; `sharded`: the
    weights are, by FSDP2."""
    name, parameter = spec.get("_component_"), nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.zeros_like(parameter)
    try:
        with torch.compiler.set_stance("force_eager"):
            optimizer = make(spec, [parameter])
            optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error) if str(name) in str(error) else f"{name}: {error}"
        raise ValueError(f"optimizer: {reason}") from error
    if sharded and isinstance(optimizer, WHOLE_ONLY):
        raise ValueError(
            f"optimizer: {name} cannot update weights that are sharded, as they are on several "
            "ranks and where compute_dtype is not dtype: choose torch.optim.AdamW or another"
        )


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
