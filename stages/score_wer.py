"""Word error rate of a file of transcripts, as AudioBench computes it.

    python -m stages.score_wer file=FILE.jsonl

In: JSON lines {"reference", "prediction"}; "seconds" and "speaker", where every line has them, give
the rate by duration and an interval by speaker. Out, on the screen: errors, words, capped rate,
interval; the last line is the corpus WER with 6 decimals and nothing else. AudioBench's published
logs hold texts that are normalised already: these are recognised and scored as they are
(`normalised` says it outright).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechfuse import config, json_lines
from speechfuse.scores import audiobench_wer


@dataclass
class ScoreWer:
    file: str = config.key("JSON lines {reference, prediction}")
    normalised: bool | None = config.key("the texts are AudioBench's output; null: find out", None)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; ValueError naming the line that is not one."""
    rows = []
    for number, row in json_lines.read(path):
        for key in ("reference", "prediction"):
            if not isinstance(row.get(key), str):
                where = f"{path}, line {number}"
                raise ValueError(
                    f"{where}: {key} must be a text; the line is {json.dumps(row):.80}"
                )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows: one line {{reference, prediction}} an utterance")
    return rows


def main(job: ScoreWer) -> None:
    rows = read(Path(job.file))
    references, predictions = [r["reference"] for r in rows], [r["prediction"] for r in rows]
    is_output, changed = audiobench_wer.normalised_already(references, predictions)
    as_they_are = is_output if job.normalised is None else job.normalised
    if as_they_are and changed:
        print(
            f"texts scored as they are: AudioBench-normalised already ({changed} of "
            f"{2 * len(rows)} would change); normalised=false normalises them"
        )
    timed = all(isinstance(row.get("seconds"), int | float) for row in rows)
    seconds = [row["seconds"] for row in rows] if timed else None
    named = all(row.get("speaker") for row in rows)
    speakers = [str(row["speaker"]) for row in rows] if named else None
    normalise = str if as_they_are else None
    result = audiobench_wer.score(references, predictions, seconds, speakers, normalise)
    if result.not_english:
        print(
            f"{result.not_english} of {len(rows)} references are not English: in them accents and "
            "marks count, and nothing but case and punctuation is normalised; AudioBench's rate is "
            "another"
        )
    totals = result.totals
    print(
        f"{len(rows)} utterances, {totals.words} words: {totals.substitutions} substitutions, "
        f"{totals.deletions} deletions, {totals.insertions} insertions"
    )
    for label, rate, count in result.by_duration:
        print(f"{label}: {rate:.6f} ({count} utterances)")
    print(
        f"each utterance capped at 1: {result.capped:.6f}; above 1: {result.above_one:.2%} of "
        f"utterances; 95 % interval {result.low:.6f} to {result.high:.6f}"
    )
    print(f"{result.value:.6f}")


if __name__ == "__main__":
    config.main(main, ScoreWer, __doc__, ("file",))
