"""Kill trainings at random steps, resume them, and compare with trainings that were left alone.

    just prove resume       (about 20 minutes on two cores)

Every setting (1 or 2 ranks, accumulation 1 or 4, loader workers 0 or 2; packed) is run undisturbed
once, then killed with SIGKILL at five random steps, each time started again, and once stopped with
SIGTERM; 8-bit moments on 2 and 3 ranks of unequal parts are killed once, with one cache of compiled
code for all starts. A state is written every 3 steps, in the background. The last line says how
many of the runs end with the weights of the undisturbed one, bit by bit, and with the same losses.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from speechfuse.tokens.vocabulary import read_config
from speechfuse.train.state import complete_steps
from tests.small_training import (
    ROOT,
    command,
    kill,
    lines,
    losses,
    make_parts,
    recipe,
    train,
    weights,
)

KILLS = 5


def stopped(config: Path, out: Path, ranks: int, step: int, how: signal.Signals) -> None:
    """Start a run, and end it once step `step` stands in its metrics: by SIGKILL of all its
    processes, or by SIGTERM to the first of them."""
    metrics, began = out / "metrics.jsonl", time.time_ns()
    process = subprocess.Popen(
        command(config, ranks), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (
        metrics.exists()
        and metrics.stat().st_mtime_ns > began
        and metrics.read_bytes().count(b"\n") >= step
    ):
        assert process.poll() is None, f"{config}: it ended by itself before step {step}"
        time.sleep(0.002)
    if how == signal.SIGKILL:
        kill(process)
    else:
        process.terminate()
        process.wait()
        saved = max(complete_steps(out / "state"))
        assert saved >= step, f"{config}: SIGTERM at {step}, the newest state is of {saved}"
    assert not (out / "manifest.json").exists(), f"{config}: it was through at step {step}"


def same(out: Path, reference: Path) -> bool:
    if not (out / "manifest.json").exists():
        return False
    ours, theirs = weights(out), weights(reference)
    return losses(out) == losses(reference) and all(
        torch.equal(ours[name], tensor) for name, tensor in theirs.items()
    )


def kill_and_compare(
    parts: Path, name: str, ranks: int, kills: int, **changes: Any
) -> Iterator[bool]:
    """Yield whether a run ends as undisturbed, for SIGKILL at `kills` steps and for SIGTERM."""
    reference = parts / f"{name}-whole"
    done = train(recipe(parts, reference, **changes), ranks)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-1000:]}")
    steps = len(lines(reference))
    assert losses(reference)[-1] < 0.5 * losses(reference)[0], "it must learn"
    places = sorted(random.sample(range(3, steps - 2), kills))
    for how, at in ((signal.SIGKILL, places), (signal.SIGTERM, [steps // 2])):
        out = parts / f"{name}-{how.name}"
        config = recipe(parts, out, **changes)
        for step in at:
            stopped(config, out, ranks, step, how)
        train(config, ranks)
        result = "bit-equal" if same(out, reference) else "DIFFERS"
        print(f"{name} {how.name} at {at} of {steps} steps: {result}", flush=True)
        yield result == "bit-equal"


def settings(parts: Path) -> Iterator[bool]:
    for ranks, accumulation, workers in itertools.product((1, 2), (1, 4), (0, 2)):
        yield from kill_and_compare(
            parts,
            f"ranks{ranks}-accumulation{accumulation}-workers{workers}",
            ranks,
            KILLS,
            micro_batch_size=8 // ranks // accumulation,
            batch_size=8,
            epochs=6,
            runtime={"state_every": 3, "loader_workers": workers},
        )


def shared_compiler_cache(parts: Path) -> Iterator[bool]:
    """8-bit moments, whose update torchao compiles: ranks with parts of unequal size, and the code
    of the first start in the cache of the next ones."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(parts / "inductor")
    rows = read_config(parts / "expanded")["vocab_size"]
    assert rows % 2 and rows % 3, f"{rows} rows would make equal parts"
    optimizer = {"_component_": "torchao.optim.AdamW8bit", "lr": 3e-3}
    for ranks in (2, 3):
        changes = {"batch_size": 6, "epochs": 6, "optimizer": optimizer}
        changes["runtime"] = {"state_every": 3}
        yield from kill_and_compare(parts, f"ranks{ranks}-8bit", ranks, 1, **changes)


def main() -> None:
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        small = make_parts(Path(folder) / "small")
        uneven = make_parts(Path(folder) / "uneven", width=64, codes=19)
        results = [*settings(small), *shared_compiler_cache(uneven)]
    print(f"{sum(results)} of {len(results)} bit-equal")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
