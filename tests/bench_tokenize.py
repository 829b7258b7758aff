"""How fast speech becomes codes, and against one clip at a time.

    just bench tokenize                              (a small encoder on the CPU, about 4 minutes)
    just bench tokenize size=medium device=cuda      (Whisper medium's dimensions on one GPU)

Keys: size=micro|tiny|medium, device=cpu|cuda, threads=N (that decode), batch=N, repeats=N, clips=N,
only=PATTERN (ways that this regular expression fits), out=FILE.json. Weights are random: they serve
for speed. Speeds are seconds of audio per second, the
median of `repeats` rounds in which the ways take turns. The baseline does what the original did:
everything decoded first, then one clip per forward in float32. The pipeline is
`speechfuse.quantizer.tokenize.tokenize` and the writing of the shard.
"""

import json
import math
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from speechfuse import workers
from speechfuse.audio import espeak_ng
from speechfuse.corpora import clip
from speechfuse.corpora.clip import Clip
from speechfuse.corpora.folder import Folder
from speechfuse.quantizer import tokenize
from speechfuse.quantizer.encoder import PADDING
from speechfuse.quantizer.model import Quantizer, QuantizerConfig
from speechfuse.rows import shards

SIZES = {"micro": (16, 1, 1), "tiny": (384, 6, 4), "medium": (1024, 16, 24)}  # width, heads, layers
BASELINE = "one clip at a time, float32"
DEFAULTS = {
    "size": "tiny",
    "device": "cpu",
    "threads": "2",
    "batch": "16",
    "repeats": "3",
    "clips": "32",
    "only": "",
    "out": "",
}


def make_corpus(path: Path, clips: int) -> float:
    """Spoken clips of 4 to 20 s as FLAC at 16 kHz; 32 different ones under many names. Seconds."""
    rng, total = random.Random(0), 0.0
    with espeak_ng.EspeakLibrary() as engine:
        for i in range(clips):
            if i >= 32:
                os.link(path / f"{i % 32:06d}.flac", path / f"{i:06d}.flac")
            else:
                text = " ".join(rng.choices(["seven", "orange", "rivers", "under"], k=60))
                spoken = engine.speak(text, espeak_ng.EspeakVoice("en-us+Annie")).waveform
                length = int(rng.uniform(4, 20) * 16_000)
                soundfile.write(path / f"{i:06d}.flac", np.resize(spoken, length), 16_000)
            total += soundfile.info(path / f"{i:06d}.flac").duration
    return total


def timed(work: Callable[[], object], device: str) -> float:
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def quantizer_of(size: str, device: str) -> Quantizer:
    """A quantizer of random weights."""
    torch.manual_seed(0)
    width, heads, layers = SIZES[size]
    quantizer = Quantizer(QuantizerConfig(512, 64, 2, True, 80, 1500, width, heads, layers))
    torch.nn.init.normal_(quantizer.codebook)
    return quantizer.eval().to(device)


def speeds(options: dict[str, str]) -> tuple[float, dict[str, float]]:
    """Seconds of the corpus, and the median speed of each way."""
    device, batch, threads = options["device"], int(options["batch"]), int(options["threads"])
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    quantizer = quantizer_of(options["size"], device)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary)
        seconds = make_corpus(path, int(options["clips"]))
        corpus = Folder(str(path))
        (shard,) = corpus.plan(10**6)

        def clips() -> list[Clip]:
            return list(corpus.clips(shard))

        def decode() -> list[np.ndarray]:
            found = workers.prefetch(clip.decode, clips(), threads, 4 * batch)
            return [decoded.waveform for decoded in found]

        # for the parts on their own: at least 32 clips, and whole batches, since a forward of a
        # batch that is not full takes as long
        windows = batch * math.ceil(32 / batch)
        decoded = [clip.decode(each).waveform for each in clips()[:32]]
        few = list(islice(cycle(decoded), windows))
        share = sum(map(len, few)) / 16_000 / seconds
        full = torch.full((batch, 80, quantizer.frames), PADDING, device=device)

        def mel() -> None:
            for waveform in few:
                quantizer.mel(waveform)

        @torch.inference_mode()
        def encode() -> None:
            bf16 = quantizer.dtype != torch.float32
            for _ in range(0, len(few), batch):
                with torch.autocast(device, torch.bfloat16, enabled=bf16):
                    embedded = quantizer.embed(full)
                quantizer.quantize(embedded.float())

        def one_at_a_time() -> None:
            for waveform in few:
                quantizer.encode([waveform], 1)

        def pipeline() -> None:
            made = tokenize.tokenize(clips(), quantizer, batch, [], threads, 4 * batch)
            shards.write_shard(
                path / "out.parquet", made.rows, shards.SPEECH, quantizer.stream, made.counts
            )

        f32, bf16 = torch.float32, torch.bfloat16
        ways: list[tuple[str, Callable[[], object], torch.dtype, float]] = [
            ("decode", decode, f32, 1.0),
            ("mel", mel, f32, share),
            ("encode, float32", encode, f32, share),
            ("encode, bfloat16", encode, bf16, share),
            ("pipeline, float32", pipeline, f32, 1.0),
            ("pipeline, bfloat16", pipeline, bf16, 1.0),
            (BASELINE, one_at_a_time, f32, share),
        ]
        ways = [way for way in ways if re.search(options["only"], way[0])]
        if device == "cpu":  # where bfloat16 is emulated and slower
            ways = [way for way in ways if way[2] == f32]
        times: dict[str, list[float]] = {name: [] for name, *_ in ways}
        for dtype in {way[2] for way in ways}:  # the first forwards choose their kernels
            quantizer.dtype = dtype
            encode()
        for _ in tqdm(range(int(options["repeats"])), "rounds"):
            for name, work, dtype, part in ways:
                quantizer.dtype = dtype
                times[name].append(part * seconds / timed(work, device))
    return seconds, {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if unknown := given.keys() - DEFAULTS.keys():
        sys.exit(f"error: unknown key {', '.join(unknown)}; there are {', '.join(DEFAULTS)}")
    options = DEFAULTS | given
    seconds, found = speeds(options)
    machine = {
        "cpu": f"{os.cpu_count()} x {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if options["device"] == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(f"{seconds / 3600:.2f} h of audio, {options}, {machine}")
    print("| way | x real time | to one clip at a time |\n|---|---|---|")
    for name, speed in found.items():
        ratio = f"{speed / found[BASELINE]:.2f}" if BASELINE in found else ""
        print(f"| {name} | {speed:,.1f} | {ratio} |")
    if options["out"]:
        Path(options["out"]).write_text(
            json.dumps({"options": options, "machine": machine, "x_real_time": found}, indent=1)
        )


if __name__ == "__main__":
    main()
