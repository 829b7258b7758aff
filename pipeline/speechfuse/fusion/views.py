"""Rows with frames as samples: places for vectors among the tokens, and a batch that has both.

In: rows of stages.encode_speech. Out: samples whose tokens hold FRAME once for each vector that the
adapter will make, a pure function of the row; a batch has their frames beside its tokens. Text in
the same recipe is a view of this room too, because all samples of a batch are collated alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechfuse import config
from speechfuse.fusion.adapters import positions
from speechfuse.fusion.door import FRAME
from speechfuse.rows import shards
from speechfuse.samples import datasets, view
from speechfuse.samples.view import IGNORE, Sample, View
from speechfuse.tokens import prompts
from speechfuse.tokens.vocabulary import SoundLayout, Vocabulary

NO_CODE = -1  # in `codes`, for tokens that are no frame of a session


@dataclass(frozen=True)
class SplicedSample(Sample):
    """`audio`: of each clip in the tokens, in order, its frames, float16 (frames, width), or its
    waveform, float32 (samples,); until View.at_step reads that, the row that says where it is.
    `codes`: of a session the codes of each token's frame, int64 (tokens, codebooks), see
    fusion.channels."""

    audio: tuple[Any, ...] = ()
    codes: np.ndarray | None = None


@dataclass(frozen=True)
class SplicedView(View):
    """`stream` describes the frames; `stack` of them are one vector, and `prompt` learned vectors
    come before; `codec`: of sessions, with its `sizes`, which are keys of the adapter."""

    stream: dict[str, Any] | None = None
    stack: int = 0
    codec: dict[str, Any] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    prompt: int = 0


def frames_of(speech: dict[str, Any], width: int) -> np.ndarray:
    """Return the frames of a speech row, float16 (frames, width). Raises ValueError where it has
    none."""
    if not speech.get("frames"):
        raise ValueError(f"row {speech.get('id')} has no frames: encode its recordings")
    return np.frombuffer(speech["frames"], np.float16).reshape(-1, width)


def collate(
    rows: list[list[Sample]], length: int, pad: int, layout: SoundLayout | None
) -> dict[str, Tensor]:
    """Return the batch of samples.view.collate, with `audio`, float16 (clips, longest, width), and
    `audio_lengths` (clips): frames of each clip, in the order of their places; zeros behind. Of
    waveforms `audio` is float32 (clips, longest), and the lengths are samples. Of sessions also
    `codes`, and `code_labels`, those of the next frame, int64 (rows, length, codebooks), NO_CODE
    and IGNORE for other tokens; and `padding`, bool (rows, length): where the label is no text."""
    samples = [sample for row in rows for sample in row]
    audio, lengths = padded([clip for each in samples for clip in getattr(each, "audio", ())])
    batch = view.collate(rows, length, pad, layout)
    batch |= {"audio": audio, "audio_lengths": lengths}
    tracks = [getattr(sample, "codes", None) for sample in samples]
    if not (books := max((track.shape[1] for track in tracks if track is not None), default=0)):
        return batch
    codes = torch.full((len(rows), length, books), NO_CODE)
    labels, tracks_left = torch.full_like(codes, IGNORE), iter(tracks)
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            end, track = start + len(sample.tokens), next(tracks_left)
            if track is not None:
                codes[number, start:end] = torch.from_numpy(track)
                labels[number, start : end - 1] = codes[number, start + 1 : end]
            start = end
    padding = (batch["labels"] == pad) & (codes[..., 0] != NO_CODE)
    return batch | {"codes": codes, "code_labels": labels, "padding": padding}


def padded(clips: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return the frames of clips as (clips, longest, width), zeros behind, and their lengths."""
    tensors = [torch.from_numpy(clip.copy()) for clip in clips]
    lengths = torch.tensor([len(clip) for clip in clips], dtype=torch.long)
    return pad_sequence(tensors, batch_first=True) if clips else torch.zeros(0, 0, 0), lengths


def places(speech: dict[str, Any], width: int, stack: int, clips: list[np.ndarray]) -> list[int]:
    """Return the ids that stand for a speech segment, FRAME for each vector; its frames are added
    to `clips`."""
    clips.append(frames_of(speech, width))
    return [FRAME] * positions(len(clips[-1]), stack)


