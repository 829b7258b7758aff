"""How long a training's data takes to be ready, and how much memory, by the size of the dataset.

    just bench startup [tokens=100000000]

Writes a dataset of random codes (clips of 10 to 20 s) with so many sound tokens and one with ten
times fewer, and opens each as a training does, in a process of its own: the first time, when the
index and the plan are made, and a second time. Then the first step is rendered. The last lines are
a table of seconds and peak memory.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from speechfuse import artifact
from speechfuse.rows import shards
from tests.small_training import STREAM, make_parts, recipe

ROWS = 2000  # of a shard
OPEN = """
import json, resource, sys, time
from pathlib import Path
from speechfuse import config
from speechfuse.samples import datasets
from speechfuse.train import plan
from speechfuse.train.config import Finetune
job = config.load(Finetune, Path(sys.argv[1]), [])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
mixture = plan.load_data(job, {})
ready = time.perf_counter() - started
datasets.Batches(mixture, 0, 1, 16)[0]
first = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
counts = mixture.plan.counts
useful = counts.tokens / (counts.steps * job.batch_size * job.seq_len)
print(json.dumps([ready, first, before / 1024, peak / 1024, counts.tokens, useful]))
"""


def write(folder: Path, tokens: int) -> None:
    """A dataset of random codes with about so many sound tokens."""
    work = artifact.Artifact(folder, "bench", 1, {"tokens": tokens}, {})
    work.begin()
    rng = np.random.default_rng(0)
    paths, made = [], 0
    while made < tokens:
        rows = []
        for number in range(ROWS):
            codes = rng.integers(0, 16, rng.integers(250, 500), dtype=np.uint16)
            rows.append({"id": f"{len(paths)}-{number}", "codes": codes, "extra": "{}"})
            made += len(codes) + 4
        paths.append(folder / shards.shard_name(len(paths)))
        shards.write_shard(paths[-1], rows, shards.SPEECH, STREAM)
    work.finish({}, paths)


def main() -> None:
    given = dict(argument.split("=") for argument in sys.argv[1:])
    tokens = int(given.get("tokens", 100_000_000))
    print("| tokens | start | data ready (s) | with the first step (s) | peak MB | of it imports |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        parts = make_parts(Path(place))
        for size in (tokens // 10, tokens):
            folder = Path(place) / str(size)
            began = time.perf_counter()
            write(folder, size)
            print(f"written in {time.perf_counter() - began:.0f} s", file=sys.stderr)
            config = recipe(parts, folder.with_name("run"), seq_len=4096, batch_size=16)
            content = yaml.safe_load(config.read_text())
            content["datasets"] = [
                {"_component_": "speechfuse.samples.sound", "path": str(folder), "share": 1}
            ]
            content["runtime"]["cache"] = str(Path(place) / f"cache-{size}")
            config.write_text(yaml.safe_dump(content))
            for start in ("first", "second"):
                done = subprocess.run(
                    [sys.executable, "-c", OPEN, str(config)], capture_output=True, text=True
                )
                if done.returncode:
                    sys.exit(done.stderr)
                ready, first, before, peak, found, useful = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"| {found:,} | {start} | {ready:.2f} | {first:.2f} | {peak:,.0f} | "
                    f"{before:,.0f} |",
                    flush=True,
                )
            print(f"useful share {useful:.2%}", file=sys.stderr)


if __name__ == "__main__":
    main()
