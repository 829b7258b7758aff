"""Training a quantizer of the WhisperVQ class on phonemes.

In: clips with phoneme times (espeak-ng gives them for free), or any clips and a quantizer of this
kind on a Whisper, whose guess of the phonemes then stands for them. Out: a Quantizer. Where
WhisperVQ distils a large Whisper, this one learns from framewise phoneme targets through the same
bottleneck: encoder, its own or a frozen Whisper's, downsampling, MLP, cosine codebook trained by
vector-quantize-pytorch (EMA). Each 40 ms token predicts the phonemes of its two 20 ms halves.

A method of `stages.train_quantizer` is a class with

    window    speechfuse.quantizer.training.mels.Window: the clips it can be trained on
    inputs    {name: fingerprint} of what it reads beside the corpora
    begin(training, validation, device)  -> the module whose parameters train and whose state is
              saved; raises ValueError when training would be in vain
    losses(step, steps, size, seed)      -> {name: loss}, their sum is minimised; a pure function of
              its arguments, the module and torch's random state
    finish(out)  -> (totals, files written)
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from vector_quantize_pytorch import VectorQuantize

from speechfuse import artifact, config
from speechfuse.audio import espeak_ng
from speechfuse.components import OpenShare, Positive
from speechfuse.quantizer.encoder import padded
from speechfuse.quantizer.model import ENCODER_DIMS, Quantizer, QuantizerConfig
from speechfuse.quantizer.training import batches
from speechfuse.quantizer.training.alignment import aligned, spelled
from speechfuse.quantizer.training.batches import SILENCE, UNKNOWN, Labelled, labelled
from speechfuse.quantizer.training.mels import MEL_RATE, Example, Window

HEAD = "phonemes.safetensors"  # beside a quantizer on a Whisper: what names its phonemes


def trained_codebook(dim: int, config: QuantizerConfig, decay: float) -> VectorQuantize:
    """A cosine codebook that follows its inputs (batch, tokens, dim) by a moving average."""
    shape = {"dim": dim, "codebook_size": config.codes, "codebook_dim": config.codebook_dim}
    average = {"decay": decay, "kmeans_init": True, "threshold_ema_dead_code": 2}
    return VectorQuantize(**shape, **average, use_cosine_sim=True)


class Head(nn.Linear):
    """Names the phonemes of embedded speech (batch, tokens, width): logits (batch, labels,
    phonemes)."""

    def __init__(self, config: QuantizerConfig, phonemes: int) -> None:
        super().__init__(config.n_audio_state, config.downsample * phonemes)
        self.phonemes = phonemes

    def forward(self, embedded: Tensor) -> Tensor:
        return super().forward(embedded).unflatten(-1, (-1, self.phonemes)).flatten(1, 2)


class Guess(nn.Module):
    """The phonemes of speech as the quantizer in the folder `checkpoint`, trained on a Whisper by
    this method, hears them before its codebook. Raises ValueError for another folder."""

    def __init__(self, checkpoint: str) -> None:
        super().__init__()
        self.quantizer = Quantizer.load(Path(checkpoint))
        self.config, path = self.quantizer.config, Path(checkpoint) / HEAD
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} has no {HEAD}: make it by speechfuse.quantizer.phonemes and whisper"
            )
        with safe_open(path, "pt") as file:
            self.phonemes: list[str] = json.loads(file.metadata()["phonemes"])
        self.head = Head(self.config, len(self.phonemes))
        self.head.load_state_dict(load_file(path))

    def embed(self, mels: Tensor) -> Tensor:
        """(batch, n_mels, window frames) -> probabilities (batch, tokens, downsample *
        phonemes)."""
        probabilities = self.head(self.quantizer.embed(mels)).softmax(-1)
        return probabilities.unflatten(1, (-1, self.config.downsample)).flatten(2)


class Trainee(nn.Module):
    """A Quantizer with the parts that only training needs: the trained codebook and the phoneme
    head."""

    def __init__(self, quantizer: Quantizer, phonemes: int, decay: float) -> None:
        super().__init__()
        config = quantizer.config
        self.quantizer = quantizer
        self.vq = trained_codebook(config.n_audio_state, config, decay)
        self.head = Head(config, phonemes)

    def forward(self, inputs: Tensor, quantize: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What the encoder reads (batch, ...) -> logits (batch, labels, phonemes) before and behind
        the codebook, and the commitment loss."""
        x = quantized = self.quantizer.embed(inputs)
        commitment = x.new_zeros(())
        if quantize:
            with torch.autocast(x.device.type, enabled=False):  # the average is of small changes
                quantized, _, losses = self.vq(x.float())
            commitment = losses.sum()
        return self.head(x), self.head(quantized), commitment

    @torch.no_grad()
    def finish(self) -> Quantizer:
        """Copy the learnt codebook into the quantizer; the mask code's row stays 0, so speech never
        becomes it."""
        config = self.quantizer.config
        self.quantizer.project_in.load_state_dict(self.vq.project_in.state_dict())
        self.quantizer.codebook.zero_()
        self.quantizer.codebook[: config.codes] = F.normalize(self.vq.codebook, dim=-1)
        return self.quantizer.eval()


