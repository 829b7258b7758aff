"""What a training step computes: `step(model, batch) -> {name: (loss sum, target count)}`, chosen
by dotted path."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechfuse.datasets import IGNORE


def next_token(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Cross-entropy of the next token, summed over the targets of the batch, and their number."""
    logits = model(batch["tokens"], mask=batch["mask"], input_pos=batch["input_pos"])
    labels = batch["labels"]
    kept = labels != IGNORE
    loss = F.cross_entropy(logits[kept].float(), labels[kept], reduction="sum")
    return {"loss": (loss, torch.count_nonzero(kept))}
