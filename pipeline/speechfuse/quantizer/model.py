"""WhisperVQ: speech to codes, 25 a second.

In: mono float32 waveforms at 16 kHz, each no longer than the quantizer's window. Out: one array of
uint16 codes a waveform. Reads the published checkpoint ({config, tunables, state_dict} of
WhisperSpeech's RQBottleneckTransformer, beside an openai-whisper checkpoint) and ours (the encoding
half of the same tensors in safetensors + config.json). Inference is the one of whisperspeech 0.8.9
(vq_stoks.py, `encode_mel` and `quantize`), token for token: log-mel per clip, padding of -1.5 in
mel space.
"""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from speechfuse.artifact import replacing, write_json
from speechfuse.audio.decoding import SAMPLE_RATE
from speechfuse.components import Count, Positive
from speechfuse.quantizer import checkpoints
from speechfuse.quantizer.checkpoints import ENCODER_DIMS, POSITION_RATE, Seconds
from speechfuse.quantizer.encoder import HOP_LENGTH, Encoder, log_mel, padded

LONGEST = 3600.0  # seconds of a waveform at once, where the encoder looks back only
SCALE = ".scale"  # behind the name of a weight in 8 bits
FFN_MULT = 4  # RQBottleneckTransformer's default, never changed in a published model
Codes = Annotated[int, Ge(1), Le(65_535)]  # with the mask code they fit into uint16


@dataclass
class QuantizerConfig:
    """Shape of a quantizer. The codebook has `codes` + 1 rows, the last one for the mask code;
    ENCODER_DIMS are Whisper's. A clip is padded to the window, as WhisperSpeech does it, or with
    `pad_to` to the next multiple of so many seconds, which is faster for short clips and another
    quantizer: it is to be trained so. `ffn_mult`: width of the MLP behind the encoder, in widths of
    the encoder. With `look_back`, see encoder.Encoder, it takes waveforms of any length, and the
    window is that of its training alone."""

    codes: Codes
    codebook_dim: Count
    downsample: Count
    downsample_mean: bool
    n_mels: int
    n_audio_ctx: Count
    n_audio_state: Count
    n_audio_head: Count
    n_audio_layer: Count
    ffn_mult: Count = FFN_MULT
    pad_to: Positive | None = None
    look_back: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        padded = round((self.pad_to or 0) * POSITION_RATE)  # positions
        whole = padded and padded % self.downsample == 0 == self.n_audio_ctx % padded
        if self.pad_to and not (whole and padded / POSITION_RATE == self.pad_to):
            raise ValueError(
                f"pad_to={self.pad_to:g}: give a multiple of {self.downsample / POSITION_RATE:g} s "
                f"that divides the window, {self.n_audio_ctx / POSITION_RATE:g} s"
            )
        if self.look_back and not self.pad_to:
            raise ValueError(f"look_back={self.look_back} needs pad_to: 1.0")
        if self.n_mels not in ((80,) if self.look_back else (80, 128)):
            raise ValueError(
                f"n_mels={self.n_mels}: a log-mel has 80 or 128 bands, with look_back 80"
            )
        if self.n_audio_state % 2 or self.n_audio_state % self.n_audio_head:
            raise ValueError(
                f"n_audio_state={self.n_audio_state}: it is to be even and a multiple of "
                f"n_audio_head, {self.n_audio_head}"
            )
        if self.downsample_mean and self.n_audio_ctx % self.downsample:
            raise ValueError(
                f"n_audio_ctx={self.n_audio_ctx}: it is to be a multiple of downsample, "
                f"{self.downsample}"
            )

    def described(self) -> dict[str, Any]:
        """Return the keys that differ from their defaults, as config.json holds them."""
        own = fields(self)
        return {f.name: v for f in own if (v := getattr(self, f.name)) != f.default}


Encoded = tuple[Tensor, list[int]]  # of a batch: codes, frames or the like; how many each clip has
Parts = tuple[QuantizerConfig, dict[str, Tensor]]  # shape and tensors, under our names


