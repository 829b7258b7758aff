"""Synthesize one dataset in many ways and compare the shards byte for byte.

    just prove synthesize               (about 8 minutes on two cores)

The texts are made here: questions, and conversations of two to five turns. Ways: one worker, two,
another number of samples ahead, and KILLS runs that are killed with SIGKILL at a random moment and
started again. Of every result each conversation of several turns must also be whole, in order and
there once. The last line says how many are identical.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from speechfuse.rows import shards
from speechfuse.texts.conversations import Conversation, Turn
from tests.test_kinds import texts

KILLS, SHARDS = 10, 18
WORDS = "one two three four five six seven eight nine ten red green blue".split()
KINDS = {
    "instruction": {"_component_": "speechfuse.synthesis.Instruction", "share": 0.3},
    "transcription": {
        "_component_": "speechfuse.synthesis.Transcription",
        "share": 0.1,
        "requests": ["repeat:", "{speech} what was that?"],
    },
    "turns": {"_component_": "speechfuse.synthesis.MultiTurn", "share": 0.4, "spoken": 0.7},
    "refusal": {
        "_component_": "speechfuse.synthesis.Refusal",
        "share": 0.1,
        "replies": ["what?"],
        "most": 4.0,
    },
    "text": {"_component_": "speechfuse.synthesis.Text", "share": 0.1},
}


def make_texts(folder: Path) -> dict[str, Conversation]:
    rng = random.Random(0)

    def turns(number: int) -> list[Turn]:
        said = [" ".join(rng.choices(WORDS, k=rng.randint(2, 7))) for _ in range(2 * number)]
        return [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]

    found = [Conversation(f"t{i}", turns(max(1, i % 8 - 2)), "made here") for i in range(400)]
    texts(folder, found, 100)
    return {conversation.id: conversation for conversation in found}


def start(config: Path, out: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "stages.synthesize_instructions", str(config), f"out={out}"]
    return subprocess.Popen(
        [*command, *overrides],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"the job failed: {errors.decode()[-500:]}")


def shards_in(out: Path) -> int:
    return len(list(out.glob("shard-*.parquet")))


def result(out: Path) -> str:
    """One hash of all shards, reject lists and totals."""
    digest = hashlib.sha256()
    for path in sorted(out.glob("shard-*")):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(json.dumps(json.loads((out / "manifest.json").read_text())["totals"]).encode())
    return digest.hexdigest()


def check_turns(out: Path, stored: dict[str, Conversation]) -> int:
    """How many conversations of several turns there are; ends where one is not as its text is."""
    seen: Counter[str] = Counter()
    for row in shards.read_rows(out):
        extra: dict[str, Any] = json.loads(row["extra"])
        if extra["kind"] != "turns":
            continue
        seen[row["id"]] += 1
        said = [
            (turn["role"], " ".join(s["text"] or s["speech"]["text"] for s in turn["segments"]))
            for turn in row["turns"]
        ]
        if said != [(turn.role, turn.text) for turn in stored[extra["text"]].turns]:
            sys.exit(f"{row['id']} is not whole and in order: {said}")
    if not seen or max(seen.values()) > 1:
        sys.exit(f"conversations are there twice, or none is: {seen.most_common(3)}")
    return len(seen)


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        outs, config = Path(temporary) / "out", Path(temporary) / "job.yaml"
        stored = make_texts(Path(temporary) / "texts")
        voices = {
            "espeak": {
                "_component_": "speechfuse.synthesis.Espeak",
                "accents": ["en-us", "en-gb-x-rp"],
                "variants": ["Annie", "m3"],
            }
        }
        steps = [
            {"_component_": "speechfuse.audio.Reverberation", "probability": 0.3},
            {"_component_": "speechfuse.audio.Noise", "snr": [5, 30], "probability": 0.5},
        ]
        config.write_text(
            yaml.safe_dump(
                {
                    "texts": f"{temporary}/texts",
                    "kinds": KINDS,
                    "voices": voices,
                    "samples": 50 * SHARDS,
                    "quantizer": {"checkpoint": "recipes/demo/models/quantizer"},
                    "batch_size": 4,
                    "augmentation": steps,
                    "shard_size": 50,
                    "runtime": {"device": "cpu"},
                    "out": "out",
                }
            )
        )
        found: dict[str, str] = {}

        def record(way: str, out: Path) -> None:
            found[way] = result(out)
            several = check_turns(out, stored)
            print(f"{found[way][:16]}  {way}; {several} of several turns, whole", flush=True)

        def whole(way: str, *overrides: str) -> float:
            begin, out = time.monotonic(), outs / way.replace(" ", "-")
            finish(start(config, out, *overrides))
            record(way, out)
            return time.monotonic() - begin

        whole("1 worker", "runtime.workers=1")
        seconds = whole("2 workers")
        whole("1 sample ahead", "runtime.prefetch=1")
        rng = random.Random(time.time_ns())
        killed = 0
        while killed < KILLS:
            out, after = outs / f"kill-{time.time_ns()}", rng.randint(-1, SHARDS - 1)
            job = start(config, out)
            while shards_in(out) < after:  # -1: before or while it plans
                time.sleep(0.005)
            time.sleep(rng.uniform(0, seconds / 3 if after < 1 else seconds / SHARDS))
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
            if (out / "manifest.json").exists():
                continue  # it had ended
            had = shards_in(out) if (out / "plan.json").exists() else "not even a plan and no"
            finish(start(config, out))
            killed += 1
            record(f"{killed}: killed with {had} shards done, resumed", out)
        same = sum(each == found["1 worker"] for each in found.values())
        print(f"{same} of {len(found)} identical")
        sys.exit(same != len(found))


if __name__ == "__main__":
    main()
