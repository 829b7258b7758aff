"""Kill trainings at random steps, resume them, and compare with trainings that were left alone.

    just prove resume       (about 20 minutes on two cores)

Every setting (1 or 2 ranks, accumulation 1 or 4, loader workers 0 or 2; packed) is run undisturbed
once, then killed with SIGKILL at five random steps, each time started again, and once stopped with
SIGTERM. A state is written every 3 steps, in the background. The last line says how many of the
runs end with the weights of the undisturbed one, bit by bit, and with the same losses.
"""

import itertools
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

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


def main() -> None:
    random.seed(0)
    equal = total = 0
    with tempfile.TemporaryDirectory() as folder:
        parts = make_parts(Path(folder))
        for ranks, accumulation, workers in itertools.product((1, 2), (1, 4), (0, 2)):
            name = f"ranks{ranks}-accumulation{accumulation}-workers{workers}"
            changes = {
                "micro_batch_size": 8 // ranks // accumulation,
                "batch_size": 8,
                "epochs": 6,
                "runtime": {"state_every": 3, "loader_workers": workers},
            }
            reference = Path(folder) / f"{name}-whole"
            done = train(recipe(parts, reference, **changes), ranks)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr[-1000:]}")
            steps = len(lines(reference))
            assert losses(reference)[-1] < 0.5 * losses(reference)[0], "it must learn"
            kills = sorted(random.sample(range(3, steps - 2), KILLS))
            for how, places in ((signal.SIGKILL, kills), (signal.SIGTERM, [steps // 2])):
                out = Path(folder) / f"{name}-{how.name}"
                config = recipe(parts, out, **changes)
                for step in places:
                    stopped(config, out, ranks, step, how)
                train(config, ranks)
                total += 1
                equal += same(out, reference)
                said = "bit-equal" if same(out, reference) else "DIFFERS"
                print(f"{name} {how.name} at {places} of {steps} steps: {said}", flush=True)
    print(f"{equal} of {total} bit-equal")
    sys.exit(equal != total)


if __name__ == "__main__":
    main()