def begin_with(small: Quantizer, large: Quantizer) -> None:
    """Give `small` the convolutions, positions and first layers of the encoder of `large`. Raises
    ValueError where their shapes differ."""
    own, theirs = small.encoder.state_dict(), large.encoder.state_dict()
    positions = "positional_embedding"
    theirs[positions] = theirs[positions][: small.config.n_audio_ctx]
    alike = small.config.n_audio_head == large.config.n_audio_head
    if not alike or any(x.shape != theirs.get(name, x[..., :0]).shape for name, x in own.items()):
        raise ValueError(f"method.start: {small.config} is no beginning of {large.config}")
    small.encoder.load_state_dict({name: theirs[name] for name in own})


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits (batch, labels, phonemes) to labels (batch, labels) or to probabilities (batch,
    labels, phonemes), the mean over those that are known."""
    logits = logits.flatten(0, 1)
    if labels.ndim == 2:
        return F.cross_entropy(logits, labels.flatten(), ignore_index=UNKNOWN)
    targets = labels.float().flatten(0, 1)
    return F.cross_entropy(logits, targets, reduction="sum") / targets.sum()


@torch.inference_mode()
def codes_of(quantizer: Quantizer, examples: Sequence[Example]) -> np.ndarray:
    """Codes of a batch of clips that are padded to the same length, int64 (clips, tokens), those of
    the padding included."""
    frames = quantizer.padded_frames(max(each.frames for each in examples))
    window = padded([each.mel for each in examples], len(examples), frames)
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
    """The method that needs phonemes in place of a Whisper's text decoder.

    model          the keys of QuantizerConfig; with `whisper` without those of the encoder
    quantize_from  share of the steps before the codebook starts
    decay          of the codebook's moving average
    whisper        openai-whisper's `.pt`, whose encoder, cut to `window` seconds, is taken and
                   stays as it is; what it makes of the clips is computed once
    labels_from    {checkpoint: folder that this method made with `whisper`}: its guess of the
                   phonemes, of the undisturbed clips, is the target; they need have none themselves
    voice          of espeak-ng, as en-us: the targets are that voice's phonemes of a clip's text,
                   each where labels_from hears it; of a clip without text, what it hears
    delay          seconds after which a phoneme is named, where nothing that comes later is heard
    start          begin with the first layers of that one's Whisper, of the same width
    int8           write the weights in 8 bits
    """

    def __init__(
        self,
        model: dict[str, Any],
        quantize_from: Annotated[float, Ge(0), Lt(1)] = 0.4,
        decay: OpenShare = 0.95,
        whisper: str | None = None,
        window: Positive | None = None,
        labels_from: dict[str, Any] | None = None,
        voice: str | None = None,
        delay: Annotated[float, Ge(0)] = 0.0,
        start: bool = False,
        int8: bool = False,
    ) -> None:
        self.inputs, self.encoder, self.guess = dict[str, str](), None, None
        teacher: dict[str, Any] = {}
        if delay and labels_from:
            raise ValueError("method.delay: labels_from names each phoneme in its place")
        alone = (window and not whisper) or ((start or voice) and not labels_from)
        if alone or (whisper and labels_from):
            raise ValueError(
                "method: window belongs to whisper, voice and start to labels_from: two ways"
            )
        if voice:
            with espeak_ng.EspeakLibrary() as engine:
                engine.choose(espeak_ng.EspeakVoice(voice))
        if whisper:
            teacher = {"_component_": "speechfuse.quantizer.of_whisper", "checkpoint": whisper}
            teacher |= {"window": window}
            heard = config.instantiate(teacher)
            # pad_to: what it makes of a clip is made in the whole window
            if own := sorted({*ENCODER_DIMS, "pad_to"} & {*model}):
                raise ValueError(f"method.model: {own[0]} is that of {whisper}: leave it out")
            model = model | {name: getattr(heard.config, name) for name in ENCODER_DIMS}
            self.inputs["whisper"] = artifact.sha256_of(Path(whisper))
        shape = {"_component_": "speechfuse.quantizer.model.QuantizerConfig", **model}
        self.quantizer = Quantizer(config.instantiate(shape))
        n_mels, seconds = self.quantizer.config.n_mels, self.quantizer.frames / MEL_RATE
        if whisper:
            self.encoder, self.quantizer.encoder = heard.encoder, nn.Identity()
        if labels_from:
            teacher = {"_component_": f"{__name__}.Guess", **labels_from}
            self.guess = config.instantiate(teacher)
            seconds = min(seconds, self.guess.quantizer.window)
            if self.guess.config.n_mels != n_mels:
                raise ValueError(f"method.model.n_mels={n_mels}: labels_from has another")
            self.inputs["labels_from"] = artifact.fingerprint_of(Path(labels_from["checkpoint"]))
            if start:
                begin_with(self.quantizer, self.guess.quantizer)
        self.quantize_from, self.decay, self.voice, self.int8 = quantize_from, decay, voice, int8
        self.delay = delay
        look_back = bool(self.quantizer.config.look_back)
        needs = None if labels_from else "phonemes"
        self.window = Window(n_mels, seconds, needs, teacher, look_back=look_back)

    def begin(self, training: list[Example], validation: list[Example], device: str) -> nn.Module:
        names = {batches.phoneme_name(name) for each in training for _, name in each.phonemes}
        self.phonemes = self.guess.phonemes if self.guess else sorted(names | {SILENCE})
        with espeak_ng.EspeakLibrary() as engine:
            once = {id(each): each for each in training}  # it may count several times
            bar = tqdm(once.items(), "labels")
            known = {key: self._labelled(each, engine) for key, each in bar}
            self.training = [known[id(each)] for each in training]
            self.validation = [self._labelled(each, engine) for each in validation]
        self.shortest = self.quantizer.padded_frames(min(each.frames for each in training))
        self.trainee = Trainee(self.quantizer, len(self.phonemes), self.decay).to(device)
        return self.trainee

    def _labelled(self, example: Example, engine: espeak_ng.EspeakLibrary) -> Labelled:
        if self.guess is None:
            return labelled(example, self.phonemes, self.delay)
        guessed = np.array(example.taught).reshape(-1, len(self.phonemes))
        if self.voice:
            classes = {name: i for i, name in enumerate(self.phonemes)}
            spoken = spelled(engine, example.text, self.voice, classes) if example.text else []
            guessed = aligned(guessed, spoken, classes[SILENCE])
        return Labelled(example, torch.from_numpy(guessed))

    def losses(self, step: int, steps: int, size: int, seed: int) -> dict[str, Tensor]:
        device = self.quantizer.codebook.device
        if self.encoder:
            downsample = self.quantizer.config.downsample
            inputs, labels = batches.packed(self.training, downsample, size, seed, step)
        else:
            longest, least = self.quantizer.frames, self.quantizer.padded_frames(1)
            chance = random.Random(
                f"{seed}/{step}"
            )  # of the lengths that these clips are padded to
            frames = least * chance.randint(self.shortest // least, longest // least)
            size = size * longest // frames
            inputs, labels = batches.batch(self.training, frames, size, seed, step)
        quantize = step >= self.quantize_from * steps
        before, behind, commitment = self.trainee(inputs.to(device), quantize)
        found = {"loss": cross_entropy(behind, labels.to(device)), "commitment": commitment}
        if self.encoder:  # for labels_from the head must go on to know what has had no codebook
            found["before"] = cross_entropy(before, labels.to(device))
        return found

    def finish(self, out: Path) -> tuple[dict[str, Any], list[Path]]:
        """Write the quantizer. Returns (totals, files); totals are the phoneme-normalised mutual
        information of codes and phonemes on the validation clips, and the codes in use."""
        model = self.trainee.finish()
        files = [out / "config.json", out / "model.safetensors"]
        if self.encoder:
            model.encoder = self.encoder.to(model.codebook.device)
            # one entry only: safetensors writes several in a random order
            metadata = {"phonemes": json.dumps(self.phonemes)}
            files.append(out / HEAD)
            with artifact.replacing(out / HEAD) as temporary:
                save_file(self.trainee.head.state_dict(), temporary, metadata)
        model.int8 = self.int8
        model.save(out)
        model = Quantizer.load(out)
        codes, labels = [], []
        for item in self.validation:
            code_of_label = codes_of(model, [item.example])[0].repeat(batches.FRAMES_PER_LABEL)
            codes.append(code_of_label[: len(item.labels)])
            likeliest = item.labels.argmax(-1) if item.labels.ndim > 1 else item.labels
            labels.append(likeliest.numpy())
        every_code, every_label = np.concatenate(codes), np.concatenate(labels)
        has_label = every_label != UNKNOWN
        totals = {
            "phonemes": len(self.phonemes),
            "identity": model.identity,
            "pnmi": round(phoneme_information(every_code[has_label], every_label[has_label]), 4),
            "codes_used": len(np.unique(every_code)),
        }
        return totals, files


phonemes = Phonemes  # its name in YAML
