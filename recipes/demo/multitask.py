"""NeMo manifests of several tasks on the demo's world: one recording, and what is asked about it.

    python recipes/demo/multitask.py recipes/demo/multitask.yaml

In: the lines of the world, and files of questions, one a task; where those have two places <audio>,
the task is about two recordings. Out: recordings by espeak-ng; for each task TASK.jsonl, whose
lines have the reply, and no question: a training draws it from the file; and test.jsonl, in voices
of no training, where each recording comes once with a question of each task.
"""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from speechfuse import artifact, config
from speechfuse.audio.decoding import SAMPLE_RATE
from speechfuse.config import key
from speechfuse.corpora.clip import Clip

GROUPS = {"en-us": "american voice", "en-gb": "british voice"}
REPLIES: dict[str, Callable[..., str]] = {  # by task, of its recordings
    "transcribe": lambda clip: clip.text,
    "answer": lambda clip: clip.extra["answer"],
    "count": lambda clip: f"{len(clip.text.split())} words",
    "voice": lambda clip: GROUPS[clip.speaker[:5]],
    "first": lambda one, other: one.text,
    "second": lambda one, other: other.text,
}


@dataclass
class Multitask:
    out: str = key("folder of recordings and manifests")
    corpus: dict[str, Any] = key("speechfuse.corpora.synthetic, of the world's lines")
    questions: dict[str, str] = key("{task: file of questions about it, one a line}")
    clips: dict[str, int] = key("{task: lines to train on}")
    test_clips: int = key("recordings of each split that are asked about", 100, least=1)
    seed: int = key("of which recordings", 0, least=0)
    fresh: bool = key("move an artifact that differs aside", False)


def line(task: str, split: str, clips: Iterable[Clip], question: str | None) -> dict[str, Any]:
    """Return the line of a manifest; without a `question` it names none."""
    clips = [*clips]
    paths, ids = [f"audio/{clip.id}.flac" for clip in clips], [clip.id for clip in clips]
    entry: dict[str, Any] = {"id": "+".join([task, *ids]), "task": task, "split": split}
    entry |= {"audio_filepath": paths if len(paths) > 1 else paths[0]}
    entry |= {"answer": REPLIES[task](*clips), "fact": clips[0].extra["fact"]}
    entry["text"] = " ".join(str(clip.text) for clip in clips)
    return entry | ({"context": question} if question else {})


def main(job: Multitask) -> None:
    out, corpus, rng = Path(job.out), config.instantiate(job.corpus), random.Random(job.seed)
    files = job.questions.items()
    asked = {task: Path(file).read_text("utf-8").splitlines() for task, file in files}
    if not asked.keys() == job.clips.keys() <= REPLIES.keys():
        raise ValueError(
            f"questions and clips must name the same of the tasks {', '.join(REPLIES)}"
        )
    both = {task for task, lines in asked.items() if lines[0].count("<audio>") == 2}
    inputs = {"corpus": corpus.fingerprint, "questions": artifact.json_digest(asked)}
    settings = {name: value for name, value in vars(job).items() if name != "fresh"}
    work = artifact.Artifact(out, "multitask", 1, settings, inputs)
    if not work.begin(fresh=job.fresh):
        return
    spoken = {n: row for n, row in corpus.rows.items() if row["kind"] == "question"}

    def clips_of(split: str, voices: str, count: int) -> list[Clip]:
        """Return as many clips, of which a file is written."""
        ids = [n for n, row in spoken.items() if (row["split"], row["voices"]) == (split, voices)]
        made = [*corpus.clips({"lines": rng.sample(ids, count)})]
        for clip in made:
            soundfile.write(out / f"audio/{clip.id}.flac", clip.audio, SAMPLE_RATE)
        return made

    (out / "audio").mkdir(exist_ok=True)
    train = clips_of("train", "train", sum(n for task, n in job.clips.items() if task not in both))
    manifests, start = dict[str, list[dict[str, Any]]](), 0
    for task, count in job.clips.items():
        chosen = [rng.sample(train, 2) for _ in range(count)]
        if task not in both:  # each recording is in one task alone
            chosen, start = [[clip] for clip in train[start : start + count]], start + count
        manifests[task] = [line(task, "train", clips, None) for clips in chosen]
    manifests["test"] = []
    for split in ("seen_facts", "unseen_facts"):
        clips = clips_of(split, "unseen", job.test_clips)
        for number, clip in enumerate(clips):
            for task, lines in asked.items():
                pair = [clip, clips[number - 1]] if task in both else [clip]
                question = lines[number % len(lines)]
                manifests["test"].append(line(task, split, pair, question))
    for name, entries in manifests.items():
        text = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in entries)
        artifact.write_atomic(out / f"{name}.jsonl", text)
    totals = {name: len(entries) for name, entries in manifests.items()}
    work.finish(totals, [*sorted(out.glob("audio/*")), *sorted(out.glob("*.jsonl"))])
    print(f"{out}: {totals}")


if __name__ == "__main__":
    config.main(main, Multitask, __doc__)
