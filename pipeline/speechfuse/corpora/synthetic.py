"""Synthetic speech by espeak-ng (and flite).

In: lines of text. Out: clips whose audio is synthesized when they are read.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speechfuse import artifact
from speechfuse.audio import augmentation, espeak_ng
from speechfuse.audio.espeak_ng import VoiceGroup
from speechfuse.corpora.clip import Clip
from speechfuse.rows.rejects import Reject


class Synthetic:
    """Lines of text spoken by espeak-ng, with light noise and gain.

    `lines`: a JSONL file {id, text, ...}; a line's `voices` names the group of `voices` that speaks
    it, other keys are kept in `extra`. `splits`: those of the lines to speak; null for all. Voice,
    noise (`snr`) and `gain` in dB of a line depend only on `seed` and its id. Groups named in
    `optional_voices` need flite; without it their lines are left out, and a notice is printed.
    """

    def __init__(
        self,
        lines: str,
        voices: dict[str, dict[str, Any]],
        splits: list[str] | None = None,
        optional_voices: list[str] | None = None,
        snr: tuple[float, float] = (20.0, 40.0),
        gain: tuple[float, float] = (-10.0, 0.0),
        seed: int = 0,
    ) -> None:
        path = Path(lines)
        self.source_name, self.licence = f"espeak-ng speaking {path.name}", None
        if not path.is_file():
            raise FileNotFoundError(f"no lines to speak at {lines}")
        self.voices = {name: VoiceGroup(**spec) for name, spec in voices.items()}
        self.snr, self.gain, self.seed = snr, gain, seed
        optional = list(optional_voices or [])
        self.skipped = [] if espeak_ng.flite_available() else optional
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        self.rows = {row["id"]: row for row in rows if splits is None or row["split"] in splits}
        for row in self.rows.values():
            if row["voices"] not in [*self.voices, *self.skipped]:
                raise ValueError(
                    f"{lines}: line {row['id']} wants the voices {row['voices']!r}; "
                    f"configured are {sorted(self.voices)}"
                )
        lines_sha256 = artifact.sha256_of(path)
        self.fingerprint = artifact.json_digest([lines_sha256, self.skipped])
        self.alike = [artifact.json_digest([lines_sha256, skipped]) for skipped in ([], optional)]

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        if self.skipped:
            names = ", ".join(self.skipped)
            print(f"flite is not installed: lines for the voices {names} are left out")
        ids = [id for id, row in self.rows.items() if row["voices"] not in self.skipped]
        parts = [ids[start : start + shard_size] for start in range(0, len(ids), shard_size)]
        return [{"count": len(part), "lines": part} for part in parts]

    def clips(self, shard: dict[str, Any]) -> Iterator[Clip | Reject]:
        # espeak-ng carries state from one utterance to the next, so every shard starts a new one
        with espeak_ng.EspeakLibrary() as engine:
            for id in shard["lines"]:
                row = self.rows[id]
                if row["voices"] in self.skipped:
                    raise ValueError(
                        f"line {id} was planned for the voices {row['voices']}, which need flite: "
                        "install flite, or start anew without it with fresh=true"
                    )
                rng = random.Random(f"{self.seed}/{id}")
                voice = self.voices[row["voices"]].draw(rng)
                speech = espeak_ng.speak(engine, row["text"], voice)
                waveform = augmentation.disturb(
                    speech.waveform, rng.uniform(*self.snr), rng.uniform(*self.gain), rng
                )
                extra = {key: value for key, value in row.items() if key not in ("id", "text")}
                yield Clip(
                    id,
                    waveform,
                    f"synthetic:{voice.name}",
                    text=row["text"],
                    speaker=f"{voice.name}/{voice.rate}/{voice.pitch}",
                    language="en",
                    extra=extra,
                    phonemes=speech.phonemes,
                )
