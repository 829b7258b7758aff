"""Make recipes/demo/slt: questions on 40 facts of no spoken training, by flite's voice slt.

    PYTHONPATH=pipeline:. .venv/bin/python tests/make_slt.py

In: out/data/world (`just data`) and the program flite (Debian's package). The files are there
already; this says how they came about.
"""

import subprocess
from pathlib import Path

import soundfile

from tests.demo_code import demo

FOLDER = Path("recipes/demo/slt")


def main() -> None:
    clips = demo("neural").questions(Path("out/data/world/speak.jsonl"), 40, "slt")
    for clip in clips:
        wav = FOLDER / "speech.wav"
        subprocess.run(["flite", "-voice", "slt", "-t", clip["text"], "-o", str(wav)], check=True)
        soundfile.write(FOLDER / f"{clip['fact']}.flac", *soundfile.read(wav, dtype="int16"))
        wav.unlink()
    text = demo("neural").manifest(clips, ".flac", "flite", "flite:slt")
    (FOLDER / "manifest.jsonl").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
