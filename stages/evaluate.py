"""Score checkpoints: one JSON file per (checkpoint, task).

    python -m stages.evaluate recipes/demo/evaluate.yaml only=[stage2] limit=100

In: checkpoints (a run's folder stands for all its epochs) and tasks. Out:
<out>/<checkpoint>/<task>.json with scores, intervals, items and fingerprints; what the models said
is kept in <out>/cells by content (speechfuse.evals.cells). Everything is checked before any work is
spent. A stop loses no finished batch; a changed metric scores again without a model; a result made
from something else is moved aside. A cell that fails is written down in <task>.failed.json, the
others go on, and the exit status is 1.
"""

import sys
from typing import Any

from tqdm import tqdm

from speechfuse import artifact, config
from speechfuse.evals import sweep


def main(job: sweep.Evaluate) -> None:
    lacking = sweep.left_out(job) if not job.only or not sweep.cells_of(job) else {}
    left = [f"left out: {task}, as {path} is not there" for task, path in lacking.items()]
    if job.runtime.dry_run:
        print(*sweep.survey(job), *left, sep="\n")
        return
    every = sweep.prepare(job, sweep.cells_of(job))
    todo = [work for work in every if not sweep.is_done(work)]
    missing = [len({*sweep.instance(w.spec).ids()} - w.predictions.read().keys()) for w in todo]
    failed, computed = [], 0
    with tqdm(total=sum(missing), desc=f"{len(todo)} cells", unit="item") as bar:
        for work, count, error in sweep.predict_all(todo, job.runtime, bar):
            computed += count
            failure_file = work.result.with_suffix(".failed.json")
            result: dict[str, Any] = {"checkpoint": work.name, "task": work.task, "error": error}
            if error is None:
                try:
                    result = sweep.result_of(work, job.limit is not None)
                except Exception as failure:
                    result["error"] = error = sweep.error_line(work, failure)
            if work.result.exists():
                aside = artifact.move_aside(work.result).name
                tqdm.write(f"{work.result} was made from something else: moved aside to {aside}")
            if error is not None:
                failed.append(f"{work.name} {work.task}: {error}")
                artifact.write_json(failure_file, result)
                continue
            artifact.write_json(work.result, result)
            failure_file.unlink(missing_ok=True)
            lines = [f"{s['split']} {s['metric']} {s['value']:.3f}" for s in result["scores"]]
            tqdm.write(f"{work.name} {work.task}: {', '.join(lines[:6])}")  # 57 subjects are many
    print(
        f"{job.out}: {len(todo) - len(failed)} results made, {len(every) - len(todo)} were "
        f"there; {computed:,} items computed",
        *left,
        sep="\n",
    )
    for line in failed:
        print("error:", line, file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    config.main(main, sweep.Evaluate, __doc__)
