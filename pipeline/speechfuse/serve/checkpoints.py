"""Checkpoints by name, and the ears that each hears with.

In: a report, which names the chosen epoch. Out: the folders of all epochs beside it; a checkpoint
and its encoder, as `just ask` uses them, loaded when asked for.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speechfuse.audio import decoding
from speechfuse.provenance import maker
from speechfuse.quantizer.spec import EncoderSpec
from speechfuse.tokens.vocabulary import read_speech

if TYPE_CHECKING:
    from speechfuse.quantizer.model import Quantizer


def chosen_checkpoint(report: Path) -> Path:
    """Return the folder of the checkpoint that `report` marks as chosen: its run is expected in the
    report's folder. Raises FileNotFoundError without a report."""
    if not report.is_file():
        raise FileNotFoundError(
            f"no report at {report}: {maker(str(report))}; or give checkpoint=FOLDER"
        )
    try:
        rows = json.loads(report.read_text("utf-8"))
        names = {Path(row["checkpoint"]) for row in rows if row["chosen"] is True}
    except (ValueError, LookupError, TypeError):
        raise ValueError(
            f"{report} is no report, a list of {{checkpoint, chosen, ...}}: {maker(str(report))}"
        ) from None
    if len(names) != 1:
        raise ValueError(f"{report} marks {len(names)} checkpoints as chosen: {maker(str(report))}")
    return report.parent / names.pop()


def every_epoch(report: Path, checkpoint: str | None) -> dict[str, Path]:
    """Return {name: folder} of all epochs of the runs beside `report`: RUN/epoch_N. The first is
    `checkpoint`, or without one the chosen epoch, under the name of the report's folder."""
    first = Path(checkpoint) if checkpoint else chosen_checkpoint(report)
    found = sorted(path.parent for path in report.parent.glob("*/epoch_*/config.json"))
    others = {folder.relative_to(report.parent).as_posix(): folder for folder in found}
    return {report.parent.name: first, **others}


@dataclass(frozen=True)
class Listener:
    """A checkpoint's generator, and the quantizer or encoder that it hears with."""

    generator: Any
    quantizer: "Quantizer"

    def pieces(self, waveform: np.ndarray) -> list[np.ndarray]:
        """Return a recording without the silence at its ends, in which a model that learned from
        clips without any hears words, in pieces of at most the window."""
        return decoding.split(decoding.spoken(waveform), self.quantizer.window)

    def speech(self, pieces: list[np.ndarray]) -> list[dict[str, Any]]:
        """Return the segments of a turn that hold a recording, cut into `pieces`."""
        return self.generator.speech(self.quantizer, pieces)


class TwoChannels(ValueError):
    """A model that listens while it speaks, which has no turns to be asked in."""


def load(checkpoint: Path, job: Any, what: str) -> Listener:
    """Return the listener of a folder. It hears with its own encoder/, which trained with the rest;
    else with the `quantizer` of `job`, or, if its frames are of another, with the `encoder` of
    `job`. `what` names the speech in the error. Raises TwoChannels, and ValueError as
    generation.Generator."""
    from speechfuse.evals import generation  # torch with it
    from speechfuse.quantizer import foreign

    speech = read_speech(checkpoint)
    if "codec" in speech:
        raise TwoChannels(f"{checkpoint} listens while it speaks: `just duplex` talks to it")
    ears: Any
    if (checkpoint / "encoder").is_dir():
        ears = foreign.trained(checkpoint / "encoder")
    else:
        ears = _quantizer(job.quantizer, job.whisper, job.window)
        if job.encoder and speech.get("encoder", ears.identity) != ears.identity:
            ears = EncoderSpec(job.encoder).load("cpu")
    return Listener(generation.generator(checkpoint, ears.identity, what), ears)


@lru_cache(1)
def _quantizer(path: str, whisper: str | None, window: float | None) -> "Quantizer":
    from speechfuse.quantizer.model import Quantizer

    return Quantizer.load(path, whisper, window)
