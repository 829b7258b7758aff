"""One shard of a spoken dataset: planned samples in, conversations with speech out.

In: a shard of synthesis.plan and the settings of stages.synthesize_instructions. Out: rows of
shards.CONVERSATIONS, rejects, counts, and the audio of the samples that the plan names as
examples. Batches have a fixed shape and order, so all of it is a pure function of the plan,
whatever the number of threads. A sample is whole or rejected.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import count
from typing import Any

import numpy as np

from speechfuse import workers
from speechfuse.audio import decoding
from speechfuse.quantizer.model import Quantizer
from speechfuse.quantizer.spec import QuantizerSpec
from speechfuse.rows import shards
from speechfuse.rows.making import component
from speechfuse.rows.rejects import Reject
from speechfuse.synthesis.examples import EXAMPLES, example_name
from speechfuse.synthesis.plan import entries_of, with_texts
from speechfuse.synthesis.recording import Piece, Recorder, SpokenSample, engines_of
from speechfuse.synthesis.round_trip import RoundTrip, SynthesizedClip

ROUND_TRIP = {"_component_": "speechfuse.synthesis.round_trip.RoundTrip"}


def synthesize_shard(
    shard: dict[str, Any],
    kinds: dict[str, dict[str, Any]],
    texts: str | None,
    voices: dict[str, dict[str, Any]],
    augmentation: list[dict[str, Any]],
    round_trip: dict[str, Any] | None,
    quantizer: QuantizerSpec,
    seed: int,
    batch_size: int,
    depth: int,
) -> shards.Shard:
    """Rows, rejects, counts and further files of one shard of the plan; the job's settings are its
    arguments. `depth`: samples recorded ahead of the encoder."""
    encoder, entries = quantizer.load(workers.device()), entries_of(kinds, texts)
    trip = component(ROUND_TRIP | round_trip) if round_trip else None
    with Recorder(entries, engines_of(voices), augmentation, seed, encoder) as recorder:
        samples = with_texts(shard["samples"], entries)
        threads = sum(engine.parallel for engine in recorder.engines.values()) or 1
        recorded = workers.prefetch(lambda pair: recorder.record(*pair), samples, threads, depth)
        return _encode(recorded, encoder, batch_size, trip, shard.get("examples", ()))


def _encode(
    samples: Iterable[SpokenSample | Reject],
    quantizer: Quantizer,
    batch_size: int,
    round_trip: RoundTrip | None,
    examples: Collection[str],
) -> shards.Shard:
    """Encode the pieces of speech in batches of one shape, and keep the samples without fault."""
    counts = Counter[str]()
    shard = shards.Shard([], [], counts, {})
    recorded: list[SpokenSample] = []
    pending: list[tuple[SpokenSample, Piece]] = []

    def finish() -> None:
        sounding = [piece for _, piece in pending if piece.waveform is not None]
        waveforms = [np.asarray(piece.waveform) for piece in sounding]
        for piece, codes in zip(sounding, quantizer.encode(waveforms, batch_size), strict=True):
            piece.codes = codes
        if round_trip:
            _judge([pair for pair in pending if pair[1].text], round_trip, counts)
        for item, piece in pending:
            if item.sample["id"] not in examples:
                piece.waveform = None
        pending.clear()

    for item in samples:
        if isinstance(item, Reject):
            shard.rejects.append({"id": item.id, "reason": item.reason})
            continue
        recorded.append(item)
        for piece in item.pieces:
            pending.append((item, piece))
            if len(pending) == batch_size:
                finish()
    finish()
    example_rows = []
    for item in recorded:
        if item.fault:
            shard.rejects.append({"id": item.sample["id"], "reason": item.fault})
            continue
        if item.sample["id"] in examples:
            example_rows.append(len(shard.rows))
            for number, piece in enumerate(item.pieces):
                if piece.waveform is not None:
                    name = example_name(len(shard.rows), number)
                    shard.files[name] = decoding.encode(piece.waveform, "FLAC")
        shard.rows.append(_row(item))
        counts["split"] += sum(piece.part == 0 for piece in item.pieces)
        counts["pieces"] += sum(piece.part is not None for piece in item.pieces)
    if example_rows:
        shard.files[EXAMPLES] = json.dumps(example_rows).encode()
    return shard


def _judge(
    spoken: list[tuple[SpokenSample, Piece]], round_trip: RoundTrip, counts: Counter[str]
) -> None:
    """Note each piece's transcript, count its errors by voice, and the first reason to reject a
    sample as its fault."""
    clips = [SynthesizedClip(p.text or "", np.asarray(p.codes), p.waveform) for _, p in spoken]
    for (item, piece), verdict in zip(spoken, round_trip.judge(clips), strict=True):
        piece.about |= {"heard": verdict.transcript, "wer": verdict.wer}
        item.fault = item.fault or verdict.reason
        counts[f"heard/{piece.voice}"] += 1
        counts[f"words/{piece.voice}"] += verdict.words
        counts[f"wrong/{piece.voice}"] += round(verdict.wer * verdict.words)
        if verdict.reason:
            counts[f"refused/{piece.voice}"] += 1


def _row(item: SpokenSample) -> dict[str, Any]:
    sample, conversation = item.sample, item.conversation
    turns, numbers = [], count()
    for turn in item.turns:
        segments = []
        for segment in turn["segments"]:
            if "text" in segment:
                segments.append(segment)
                continue
            id, offset = f"{sample['id']}/{next(numbers)}", 0.0
            for piece in segment["pieces"]:
                segments.append({"speech": _speech(piece, id, offset)})
                offset += piece.seconds
        turns.append({"role": turn["role"], "segments": segments})
    origin = {"source": conversation.source, "text": conversation.id, "kind": sample["kind"]}
    extra = {**conversation.extra, **origin}
    return {"id": sample["id"], "turns": turns, "extra": json.dumps(extra, sort_keys=True)}


def _speech(piece: Piece, id: str, offset: float) -> dict[str, Any]:
    codes, whole = np.asarray(piece.codes), piece.part is None
    uri = f"synthetic:{piece.voice or piece.about['sound']}"
    if "shuffled" in piece.about:
        codes = np.random.default_rng(piece.seed).permutation(codes)
    return {
        "id": id if whole else f"{id}#{piece.part}",
        "codes": codes.astype(np.uint16),
        "seconds": piece.seconds,
        "text": piece.text,
        "speaker": piece.voice,
        "language": piece.language,
        "source": {"uri": uri, "offset": offset, "seconds": piece.seconds, "sha256": None},
        "parent": None if whole else id,
        "part": piece.part,
        "extra": json.dumps({"seed": piece.seed, **piece.about}, sort_keys=True),
    }