def speech(
    vocabulary: Vocabulary,
    path: str,
    turns: dict[str, Any],
    stack: int,
    select: dict[str, Any] | None = None,
    train_on: str = "answers",
    prompt: int = 0,
) -> View:
    """Rows of stages.encode_speech made into conversations by `turns`, as samples.speech does.
    `stack` and `prompt`: those of the adapter. Rows without a transcript have no sample. Raises
    ValueError for another dataset."""
    stream = shards.read_stream(Path(path))
    if "encoder" not in stream:
        raise ValueError(f"{path} holds no frames: `just encode` it, or take .speech of samples")
    ids_of = partial(places, width=stream["width"], stack=stack)
    sizes = stream, stack, prompt
    return conversations_of(vocabulary, Path(path), turns, select, train_on, ids_of, sizes)


def conversations_of(
    vocabulary: Vocabulary,
    path: Path,
    turns: dict[str, Any],
    select: dict[str, Any] | None,
    train_on: str,
    ids_of: Callable[..., list[int]],
    sizes: tuple[dict[str, Any], int, int],
    at_step: Callable[[Sample, int], Sample] | None = None,
) -> View:
    """Return the view of rows that `turns` makes into conversations; `ids_of(speech, clips=)`
    returns the ids of a speech segment and adds its audio to `clips`; `sizes`: stream, stack and
    prompt of a SplicedView."""
    turns_of, (stream, stack, prompt) = config.bind(turns, "row"), sizes

    def render(row: dict[str, Any]) -> Sample | None:
        if not datasets.answered(row, turns):
            return None
        clips: list[Any] = []
        ids, targets = prompts.render(
            vocabulary,
            turns_of(row=row),
            speech_ids=lambda speech: [FRAME] * prompt + ids_of(speech, clips=clips),
            draw=row.get("draw"),
        )
        tokens = np.array(ids, np.int32)
        learned = np.array(targets) if train_on == "answers" else tokens != FRAME
        learned[0] = False
        return SplicedSample(row["id"], tokens, learned, tuple(clips))

    datasets.check_train_on(train_on)
    return SplicedView(path, select or {}, render, collate, at_step, stream, stack, prompt=prompt)


def conversations(
    vocabulary: Vocabulary,
    path: str,
    select: dict[str, Any] | None = None,
    train_on: str = "answers",
) -> View:
    """Conversations in writing, as samples.conversations: text replay beside frames."""
    text = datasets.conversations(vocabulary, path, select, train_on)
    return replace(text, collate=collate)


def check(
    views: list[View], adapter: dict[str, Any] | None, encoder: dict[str, Any] | None
) -> str | None:
    """Return the identity of the encoder whose frames `views` have; None where none has any. Raises
    ValueError where one does not fit the `adapter` {width, stack, ...}, the `encoder` of the recipe
    or another view."""
    spliced = [view for view in views if isinstance(view, SplicedView) and view.stream]
    if bool(spliced) != bool(adapter):
        raise ValueError(
            f"adapter={adapter}, and {len(spliced)} of the datasets have frames "
            "(speechfuse.fusion.speech or .recordings): they belong together, give both or none"
        )
    if encoder and (cached := [each.path for each in spliced if each.at_step is None]):
        raise ValueError(
            f"{cached[0]}: its frames are cached, and encoder={encoder} makes them as it trains: "
            "take speechfuse.fusion.recordings for it, or leave encoder out"
        )
    identities = {(each.stream or {})["encoder"]: each.path for each in spliced}
    if len(identities) > 1:
        others = ", ".join(f"{path}: {name[:12]}" for name, path in identities.items())
        raise ValueError(f"datasets have frames of several encoders ({others}): encode with one")
    for each in spliced:
        sizes = {"width": (each.stream or {})["width"], "stack": each.stack, "prompt": each.prompt}
        for name, value in (sizes | each.sizes).items():
            if (own := ({"stack": 1, "prompt": 0} | (adapter or {})).get(name)) != value:
                raise ValueError(
                    f"{each.path}: adapter.{name}={own}, and the dataset has {name}={value}: they "
                    "must be equal"
                )
    return next(iter(identities), None)
