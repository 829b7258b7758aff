"""What a training step computes: `step(model, batch) -> {name: (loss sum, target count)}`, chosen
by dotted path. The sum of all losses is what is trained, divided by all targets of the step."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from speechfuse.samples.view import IGNORE
from speechfuse.train.backbone import embedding_of, head_of


def next_token(model: nn.Module, batch: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute the cross-entropy of the next token, apart for text and sound tokens.

    `batch`: tokens, labels, input_pos (rows, length), mask (see attention.mask_of), sound (rows,
    length): where the label is a sound token; audio, audio_lengths (see fusion.views.collate) where
    there are frames.
    """
    labels, sound, hearing = batch["labels"], batch["sound"], nullcontext()
    if "audio" in batch:
        hearing = embedding_of(model).hearing(batch["audio"], batch["audio_lengths"])
    with head_of(model).scoring(labels, sound.long(), 2), hearing:
        sums = model(batch["tokens"], mask=batch["mask"], input_pos=batch["input_pos"])
    targets = labels != IGNORE
    return {
        "text": (sums[0], torch.count_nonzero(targets & ~sound)),
        "sound": (sums[1], torch.count_nonzero(targets & sound)),
    }
