"""How much the demo's scores vary between seeds.

    python recipes/demo/seed_variance.py recipes/demo/seed_variance.yaml

In: report.json of several seeds. Out: for each score of the chosen epochs its mean, lowest and
highest value over the seeds, as a Markdown table on the screen and in `out`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from speechfuse import artifact, config
from speechfuse.report import page


@dataclass
class SeedVariance:
    out: str = config.key("the Markdown file to write")
    reports: list[str] = config.key("report.json of each seed")


def chosen_scores(report: Path) -> dict[tuple[str, str, str], float]:
    """Return {(task, split, metric): value} of the chosen checkpoint.

    Raises FileNotFoundError if the report is not there.
    """
    if not report.is_file():
        raise FileNotFoundError(f"no report at {report}: run that seed first")
    rows = [row for row in json.loads(report.read_text()) if row["chosen"]]
    return {(row["task"], row["split"], row["metric"]): row["value"] for row in rows}


def main(job: SeedVariance) -> None:
    scores = [chosen_scores(Path(path)) for path in job.reports]
    if not scores:
        raise ValueError("reports is empty: name the report.json of each seed")
    head = [f"score of the chosen epoch, {len(scores)} seeds", "mean", "lowest", "highest"]
    rows = []
    for key in sorted(set.intersection(*map(set, scores))):
        values = [of_seed[key] for of_seed in scores]
        figures = sum(values) / len(values), min(values), max(values)
        rows.append([" ".join(key), *(f"{figure:.3f}" for figure in figures)])
    text = page.table(head, rows) + "\n"
    artifact.write_atomic(Path(job.out), text)
    print(text, end="")


if __name__ == "__main__":
    config.main(main, SeedVariance, __doc__)
