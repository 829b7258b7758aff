"""Training a small quantizer of the WhisperVQ class on speech whose phonemes are known.

In: utterances with phoneme times (synthetic speech gives them for free). Out: a Quantizer. Where
WhisperVQ distils a large Whisper, this one learns from framewise phoneme targets through the same
bottleneck: encoder, mean downsampling, MLP, cosine codebook trained by vector-quantize-pytorch
(EMA). Each 40 ms token predicts the phonemes of its two 20 ms halves.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from speechfuse import tokenizing
from speechfuse.corpora import Clip
from speechfuse.quantizer import PADDING, Quantizer

SILENCE, IGNORE = "_", -100
FRAMES_PER_LABEL = 2  # mel frames (10 ms) per phoneme label (20 ms)


@dataclass(frozen=True)
class Example:
    """`mel`: float16 (n_mels, frames). `labels`: int64 (frames // 2,), indices into the phoneme
    list."""

    mel: Tensor
    labels: Tensor


def phoneme_name(name: str) -> str:
    """espeak-ng's phoneme without stress and pause marks, so that one sound is one class."""
    return name.strip("',%=|!;-_:^\"") or SILENCE


def example(quantizer: Quantizer, utterance: Clip, phonemes: list[str]) -> Example:
    """Mel and labels of one utterance; a phoneme that `phonemes` lacks is ignored by the loss."""
    mel = quantizer.mel(tokenizing.decode(utterance).waveform)
    count = mel.shape[1] // FRAMES_PER_LABEL
    starts = np.array([second for second, _ in utterance.phonemes])
    classes = {name: i for i, name in enumerate(phonemes)}
    names = [classes.get(phoneme_name(name), IGNORE) for _, name in utterance.phonemes]
    middles = (np.arange(count) + 0.5) * FRAMES_PER_LABEL / 100
    current = np.searchsorted(starts, middles, side="right") - 1
    labels = np.where(current >= 0, np.array(names)[current], classes[SILENCE])
    return Example(mel.half(), torch.from_numpy(labels.astype(np.int64)))


class Trainee(nn.Module):
    """A Quantizer with the parts that only training needs: the learning codebook and the phoneme
    head."""

    def __init__(self, quantizer: Quantizer, phonemes: int, decay: float) -> None:
        super().__init__()
        config = quantizer.config
        self.quantizer, self.phonemes = quantizer, phonemes
        self.vq = VectorQuantize(
            dim=config.n_audio_state, codebook_size=config.codes, codebook_dim=config.codebook_dim,
            use_cosine_sim=True, decay=decay, kmeans_init=True, threshold_ema_dead_code=2,
        )  # fmt: skip
        self.head = nn.Linear(config.n_audio_state, config.downsample * phonemes)

    def forward(self, mels: Tensor, quantize: bool) -> tuple[Tensor, Tensor]:
        """(batch, n_mels, frames) -> logits (batch, labels, phonemes) and the commitment loss."""
        x = self.quantizer.embed(mels)
        commitment = x.new_zeros(())
        if quantize:
            x, _, losses = self.vq(x)
            commitment = losses.sum()
        return self.head(x).unflatten(-1, (-1, self.phonemes)).flatten(1, 2), commitment

    @torch.no_grad()
    def finish(self) -> Quantizer:
        """Copy the learnt codebook into the quantizer; the mask code's row stays 0, so speech never
        becomes it."""
        config = self.quantizer.config
        self.quantizer.project_in.load_state_dict(self.vq.project_in.state_dict())
        self.quantizer.codebook.zero_()
        self.quantizer.codebook[: config.codes] = F.normalize(self.vq.codebook, dim=-1)
        return self.quantizer.eval()


def batch(
    examples: Sequence[Example], frames: int, size: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """The windows of one step, a pure function of (seed, step): mels (size, n_mels, frames), labels
    (size, frames // 2).

    Most windows are filled with several utterances one after the other, since a window of silence
    teaches nothing; three in ten hold one utterance and padding, as at inference. Each utterance is
    warped in frequency (VTLP, Jaitly and Hinton 2013) and tilted, which stands for other throats
    and microphones.
    """
    rng = random.Random(f"{seed}/{step}")
    mels = torch.full((size, examples[0].mel.shape[0], frames), PADDING)
    labels = torch.full((size, frames // FRAMES_PER_LABEL), IGNORE)
    for row in range(size):
        start, alone = 0, rng.random() < 0.3
        while True:
            item = rng.choice(examples)
            length = len(item.labels) * FRAMES_PER_LABEL
            if start + length > frames:
                break
            mels[row, :, start : start + length] = _disturb(item.mel[:, :length].float(), rng)
            half = start // FRAMES_PER_LABEL
            labels[row, half : half + len(item.labels)] = item.labels
            start += length
            if alone:
                break
    return mels, labels


def _disturb(mel: Tensor, rng: random.Random) -> Tensor:
    bins = torch.arange(mel.shape[0])
    warped = (bins * rng.uniform(0.85, 1.18)).clamp(max=mel.shape[0] - 1)
    low = warped.floor().long()
    share = (warped - low)[:, None]
    mel = mel[low] * (1 - share) + mel[(low + 1).clamp(max=mel.shape[0] - 1)] * share
    tilt = torch.linspace(-1, 1, mel.shape[0])[:, None] * rng.uniform(-0.15, 0.15)
    mel = mel + tilt + rng.uniform(-0.15, 0.15)
    width, begin = rng.randint(0, 10), rng.randint(0, mel.shape[0] - 10)
    mel[begin : begin + width] = mel.mean()
    return mel


def phoneme_information(codes: np.ndarray, labels: np.ndarray) -> float:
    """PNMI: the share of the phonemes' entropy that the codes explain, 0 to 1 (HuBERT, Hsu et al.
    2021, section IV.D)."""
    joint = np.zeros((codes.max() + 1, labels.max() + 1))
    np.add.at(joint, (codes, labels), 1)
    joint /= joint.sum()
    code, label = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
    seen = joint > 0
    information = (joint[seen] * np.log(joint[seen] / (code @ label)[seen])).sum()
    entropy = -(label[label > 0] * np.log(label[label > 0])).sum()
    return float(information / entropy)
