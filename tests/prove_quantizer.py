"""Train a quantizer by distillation until a Whisper understands its codes, and refuse bad teachers.

    just prove quantizer           (about 10 minutes on one core)

Trains a micro-Whisper here on forty words that espeak-ng speaks, then, by the job and against that
teacher, a quantizer of CODES codes. Sentences and voices of the figures are in no training. Also
tried: a teacher with random weights, one with an encoder that is not its own, and codes that belong
to another clip. The last line says how far the codec is from its teacher, and how far it may be.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from speechfuse.quantizer.decoder import CodeTranscriber
from speechfuse.quantizer.model import Quantizer
from speechfuse.quantizer.training.phonemes import codes_of
from speechfuse.scores.word_errors import word_error_rate
from tests import micro_whisper

CLIPS = {"training": 1500, "validation": 200}
TEACHER_STEPS, CODEC_STEPS, CODES = 1000, 800, 128
MOST_TEACHER, MOST_GAP = 0.15, 0.10  # word error rates


def train_quantizer(out: Path, corpora: dict[str, Any], teacher: Path) -> str | None:
    """None when the job made a quantizer, else how it refused."""
    recipe = {
        "out": str(out),
        "corpus": corpora["training"],
        "validation": corpora["validation"],
        "method": {
            "_component_": "speechfuse.quantizer.whisper",
            "whisper": str(teacher),
            "codes": CODES,
            "codebook_dim": 16,
            "decay": 0.95,
        },
        "steps": CODEC_STEPS,
        "lr": 1e-3,
        "runtime": {"workers": 1, "device": "cpu"},
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "stages.train_quantizer", str(path)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode not in (0, 2):
        sys.exit(f"the job failed: {done.stderr[-500:]}")
    return done.stderr.splitlines()[-1] if done.returncode else None


def spoilt(teacher: Path, path: Path, part: str) -> Path:
    """A copy of a checkpoint with random weights where names begin with `part`."""
    content = torch.load(teacher, weights_only=True)
    torch.manual_seed(1)
    for name, tensor in content["model_state_dict"].items():
        if name.startswith(part) and tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
    torch.save(content, path)
    return path


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpora = micro_whisper.corpora(folder, CLIPS["training"], CLIPS["validation"])
        speech = micro_whisper.load(corpora, folder / "mels")
        teacher = folder / "micro.pt"
        micro_whisper.train(teacher, speech["training"], TEACHER_STEPS)
        refused = {}
        for what, part in (("random weights", ""), ("another encoder", "encoder.")):
            bad = spoilt(teacher, folder / f"{what.replace(' ', '-')}.pt", part)
            refused[what] = train_quantizer(folder / f"of-{bad.stem}", corpora, bad)
            print(f"teacher with {what}: {refused[what] or 'NOT REFUSED'}", flush=True)
        out = folder / "quantizer"
        if failure := train_quantizer(out, corpora, teacher):
            sys.exit(failure)
        found = json.loads((out / "manifest.json").read_text())["totals"]
        clips = speech["validation"]
        codes = [
            row[: each.frames // 4]
            for each, row in zip(clips, codes_of(Quantizer.load(out), clips), strict=True)
        ]
        half = len(codes) // 2
        heard = CodeTranscriber.load(out, teacher).transcribe([*codes[half:], *codes[:half]])
        others, _, _ = word_error_rate([each.text or "" for each in clips], heard)
    (was, low, high), (is_now, codec_low, codec_high) = found["teacher_wer"], found["codec_wer"]
    print(f"teacher WER {was:.3f} ({low:.3f}-{high:.3f}), n = {found['validation_clips']}")
    print(f"codec WER {is_now:.3f} ({codec_low:.3f}-{codec_high:.3f})")
    print(f"codec WER, codes of another clip {others:.3f}")
    print(f"{found['codes_used']} of {CODES} codes, perplexity {found['perplexity']}")
    good = was <= MOST_TEACHER and is_now - was <= MOST_GAP and others > 0.8
    print(f"gap {is_now - was:.3f}, at most {MOST_GAP}: {'proved' if good else 'NOT PROVED'}")
    sys.exit(not (good and all(refused.values())))


if __name__ == "__main__":
    main()
