"""How much the demo's numbers move from seed to seed.

    python recipes/demo/seed_variance.py recipes/demo/seed_variance.yaml

In: report.json of several seeds. Out, as a Markdown table on the screen and in `out`: each score of
the chosen epochs, its mean and its range over the seeds.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from speechfuse import artifact, config


@dataclass
class SeedVariance:
    out: str = field(metadata={"help": "the Markdown file to write"})
    reports: list[str] = field(metadata={"help": "report.json of each seed"})


def chosen_scores(report: Path) -> dict[tuple[str, str, str], float]:
    """(task, split, metric) -> value of the chosen checkpoint."""
    if not report.is_file():
        raise FileNotFoundError(f"no report at {report}: run that seed first")
    rows = [row for row in json.loads(report.read_text()) if row["chosen"]]
    return {(row["task"], row["split"], row["metric"]): row["value"] for row in rows}


def main(job: SeedVariance) -> None:
    scores = [chosen_scores(Path(path)) for path in job.reports]
    if not scores:
        raise ValueError("reports is empty: name the report.json of each seed")
    lines = [f"| score of the chosen epoch, {len(scores)} seeds | mean | lowest | highest |"]
    lines.append("|---|---|---|---|")
    for key in sorted(set.intersection(*map(set, scores))):
        values = [each[key] for each in scores]
        mean = sum(values) / len(values)
        name = " ".join(key)
        lines.append(f"| {name} | {mean:.3f} | {min(values):.3f} | {max(values):.3f} |")
    text = "\n".join(lines) + "\n"
    artifact.write_atomic(Path(job.out), text)
    print(text, end="")


if __name__ == "__main__":
    config.main(main, SeedVariance, __doc__)
