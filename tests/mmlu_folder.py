"""A folder in MMLU's layout for tests: 57 subjects, made-up questions."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from speechfuse.evals.harness import SUBJECTS

WORDS = "one two three four five six seven eight nine ten".split()


def question(subject: str, split: str, number: int) -> dict:
    seed = sum(map(ord, subject + split)) + 7 * number
    choices = [WORDS[(seed + 3 * i) % 10] for i in range(4)]
    text = f"{subject.replace('_', ' ')} {split}: what comes after {WORDS[seed % 10]}? {seed}"
    return {"question": text, "subject": subject, "choices": choices, "answer": seed % 4}


def write_mmlu(folder: Path, kind: str = "jsonl", test: int = 4, dev: int = 5) -> Path:
    """<subject>/{test,validation,dev} of all subjects, `kind` jsonl or parquet, without README."""
    for subject in SUBJECTS:
        (folder / subject).mkdir(parents=True, exist_ok=True)
        for split, count in (("test", test), ("validation", 1), ("dev", dev)):
            rows = [question(subject, split, number) for number in range(count)]
            if kind == "parquet":
                path = folder / subject / f"{split}-00000-of-00001.parquet"
                pq.write_table(pa.Table.from_pylist(rows), path)
            else:
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                (folder / subject / f"{split}.jsonl").write_text(lines)
    return folder
