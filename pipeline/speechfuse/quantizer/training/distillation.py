"""WhisperVQ's recipe: a quantizer that keeps what a Whisper's text decoder needs.

In: speech with transcripts, and an openai-whisper checkpoint, which stays as it is. Out: the
quantizer, its decoding half, the published file that holds both, and the transcripts of the
validation clips by teacher and quantizer. The model is Whisper's encoder, mean downsampling, MLP,
cosine codebook trained by vector-quantize-pytorch (EMA, dead codes refilled), decoding half,
Whisper's text decoder. The loss is that of whisperspeech 0.8.9 (vq_stoks.py, `forward`): cross
entropy to the transcript, KL to the teacher's distribution from the unquantized features (summed
over the tokens of a clip), and the commitment to the codebook. Unlike there, padding takes no code:
it has the vector of the mask code, which is 0.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn
from tqdm import tqdm

from speechfuse import artifact
from speechfuse.components import Count, OpenShare, Positive
from speechfuse.quantizer import decoder
from speechfuse.quantizer.encoder import padded
from speechfuse.quantizer.model import ENCODER_DIMS, Codes, Quantizer, QuantizerConfig
from speechfuse.quantizer.training.mels import Example, Window
from speechfuse.quantizer.training.phonemes import codes_of, trained_codebook
from speechfuse.scores.word_errors import word_error_rate

PUBLISHED = "whisper-vq.model"  # both halves in WhisperSpeech's own format
BATCH = 16  # clips decoded at once
DOWNSAMPLE = 2
TOKEN_FRAMES = 2 * DOWNSAMPLE  # mel frames (10 ms) of one code
COUNT = 4.0  # tokens a step that a code is said to have had, twice of what keeps it alive


class Student(nn.Module):
    """The trained modules: both halves and the codebook between them, without the encoder."""

    def __init__(self, config: QuantizerConfig, depth: int, decay: float) -> None:
        super().__init__()
        self.quantizer = Quantizer(config)
        self.quantizer.encoder = nn.Identity()
        self.vq = trained_codebook(config.codebook_dim, config, decay)
        shape = decoder.Shape(config.n_audio_head, depth)
        self.decoding = decoder.WhisperTextDecoder(config, shape)

    def begin_with(self, start: Quantizer) -> None:
        """Take what `start` has behind its encoder."""
        tensors = start.state_dict().items()
        self.quantizer.load_state_dict({n: x for n, x in tensors if not n.startswith("encoder.")})
        codes, trained = start.codebook[: start.config.codes], self.vq._codebook
        trained.embed.copy_(codes)
        trained.embed_avg.copy_(codes * COUNT)
        trained.cluster_size.fill_(COUNT)
        trained.initted.fill_(True)

    def forward(self, features: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded audio (batch, n_audio_ctx, width), and which of its tokens (batch, window tokens)
        are not padding -> features that went through the codebook, and the commitment loss."""
        x = F.normalize(self.quantizer.project_in(self.quantizer.embed(features)), dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            quantized, _, commitment = self.vq(x.float(), mask=present)
        return self.decoding(quantized), commitment.sum()


class Whisper:
    """WhisperVQ's training method.

    whisper           an openai-whisper `.pt` of any size, its encoder cut to `window` seconds; cut,
                      its decoder goes on where a text ends, so that the end is a target by itself,
                      and its own transcripts are made with its whole window
    start             folder of a quantizer on the same encoder, e.g. made by phonemes: it begins
                      with that one's codes, whose number and dimensions are to be the same
    regression        share of the steps, the first ones, that learn to give back what the encoder
                      makes of the clips, and not yet its text: a start that WhisperVQ lacks
    cache             keep on disk, in float16, what the encoder makes of each clip, so that no step
                      runs it: 192 kB a clip for tiny and 5 s, 3 MB for medium and 30 s
    codes             entries of the codebook, of `codebook_dim` dimensions
    depth             transformer blocks of the decoding half
    decay             of the codebook's moving average
    language          of the transcripts
    validation_clips  clips that are decoded for the word error rates, whose texts pass Whisper's
                      English normaliser
    max_teacher_wer   a teacher with a higher rate is refused
    dtype             float32, or bfloat16 for the matrix products
    """

    def __init__(
        self,
        whisper: str,
        codes: Codes = 512,
        codebook_dim: Count = 64,
        depth: Count = 1,
        decay: OpenShare = 0.99,
        language: str = "en",
        validation_clips: Count = 500,
        max_teacher_wer: Positive = 0.5,
        dtype: str = "float32",
        window: Positive | None = None,
        start: str | None = None,
        cache: bool = False,
        regression: Annotated[float, Ge(0), Lt(1)] = 0.0,
    ) -> None:
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"method.dtype={dtype!r}: choose float32 or bfloat16")
        self.regression = regression
        self.path, self.language = Path(whisper), language
        self.teacher = decoder.load_whisper(self.path, window, DOWNSAMPLE)
        self.cut = window is not None
        self.tokenizer = decoder.tokenizer_of(self.teacher, language)
        dims = self.teacher.dims
        encoder_dims = {name: getattr(dims, name) for name in ENCODER_DIMS}
        self.config = QuantizerConfig(codes, codebook_dim, DOWNSAMPLE, True, **encoder_dims)
        self.depth, self.decay, self.reduced = depth, decay, dtype == "bfloat16"
        self.validation_clips, self.max_teacher_wer = validation_clips, max_teacher_wer
        encoder = {"_component_": "speechfuse.quantizer.of_whisper"}
        kept = {**encoder, "checkpoint": whisper, "window": window} if cache else {}
        self.window = Window(dims.n_mels, dims.n_audio_ctx / 50, "text", kept, whole=True)
        self.inputs = {"whisper": artifact.sha256_of(self.path)}
        self.start = self._start(Path(start)) if start else None

    def _start(self, folder: Path) -> Quantizer:
        quantizer = Quantizer.load(folder)
        if quantizer.config != self.config:
            raise ValueError(
                f"method.start: {folder} is {quantizer.config}, but {self.config} is to be trained"
            )
        theirs = self.teacher.encoder.state_dict()
        if any(not torch.equal(x, theirs[n]) for n, x in quantizer.encoder.state_dict().items()):
            raise ValueError(f"method.start: {folder} has another encoder than {self.path}")
        self.inputs["start"] = quantizer.identity
        return quantizer

    def begin(self, training: list[Example], validation: list[Example], device: str) -> nn.Module:
        self.device = torch.device(device)
        self.teacher.to(self.device)
        every = max(1, len(validation) // self.validation_clips)
        self.validation = validation[::every][: self.validation_clips]
        self.teacher_transcripts = []
        whole = decoder.load_whisper(self.path).to(self.device) if self.cut else self.teacher
        frames = 2 * whole.dims.n_audio_ctx
        for part in tqdm(_batches(self.validation), "teacher", unit="batch"):
            with torch.inference_mode():
                mels = padded([each.mel for each in part], len(part), frames, self.device)
                features = whole.encoder(mels)
            self.teacher_transcripts += decoder.transcribe(whole, features, self.language)
        self.teacher_wer = word_error_rate(self.texts, self.teacher_transcripts)
        if not self.teacher_wer[0] <= self.max_teacher_wer:
            raise ValueError(
                f"{self.path} does not transcribe: WER {self.teacher_wer[0]:.2f} on "
                f"{len(self.validation)} validation clips, more than max_teacher_wer="
                f"{self.max_teacher_wer}; it hears {self.teacher_transcripts[0]!r} in "
                f"{self.texts[0]!r}; give a trained Whisper that knows this speech and language"
            )
        most = self.teacher.dims.n_text_ctx
        read = [(each, self._tokens(each.text or "")) for each in training]
        self.training = [(each, tokens) for each, tokens in read if len(tokens) <= most]
        self.text_too_long = len(training) - len(self.training)
        if not self.training:
            raise ValueError(f"every transcript has more than the {most} tokens of {self.path}")
        self.student = Student(self.config, self.depth, self.decay)
        if self.start:
            self.student.begin_with(self.start)
        return self.student.to(self.device)

    def _tokens(self, text: str) -> list[int]:
        """Input of the text decoder: the task's tokens, then the text's, none of them special."""
        tokens = self.tokenizer.encode(f" {text.strip()}", disallowed_special=())
        return [*self.tokenizer.sot_sequence_including_notimestamps, *tokens]

    @property
    def texts(self) -> list[str]:
        return [each.text or "" for each in self.validation]

    def losses(self, step: int, steps: int, size: int, seed: int) -> dict[str, Tensor]:
        count = len(self.training)
        places = range(step * size, (step + 1) * size)
        chosen = [self.training[_order(seed, at // count, count)[at % count]] for at in places]
        present = torch.zeros(size, self.config.n_audio_ctx // DOWNSAMPLE, dtype=torch.bool)
        length = max(len(text) for _, text in chosen)
        tokens = torch.full((size, length), self.tokenizer.eot)
        predicts = torch.zeros(size, length, dtype=torch.bool)  # the token behind has a loss
        first = len(self.tokenizer.sot_sequence_including_notimestamps) - 1
        for row, (each, text) in enumerate(chosen):
            present[row, : each.frames // TOKEN_FRAMES] = True
            tokens[row, : len(text)] = torch.tensor(text)
            predicts[row, first : len(text)] = True
        targets = F.pad(tokens[:, 1:], (0, 1), value=self.tokenizer.eot)[predicts].to(self.device)
        tokens, predicts = tokens.to(self.device), predicts.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.reduced):
            with torch.no_grad():
                features = self._features([each for each, _ in chosen])
            if step < self.regression * steps:
                decoded, commitment = self.student(features, present.to(self.device))
                squares = F.mse_loss(decoded.float(), features.float())
                return {"squares": squares, "commitment": commitment}
            with torch.no_grad():
                teacher = self.teacher.decoder(tokens, features)[predicts].log_softmax(-1)
            if self.cut:
                ends = (targets == self.tokenizer.eot).unsqueeze(-1)
                certain = F.one_hot(targets, teacher.shape[-1]).log()
                teacher = torch.where(ends, certain.clamp(min=-1e4), teacher)
            decoded, commitment = self.student(features, present.to(self.device))
            student = self.teacher.decoder(tokens, decoded)[predicts].log_softmax(-1)
        kl = F.kl_div(student, teacher, reduction="sum", log_target=True) / size
        return {"ce": F.nll_loss(student, targets), "kl": kl, "commitment": commitment}

    @torch.no_grad()
    def finish(self, out: Path) -> tuple[dict[str, Any], list[Path]]:
        """Write the quantizer and its files. Returns (totals, files); totals are word error rates
        of teacher and quantizer on the validation clips, and the codes in use."""
        quantizer, decoding = self.student.quantizer.eval(), self.student.decoding.eval()
        quantizer.encoder = self.teacher.encoder
        quantizer.codebook[: self.config.codes] = F.normalize(self.student.vq.codebook, dim=-1)
        codes = [
            row[: each.frames // TOKEN_FRAMES]
            for part in tqdm(_batches(self.validation), "quantizer", unit="batch")
            for row, each in zip(codes_of(quantizer, part), part, strict=True)
        ]
        transcriber = decoder.CodeTranscriber(decoding, quantizer, self.teacher, self.language)
        transcripts = transcriber.transcribe(codes, BATCH)
        rows = zip(self.texts, self.teacher_transcripts, transcripts, strict=True)
        lines = [json.dumps({"text": t, "teacher": a, "codec": b}) for t, a, b in rows]
        artifact.write_atomic(out / "heard.jsonl", "".join(f"{line}\n" for line in lines))
        quantizer.save(out)
        decoding.save(out)
        decoder.save_published(out / PUBLISHED, quantizer, decoding, self.path.stem)
        shares = np.bincount(np.concatenate(codes), minlength=self.config.codes).astype(float)
        shares = shares[shares > 0] / shares.sum()
        entropy = float(-(shares * np.log2(shares)).sum())
        totals = {
            "identity": quantizer.identity,
            "validation_clips": len(self.validation),
            "text_too_long": self.text_too_long,
            "teacher_wer": _score(self.teacher_wer),
            "codec_wer": _score(word_error_rate(self.texts, transcripts)),
            "codes_used": len(shares),
            "entropy_bits": round(entropy, 3),
            "perplexity": round(2**entropy, 1),
        }
        names = ("config.json", "model.safetensors", decoder.FILE, PUBLISHED, "heard.jsonl")
        return totals, [out / name for name in names]

    def _features(self, examples: list[Example]) -> Tensor:
        """What the encoder makes of clips: (clips, n_audio_ctx, width) on the device."""
        if self.window.teacher:
            kept = np.stack([each.taught for each in examples])
            return torch.from_numpy(kept).to(self.device).float()
        mels, frames = [each.mel for each in examples], 2 * self.config.n_audio_ctx
        return self.teacher.encoder(padded(mels, len(mels), frames, self.device))


def _batches(examples: list[Example]) -> list[list[Example]]:
    return [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]


def _score(wer: tuple[float, float, float]) -> list[float]:
    return [round(value, 4) for value in wer]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of the clips in an epoch, int64 (count,)."""
    return np.random.default_rng([seed, epoch]).permutation(count)


whisper = Whisper  # its name in YAML
