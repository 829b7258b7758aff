"""Training a small quantizer of the WhisperVQ class on speech whose phonemes are known.

In: clips with phoneme times (synthetic speech gives them for free). Out: a Quantizer. Where
WhisperVQ distils a large Whisper, this one learns from framewise phoneme targets through the same
bottleneck: encoder, mean downsampling, MLP, cosine codebook trained by vector-quantize-pytorch
(EMA). Each 40 ms token predicts the phonemes of its two 20 ms halves.

A method of `stages.train_quantizer` is a class with

    window    speechfuse.quantizer.training.mels.Window: the clips it can be trained on
    inputs    {name: fingerprint} of what it reads beside the corpora
    begin(training, validation, device)  -> the module whose parameters train and whose state is
              saved; raises ValueError when training would be in vain
    losses(step, steps, size, seed)      -> {name: loss}, their sum is minimised; a pure function of
              its arguments, the module and torch's random state
    finish(out)  -> (totals, files written)
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from speechfuse import config
from speechfuse.components import OpenShare
from speechfuse.quantizer.model import PADDING, Quantizer, QuantizerConfig, padded
from speechfuse.quantizer.training.mels import Example, Window

SILENCE = "_"
UNKNOWN = -1  # label of a phoneme that is no class, and of padding; it has no loss
FRAMES_PER_LABEL = 2  # mel frames (10 ms) per phoneme label (20 ms)


@dataclass(frozen=True)
class Labelled:
    """`labels`: int64 (frames // 2,), indices into the phoneme list."""

    example: Example
    labels: Tensor


def phoneme_name(name: str) -> str:
    """espeak-ng's phoneme without stress and pause marks, so that one sound is one class."""
    return name.strip("',%=|!;-_:^\"") or SILENCE


def labelled(example: Example, phonemes: list[str]) -> Labelled:
    """The example with a label for each 20 ms; a phoneme that `phonemes` lacks is UNKNOWN."""
    count = example.mel.shape[1] // FRAMES_PER_LABEL
    starts = np.array([second for second, _ in example.phonemes])
    classes = {name: i for i, name in enumerate(phonemes)}
    names = [classes.get(phoneme_name(name), UNKNOWN) for _, name in example.phonemes]
    middles = (np.arange(count) + 0.5) * FRAMES_PER_LABEL / 100
    current = np.searchsorted(starts, middles, side="right") - 1
    labels = np.where(current >= 0, np.array(names)[current], classes[SILENCE])
    return Labelled(example, torch.from_numpy(labels.astype(np.int64)))


def trained_codebook(dim: int, config: QuantizerConfig, decay: float) -> VectorQuantize:
    """A cosine codebook that follows its inputs (batch, tokens, dim) by a moving average."""
    shape = {"dim": dim, "codebook_size": config.codes, "codebook_dim": config.codebook_dim}
    average = {"decay": decay, "kmeans_init": True, "threshold_ema_dead_code": 2}
    return VectorQuantize(**shape, **average, use_cosine_sim=True)


class Trainee(nn.Module):
    """A Quantizer with the parts that only training needs: the trained codebook and the phoneme
    head."""

    def __init__(self, quantizer: Quantizer, phonemes: int, decay: float) -> None:
        super().__init__()
        config = quantizer.config
        self.quantizer, self.phonemes = quantizer, phonemes
        self.vq = trained_codebook(config.n_audio_state, config, decay)
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
    examples: Sequence[Labelled], frames: int, size: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """The windows of one step, a pure function of (seed, step): mels (size, n_mels, frames), labels
    (size, frames // 2).

    Most windows are filled with several utterances one after the other, since a window of silence
    teaches nothing; three in ten hold one utterance and padding, as at inference. Each utterance is
    warped in frequency (VTLP, Jaitly and Hinton 2013) and tilted, to imitate other vocal tracts and
    microphones.
    """
    rng = random.Random(f"{seed}/{step}")
    mels = torch.full((size, examples[0].example.n_mels, frames), PADDING)
    labels = torch.full((size, frames // FRAMES_PER_LABEL), UNKNOWN)
    for row in range(size):
        start, single = 0, rng.random() < 0.3
        while True:
            item = rng.choice(examples)
            length = len(item.labels) * FRAMES_PER_LABEL
            if start + length > frames:
                break
            mel = item.example.mel[:, :length].float()
            mels[row, :, start : start + length] = _disturb(mel, rng)
            half = start // FRAMES_PER_LABEL
            labels[row, half : half + len(item.labels)] = item.labels
            start += length
            if single:
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


@torch.inference_mode()
def codes_of(quantizer: Quantizer, examples: Sequence[Example]) -> np.ndarray:
    """Codes of a batch of clips, int64 (clips, window tokens), those of the padding included."""
    window = padded([each.mel for each in examples], len(examples), quantizer.config)
    embedded = quantizer.embed(window.to(quantizer.codebook.device))
    return quantizer.quantize(embedded).cpu().numpy()


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


class Phonemes:
    """The method that needs no teacher. `model`: the keys of QuantizerConfig; `quantize_from`: the
    share of the steps before the codebook starts; `decay`: of its moving average."""

    inputs: dict[str, str] = {}  # noqa: RUF012

    def __init__(
        self,
        model: dict[str, Any],
        quantize_from: Annotated[float, Ge(0), Lt(1)] = 0.4,
        decay: OpenShare = 0.95,
    ) -> None:
        shape = {"_component_": "speechfuse.quantizer.model.QuantizerConfig", **model}
        self.quantizer = Quantizer(config.instantiate(shape))
        self.quantize_from, self.decay = quantize_from, decay
        self.window = Window(self.quantizer.config.n_mels, self.quantizer.window, "phonemes")

    def begin(self, training: list[Example], validation: list[Example], device: str) -> nn.Module:
        names = {phoneme_name(name) for each in training for _, name in each.phonemes}
        self.phonemes = sorted(names | {SILENCE})
        self.training = [labelled(each, self.phonemes) for each in training]
        self.validation = [labelled(each, self.phonemes) for each in validation]
        self.trainee = Trainee(self.quantizer, len(self.phonemes), self.decay).to(device)
        return self.trainee

    def losses(self, step: int, steps: int, size: int, seed: int) -> dict[str, Tensor]:
        device = self.quantizer.codebook.device
        mels, labels = batch(self.training, self.quantizer.frames, size, seed, step)
        quantize = step >= self.quantize_from * steps
        logits, commitment = self.trainee(mels.to(device), quantize)
        targets = labels.to(device).flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=UNKNOWN)
        return {"loss": loss, "commitment": commitment}

    def finish(self, out: Path) -> tuple[dict[str, Any], list[Path]]:
        """Write the quantizer. Returns (totals, files); totals are the phoneme-normalised mutual
        information of codes and phonemes on the validation clips, and the codes in use."""
        model = self.trainee.finish()
        codes, labels = [], []
        for item in self.validation:
            code_of_label = codes_of(model, [item.example])[0].repeat(FRAMES_PER_LABEL)
            codes.append(code_of_label[: len(item.labels)])
            labels.append(item.labels.numpy())
        every_code, every_label = np.concatenate(codes), np.concatenate(labels)
        has_label = every_label != UNKNOWN
        totals = {
            "phonemes": len(self.phonemes),
            "identity": model.identity,
            "pnmi": round(phoneme_information(every_code[has_label], every_label[has_label]), 4),
            "codes_used": len(np.unique(every_code)),
        }
        model.save(out)
        return totals, [out / "config.json", out / "model.safetensors"]


phonemes = Phonemes  # its name in YAML
