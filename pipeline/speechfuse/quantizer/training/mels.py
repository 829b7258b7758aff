"""Training data of a quantizer: the log-mels of a corpus, on disk, with texts and phonemes.

In: a corpus and its plan. Out: for each shard <folder>/00007.npy (float16, 58 MB an hour of speech
with 80 mels) and 00007.json, which is written last. What a frozen model makes of each mel, where a
method learns from one, lies beside it in 00007.taught.npy, so that no training step runs that
model. Made in worker processes; a shard that exists is not made again. Arrays are memory-mapped;
texts and phonemes are in memory.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from speechfuse import artifact, workers
from speechfuse.audio.decoding import SAMPLE_RATE
from speechfuse.corpora.clip import Clip, decode
from speechfuse.quantizer.encoder import log_mel, padded
from speechfuse.rows.making import component
from speechfuse.rows.rejects import Reject

MEL_RATE = 100  # frames a second
SHORTEST = 0.04  # seconds: one code
BATCH = 16  # clips that a frozen model reads at once
TAUGHT = ".taught.npy"


@dataclass(frozen=True)
class Example:
    """A clip to train on. `stored`: its mel, float16 (n_mels * frames,), mapped from disk;
    `phonemes`: (start in seconds, name) of each; `taught`: what the frozen model made of it,
    float16 (rows, width), mapped from disk."""

    stored: np.ndarray
    n_mels: int
    text: str | None
    phonemes: list[tuple[float, str]]
    taught: np.ndarray

    @property
    def frames(self) -> int:
        return len(self.stored) // self.n_mels

    @property
    def mel(self) -> Tensor:
        """float16 (n_mels, frames), in memory."""
        return torch.from_numpy(np.array(self.stored)).view(self.n_mels, -1)


@dataclass(frozen=True)
class Window:
    """The clips that a method trains on: at most `seconds` long, with `needs`, text or phonemes.

    `teacher`: {_component_: ...} of a frozen model that has a Quantizer's `config` and `embed`, by
    which each clip is embedded once; `whole`: of it all rows of the window are kept, those of the
    padding included, else the clip's own. `look_back`: the log-mel is that of audio.mel.
    """

    n_mels: int
    seconds: float
    needs: str | None
    teacher: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    look_back: bool = False


def make(
    specs: dict[str, dict[str, Any]],
    plans: dict[str, list[dict[str, Any]]],
    folder: Path,
    window: Window,
    processes: int,
    device: str = "cpu",
) -> None:
    """Make the missing shards of the corpora `specs` {name: {_component_, ...}}, each in
    <folder>/<name>; the window's teacher runs on `device`, see workers.processes."""
    tasks = [
        (specs[name], shard, folder / name / f"{i:05d}.json", window)
        for name, plan in plans.items()
        for i, shard in enumerate(plan)
    ]
    missing = [task for task in tasks if not task[2].exists()]
    done = len(tasks) - len(missing)
    stored = workers.processes(_store, missing, processes, device if window.teacher else "cpu")
    for _ in tqdm(stored, "mels", len(tasks), initial=done, unit="shard"):
        pass


def load(
    folder: Path, window: Window, max_reject_rate: float
) -> tuple[list[Example], dict[str, Any]]:
    """All examples of a corpus in order, and {hours, clips, rejected: {kind: n}}.

    Raises ValueError when more than `max_reject_rate` of the clips are rejected, or none is left.
    """
    examples, rejects, frames = list[Example](), list[dict[str, str]](), 0
    for path in sorted(folder.glob("*.json")):
        shard = json.loads(path.read_text("utf-8"))
        rejects += shard["rejects"]
        stored = np.load(path.with_suffix(".npy"), mmap_mode="r")
        taught = np.load(path.with_suffix(TAUGHT), mmap_mode="r")
        start = at = 0
        for row in shard["rows"]:
            end = start + row["frames"] * window.n_mels
            phonemes = [(second, name) for second, name in row["phonemes"]]
            rows = taught[at : at + row["taught"]]
            mel = stored[start:end]
            examples.append(Example(mel, window.n_mels, row["text"], phonemes, rows))
            start, at, frames = end, at + row["taught"], frames + row["frames"]
    clips = len(examples) + len(rejects)
    if not examples or len(rejects) > max_reject_rate * clips:
        first = f"; first: {rejects[0]['id']}: {rejects[0]['reason']}" if rejects else ""
        raise ValueError(
            f"{folder.name}: {len(rejects)} of {clips} clips cannot be trained on, more than "
            f"runtime.max_reject_rate={max_reject_rate}{first}"
        )
    kinds = Counter(reject["reason"].partition(":")[0] for reject in rejects)
    hours = round(frames / MEL_RATE / 3600, 3)
    return examples, {"hours": hours, "clips": clips, "rejected": dict(sorted(kinds.items()))}


def _store(corpus: dict[str, Any], shard: dict[str, Any], path: Path, window: Window) -> None:
    """One shard, in a worker process."""
    torch.set_num_threads(1)
    rows, rejects, mels = list[dict[str, Any]](), [], []
    for clip in component(corpus).clips(shard):
        mel = _mel_of(clip, window)
        if isinstance(mel, Reject):
            rejects.append({"id": mel.id, "reason": mel.reason})
        else:
            rows.append({"frames": mel.shape[1], "text": clip.text, "phonemes": clip.phonemes})
            mels.append(mel)
    empty = np.zeros((0, 1), np.float16)
    taught = _taught(mels, window) if window.teacher else [empty] * len(mels)
    for row, own in zip(rows, taught, strict=True):
        row["taught"] = len(own)
    for suffix, arrays in ((".npy", [mel.ravel() for mel in mels]), (TAUGHT, taught)):
        with artifact.replacing(path.with_suffix(suffix)) as new, open(new, "wb") as file:
            np.save(file, np.concatenate(arrays or [empty]))
    artifact.write_json(path, {"rows": rows, "rejects": rejects})


def _taught(mels: list[np.ndarray], window: Window) -> list[np.ndarray]:
    """What the teacher makes of clips, float16 (rows, width) of each."""
    teacher, taught = component(window.teacher).to(workers.device()), list[np.ndarray]()
    for start in range(0, len(mels), BATCH):
        part = [torch.from_numpy(mel) for mel in mels[start : start + BATCH]]
        windows = padded(part, len(part), 2 * teacher.config.n_audio_ctx, workers.device())
        with torch.inference_mode():
            embedded = teacher.embed(windows).half().cpu().numpy()
        for rows, mel in zip(embedded, part, strict=True):
            own = mel.shape[1] // (2 * teacher.config.downsample)
            taught.append(rows if window.whole else rows[:own])
    return taught


def _mel_of(clip: Clip | Reject, window: Window) -> np.ndarray | Reject:
    """float16 (n_mels, frames). A clip over the window is a reject, because which of its words fall
    into which piece is not known."""
    if isinstance(clip, Reject):
        return clip
    needed = getattr(clip, window.needs) if window.needs else True
    if not (needed.strip() if isinstance(needed, str) else needed):
        return Reject(clip.id, f"no {window.needs}: training needs it")
    try:
        waveform = decode(clip).waveform
    except ValueError as error:
        return Reject(clip.id, str(error))
    seconds = len(waveform) / SAMPLE_RATE
    if not SHORTEST <= seconds <= window.seconds:
        kind = "too long" if seconds > window.seconds else "too short"
        return Reject(clip.id, f"{kind}: {seconds:.2f} s; {SHORTEST} to {window.seconds:g} s fit")
    return log_mel(waveform, window.n_mels, look_back=window.look_back).half().numpy()
