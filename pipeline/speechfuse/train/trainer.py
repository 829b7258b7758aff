"""One optimizer step: forward, backward and clipping, on one rank or several.

In: the micro-batches of a step. Out: losses summed over all ranks, and gradients of their mean over
all target tokens of the step, whatever the number of ranks and micro-batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from speechfuse import config
from speechfuse.train import attention, gpus
from speechfuse.train.backbone import Decoder
from speechfuse.train.config import Finetune
from speechfuse.train.model import load

Step = Callable[[nn.Module, dict[str, Any]], dict[str, tuple[Tensor, Tensor]]]


@dataclass
class Trainer:
    """The parts of a run that every step needs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Step
    attention: str
    device: torch.device
    clip: float | None

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.stop = False

    def on_device(self, part: dict[str, Tensor]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            name: tensor.to(self.device, non_blocking=True) for name, tensor in part.items()
        }
        batch["mask"] = attention.mask_of(batch.pop("document"), self.attention)
        return batch

    def backward(self, parts: list[dict[str, Tensor]]) -> tuple[dict[str, tuple[float, int]], bool]:
        """Forward and backward of one optimizer step: ({name: (loss sum, targets)} over all ranks,
        whether a rank was asked to stop). Gradients are then of the mean over all targets."""
        names: list[str] = []
        sums = torch.zeros(0, dtype=torch.float64, device=self.device)
        for part in parts:
            losses = self.step(self.model, self.on_device(part))
            torch.stack([value for value, _ in losses.values()]).sum().backward()
            numbers = [each.detach().double() for pair in losses.values() for each in pair]
            sums = sums + torch.stack(numbers) if names else torch.stack(numbers)
            names = list(losses)
        sums = torch.cat([sums, sums.new_tensor([float(self.stop)])])
        if dist.is_initialized():
            dist.all_reduce(sums)
        *values, stop = sums.tolist()
        result = {name: (values[2 * i], int(values[2 * i + 1])) for i, name in enumerate(names)}
        # FSDP2 averages gradients over ranks, so their sum is that times the ranks
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        targets = max(1, sum(count for _, count in result.values()))
        for parameter in self.trained:
            if parameter.grad is not None:
                parameter.grad.mul_(ranks / targets)
        return result, stop > 0

    def clipped_norm(self) -> float:
        """Clip the gradient; its norm before that."""
        limit = self.clip if self.clip is not None else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.trained, limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def trainer_of(job: Finetune, decoder: Decoder) -> Trainer:
    """The trainer of `decoder`, whose model gets the weights of the checkpoint."""
    device, model = gpus.device_of(job.runtime.device), decoder.model
    torch.manual_seed(job.seed)
    load(decoder, job, device)
    return Trainer(
        model,
        config.instantiate(
            job.optimizer, params=[p for p in model.parameters() if p.requires_grad]
        ),
        config.resolve(job.step),
        attention.kind_of(job.attention, device, job.packed, job.seq_len),
        device,
        job.clip_grad_norm,
    )
