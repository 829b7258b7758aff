"""Channels: a model that listens while it speaks, as DuplexS2S in NVIDIA NeMo.

In: rows of sessions with the user's frames (corpora.sessions, encoded). Out: samples in which each
frame is one token. What the model reads at a frame is the sum of its own text token, its own codes
and the user's frame; it predicts text and codes of the next one. The codes lag behind the text by
one frame. Beside a codebook's codes there are three marks: BEGIN, END, DELAY. For a reply "hi" in
frames 2 to 4 of 7, with s for the codes of silence and a, b, c for those of the reply:

    text    pad pad begin hi  pad end  pad        codes   DELAY s s BEGIN b c END
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from speechfuse.codecs.codec import codec_of, frame_at
from speechfuse.components import Count, Positive
from speechfuse.fusion.adapters import Stack, positions
from speechfuse.fusion.views import NO_CODE, SplicedSample, SplicedView, collate, frames_of
from speechfuse.rows import shards
from speechfuse.samples.view import Sample, View
from speechfuse.tokens.vocabulary import Vocabulary

MARKS = BEGIN, END, DELAY = 0, 1, 2  # behind the codes of a codebook


class Channels(Stack):
    """Embedding and head of the codes, beside an adapter for the user's frames. `marks`: what is
    added to the language model's head for a frame without text and for the beginning of a turn: no
    language model has learned to say their tokens.

    window          frames that each frame sees, its own and those before it
    text_weight     of the text in the loss; each codebook has 1
    padding_weight  of text frames in which nothing is said, over 80 % of all, as a factor on that
    user_weight     of the user's channel in the sum
    """

    def __init__(
        self,
        width: int,
        out: int,
        codebooks: Count,
        codebook_size: Count,
        window: Count,
        stack: int = 1,
        hidden: Count = 256,
        text_weight: Positive = 3.0,
        padding_weight: Positive = 1.0,
        user_weight: float = 1.0,
    ) -> None:
        super().__init__(width, out, stack, hidden)
        self.codebooks, self.size = codebooks, codebook_size + len(MARKS)
        self.weights = {"text": text_weight, "padding": text_weight * padding_weight, "codes": 1.0}
        self.user_weight = user_weight
        self.codes = nn.Embedding(codebooks * self.size, out)  # one table behind the other
        self.head = nn.Linear(out, codebooks * self.size)
        self.marks = nn.Parameter(torch.zeros(2, out))
        nn.init.zeros_(self.codes.weight)

    def placed(self, words: Tensor, heard: Tensor, places: Tensor, codes: Tensor | None) -> Tensor:
        """Add codes (rows, length, codebooks), NO_CODE where none are, and the user's vectors."""
        if codes is None:
            return super().placed(words, heard, places, codes)
        own = codes[..., 0] != NO_CODE
        first = torch.arange(codes.shape[-1], device=codes.device) * self.size
        spoken = self.codes(codes.clamp(min=0) + first).sum(-2) * own[..., None]
        user = super().placed(torch.zeros_like(words), heard, own, codes)
        return words + spoken + self.user_weight * user

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., out) -> (..., codebooks, size): of the next frame's codes."""
        return self.head(hidden).unflatten(-1, (self.codebooks, self.size))


def tracks(
    vocabulary: Vocabulary,
    turns: list[dict[str, Any]],
    frames: int,
    rate: float,
    silence: np.ndarray,
    size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return text (frames,) and codes (frames, codebooks) of the assistant's `turns` {text, start,
    end, codes, cut}. A turn's text begins in its first frame, an id a frame, and runs past its end
    where it is longer; no mark is put over it. Of a turn that was cut it ends with the turn."""
    text = np.full(frames, vocabulary.end, np.int64)
    codes = np.tile(silence.astype(np.int64), (frames, 1))
    own = [turn for turn in turns if turn["role"] == "assistant"]
    starts = [min(frames, frame_at(turn["start"], rate)) for turn in own]
    for turn, start, limit in zip(own, starts, [*starts, frames][1:], strict=True):
        end, room = frame_at(turn["end"], rate), limit - start
        ids = vocabulary.text(turn["text"])[: max(0, end - start - 1) if turn.get("cut") else None]
        written = [vocabulary.begin, *ids][:room]
        speech = np.array(turn["codes"], np.int64).reshape(-1, codes.shape[1])[:room]
        codes[start : start + len(speech)] = speech
        text[start : start + len(written)] = written
        if (end := max(end, start + len(written))) < limit:
            text[end] = vocabulary.end_of_turn
    codes[text == vocabulary.begin] = size + BEGIN
    codes[text == vocabulary.end_of_turn] = size + END
    return text, np.concatenate([np.full_like(codes[:1], size + DELAY), codes])[:frames]


def duplex(
    vocabulary: Vocabulary,
    path: str,
    codec: dict[str, Any],
    stack: int = 1,
    select: dict[str, Any] | None = None,
) -> View:
    """Sessions with the user's frames. `stack`: that of the adapter. In a session of the kind
    `reading` the text is given, and only codes are learned. Raises ValueError for another dataset,
    and for a codec of another rate than that of the frames."""
    stream, of_codec = shards.read_stream(Path(path)), codec_of(codec)
    if "encoder" not in stream:
        raise ValueError(f"{path} holds no frames: `just encode` the sessions")
    if stream["frame_rate"] / stack != of_codec.frame_rate:
        raise ValueError(
            f"{path} has {stream['frame_rate'] / stack:g} frames a second with stack={stack}, the "
            f"codec {of_codec.frame_rate:g}: they must be equal"
        )
    rate, size, silence = of_codec.frame_rate, of_codec.codebook_size, of_codec.silence()

    def render(row: dict[str, Any]) -> Sample | None:
        if "turns" not in row["extra"]:
            raise ValueError(f"row {row['id']} is no session: its corpus is to be .sessions")
        frames, turns = frames_of(row, stream["width"]), row["extra"]["turns"]
        length = positions(len(frames), stack)
        text, codes = tracks(vocabulary, turns, length, rate, silence, size)
        targets = np.ones(length, bool)
        if row["extra"].get("kind") == "reading":
            targets[: np.flatnonzero(text != vocabulary.end).max(initial=-1) + 1] = False
        return SplicedSample(row["id"], text.astype(np.int32), targets, (frames,), codes)

    sizes = {"codebooks": of_codec.codebooks, "codebook_size": size}
    spec = codec | {"identity": of_codec.identity}
    return SplicedView(Path(path), select or {}, render, collate, None, stream, stack, spec, sizes)
