"""One optimizer step: forward, backward and clipping, on one rank or several.

In: the micro-batches of a step. Out: losses summed over all ranks, and gradients of their mean over
all target tokens of the step, whatever the number of ranks and micro-batches.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from speechfuse import config
from speechfuse.train import attention, gpus, optimizers, state
from speechfuse.train.backbone import Decoder
from speechfuse.train.config import Finetune
from speechfuse.train.model import load

Step = Callable[[nn.Module, dict[str, Any]], dict[str, tuple[Any, ...]]]


class Trainer:
    """The parts of a run that every step needs."""

    def __init__(self, job: Finetune, decoder: Decoder) -> None:
        """Load the weights of the checkpoint into `decoder`, and make `job`'s optimizer."""
        self.device, self.model = gpus.device_of(job.runtime.device), decoder.model
        self.window = (job.adapter or {}).get("window")
        kind = attention.kind_of(job.attention, self.device, job.packed, job.seq_len, self.window)
        self.attention = kind
        torch.manual_seed(job.seed + state.rank())  # for dropout, which is to differ among ranks
        load(decoder, job, self.device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = optimizers.groups(self.model, job.optimizer, job.rates)
        self.optimizer = optimizers.make(job.optimizer, groups)
        self.step: Step = config.resolve(job.step)
        self.clip = math.inf if job.clip_grad_norm is None else job.clip_grad_norm
        self.stop = False

    def on_device(self, part: dict[str, Tensor]) -> dict[str, Any]:
        """Return a micro-batch on this rank's device, with the mask of its documents."""
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in part.items()}
        document = batch.pop("document")
        return batch | {"mask": attention.mask_of(document, self.attention, self.window)}

    def backward(self, parts: list[dict[str, Tensor]]) -> tuple[dict[str, tuple[float, int]], bool]:
        """Run forward and backward of one optimizer step; return ({name: (loss sum, targets)} over
        all ranks, whether a rank was asked to stop). Gradients are of the mean over all targets."""
        sums: Any = 0
        for part in parts:
            losses = self.step(self.model, self.on_device(part))
            weighted = [
                value * (weight[0] if weight else 1) for value, _, *weight in losses.values()
            ]
            torch.stack(weighted).sum().backward()
            numbers = [e.detach().double() for value, n, *_ in losses.values() for e in (value, n)]
            sums = sums + torch.stack(numbers)
        sums = torch.cat([sums, sums.new_tensor([float(self.stop)])])
        if dist.is_initialized():
            dist.all_reduce(sums)
        *values, stop = sums.tolist()
        result = {name: (values[2 * i], int(values[2 * i + 1])) for i, name in enumerate(losses)}
        # FSDP2 averages gradients over ranks, so their sum is that times the ranks
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        targets = max(1, sum(count for _, count in result.values()))
        gradients = [p.grad for p in self.trained if p.grad is not None]
        torch._foreach_mul_(gradients, ranks / targets)
        return result, stop > 0

    def clipped_norm(self) -> float:
        """Clip the gradient, and return its norm before that."""
        norm = nn.utils.clip_grad_norm_(self.trained, self.clip)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
