"""Whether a checkpoint is good enough for the next stage.

    python -m stages.gate recipes/demo/gate.yaml

In: the result files of the checkpoint and of the base, and thresholds. Out, on the screen: the
table that it was judged by. The exit status is 1 when a threshold is missed; 2 when there is
nothing to judge.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from speechfuse import config
from speechfuse.evals import cells
from speechfuse.report import choice, results, tables
from speechfuse.report.choice import Floor
from speechfuse.report.results import Checkpoints, Results, key


@dataclass
class Gate:
    evals: str = config.key("folder of the result files")
    checkpoint: str = config.key("what is judged, as results call it")
    base: str = config.key("checkpoint that of_base_at_least refers to")
    floors: list[Floor] = config.key("{task, split, metric, at_least | at_most | of_base_at_least}")
    path: str | None = config.key("its folder: the results must be of these very weights", None)
    protocol: str = config.key("protocol of the results", "clean")


def complete(job: Gate) -> Checkpoints:
    """The results, with every score that a threshold needs; ValueError with the cure."""
    run = job.checkpoint.partition("/")[0]
    cure = f"run the sweep of it first: just sweep only=[{run},{job.base}]"
    try:
        every = results.read(Path(job.evals), job.base, [])
        by_checkpoint = every.of(job.protocol)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{error}; {cure}") from error
    for floor in job.floors:
        needs = [job.checkpoint, *([job.base] if floor.of_base_at_least is not None else [])]
        for name in needs:
            if name not in by_checkpoint or key(floor) not in by_checkpoint[name].scores:
                what = f"no {' '.join(key(floor))} of {name} in {job.evals}"
                raise ValueError(f"{what}{why(every, name)}; {cure}")
    if job.path:
        now = cells.fingerprint(Path(job.path), Path(job.evals))
        used = {by_checkpoint[job.checkpoint].file(key(floor)).name for floor in job.floors}
        for name in used:
            if by_checkpoint[job.checkpoint].files[name].fingerprints["checkpoint"] != now:
                raise ValueError(
                    f"the result {name} of {job.checkpoint} is of other weights than {job.path} "
                    f"holds now; {cure}"
                )
    return by_checkpoint


def why(every: Results, name: str) -> str:
    failed = [f"{f.task}: {f.error}" for f in every.failures if f.checkpoint == name]
    return f" (failed: {'; '.join(failed)})" if failed else ""


def table(job: Gate, by_checkpoint: Checkpoints) -> tuple[list[list[str]], int]:
    """What each threshold asks for and finds, a head first, and how many are missed."""
    rows, missed = [], 0
    for floor in job.floors:
        of, cell = key(floor), by_checkpoint[job.checkpoint].file(key(floor))
        good, line = choice.judge(floor, by_checkpoint, job.checkpoint, job.base)
        missed += not good
        base = by_checkpoint.get(job.base)
        share = choice.of_base(by_checkpoint, job.checkpoint, of, job.base)
        score, caveats = cell.scores[of], ", ".join(tables.caveats(cell, of))
        of_base = tables.shown(base.scores[of]) if base and of in base.scores else "-"
        found = [" ".join(of), str(score.n), tables.shown(score), of_base]
        asked, verdict = line.rpartition(", ")[2], "ok" if good else "MISSED"
        rows.append([*found, f"{share:.3f}" if share else "-", asked, verdict, caveats])
    head = ["score", "n", job.checkpoint, job.base, "of base", "threshold", "", ""]
    return [head, *rows], missed


def main(job: Gate) -> None:
    if not job.floors:
        raise ValueError("floors is empty: a gate without thresholds lets everything through")
    judged, missed = table(job, complete(job))
    widths = [max(map(len, column)) for column in zip(*judged, strict=True)]
    for row in judged:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    if missed:
        print(
            f"gate: {job.checkpoint} misses {missed} of {len(job.floors)} thresholds: train it "
            "again, lower a threshold in the gate's YAML, or go on all the same with gate=false",
            file=sys.stderr,
        )
        sys.exit(1)
    print(f"gate: {job.checkpoint} keeps all {len(job.floors)} thresholds")


if __name__ == "__main__":
    config.main(main, Gate, __doc__)
