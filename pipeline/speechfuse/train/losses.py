"""What a training step computes: `step(model, batch) -> {name: (loss sum, target count)}`, chosen
by dotted path. The sum of all losses is what is trained, divided by all targets of the step; a
third value of a loss is its weight in that sum."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechfuse.fusion.channels import BEGIN, MARKS, Channels
from speechfuse.fusion.views import NO_CODE
from speechfuse.samples.view import IGNORE
from speechfuse.train.backbone import embedding_of, head_of
from speechfuse.train.head import linear_cross_entropy


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


def next_frame(model: nn.Module, batch: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Compute the cross-entropies of the next frame of sessions, apart for text, for the frames in
    which nothing is said, and for the codes; the weights are those of the adapter. Conversations in
    writing beside them have text alone.

    `batch`: as of next_token, with codes, code_labels and padding where there are sessions.
    """
    door, labels, head = embedding_of(model), batch["labels"], head_of(model)
    lacking = torch.full_like(labels, NO_CODE)[..., None]
    codes = batch.get("codes", lacking)
    code_labels = batch.get("code_labels", torch.full_like(lacking, IGNORE))
    padding = batch.get("padding", torch.zeros_like(labels, dtype=torch.bool))
    if not isinstance(channels := door.adapter, Channels):
        raise ValueError(
            "step=speechfuse.train.next_frame needs adapter speechfuse.fusion.Channels"
        )
    begun = codes[:, 1:, 0] == channels.size - len(MARKS) + BEGIN  # codes are a frame behind
    tokens = labels[padding][:1], batch["tokens"][:, :-1][begun][:1]  # of the marks
    kinds = (labels != IGNORE) & ~padding, padding, code_labels[..., 0] != IGNORE

    def score(hidden: Tensor, weight: Tensor) -> Tensor:
        def entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return linear_cross_entropy(
                hidden, weight, labels, torch.zeros_like(labels), 1, head.chunk
            )

        for token, row in zip(tokens, channels.marks.to(weight.dtype), strict=True):
            weight = weight.index_add(0, token, row.expand(len(token), -1))
        text, silent = (entropy(hidden[own], weight, labels[own]) for own in kinds[:2])
        # the bias is a column of the weight, for a one behind each hidden state
        biased = torch.cat([channels.head.weight, channels.head.bias[:, None]], 1)
        books = biased.to(hidden.dtype).unflatten(0, (channels.codebooks, -1))
        said = F.pad(hidden[kinds[2]], (0, 1), value=1.0)
        wanted = code_labels[kinds[2]].expand(-1, channels.codebooks)
        each = [entropy(said, book, wanted[:, i]) for i, book in enumerate(books)]
        return torch.cat([text, silent, torch.stack(each).sum(0)])

    with head.scored_by(score), door.hearing(batch["audio"], batch["audio_lengths"], codes):
        sums = model(batch["tokens"], mask=batch["mask"], input_pos=batch["input_pos"])
    many = [torch.count_nonzero(own) for own in kinds]
    many[2] = many[2] * channels.codebooks
    losses = zip(channels.weights.items(), sums, many, strict=True)
    return {name: (value, count, weight) for (name, weight), value, count in losses}
