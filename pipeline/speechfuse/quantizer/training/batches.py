"""The windows of a step of training on phonemes: labelled clips, drawn and disturbed.

In: clips of training.mels, with phoneme times or with what a frozen model guessed. Out: tensors of
one step, a pure function of the seed and the step.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from speechfuse.quantizer.encoder import PADDING
from speechfuse.quantizer.training.mels import Example

SILENCE = "_"
UNKNOWN = -1  # label of a phoneme that is no class, and of padding; it has no loss
FRAMES_PER_LABEL = 2  # mel frames (10 ms) per phoneme label (20 ms)


@dataclass(frozen=True)
class Labelled:
    """`labels`: int64 (frames // 2,), indices into the phoneme list, or their probabilities,
    float16 (tokens * downsample, phonemes)."""

    example: Example
    labels: Tensor


def phoneme_name(name: str) -> str:
    """espeak-ng's phoneme without stress and pause marks, so that one sound is one class."""
    return name.strip("',%=|!;-_:^\"") or SILENCE


def labelled(example: Example, phonemes: list[str], delay: float = 0.0) -> Labelled:
    """The example with a label for each 20 ms, what was spoken `delay` seconds before; a phoneme
    that `phonemes` lacks is UNKNOWN."""
    count = example.frames // FRAMES_PER_LABEL
    starts = np.array([second for second, _ in example.phonemes])
    classes = {name: i for i, name in enumerate(phonemes)}
    names = [classes.get(phoneme_name(name), UNKNOWN) for _, name in example.phonemes]
    middles = (np.arange(count) + 0.5) * FRAMES_PER_LABEL / 100 - delay
    current = np.searchsorted(starts, middles, side="right") - 1
    labels = np.where(current >= 0, np.array(names)[current], classes[SILENCE])
    return Labelled(example, torch.from_numpy(labels.astype(np.int64)))


def batch(
    examples: Sequence[Labelled], frames: int, size: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """The windows of one step, a pure function of (seed, step): mels (size, n_mels, frames), labels
    (size, frames // 2) or (size, frames // 2, phonemes).

    Most windows are filled with several utterances one after the other, since a window of silence
    teaches nothing; three in ten hold one utterance and padding, as at inference. Each utterance is
    disturbed, to imitate other vocal tracts, rooms and microphones.
    """
    rng = random.Random(f"{seed}/{step}")
    mels = torch.full((size, examples[0].example.n_mels, frames), PADDING)
    shape, dtype = examples[0].labels.shape[1:], examples[0].labels.dtype
    unknown = 0 if shape else UNKNOWN  # no phoneme is probable
    labels = torch.full((size, frames // FRAMES_PER_LABEL, *shape), unknown, dtype=dtype)
    for row in range(size):
        start, single = 0, rng.random() < 0.3
        for _ in range(20):  # a short window does not hold each that is drawn
            item = rng.choice(examples)
            length = len(item.labels) * FRAMES_PER_LABEL
            if start + length > frames:
                if start:
                    break
                continue
            mel = item.example.mel[:, :length].float()
            mels[row, :, start : start + length] = _disturb(mel, rng)
            half = start // FRAMES_PER_LABEL
            labels[row, half : half + len(item.labels)] = item.labels
            start += length
            if single:
                break
    return mels, labels


def packed(
    examples: Sequence[Labelled], downsample: int, size: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """The clips of one step, a pure function of (seed, step), one behind the other, since nothing
    behind the encoder sees its neighbours: its kept features (1, positions, width), and labels
    (1, positions)."""
    chosen = random.Random(f"{seed}/{step}").choices(examples, k=size)
    kept = [len(each.labels) // downsample * downsample for each in chosen]
    both = list(zip(chosen, kept, strict=True))
    features = np.concatenate([each.example.taught[:count] for each, count in both])
    labels = torch.cat([each.labels[:count] for each, count in both])
    return torch.from_numpy(features).float()[None], labels[None]


def _disturb(mel: Tensor, rng: random.Random) -> Tensor:
    """A log-mel (n_mels, frames) warped in frequency (VTLP, Jaitly and Hinton 2013), then, each by
    its own odds: smeared by a room's echo, in noise of 5 to 40 dB, its lowest and highest bands cut
    off (300 to 3,400 Hz at the worst, a telephone's); tilted, louder or softer, a few bands masked.
    """
    count, frames = mel.shape
    warped = (torch.arange(count) * rng.uniform(0.85, 1.18)).clamp(max=count - 1)
    low = warped.floor().long()
    share = (warped - low)[:, None]
    mel = mel[low] * (1 - share) + mel[(low + 1).clamp(max=count - 1)] * share
    power = 10 ** (4 * mel - 4)  # what whisper.log_mel_spectrogram took the logarithm of
    if rng.random() < 0.3:
        decay = 10 ** (-0.06 / rng.uniform(0.1, 0.5))  # of a frame: 60 dB in 0.1 to 0.5 s
        echo = rng.uniform(0.1, 0.6) * decay ** torch.arange(30)
        echo[0] = 1.0  # the direct sound
        power = F.conv1d(F.pad(power[:, None], (29, 0)), echo.flip(0)[None, None])[:, 0]
    if rng.random() < 0.5:
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        noise = torch.empty(count, frames).exponential_(generator=generator)
        noise *= 10 ** (torch.linspace(-1, 1, count)[:, None] * rng.uniform(-1.0, 0.5))
        power = power + noise * power.mean() / noise.mean() * 10 ** rng.uniform(-4.0, -0.5)
    if rng.random() < 0.4:
        power[: round(rng.uniform(0, 0.09) * count)] = 0.0
        power[round(rng.uniform(0.72, 1) * count) :] = 0.0
    mel = power.clamp(min=1e-10).log10()
    mel = (mel.clamp(min=mel.max() - 8) + 4) / 4
    tilt = torch.linspace(-1, 1, count)[:, None] * rng.uniform(-0.15, 0.15)
    mel = mel + tilt + rng.uniform(-0.15, 0.15)
    width, begin = rng.randint(0, 10), rng.randint(0, count - 10)
    mel[begin : begin + width] = mel.mean()
    return mel
