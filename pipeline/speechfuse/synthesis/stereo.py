"""Sessions of two channels that were recorded: stereo files with timed text.

In: a manifest of lines {audio_filepath, turns: [{role, start, end, text}], ...}, paths relative to
it, times in seconds. The left channel is the user's, the right one the agent's, whose speech goes
through the codec. Out: sessions, as synthesis.Sessions gives them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import soundfile

from speechfuse import artifact, json_lines
from speechfuse.audio.decoding import SAMPLE_RATE, resample
from speechfuse.codecs.codec import Codec, frame_at
from speechfuse.rows.rejects import Reject
from speechfuse.synthesis.sessions import Session

SLACK = 0.05  # seconds; times are rounded


class Stereo:
    """The recordings of the file `manifest`. Raises FileNotFoundError where there is none."""

    def __init__(self, manifest: str) -> None:
        self.path = Path(manifest)
        if not self.path.is_file():
            raise FileNotFoundError(f"no manifest of stereo recordings at {manifest}")
        self.lines = self.path.read_bytes().splitlines()
        self.fingerprint = artifact.sha256_of(self.path)

    def plan(self, shard_size: int) -> list[dict[str, Any]]:
        starts = range(0, len(self.lines), shard_size)
        return [{"count": len(self.lines[s : s + shard_size]), "first": s} for s in starts]

    def made(self, shard: Mapping[str, Any], codec: Codec) -> Iterator[Session | Reject]:
        for number in range(shard["first"], shard["first"] + shard["count"]):
            id = f"{self.path.stem}-{number:06d}"
            try:
                yield self._session(id, self.lines[number], codec)
            except (ValueError, KeyError, TypeError, soundfile.LibsndfileError) as error:
                yield Reject(id, f"bad session: line {number + 1}: {type(error).__name__}: {error}")

    def _session(self, id: str, line: bytes, codec: Codec) -> Session:
        entry = json_lines.parse(line)
        name, rate, turns = entry.pop("audio_filepath"), codec.frame_rate, entry.pop("turns")
        samples, own = soundfile.read(self.path.parent / name, dtype="float32", always_2d=True)
        if samples.shape[1] != 2:
            raise ValueError(
                f"{name} has {samples.shape[1]} channels: user and agent need one each"
            )
        user, agent = (resample(channel, own) for channel in samples.T.copy())
        codes, seconds = codec.encode(agent), len(user) / SAMPLE_RATE
        for turn in turns:
            start, end = float(turn["start"]), float(turn["end"])
            if turn["role"] not in ("user", "assistant") or not 0 <= start < end <= seconds + SLACK:
                raise ValueError(
                    f"{name} has {seconds:.2f} s, and a turn {turn}: its role is user or "
                    "assistant, and it lies in the file"
                )
            if turn["role"] == "assistant":
                turn["codes"] = codes[frame_at(start, rate) : frame_at(end, rate)]
        return Session(id, user, sorted(turns, key=lambda turn: turn["start"]), entry)
