"""Devices: where a rank computes, and the memory and peak speed of the GPUs in a table.

In: a name, from a recipe (`runtime.gpu`) or from the driver. Out: memory and peak, from the makers'
data sheets. A GPU that is not in the table has no peak: its utilisation is left out, not guessed.
"""

import os
import re
from dataclasses import dataclass

import torch

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """`memory`: bytes that the driver gives to one process. `peak`: FLOP/s of dense bfloat16
    matrix products summed in float32, without sparsity; None: unknown."""

    name: str
    memory: int
    peak: float | None


_TABLE = {  # what the whole of the driver's name looks like: the GPU
    r"NVIDIA H200": Gpu("H200", int(139.8 * GIB), 989e12),
    r"NVIDIA H100 80GB HBM3": Gpu("H100", int(79.2 * GIB), 989e12),
    r"NVIDIA H100 PCIe": Gpu("H100 PCIe", int(79.2 * GIB), 756e12),
    r"NVIDIA A100-(SXM4|PCIE)-80GB|NVIDIA A100 80GB PCIe": Gpu("A100", int(79.2 * GIB), 312e12),
    r"NVIDIA A100-(SXM4|PCIE)-40GB": Gpu("A100 40GB", int(39.4 * GIB), 312e12),
    r"NVIDIA RTX A6000": Gpu("A6000", int(47.4 * GIB), 154.8e12),
    r"NVIDIA L40S": Gpu("L40S", int(44.4 * GIB), 362e12),
    r"NVIDIA GeForce RTX 4090": Gpu("4090", int(23.5 * GIB), 165.2e12),
}


def named(name: str) -> Gpu:
    """Return the GPU that `runtime.gpu` names. Raises ValueError for one not in the table."""
    for gpu in _TABLE.values():
        if gpu.name.lower() == name.lower():
            return gpu
    names = ", ".join(gpu.name for gpu in _TABLE.values())
    raise ValueError(f"runtime.gpu={name!r}: the table of GPUs has {names}; choose one of them")


def reported(name: str, memory: int) -> Gpu:
    """Return the GPU that the driver calls `name`, with the `memory` (bytes) to use of it."""
    for pattern, gpu in _TABLE.items():
        if re.fullmatch(pattern, name):
            return Gpu(gpu.name, memory, gpu.peak)
    return Gpu(name, memory, None)


def device_of(name: str) -> torch.device:
    """Return the device of this rank for `runtime.device`: cpu, cuda or auto."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)


def check_ranks(name: str, ranks: int) -> None:
    """Raise ValueError where `ranks` processes of this machine have no GPU each on
    `runtime.device`."""
    if device_of(name).type == "cuda" and ranks > (number := torch.cuda.device_count()):
        raise ValueError(
            f"{ranks} ranks, and this machine has {number} GPUs: set runtime.ranks={number} (just "
            f"ranks={number} ...), or runtime.device=cpu"
        )


def of(device: torch.device) -> Gpu | None:
    """Return the GPU that a device is, with the memory that is free on it; None for the CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return reported(torch.cuda.get_device_properties(device).name, free)
