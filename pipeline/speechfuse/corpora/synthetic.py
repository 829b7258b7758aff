"""Synthetic speech by espeak-ng (and flite and festival).

In: lines of text. Out: clips whose audio is synthesized when they are read.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speechfuse import artifact, json_lines
from speechfuse.audio import augmentation, espeak_ng
from speechfuse.audio.espeak_ng import VoiceGroup
from speechfuse.components import Decibels
from speechfuse.corpora import planning
from speechfuse.corpora.clip import Clip, name_of, utf8
from speechfuse.rows.rejects import Reject


class Synthetic:
    """Lines of text spoken by espeak-ng, with light noise and gain.

    `lines`: a JSONL file {id, text, ...}; a line's `voices` names the group of `voices` that speaks
    it, other keys are kept in `extra`. A line that cannot be used is a reject. `splits`: those of
    the lines to speak; null for all. Voice, noise (`snr`) and `gain` in dB of a line depend only on
    `seed` and its id. Raises ValueError for ids that come twice, for a split that no line has and
    for a group that is not configured.
    """

    def __init__(
        self,
        lines: str,
        voices: dict[str, dict[str, Any]],
        splits: list[str] | None = None,
        snr: Decibels = (20.0, 40.0),
        gain: Decibels = (-10.0, 0.0),
        seed: int = 0,
    ) -> None:
        self.path, self.splits = Path(lines), splits
        self.source_name, self.licence = f"espeak-ng speaking {self.path.name}", None
        if not self.path.is_file():
            raise FileNotFoundError(f"no lines to speak at {lines}")
        self.voices = {name: VoiceGroup(**spec) for name, spec in voices.items()}
        self.snr, self.gain, self.seed = snr, gain, seed
        self.rows = self._read()
        # with the [] that it always had: data and trainings that were begun go on
        named = [name for group in self.voices.values() for name in group.names]
        # 2: flite's voices have a rate and a pitch
        own = [2] * any(name.startswith("flite:") for name in named)
        self.fingerprint = artifact.json_digest([artifact.sha256_of(self.path), own])

    def _read(self) -> dict[str, dict[str, Any] | str]:
        """Return by id the lines to speak, or why a line cannot be spoken."""
        rows: dict[str, dict[str, Any] | str] = {}
        line_of: dict[str, int] = {}
        splits: set[str] = set()
        for _, number, line in planning.lines(self.path):
            try:
                row = json_lines.parse(line)
                if self.splits is not None:
                    if "split" not in row:
                        raise ValueError("it has no split")
                    splits.add(str(row["split"]))
                    if row["split"] not in self.splits:
                        continue
                id, group, text = name_of(row, "id"), name_of(row, "voices"), row.get("text")
                if not isinstance(text, str):
                    raise ValueError(f"text is {text!r:.40}, not text")
                utf8(text)
            except ValueError as error:
                id, row = f"{self.path.name}:{number}", {}
                rows[id] = f"bad manifest line: line {number}: {error}"
            if row and group not in self.voices:
                raise ValueError(
                    f"{self.path}: line {id} wants the voices {group!r}; "
                    f"configured are {sorted(self.voices)}"
                )
            if (first := line_of.setdefault(id, number)) != number:
                raise ValueError(
                    f"{self.path}: lines {first} and {number} have the id {id!r}: give each its own"
                )
            if row:
                rows[id] = row
        if lost := sorted({*(self.splits or ())} - splits):
            raise ValueError(
                f"{self.path}: no line has the split {lost[0]!r}; there are {sorted(splits)}"
            )
        return rows

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        ids = [*self.rows]
        parts = [ids[start : start + shard_size] for start in range(0, len(ids), shard_size)]
        plan = [{"count": len(part), "lines": part} for part in parts]
        planning.mark_ids(plan, ids)
        return plan

    def clips(self, shard: dict[str, Any]) -> Iterator[Clip | Reject]:
        # espeak-ng carries state from one utterance to the next, so every shard starts a new one
        with espeak_ng.EspeakLibrary() as engine:
            for id in shard["lines"]:
                row = self.rows[id]
                if isinstance(row, str):
                    yield Reject(id, row)
                    continue
                rng = random.Random(f"{self.seed}/{id}")
                voice = self.voices[row["voices"]].draw(rng)
                try:
                    speech = espeak_ng.speak(engine, row["text"], voice)
                except espeak_ng.NoSound as error:
                    yield Reject(id, f"no sound: {error}")
                    continue
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
                    language=speech.language,
                    extra=extra,
                    phonemes=speech.phonemes,
                )
