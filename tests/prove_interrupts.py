"""Press Ctrl-C twice at random moments of four jobs, and go on.

    just prove interrupts               (about 15 minutes on two cores)

tokenize, train (alone and on two ranks), sweep and synthesize get two SIGINTs within 0.2 s, as a
terminal sends them (to all processes of the job) or the first process alone gets them. After at
most 3 s the job must have ended, with 130 and without a traceback, and no process of it may be
left. Each is then started again, and at the end its result is compared with that of a run that was
left alone. The last line counts.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.small_jobs import Job, make
from tests.small_training import ROOT

INTERRUPTS = {"tokenize": 13, "train": 10, "train on 2 ranks": 10, "sweep": 10, "synthesize": 12}
LIMIT = 3.0  # seconds


def start(job: Job, out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        job.command(out),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(job: Job, out: Path) -> float:
    """Run a job to its end; return its seconds."""
    began, process = time.monotonic(), start(job, out)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(job.arguments)}: exit {process.returncode}: {errors[-800:]}")
    return time.monotonic() - began


def family(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        first = psutil.Process(process.pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def alive(each: psutil.Process) -> bool:
    try:
        return each.is_running() and each.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def interrupt(job: Job, out: Path, after: float, gap: float, group: bool) -> str | None:
    """Start a job and interrupt it twice; return what was wrong, "" if nothing, None where it had
    ended before."""
    process = start(job, out)
    time.sleep(after)
    processes = family(process)
    if process.poll() is not None:
        process.communicate()
        return None
    send = os.killpg if group else os.kill
    send(process.pid, signal.SIGINT)
    began = time.monotonic()
    time.sleep(gap)
    processes += family(process)
    if process.poll() is None:
        send(process.pid, signal.SIGINT)
    while any(map(alive, processes)) and time.monotonic() - began < LIMIT:
        process.poll()
        time.sleep(0.02)
    left = [each for each in processes if alive(each)]
    names = [" ".join(each.cmdline()[1:4]) or each.name() for each in left]
    for each in left:
        each.kill()
    _, errors = process.communicate()
    if left:
        return f"{len(left)} processes are left after {LIMIT} s: {names}"
    if process.returncode == -signal.SIGINT:  # before the first line of the job, or after its last
        return ""
    if process.returncode != 130:
        return f"exit {process.returncode}: {errors[-600:]}"
    noise = errors.find("Traceback") if "Traceback" in errors else errors.find("leaked")
    return f"it says {errors[noise : noise + 3000]}" if noise >= 0 else ""


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    rng = random.Random(time.time_ns())
    names = [name for name in INTERRUPTS if name in sys.argv[1:] or not sys.argv[1:]]
    good = total = equal = 0
    with tempfile.TemporaryDirectory() as temporary:
        jobs = make(Path(temporary), names)
        for name, job in jobs.items():
            whole, seconds = Path(temporary) / f"{name} whole", 0.0
            seconds = finish(job, whole)
            reference, out, done = job.result(whole), Path(temporary) / f"{name} 0", 0
            while done < INTERRUPTS[name]:
                # not before the job's own code runs: until then Python itself says what it will
                after = rng.uniform(1, max(2, seconds))
                wrong = interrupt(job, out, after, rng.uniform(0, 0.2), rng.random() < 0.7)
                if wrong is None:
                    out = Path(temporary) / f"{name} {done}"
                    continue
                done, total, good = done + 1, total + 1, good + (not wrong)
                print(f"{name} after {after:.1f} s: {wrong or 'ended'}", flush=True)
            finish(job, out)
            equal += job.result(out) == reference
            print(f"{name}: resumed, {'equal' if job.result(out) == reference else 'DIFFERS'}")
    print(f"{good} of {total} ended within {LIMIT:g} s, {equal} of {len(jobs)} results equal")
    sys.exit(good != total or equal != len(jobs))


if __name__ == "__main__":
    main()
