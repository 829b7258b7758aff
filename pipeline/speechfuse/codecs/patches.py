"""A small codec of one voice that no gradient has trained.

In: the speech of a voice, some ten minutes. Out: the codec. A frame is 80 ms of log-mel, eight of
10 ms; its principal components are quantized by k-means books, each of what the books before it
left; Griffin-Lim makes sound of them. 12.5 frames a second of 2 books of 256 codes are 200 bit/s.
"""

import json
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from speechfuse import artifact
from speechfuse.audio.decoding import SAMPLE_RATE
from speechfuse.audio.mel import BANDS, HOP, griffin_lim, log_mel
from speechfuse.codecs.codec import Codec

PATCH = 8  # mel frames of a frame
SAMPLES = PATCH * HOP
ROUNDS, ITERATIONS = 25, 60  # of k-means, of Griffin-Lim
NAMES = {"mean", "components", "books"}


class Patches(Codec):
    """`mean` (640,), `components` (640, kept), `books` (codebooks, codebook_size, kept)."""

    sample_rate, frame_rate = SAMPLE_RATE, SAMPLE_RATE / SAMPLES

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.codebooks, self.codebook_size, _ = tensors["books"].shape
        hashes = {name: tensor.numpy().tobytes().hex() for name, tensor in tensors.items()}
        self.identity = artifact.json_digest(hashes)

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        left = (patches(waveform) - self.tensors["mean"]) @ self.tensors["components"]
        codes = []
        for book in self.tensors["books"]:
            codes.append(_nearest(left, book))
            left = left - book[codes[-1]]
        return torch.stack(codes, 1).numpy().astype(np.uint16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        if not len(codes):
            return np.zeros(0, np.float32)
        columns = torch.from_numpy(codes.astype(np.int64)).T
        kept = sum(
            book[column] for book, column in zip(self.tensors["books"], columns, strict=True)
        )
        mel = kept @ self.tensors["components"].T + self.tensors["mean"]
        return griffin_lim(mel.reshape(-1, BANDS), ITERATIONS).clamp(-1, 1).numpy()

    def save(self, folder: Path) -> list[Path]:
        """Write the codec to `folder`; return its files."""
        paths = [folder / "config.json", folder / "model.safetensors"]
        artifact.write_json(paths[0], {"codec": "patches", "sample_rate": SAMPLE_RATE})
        with artifact.replacing(paths[1]) as temporary:
            save_file({n: tensor.contiguous() for n, tensor in self.tensors.items()}, temporary)
        return paths


def patches(waveform: np.ndarray) -> Tensor:
    """Return the frames of a waveform, (ceil(samples / 1280), 640)."""
    whole = ceil(len(waveform) / SAMPLES) * SAMPLES
    mel = log_mel(F.pad(torch.from_numpy(waveform).float(), (0, whole - len(waveform))))
    return mel.reshape(-1, PATCH * BANDS)


def _nearest(points: Tensor, book: Tensor) -> Tensor:
    return ((book**2).sum(1) - 2 * points @ book.T).argmin(1)


def _k_means(points: Tensor, size: int, chance: torch.Generator) -> Tensor:
    book = points[torch.randperm(len(points), generator=chance)[:size]].clone()
    for _ in range(ROUNDS):
        nearest = _nearest(points, book)
        many = torch.bincount(nearest, minlength=size)
        sums = torch.zeros_like(book).index_add_(0, nearest, points)
        # a code that nothing is near to begins anew somewhere
        anew = points[torch.randint(len(points), (size,), generator=chance)]
        book = torch.where(many[:, None] > 0, sums / many.clamp(min=1)[:, None], anew)
    return book


def fit(frames: Tensor, kept: int, codebooks: int, codebook_size: int, seed: int) -> Patches:
    """Return the codec of these frames (n, 640) with `kept` components. Raises ValueError for
    fewer frames than codes."""
    if len(frames) < codebook_size:
        raise ValueError(
            f"{len(frames)} frames of 80 ms are too few for codebook_size={codebook_size}: give "
            "more speech"
        )
    mean = frames.mean(0)
    _, vectors = torch.linalg.eigh(torch.cov((frames - mean).double().T))
    components = vectors[:, -kept:].flip(1).float()
    left, books = (frames - mean) @ components, list[Tensor]()
    chance = torch.Generator().manual_seed(seed)
    for _ in range(codebooks):
        books.append(_k_means(left, codebook_size, chance))
        left = left - books[-1][_nearest(left, books[-1])]
    # the frame without sound is a code, or a pause would hum
    silent = (patches(np.zeros(SAMPLES, np.float32)) - mean) @ components
    books[0][_nearest(silent, books[0])] = silent
    for book in books[1:]:
        book[book.norm(dim=1).argmin()] = 0
    return Patches({"mean": mean, "components": components, "books": torch.stack(books)})


def load(checkpoint: str) -> Patches:
    """Return the codec in a folder that stages.fit_codec made. Raises ValueError for another."""
    path = Path(checkpoint) / "model.safetensors"
    stated = Path(checkpoint) / "config.json"
    if not path.is_file() or json.loads(stated.read_text("utf-8")).get("codec") != "patches":
        raise ValueError(f"{checkpoint} is no codec of ours: `just fit-codec` makes one")
    if (tensors := load_file(path)).keys() != NAMES:
        raise ValueError(f"{path} has {sorted(tensors)}, and not {sorted(NAMES)}: copy it again")
    return Patches(tensors)