class Quantizer(nn.Module):
    """The encoding half of a WhisperVQ: Whisper encoder, downsampling, MLP, cosine codebook."""

    codebook: Tensor
    int8 = False  # save the weights in 8 bits, each row with its scale: a quarter of the size

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self._identity: tuple[list[int], str] = [], ""
        self.dtype = torch.float32  # of the encoder's matrix products; bfloat16 is not exact
        self.config = config
        width = config.n_audio_state
        self.encoder: nn.Module = Encoder(*(getattr(config, name) for name in ENCODER_DIMS))
        self.encoder.look_back = config.look_back
        wide = width * config.ffn_mult
        self.mlp = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))
        self.mlp_ln = nn.LayerNorm(width)
        self.project_in = nn.Linear(width, config.codebook_dim)
        self.register_buffer("codebook", torch.zeros(config.codes + 1, config.codebook_dim))

    @property
    def codebook_size(self) -> int:
        """Number of codes without the mask code, which published checkpoints occasionally emit."""
        return self.config.codes

    @property
    def frames(self) -> int:
        """Mel frames (10 ms) of one window."""
        return 2 * self.config.n_audio_ctx

    @property
    def window(self) -> float:
        """Longest waveform in seconds."""
        return LONGEST if self.config.look_back else self.frames * HOP_LENGTH / SAMPLE_RATE

    def padded_frames(self, frames: int) -> int:
        """Mel frames that a clip of so many is padded to."""
        step = round((self.config.pad_to or self.window) * SAMPLE_RATE / HOP_LENGTH)
        padded = -(-frames // step) * step
        return padded if self.config.look_back else min(padded, self.frames)

    @property
    def shortest(self) -> float:
        """Shortest waveform in seconds: that of one code."""
        return 1 / self.token_rate

    @property
    def token_rate(self) -> float:
        """Codes a second."""
        return SAMPLE_RATE / HOP_LENGTH / 2 / self.config.downsample

    @property
    def identity(self) -> str:
        """sha256 of tensors and configuration, 64 hex digits: the same in every file format."""
        # seconds for a large one, so it is kept while no tensor is written to
        versions = [tensor._version for tensor in self.state_dict().values()]
        if self._identity[0] != versions:
            self._identity = versions, self._hash()
        return self._identity[1]

    def _hash(self) -> str:
        digest = hashlib.sha256(json.dumps(self.config.described(), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def stream(self) -> dict[str, object]:
        """The description that every dataset made with this quantizer carries."""
        codebook = {"codebooks": 1, "codebook_size": self.codebook_size}
        return {"quantizer": self.identity, "token_rate": self.token_rate, **codebook}

    def mel(self, waveform: np.ndarray) -> Tensor:
        """Log-mel of one clip on the quantizer's device, (n_mels, frames)."""
        look_back = bool(self.config.look_back)
        return log_mel(waveform, self.config.n_mels, self.codebook.device, look_back)

    def embed(self, mels: Tensor) -> Tensor:
        """(batch, n_mels, window frames) -> (batch, window tokens, width), what the codebook
        quantizes."""
        x, step = self.encoder(mels), self.config.downsample
        x = x.unflatten(1, (-1, step)).mean(-2) if self.config.downsample_mean else x[:, ::step]
        return x + self.mlp(self.mlp_ln(x))

    def quantize(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> codes (batch, tokens) by cosine similarity. The codebook's rows
        are kept at unit length in training, so the product is the cosine."""
        return (F.normalize(self.project_in(x), dim=-1) @ self.codebook.T).argmax(-1)

    def check(self, waveforms: list[np.ndarray]) -> None:
        """Raise ValueError for a waveform longer than the window or too short for one token."""
        shortest, longest = (round(s * SAMPLE_RATE) for s in (self.shortest, self.window))
        for i, waveform in enumerate(waveforms):
            if not shortest <= len(waveform) <= longest:
                raise ValueError(
                    f"waveform {i} has {len(waveform) / SAMPLE_RATE:.2f} s; this quantizer takes "
                    f"{self.shortest:.2f} to {self.window:g} s: split it first "
                    "(speechfuse.audio.decoding.split)"
                )

    @torch.inference_mode()
    def embed_batch(self, waveforms: list[np.ndarray], batch_size: int) -> Encoded:
        """Start one forward pass: float32 (batch_size, tokens, width) on the device, and how many
        tokens each waveform has. At most `batch_size` waveforms, all padded to the same length; the
        rest of the batch is silence, so that the arithmetic does not depend on how many there are.
        Raises ValueError for a waveform longer than the window or too short for one token.
        """
        self.check(waveforms)
        mels = [self.mel(waveform) for waveform in waveforms]
        (frames,) = {self.padded_frames(mel.shape[1]) for mel in mels}
        window = padded(mels, batch_size, frames, self.codebook.device)
        with torch.autocast(window.device.type, self.dtype, enabled=self.dtype != torch.float32):
            embedded = self.embed(window)
        return embedded.float(), [mel.shape[1] // 2 // self.config.downsample for mel in mels]

    @torch.inference_mode()
    def encode_batch(self, waveforms: list[np.ndarray], batch_size: int) -> Encoded:
        """Start one forward pass: codes (batch_size, tokens), as embed_batch."""
        embedded, lengths = self.embed_batch(waveforms, batch_size)
        return self.quantize(embedded), lengths

    def columns(self, codes: np.ndarray) -> dict[str, Any]:
        """Return the columns of a row of speech with these codes (tokens)."""
        return {"codes": codes.astype(np.uint16)}

    def encode(self, waveforms: list[np.ndarray], batch_size: int = 1) -> list[np.ndarray]:
        """Codes of each waveform, uint16, 25 a second (a last incomplete token is not made)."""
        results: dict[int, np.ndarray] = {}
        padded_frames = [self.padded_frames(len(each) // HOP_LENGTH) for each in waveforms]
        for frames in dict.fromkeys(padded_frames):
            places = [i for i, each in enumerate(padded_frames) if each == frames]
            for start in range(0, len(places), batch_size):
                batch = places[start : start + batch_size]
                codes, lengths = self.encode_batch([waveforms[i] for i in batch], batch_size)
                rows = codes.cpu().numpy().astype(np.uint16)
                cut = (row[:length] for row, length in zip(rows, lengths, strict=False))
                results |= zip(batch, cut, strict=False)
        return [results[i] for i in range(len(waveforms))]

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        for name, tensor in list(tensors.items()):
            if self.int8 and name.endswith(".weight") and tensor.ndim > 1:
                scale = tensor.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
                scale = tensors[name + SCALE] = scale.view(-1, *[1] * (tensor.ndim - 1))
                tensors[name] = (tensor / scale).round().to(torch.int8)
        with replacing(folder / "model.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        write_json(folder / "config.json", self.config.described())

    @classmethod
    def load(
        cls, path: Path | str, whisper: Path | str | None = None, window: Seconds = None
    ) -> "Quantizer":
        """Read ours (a folder) or a published WhisperVQ (a `.model` file, with `whisper` = the
        openai-whisper `.pt` that its config names, cut to `window`, see read_whisper). Raises
        ValueError for what does not fit."""
        path = Path(path)
        ours = path.is_dir()
        config, tensors = read_ours(path, window) if ours else read_published(path, whisper, window)
        model = cls(config)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            message = f"{path} does not hold the quantizer its config describes: {error}"
            raise ValueError(message) from None
        return model.eval()


def read_ours(folder: Path, window: Seconds = None) -> Parts:
    """Shape and tensors of a folder that Quantizer.save wrote. Raises ValueError for another, and
    for one with another window than `window` seconds."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a quantizer: it has no {name}")
    try:
        config = QuantizerConfig(**json.loads((folder / "config.json").read_text()))
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if name.endswith(SCALE)]:
            scale, weight = tensors.pop(name), name.removesuffix(SCALE)
            tensors[weight] = tensors[weight].float() * scale
    except (TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a quantizer of ours: {error}") from None
    if window not in (None, own := config.n_audio_ctx / POSITION_RATE):
        raise ValueError(f"window={window:g}: {folder} was trained with a window of {own:g} s")
    return config, tensors


def read_published(path: Path, whisper_path: Path | str | None, window: Seconds = None) -> Parts:
    """Shape and tensors, under our names, of a published WhisperVQ and its Whisper's encoder, cut
    to `window` seconds."""
    published = checkpoints.read_torch(path, {"config", "state_dict"}, "WhisperVQ checkpoint")
    config, tunables = published["config"], published.get("tunables") or {}
    name = config.get("whisper_model_name", "tiny.en")
    if whisper_path is None:
        raise ValueError(f"{path} needs its Whisper encoder: set whisper to openai's {name}.pt")
    for key, fits in {
        "q_depth": config.get("q_depth") == 1,
        "use_cosine_sim": bool(config.get("use_cosine_sim")),
        "downsample_conv": not tunables.get("downsample_conv"),
    }.items():
        if not fits:
            raise ValueError(
                f"{path}: unsupported {key}; WhisperVQ has q_depth 1, use_cosine_sim and no "
                "downsample_conv"
            )
    teacher = checkpoints.read_whisper(Path(whisper_path), window, config["downsample"])
    dims, state = teacher["dims"], published["state_dict"]
    tensors = below(state, "mlp.", "mlp_ln.")
    try:
        tensors |= projection(state, "project_in")
        tensors["codebook"] = state["rq.layers.0._codebook.embed"][0]
    except KeyError as error:
        raise ValueError(f"{path} is not a WhisperVQ checkpoint: no tensor {error}") from None
    if not tunables.get("mask_embs"):  # the oldest models have no mask code; ours never chooses it
        tensors["codebook"] = F.pad(tensors["codebook"], (0, 0, 0, 1))
    width = tensors["mlp_ln.weight"].shape[0]
    if width != dims["n_audio_state"]:
        raise ValueError(
            f"{path} was trained on Whisper {name} (width {width}), "
            f"{whisper_path} has width {dims['n_audio_state']}"
        )
    rows, dim = tensors["codebook"].shape
    mean, encoder_dims = bool(tunables.get("downsample_mean")), {n: dims[n] for n in ENCODER_DIMS}
    shape = QuantizerConfig(rows - 1, dim, config["downsample"], mean, **encoder_dims)
    tensors = below(teacher["model_state_dict"], "encoder.") | tensors
    return shape, {key: value.float() for key, value in tensors.items()}


def below(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """The tensors of `state` whose names begin with one of `prefixes`."""
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}


def projection(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Weight and bias of `name`, project_in or project_out, in a published state dict.
    vector-quantize-pytorch moved them from the first layer to the residual quantizer in 2024.
    Raises KeyError where there is none."""
    old = f"rq.layers.0.{name}"
    place = old if f"{old}.weight" in state else f"rq.{name}"
    return {f"{name}.{part}": state[f"{place}.{part}"] for part in ("weight", "bias")}
