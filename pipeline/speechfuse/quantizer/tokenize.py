"""One shard of a corpus: clips in, rows of codes out. What stages.tokenize_speech runs in its
workers.

Clips are decoded, filtered and split by a few threads ahead of the encoder, in order; batches have
a fixed shape. So the rows are a pure function of clips and quantizer, whatever the number of
threads and however far ahead they work.
"""

import hashlib
import json
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechfuse import config, workers
from speechfuse.artifact import sha256_of
from speechfuse.audio import decoding
from speechfuse.audio.filters import Filter
from speechfuse.corpora.clip import Clip, decode
from speechfuse.quantizer.encoder import HOP_LENGTH
from speechfuse.quantizer.model import Quantizer
from speechfuse.quantizer.spec import EncoderSpec, QuantizerSpec
from speechfuse.rows import several
from speechfuse.rows.making import component
from speechfuse.rows.rejects import FILTERED, Reject
from speechfuse.rows.shards import Shard


@dataclass(frozen=True)
class DecodedClip:
    """A decoded clip: its pieces are float32 at 16 kHz, each within the quantizer's window.
    `recordings`: of a clip of several each of them, of one piece."""

    clip: Clip
    decoded: decoding.Decoded | None
    pieces: list[np.ndarray]
    sha256: str | None
    recordings: "list[DecodedClip] | None" = None


def prepare(clip: Clip | Reject, window: float, filters: list[Filter]) -> DecodedClip | Reject:
    """Decode, filter and split one clip; `window` in seconds."""
    if isinstance(clip, Reject):
        return clip
    if clip.recordings is not None:
        recordings, pieces = list[DecodedClip](), list[np.ndarray]()
        for each in clip.recordings:
            if isinstance(made := prepare(each, window, filters), Reject):
                return Reject(clip.id, f"{made.reason} ({each.uri})")
            if len(made.pieces) > 1:
                too_long = f"too long: {each.uri} is longer than the {window:g} s of an encoder"
                return Reject(clip.id, f"{too_long}; of several recordings none is split")
            recordings.append(made)
            pieces += made.pieces
        return DecodedClip(clip, None, pieces, None, recordings)
    try:
        decoded = decode(clip)
    except ValueError as error:
        return Reject(clip.id, str(error))
    for keep in filters:
        if reason := keep(decoded.waveform, clip.text):
            return Reject(clip.id, f"{FILTERED}{reason}")
    digest, whole = None, clip.offset == 0 and clip.seconds is None
    if whole and isinstance(clip.audio, Path):
        digest = sha256_of(clip.audio)
    elif whole and isinstance(clip.audio, bytes):
        digest = _sha256(clip.audio)
    return DecodedClip(clip, decoded, decoding.split(decoded.waveform, window), digest)


def tokenize_shard(
    planned: dict[str, Any],
    corpus: dict[str, Any],
    encoder: QuantizerSpec | EncoderSpec,
    filters: list[dict[str, Any]],
    batch_size: int,
    threads: int,
    depth: int,
) -> Shard:
    """The shard `planned` of a corpus, in a worker process: `threads` threads decode up to `depth`
    clips ahead of the encoder. `corpus` and `filters` are {_component_, ...}."""
    originals = planned.get("same_audio", {})  # {id of a duplicate: id of the first}

    reserved: set[str] = set()

    def unless_duplicate(position: int, clip: Clip | Reject) -> Clip | Reject:
        ends = planned.get("reserved", {}).get(str(position), ())
        reserved.update(f"{clip.id}#{end}" for end in ends)
        reason = f"{FILTERED}duplicate audio: same as {originals.get(clip.id)}"
        return Reject(clip.id, reason) if clip.id in originals else clip

    clips = starmap(unless_duplicate, enumerate(component(corpus).clips(planned)))
    instances, device = list(map(config.instantiate, filters)), workers.device()
    return tokenize(clips, encoder.load(device), batch_size, instances, threads, depth, reserved)


def audio_digests(
    planned: dict[str, Any], corpus: dict[str, Any], threads: int, depth: int
) -> list[tuple[str, str]]:
    """(id, sha256 of the 16 kHz samples) of a shard's clips that decode, in a worker process."""

    def digest(clip: Clip) -> tuple[str, str] | None:
        try:
            return clip.id, _sha256(decode(clip).waveform.tobytes())
        except ValueError:
            return None

    clips = (clip for clip in component(corpus).clips(planned) if isinstance(clip, Clip))
    return list(filter(None, workers.prefetch(digest, clips, threads, depth)))


