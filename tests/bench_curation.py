"""What curation makes of planted dirt, kind by kind, and how fast it is.

    just bench curation [show=20]          (half a minute)

Columns: rows planted of each kind; kept as they are, rewritten, dropped; then what went wrong: good
rows lost, rows kept that should not be, rows kept with another text than a careful reader would
speak. `show` lists so many of those. Speed is that of one process, each step alone.
"""

import sys
import tempfile
import time
from dataclasses import astuple
from pathlib import Path

from omegaconf import OmegaConf

from speechfuse import config
from speechfuse.texts.conversations import Conversation
from speechfuse.texts.curation.step import Dropped
from stages import curate_texts
from tests import dirty_texts


def speed(job: curate_texts.CurateTexts) -> None:
    source = config.instantiate(job.texts[0])
    shards = source.plan(100_000)
    every = [c for s in shards for c in source.conversations(s) if isinstance(c, Conversation)]
    for spec in job.steps:
        step = config.instantiate(spec)
        step(every[0]) if callable(step) else None
        begin = time.process_time()
        if callable(step):
            every = [c for c in map(step, every) if not isinstance(c, Dropped)]
        else:
            step.decide((c.id, step.sketch(c)) for c in every)
        seconds = time.process_time() - begin
        print(f"{step.name:12s} {1000 * seconds / len(every):6.2f} ms a row")


def main() -> None:
    show = int(dict(argument.split("=") for argument in sys.argv[1:]).get("show", 0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        labels = dirty_texts.write(folder)
        (folder / "job.yaml").write_text(OmegaConf.to_yaml(dirty_texts.job(folder)))
        job = config.load(curate_texts.CurateTexts, folder / "job.yaml", [])
        curate_texts.main(job)
        table, wrong = dirty_texts.outcomes(labels, dirty_texts.curated(Path(job.out)))
        speed(job)
    columns = ("kind", "planted", "kept", "rewritten", "dropped", "lost", "should go", "misread")
    print("\n| " + " | ".join(columns) + " |\n|---" + "|---:" * (len(columns) - 1) + "|")
    total = [0] * 7
    for kind, outcome in sorted(table.items()):
        total = [a + b for a, b in zip(total, astuple(outcome), strict=True)]
        print(f"| {kind} | " + " | ".join(map(str, astuple(outcome))) + " |")
    print("| all | " + " | ".join(map(str, total)) + " |")
    print("\n".join(wrong[:show]))
    good = sum(label.expect != "drop" for label in labels)
    print(
        f"{total[5] + total[6]} of {len(labels) - good + total[6]} that should not be spoken are; "
        f"{total[4]} of {good} good rows lost ({total[4] / good:.1%})"
    )


if __name__ == "__main__":
    main()
