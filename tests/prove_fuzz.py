"""Read random mutations of valid files of every format and list what becomes of them.

    just prove fuzz                             (100,000 mutations; about an hour on two cores)
    PYTHONPATH=. python tests/prove_fuzz.py 2000            (so many)
    PYTHONPATH=. python tests/prove_fuzz.py "nemo tar" 17   (one of them, with its traceback)

Formats, mutations and readers are those of tests/fuzzing.py; mutation 17 of a format is the same in
every run. Two processes read them; one that crashes or hangs is ended and replaced, and the
mutation is a fault. The table has a line for each format: mutations, read, rejected (all that is in
it), refused (one sentence), faults. The faults follow, by format and number.
"""

import os
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tests import fuzzing

TOTAL, WORKERS = 100_000, 2
HANGS = fuzzing.TIME_LIMIT + 5  # seconds until a reader that no alarm ends is a fault
COLUMNS = ("read", "rejected", "refused", "fault")


def work(first: int, total: int, results: Connection) -> None:
    """Try the mutations `first`, `first` + WORKERS, ...: send (number, None) before each and
    (number, outcome) after it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders print there what they think of a file
    with tempfile.TemporaryDirectory() as folder:
        seeds = fuzzing.seeds(Path(folder))
        originals = [(Path(folder) / seed.name).read_bytes() for seed in seeds]
        for number in range(first, total, WORKERS):
            results.send((number, None))
            which, turn = number % len(seeds), number // len(seeds)
            content = fuzzing.mutation(seeds[which], originals[which], turn)
            try:
                outcome = fuzzing.try_one(seeds[which], content, Path(folder))
            except fuzzing.Fault as fault:
                outcome = f"fault: {fault!s:.150}"
            results.send((number, outcome))


def run(total: int) -> dict[int, str]:
    """Return {number of the mutation: outcome} of all."""
    outcomes: dict[int, str] = {}
    workers: dict[Connection, tuple[Process, int, float]] = {}  # process, mutation, since when

    def start(first: int) -> None:
        results, end = Pipe(duplex=False)
        process = Process(target=work, args=(first, total, end), daemon=True)
        process.start()
        end.close()
        workers[results] = (process, first, time.monotonic())

    for first in range(WORKERS):
        start(first)
    while workers:
        for results in wait(list(workers), timeout=1):
            assert isinstance(results, Connection)
            process = workers[results][0]
            try:
                number, outcome = results.recv()
            except EOFError:
                process.join()
                _, number, _ = workers.pop(results)
                if number + WORKERS < total or (number not in outcomes and number < total):
                    outcomes[number] = f"fault: the process ended with {process.exitcode}"
                    start(number + WORKERS)
                continue
            workers[results] = (process, number, time.monotonic())
            if outcome:
                outcomes[number] = outcome
        for results, (process, number, since) in list(workers.items()):
            if number not in outcomes and time.monotonic() - since > HANGS:
                process.kill()
                del workers[results]
                outcomes[number] = f"fault: it hangs for over {HANGS} s"
                start(number + WORKERS)
    return outcomes


def table(outcomes: dict[int, str], formats: list[str]) -> str:
    lines = [f"{'format':16}{'mutations':>10}" + "".join(f"{name:>10}" for name in COLUMNS)]
    counts: Counter[tuple[int | None, str]] = Counter(
        (number % len(formats), o.split(":")[0]) for number, o in outcomes.items()
    )
    for (_, outcome), mutations in list(counts.items()):
        counts[None, outcome] += mutations
    for which, format in [*enumerate(formats), (None, "all")]:
        row = [counts[which, column] for column in COLUMNS]
        lines.append(f"{format:16}{sum(row):10,}" + "".join(f"{each:10,}" for each in row))
    faults = [
        f"{formats[number % len(formats)]!r} {number // len(formats)}: {outcome}"
        for number, outcome in sorted(outcomes.items())
        if outcome.startswith("fault")
    ]
    return "\n".join([*lines, *faults])


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        seeds = fuzzing.seeds(Path(folder))
        if len(arguments) == 2:
            (seed,) = (seed for seed in seeds if seed.format == arguments[0])
            original = (Path(folder) / seed.name).read_bytes()
            content = fuzzing.mutation(seed, original, int(arguments[1]))
            print(fuzzing.try_one(seed, content, Path(folder)))
            return
    began = time.monotonic()
    outcomes = run(int(arguments[0]) if arguments else TOTAL)
    print(table(outcomes, [seed.format for seed in seeds]))
    faults = sum(outcome.startswith("fault") for outcome in outcomes.values())
    print(f"{len(outcomes):,} mutations in {time.monotonic() - began:.0f} s, {faults} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main(sys.argv[1:])