def tokenize(
    clips: Iterable[Clip | Reject],
    quantizer: Any,
    batch_size: int,
    filters: list[Filter],
    threads: int,
    depth: int,
    reserved: Collection[str] = (),
) -> Shard:
    """Rows, rejects and counts of one shard's clips. `quantizer`: a Quantizer, or an encoder of
    frames with the same methods; `reserved`: ids that pieces may not have."""
    shard, shortest = Shard([], [], Counter()), quantizer.shortest
    pending = defaultdict[int, list[tuple[dict[str, Any], np.ndarray]]](list)  # by padded length
    of_several = list[tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]]()
    running: deque[tuple[list[dict[str, Any]], Any, list[int]]] = deque()  # on the device

    def collect() -> None:
        rows, codes, lengths = running.popleft()
        for row, window, length in zip(rows, codes.cpu().numpy(), lengths, strict=False):
            row |= quantizer.columns(window[:length])

    def encode(batch: list[tuple[dict[str, Any], np.ndarray]]) -> None:
        rows, waveforms = map(list, zip(*batch, strict=True))
        running.append((rows, *quantizer.encode_batch(waveforms, batch_size)))
        batch.clear()
        if len(running) > 1:  # fetched one batch late, so that the device always has work
            collect()

    def add(row: dict[str, Any], piece: np.ndarray) -> None:
        batch = pending[quantizer.padded_frames(len(piece) // HOP_LENGTH)]
        batch.append((row, piece))
        if len(batch) == batch_size:
            encode(batch)

    prepared = partial(prepare, window=quantizer.window, filters=filters)
    for item in workers.prefetch(prepared, clips, threads, depth):
        if isinstance(item, Reject):
            shard.rejects.append({"id": item.id, "reason": item.reason})
            continue
        offset = item.clip.offset
        for each in [item] if item.recordings is None else item.recordings:
            shard.counts["resampled"] += each.decoded.rate != decoding.SAMPLE_RATE
            shard.counts["mixed_down"] += each.decoded.channels > 1
            if each.decoded.channel is not None:
                shard.counts["one_channel"] += 1
        shard.counts["without_text"] += item.clip.text is None
        if item.recordings is not None:
            if min(map(_seconds, item.pieces), default=inf) < shortest:
                reason = "too short: one of its recordings is less than one token"
                shard.rejects.append({"id": item.clip.id, "reason": reason})
                continue
            parts = [_row(e, 0, e.clip.offset, _seconds(*e.pieces), ()) for e in item.recordings]
            shard.rows.append(_row(item, 0, 0.0, sum(part["seconds"] for part in parts), ()))
            of_several.append((shard.rows[-1], parts, item.clip.extra))
            for row, piece in zip(parts, item.pieces, strict=True):
                add(row, piece)
            continue
        if len(item.pieces) > 1:
            shard.counts["split"] += 1
            shard.counts["pieces"] += len(item.pieces)
        for part, piece in enumerate(item.pieces):
            seconds = _seconds(piece)
            row = _row(item, part, offset, seconds, reserved)
            offset += seconds
            if seconds < shortest:
                reason = f"too short: {seconds:.4f} s is less than one token"
                shard.rejects.append({"id": row["id"], "reason": reason})
                continue
            shard.rows.append(row)
            add(row, piece)
    for batch in filter(None, pending.values()):
        encode(batch)
    while running:
        collect()
    for row, parts, extra in of_several:
        row |= several.joined(parts, extra)
        row["extra"] = json.dumps(row["extra"], sort_keys=True)
    return shard


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _seconds(waveform: np.ndarray) -> float:
    return len(waveform) / decoding.SAMPLE_RATE


def _row(
    item: DecodedClip, part: int, offset: float, seconds: float, reserved: Collection[str]
) -> dict[str, Any]:
    clip, whole = item.clip, len(item.pieces) == 1 or item.recordings is not None
    id = clip.id if whole else f"{clip.id}#{part}"
    while not whole and id in reserved:
        id += "#"
    return {
        "id": id,
        "seconds": seconds,
        "text": clip.text if whole else None,  # which words fall into which piece is not known
        "speaker": clip.speaker,
        "language": clip.language,
        "source": {"uri": clip.uri, "offset": offset, "seconds": seconds, "sha256": item.sha256},
        "parent": None if whole else clip.id,
        "part": None if whole else part,
        "extra": json.dumps(clip.extra, sort_keys=True),
    }


def exactness_of_shard(
    planned: dict[str, Any], corpus: dict[str, Any], quantizer: QuantizerSpec, batch_size: int
) -> tuple[int, int]:
    """`exactness` of the clips of one shard, in a worker process, on its device."""
    encoder = quantizer.load(workers.device())
    return exactness(component(corpus).clips(planned), encoder, batch_size)


def exactness(
    clips: Iterable[Clip | Reject], quantizer: Quantizer, batch_size: int, enough: int = 10_000
) -> tuple[int, int]:
    """(codes equal to those of float32, codes compared) for the first clips: about `enough` codes,
    or all."""
    pieces: list[np.ndarray] = []
    codes = 0.0
    for clip in clips:
        item = prepare(clip, quantizer.window, [])
        if isinstance(item, DecodedClip):
            usable = [p for p in item.pieces if _seconds(p) >= 1 / quantizer.token_rate]
            pieces += usable
            codes += sum(map(_seconds, usable)) * quantizer.token_rate
        if codes > enough + len(pieces):  # a last incomplete one is not made
            break
    reduced = quantizer.encode(pieces, batch_size)
    dtype, quantizer.dtype = quantizer.dtype, torch.float32
    exact = quantizer.encode(pieces, batch_size)
    quantizer.dtype = dtype
    equal = sum(int((a == b).sum()) for a, b in zip(reduced, exact, strict=True))
    return equal, sum(map(len, exact))
