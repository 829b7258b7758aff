"""Codes to text: a quantizer's codes, transcribed by the Whisper that it was trained on.

In: codes, and the openai-whisper checkpoint whose encoder the quantizer has. Out: transcripts. The
decoding half of a WhisperVQ (projection, positions, transformer) turns codes into the features that
Whisper's text decoder reads. It is read from the published checkpoint or from ours
(decoder.safetensors beside model.safetensors), and written in both formats. Inference is that of
whisperspeech 0.8.9 (vq_stoks.py, `dequantize` and `decode_text`), with one difference: there a clip
ends at its first mask code; here a mask code is a code like the others.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import whisper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from whisper.model import ModelDimensions, MultiHeadAttention, ResidualAttentionBlock, Whisper
from whisper.tokenizer import Tokenizer

from speechfuse.artifact import replacing
from speechfuse.quantizer import model
from speechfuse.quantizer.checkpoints import POSITION_RATE, Seconds, read_torch, read_whisper
from speechfuse.quantizer.model import FFN_MULT, Quantizer, QuantizerConfig

FILE = "decoder.safetensors"
POSITIONS = 1500  # rows of positional_embedding in the published format, whatever the window
VOCABULARY = 51_864  # size of the smaller of openai-whisper's two vocabularies
_POSITIONS = "positional_embedding.weight"


@dataclass(frozen=True)
class Shape:
    """Settings that a decoding half's tensors do not show. The defaults are whisperspeech's."""

    heads: int
    depth: int = 1
    rope: bool = True
    query_mult: float = 2.0


class _Attention(MultiHeadAttention):
    """Whisper's attention, with rotary position embeddings and another scale of q and k."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, width: int, shape: Shape, positions: int) -> None:
        super().__init__(width, shape.heads)
        self.rope = shape.rope
        self.scale = math.sqrt(shape.query_mult * 8 / math.sqrt(width // shape.heads))
        angles = torch.outer(torch.arange(positions).float(), _frequencies(width // shape.heads))
        angles = angles.repeat(1, 2)
        for name, table in (("cosine", angles.cos()), ("sine", angles.sin())):
            self.register_buffer(name, table, persistent=False)

    def qkv_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return super().qkv_attention(self._rotated(q), self._rotated(k), v, mask)

    def _rotated(self, x: Tensor) -> Tensor:
        """Queries or keys (batch, positions, width), scaled and, with `rope`, rotated."""
        if self.rope:
            heads = x.unflatten(-1, (self.n_head, -1))
            left, right = heads.chunk(2, dim=-1)
            quarter_turn = torch.cat((-right, left), dim=-1)
            x = (heads * self.cosine[:, None] + quarter_turn * self.sine[:, None]).flatten(-2)
        return x * self.scale


def _frequencies(head_width: int) -> Tensor:
    return 1.0 / 10_000 ** (torch.arange(0, head_width, 2).float() / head_width)


class WhisperTextDecoder(nn.Module):
    """The decoding half of a WhisperVQ: turns codebook vectors into the features that Whisper's
    text decoder reads. Its tensors are named as in the published checkpoints."""

    def __init__(self, config: QuantizerConfig, shape: Shape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        width, positions = config.n_audio_state, config.n_audio_ctx
        self.project_out = nn.Linear(config.codebook_dim, width)
        self.positional_embedding = nn.Embedding(positions, width)
        nn.init.normal_(self.positional_embedding.weight, std=0.045)
        self._out_blocks = nn.Sequential()
        for _ in range(shape.depth):
            block = ResidualAttentionBlock(width, shape.heads)
            block.attn = _Attention(width, shape, positions)
            self._out_blocks.append(block)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return features (batch, n_audio_ctx, width) of codebook vectors (batch, codes of a
        window, codebook_dim)."""
        x = self.project_out(vectors).repeat_interleave(self.config.downsample, dim=1)
        return self.ln_post(self._out_blocks(x + self.positional_embedding.weight))

    def save(self, folder: Path) -> None:
        """Write decoder.safetensors."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        # one entry only: safetensors writes several in a random order, so the bytes would differ
        metadata = {"shape": json.dumps(asdict(self.shape))}
        with replacing(folder / FILE) as temporary:
            save_file(tensors, temporary, metadata=metadata)


class CodeTranscriber:
    """Transcribes the codes of `quantizer`. `codebook` is (codes + 1, codebook_dim), its last row
    the mask code's vector; `whisper` is the model whose encoder the quantizer has."""

    def __init__(
        self,
        decoder: WhisperTextDecoder,
        quantizer: Quantizer,
        whisper: Whisper,
        language: str = "en",
    ) -> None:
        self.decoder, self.quantizer, self.whisper = decoder, quantizer, whisper
        self.codebook, self.language = quantizer.codebook, language

    @classmethod
    def load(
        cls,
        path: Path | str,
        whisper: Path | str | None,
        language: str = "en",
        window: Seconds = None,
    ) -> "CodeTranscriber":
        """Return the transcriber of the quantizer at `path`: a folder of ours or a published
        `.model` file cut to `window`, as Quantizer.load takes it. `whisper` is the openai-whisper
        `.pt` that it was trained on; it gets the quantizer's window. Raises ValueError without
        `whisper`, for a Whisper with another encoder than the quantizer's, and for a quantizer
        without a decoding half."""
        if whisper is None:
            raise ValueError(
                f"{path} needs its Whisper to decode with: set whisper to the openai-whisper .pt "
                "that it was trained on"
            )
        path, quantizer = Path(path), Quantizer.load(path, whisper, window)
        config, codebook = quantizer.config, quantizer.codebook.clone()
        teacher = load_whisper(Path(whisper), config.n_audio_ctx / POSITION_RATE)
        first = "encoder.conv1.weight"
        if not torch.equal(quantizer.get_parameter(first), teacher.get_parameter(first)):
            raise ValueError(f"{path} has another encoder than {whisper}: give its own Whisper")
        teacher.encoder = quantizer.encoder  # in memory once
        if path.is_dir():
            shape, state = _state_of_ours(path)
        else:
            content = read_torch(path, {"config", "state_dict"}, "WhisperVQ checkpoint")
            shape, state = _state_of_published(path, content, config)
            if not (content.get("tunables") or {}).get("mask_embs"):
                codebook[-1] = codebook[0]  # the oldest models have no mask code: code 0 is padding
        decoder = WhisperTextDecoder(config, shape)
        try:
            decoder.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path} holds no decoding half of its quantizer: {error}") from None
        transcriber = cls(decoder.eval(), quantizer, teacher, language)
        transcriber.codebook = codebook
        return transcriber

    def to(self, device: str) -> "CodeTranscriber":
        """Moves the transcriber to `device` and returns it."""
        for part in (self.decoder, self.quantizer, self.whisper):
            part.to(device)
        self.codebook = self.codebook.to(device)
        return self

    @torch.inference_mode()
    def features(self, codes: list[np.ndarray]) -> Tensor:
        """Return the features (clips, n_audio_ctx, width) of clips, of which each is its codes
        (n,), padded to the window with the mask code. Raises ValueError for a clip of more codes
        than the window holds and for a code greater than the mask code."""
        config, mask = self.decoder.config, len(self.codebook) - 1
        tokens = config.n_audio_ctx // config.downsample
        window = torch.full((len(codes), tokens), mask)
        for row, clip in zip(window, codes, strict=True):
            if len(clip) > tokens or (len(clip) and int(clip.max()) > mask):
                raise ValueError(
                    f"{len(clip)} codes up to {clip.max(initial=0)}: this quantizer makes {tokens} "
                    f"at most, of 0 to {mask}; were they made by it?"
                )
            row[: len(clip)] = torch.from_numpy(clip.astype(np.int64))
        return self.decoder(self.codebook[window.to(self.codebook.device)])

    def transcribe(self, codes: list[np.ndarray], batch_size: int = 16) -> list[str]:
        """Return the text of each clip's codes (n,), decoded greedily by Whisper."""
        texts = []
        for start in range(0, len(codes), batch_size):
            features = self.features(codes[start : start + batch_size])
            texts += transcribe(self.whisper, features, self.language)
        return texts


def load_whisper(path: Path, window: Seconds = None, downsample: int = 1) -> Whisper:
    """Return a frozen openai-whisper model in float32, its encoder cut to `window` seconds. Raises
    ValueError as read_whisper, and for a model whose vocabulary is smaller than that of
    Whisper's tokenizers."""
    content = read_whisper(path, window, downsample)
    try:
        teacher = Whisper(ModelDimensions(**content["dims"]))
        teacher.load_state_dict(content["model_state_dict"])
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a Whisper checkpoint: {error}") from None
    if teacher.dims.n_vocab < VOCABULARY:
        raise ValueError(
            f"{path} has a vocabulary of {teacher.dims.n_vocab}: Whisper's tokenizers need "
            f"{VOCABULARY:,} or more"
        )
    return teacher.eval().requires_grad_(False)


def tokenizer_of(model: Whisper, language: str) -> Tokenizer:
    """The tokenizer that this Whisper was trained with, set to transcribe `language`."""
    options = {"num_languages": model.num_languages, "language": language, "task": "transcribe"}
    return whisper.tokenizer.get_tokenizer(model.is_multilingual, **options)


def transcribe(model: Whisper, features: Tensor, language: str) -> list[str]:
    """Return a text for each row of `features` (batch, n_audio_ctx, width), decoded greedily by
    openai-whisper."""
    options = whisper.DecodingOptions(language=language, without_timestamps=True, fp16=False)
    return [result.text for result in whisper.decode(model, features.float(), options)]


def transcribe_audio(model: Whisper, waveform: np.ndarray, language: str) -> str:
    """Return the text of a waveform of any length, in openai-whisper's own way: by windows of 30 s,
    and where a text looks wrong by another try with sampling, which has a seed here."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model.transcribe(waveform, language=language, fp16=False)["text"].strip()


def _state_of_ours(folder: Path) -> tuple[Shape, dict[str, Tensor]]:
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder} has no {FILE}: it was trained without a Whisper to decode with")
    with safe_open(folder / FILE, "pt") as file:
        shape = Shape(**json.loads(file.metadata()["shape"]))
    return shape, load_file(folder / FILE)


def _state_of_published(
    path: Path, content: dict[str, Any], config: QuantizerConfig
) -> tuple[Shape, dict[str, Tensor]]:
    options, tunables, state = (content.get(k) or {} for k in ("config", "tunables", "state_dict"))
    if options.get("ffn_mult", FFN_MULT) != FFN_MULT:
        raise ValueError(f"{path}: unsupported ffn_mult; WhisperVQ has {FFN_MULT}")
    # older files lack these keys; the defaults are those of whisperspeech's Tunables.upgrade
    rope, query_mult = tunables.get("rope", False), tunables.get("query_mult", 1)
    shape = Shape(options["n_head"], options["depth"], rope, query_mult)
    tensors = model.below(state, "_out_blocks.", "ln_post.")
    tensors = {key: value for key, value in tensors.items() if not key.endswith("inv_freq")}
    try:
        tensors |= model.projection(state, "project_out")
        tensors[_POSITIONS] = state[_POSITIONS][: config.n_audio_ctx]
    except KeyError:
        raise ValueError(f"{path} has no decoding half: no project_out or positions") from None
    return shape, {key: value.float() for key, value in tensors.items()}


def save_published(
    path: Path, quantizer: Quantizer, decoder: WhisperTextDecoder, whisper: str
) -> None:
    """Write `quantizer` and `decoder` to the file `path`, in the format of WhisperSpeech's
    published checkpoints. `whisper` is the name of the Whisper that both were trained on, e.g.
    "medium".

    The package whisperspeech loads such a file whatever the window, but can run only those with a
    window of 30 s.
    """
    config, shape = quantizer.config, decoder.shape
    head_width = config.n_audio_state // shape.heads
    options: dict[str, Any] = {"codebook_dim": config.codebook_dim, "vq_codes": config.codes}
    options |= {"q_depth": 1, "n_head": shape.heads, "head_width": head_width, "ffn_mult": FFN_MULT}
    options |= {"depth": shape.depth, "use_cosine_sim": True, "downsample": config.downsample}
    options["whisper_model_name"] = whisper
    tunables = {"rope": shape.rope, "query_mult": shape.query_mult, "mask_embs": True}
    tunables |= {"downsample_conv": False, "downsample_mean": config.downsample_mean}
    encoding = quantizer.state_dict()
    state = model.below(encoding, "mlp.", "mlp_ln.") | decoder.state_dict()
    for part in ("weight", "bias"):
        state[f"rq.layers.0.project_in.{part}"] = encoding[f"project_in.{part}"]
        state[f"rq.layers.0.project_out.{part}"] = state.pop(f"project_out.{part}")
    codebook = quantizer.codebook[None]
    rq = "rq.layers.0._codebook"
    state |= {f"{rq}.initted": torch.ones(1), f"{rq}.cluster_size": torch.ones(codebook.shape[:2])}
    state |= {f"{rq}.embed_avg": codebook, f"{rq}.embed": codebook}
    state |= {"val_true": torch.zeros(1), "val_total": torch.zeros(1)}
    state[_POSITIONS] = F.pad(state[_POSITIONS], (0, 0, 0, POSITIONS - config.n_audio_ctx))
    if shape.rope:
        for i in range(shape.depth):
            state[f"_out_blocks.{i}.attn.rotary.inv_freq"] = _frequencies(head_width)
    tensors = {key: value.cpu().clone() for key, value in state.items()}
    content = {"config": options, "tunables": tunables, "state_dict": tensors}
    with replacing(path) as temporary:
        torch.save(content, temporary)
