"""How much speech espeak-ng makes, and how many codes come out at the other end.

    just bench voices [workers=2 texts=400 words=12 rounds=3 out=FILE.json]      (about 3 minutes)

Texts of `words` common words in every voice of two accents. Speech per wall clock is the median of
`rounds`, in `workers` processes that have started: text to waveform; the same and a chain of
augmentation (reverberation, noise, a codec, each for some); the same and the demo's quantizer, in
batches as the job makes them; and the whole job (plan, processes that start, shards, manifest).
"""

import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechfuse import artifact, workers
from speechfuse.audio import augmentation, decoding
from speechfuse.quantizer.model import Quantizer
from speechfuse.rows import rejects, shards
from speechfuse.synthesis.engines.espeak import Espeak
from stages import synthesize_instructions

ROOT = Path(__file__).parent.parent
QUANTIZER = ROOT / "recipes/demo/models/quantizer"
DEFAULTS = {"workers": "2", "texts": "400", "words": "12", "rounds": "3", "out": ""}
WORDS = (
    "what is the name of a small river that runs under old houses and why do people in cold "
    "countries like to drink tea with milk before they go out"
).split()
VOICES: dict[str, Any] = {
    "accents": ["en-us", "en-gb-scotland"],
    "variants": ["Annie", "m3", "Reed"],
}
STEPS: list[dict[str, Any]] = [
    {"_component_": "speechfuse.audio.Reverberation", "probability": 0.3},
    {"_component_": "speechfuse.audio.Noise", "snr": [5, 30], "probability": 0.5},
    {"_component_": "speechfuse.audio.Lossy", "probability": 0.2},
]
BATCH = 16


def work(way: str, texts: list[str], first: int) -> tuple[float, int]:
    """Seconds of speech and codes of some texts, in a worker process."""
    engine, seconds, waiting, codes = Espeak(**VOICES), 0.0, [], 0
    quantizer = Quantizer.load(QUANTIZER) if way == "codes" else None
    names = engine.voices()
    for i, text in enumerate(texts, first):
        waveform = engine.speak(text, names[i % len(names)], i).waveform
        assert waveform is not None
        if way != "speech":
            waveform, _ = augmentation.apply(waveform, STEPS, i)
        seconds += len(waveform) / decoding.SAMPLE_RATE
        waiting += decoding.split(waveform, quantizer.window) if quantizer else []
    for at in range(0, len(waiting), BATCH):
        assert quantizer
        codes += sum(map(len, quantizer.encode(waiting[at : at + BATCH], BATCH)))
    return seconds, codes


def curated(folder: Path, texts: list[str]) -> Path:
    """The texts as stages.curate_texts leaves them."""
    made = artifact.Artifact(folder, "bench", 1, {}, {})
    made.begin()
    rows = (
        {
            "id": f"text-{i}",
            "turns": [
                {"role": "user", "segments": [{"text": text}]},
                {"role": "assistant", "segments": [{"text": "yes"}]},
            ],
            "extra": json.dumps({"source": "bench"}),
        }
        for i, text in enumerate(texts)
    )
    path = folder / shards.shard_name(0)
    shards.write_shard(path, rows, shards.CONVERSATIONS)
    rejects.write_rejects(path, [])
    made.finish({"rows": len(texts)}, [path])
    return folder


def job(folder: Path, number: int, count: int, augment: bool) -> tuple[float, int]:
    """Seconds of speech and codes that the whole job makes."""
    out = folder / f"out-{number}"
    synthesize_instructions.main(
        synthesize_instructions.SynthesizeInstructions(
            out=str(out),
            texts=str(folder / "texts"),
            kinds={
                "instruction": {"_component_": "speechfuse.synthesis.Instruction", "share": 1.0}
            },
            voices={"espeak": {"_component_": "speechfuse.synthesis.Espeak", **VOICES}},
            augmentation=STEPS if augment else [],
            shard_size=100,
            quantizer=synthesize_instructions.QuantizerSpec(str(QUANTIZER)),
            runtime=synthesize_instructions.Runtime(workers=count, device="cpu"),
        )
    )
    totals = artifact.manifest_of(out)["totals"]
    return totals["hours"] * 3600, totals["codes"]


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if unknown := given.keys() - DEFAULTS.keys():
        sys.exit(f"error: unknown key {', '.join(unknown)}; there are {', '.join(DEFAULTS)}")
    options = DEFAULTS | given
    count, texts, words = (int(options[key]) for key in ("workers", "texts", "words"))
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=words)).capitalize() + "." for _ in range(texts)]
    parts = [(lines[at : at + 25], at) for at in range(0, texts, 25)]
    found: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, begin: float, made: list[tuple[float, int]]) -> None:
        wall = time.perf_counter() - begin
        seconds, codes = (sum(column) for column in zip(*made, strict=True))
        found.setdefault(name, []).append((seconds / 60 / wall, codes / wall))

    with tempfile.TemporaryDirectory() as temporary, workers.pool(count) as pool:
        folder = Path(temporary)
        curated(folder / "texts", lines)
        ways = {
            "speech": "speech",
            "augmented": "speech, augmented",
            "codes": "augmented, to codes",
        }
        for way in ways:  # the processes start, and load what they need
            list(pool.map(work, [way] * count, [lines[:2]] * count, [0] * count))
        for number in tqdm(range(int(options["rounds"])), "rounds"):
            for way, name in ways.items():
                begin = time.perf_counter()
                names, some, first = zip(*((way, *part) for part in parts), strict=True)
                note(name, begin, list(pool.map(work, names, some, first)))
            begin = time.perf_counter()
            note("the whole job, augmented", begin, [job(folder, number, count, True)])
    machine = f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}"
    print(
        f"{texts} texts of {words} words, {count} processes, median of {options['rounds']};",
        machine,
    )
    print("| way | hours of speech per minute | x real time | codes/s |\n|---|---|---|---|")
    table = {}
    for name, rounds in found.items():
        hours, rate = (statistics.median(column) for column in zip(*rounds, strict=True))
        table[name] = {
            "hours_per_minute": hours,
            "x_real_time": hours * 60,
            "codes_per_second": rate,
        }
        print(f"| {name} | {hours:.2f} | {hours * 60:,.0f} | {f'{rate:,.0f}' if rate else '-'} |")
    if options["out"]:
        Path(options["out"]).write_text(json.dumps({"options": options, "ways": table}, indent=1))


if __name__ == "__main__":
    main()
