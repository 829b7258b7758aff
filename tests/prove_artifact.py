"""Begin one folder by two jobs at once, kill both at random moments, and look for a mixture.

    just prove artifact                 (about 4 minutes on two cores)

Two jobs that differ in one key start within 0.3 s of each other on the same folder; both plan for a
while, and every shard says which job made it. After a random time both are killed with SIGKILL.
That is done KILLS times on one folder, then both run to their end. At every moment all shards must
be of the job that is in plan.json, which never changes, and at the end one job is complete with the
rows of a run that was left alone, and the other refused in one sentence. The last line counts.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from speechfuse import config
from speechfuse.artifact import Artifact
from speechfuse.rows import making, shards

KILLS, ROUNDS, SHARDS = 20, 3, 400


@dataclass
class Job:
    out: str
    batch_size: int
    fresh: bool = False
    runtime: making.Workers = field(default_factory=lambda: making.Workers(1, "cpu"))


def plan(job: Job) -> list[dict[str, Any]]:
    time.sleep(random.uniform(0, 1.5))  # as a corpus does that is looked through
    return [{"count": job.batch_size, "number": i} for i in range(SHARDS)]


def shard(planned: dict[str, Any]) -> shards.Shard:
    time.sleep(0.01)
    rows = [{"id": f"{planned['number']}/{i}"} for i in range(planned["count"])]
    return shards.Shard(rows, [], {})


def main(job: Job) -> None:
    work = Artifact(Path(job.out), "prove_artifact", 1, {"batch_size": job.batch_size}, {})
    making.make_dataset(
        job,
        work,
        partial(plan, job),
        shard,
        "row",
        shards.SPEECH,
        None,
        lambda paths, rejects: {"rows": job.batch_size * len(paths), "rejected": {}},
        lambda out, totals: f"{out}: {totals['rows']} rows",
    )


def start(out: Path, size: int) -> subprocess.Popen:
    command = [sys.executable, __file__, f"out={out}", f"batch_size={size}"]
    command += ["runtime.engine._component_=tests.prove_artifact.here"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes)  # type: ignore[call-overload]


def here(function: Any, tasks: list[tuple], workers: int, device: str) -> Any:
    """An engine without processes of its own, which start slowly."""
    return (function(*task) for task in tasks)


def locked_since(out: Path, moment: float) -> bool:
    path = out / ".lock"
    return path.exists() and path.stat().st_mtime > moment


def sizes(out: Path) -> set[int]:
    """The jobs, by their batch_size, that plan.json and the shards are of."""
    paths = list(out.glob("shard-*.parquet"))
    sizes = {sum(1 for _ in shards.read_shard(path)) for path in paths}
    if (out / "plan.json").exists():
        sizes.add(json.loads((out / "plan.json").read_text())["config"]["batch_size"])
    return sizes


def begun_twice(out: Path, rng: random.Random) -> str:
    """Return what was wrong with one folder, "" where nothing was."""
    seen, of_plan = [], set[str]()
    for _ in range(KILLS):
        began, order = time.time(), rng.sample([16, 64], 2)
        jobs = [start(out, order[0])]
        time.sleep(rng.uniform(0, 0.3))
        jobs.append(start(out, order[1]))
        while not locked_since(out, began):  # imports are not what is proved
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        for job in jobs:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
        seen.append(sizes(out))
        if (out / "plan.json").exists():
            of_plan.add((out / "plan.json").read_text())
        if len(seen[-1]) > 1 or len(of_plan) > 1:
            return f"plan and shards of {seen[-1]}, {len(of_plan)} plans"
        if (out / "manifest.json").exists():
            return "it was complete before all kills: make it longer"
    ends = []
    for size in (16, 64):
        job = start(out, size)
        ends.append((job.communicate()[1], job.returncode))
    good = [size for size, (_, code) in zip((16, 64), ends, strict=True) if code == 0]
    errors = [error for error, code in ends if code]
    one = len(good) == 1 and sizes(out) == {*good} and len(list(out.glob("*.parquet"))) == SHARDS
    lines = [line for error in errors for line in error.splitlines() if "error:" in line]
    if not one or len(lines) != 1 or "Traceback" in errors[0] or "batch_size" not in lines[0]:
        return f"at the end {good}, {sizes(out)}, {errors}"
    return ""


def prove() -> None:
    rng = random.Random(time.time_ns())
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(ROUNDS):
            fault = begun_twice(Path(temporary) / f"data {number}", rng)
            print(f"folder {number}: {fault or 'one dataset, one plan'}", flush=True)
            wrong += [fault] if fault else []
    print(f"{ROUNDS - len(wrong)} of {ROUNDS} folders are one dataset of one plan")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    config.main(main, Job, __doc__) if sys.argv[1:] else prove()
