"""Encoders of frames from elsewhere: FastConformer (Parakeet, Canary), WavLM, HuBERT, or several.

In: mono float32 waveforms at 16 kHz, each no longer than `window` seconds. Out: float32 frames
(frames, width) of each; a clip's frames do not depend on those that share its batch. What is read
are Hugging Face folders and NeMo's `.nemo` files, without the code or the pickles in them:

    {_component_: speechfuse.quantizer.of_fastconformer, checkpoint: models/parakeet-ctc-1.1b}
    {_component_: speechfuse.quantizer.of_wavlm, checkpoint: models/wavlm-large}
    {_component_: speechfuse.quantizer.concatenated, encoders: [{_component_: ...}, ...]}
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import HubertModel, ParakeetEncoder, ParakeetEncoderConfig, WavLMModel
from transformers.audio_utils import mel_filter_bank

from speechfuse import config
from speechfuse.artifact import json_digest, write_json
from speechfuse.audio.decoding import SAMPLE_RATE
from speechfuse.components import Positive
from speechfuse.fusion.adapters import Positions, count
from speechfuse.quantizer import frames, nemo_file
from speechfuse.tokens import weights
from speechfuse.tokens.vocabulary import read_config, read_preprocessor

WINDOW = 40.0  # seconds of the longest clip that Canary-Qwen was trained on
SIZES = (  # of a FastConformer, which its identity has beside its tensors
    *("hidden_size", "num_attention_heads", "num_mel_bins", "conv_kernel_size", "scale_input"),
    *("subsampling_factor", "subsampling_conv_kernel_size", "subsampling_conv_stride"),
)
WAVE_SIZES = (  # of WavLM and HuBERT
    *("num_attention_heads", "conv_kernel", "conv_stride", "feat_extract_norm"),
    *("do_stable_layer_norm", "layer_norm_eps"),
)
MEL = {"n_fft": 512, "win_length": 400, "hop_length": 160, "preemphasis": 0.97}
WAVES: dict[str, Any] = {"hubert": HubertModel, "wavlm": WavLMModel}  # by model_type of config.json


@dataclass
class Shape:
    """What a foreign encoder's identity has beside its tensors: `kind`, a model_type; `sizes`."""

    kind: str
    sizes: dict[str, Any]

    def described(self) -> dict[str, Any]:
        return vars(self)


class Foreign(frames.FrameEncoder):
    """An encoder with convolutions `steps` over time, [kernel, stride, padding] each; `seconds`: of
    the shortest clip, which has one frame, and of the longest. It is never in training mode: no
    dropout, and batch norms with the statistics that they have."""

    config: Any
    encoder: Any

    def __init__(self, shape: Shape, steps: list[list[int]], seconds: tuple[float, float]) -> None:
        nn.Module.__init__(self)
        self._identity, self._seconds, self._steps = ([], ""), seconds, steps
        self.dtype, self.config = torch.float32, shape

    @property
    def shortest(self) -> float:
        return self._seconds[0]

    @property
    def window(self) -> float:
        return self._seconds[1]

    def padded_frames(self, frames: int) -> int:
        return 0  # clips of all lengths may share a batch

    @property
    def steps(self) -> list[list[int]]:
        return self._steps

    @property
    def token_rate(self) -> float:
        return SAMPLE_RATE / math.prod(stride for _, stride, _ in self.steps)

    @property
    def width(self) -> int:
        return self.encoder.config.hidden_size

    def train(self, mode: bool = True) -> "Foreign":
        return super().train(False)

    @torch.inference_mode()
    def encode_batch(
        self, waveforms: list[np.ndarray], batch_size: int
    ) -> tuple[Tensor, list[int]]:
        """Frames (waveforms, most frames of one, width), and how many each waveform has. Raises
        ValueError for a waveform longer than the window or too short for one frame."""
        self.check(waveforms)
        device = next(self.parameters()).device
        clips = [torch.from_numpy(np.ascontiguousarray(w, np.float32)) for w in waveforms]
        samples = torch.tensor([len(waveform) for waveform in waveforms])
        frames, lengths = self(pad_sequence(clips, batch_first=True).to(device), samples.to(device))
        return frames, lengths.tolist()

    embed_batch = encode_batch

    def forward(self, waveforms: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        least = round(self.shortest * SAMPLE_RATE)  # a clip of length 0 has one frame all the same
        waveforms = F.pad(waveforms, (0, max(0, least - waveforms.shape[1])))
        frames = self.frames_of(waveforms, samples.clamp(min=least).tolist())
        lengths = torch.tensor([count(each, self.steps) for each in samples.tolist()])
        lengths = lengths.to(frames.device)
        return frames.masked_fill(~_own(lengths, frames)[..., None], 0), lengths

    def frames_of(self, waveforms: Tensor, samples: list[int]) -> Tensor:
        """Return frames (clips, most frames of one, width), whatever behind a clip's own."""
        raise NotImplementedError

    def silence(self, clips: int) -> Tensor:
        samples = round(self.window * SAMPLE_RATE)
        return self.frames_of(torch.zeros(clips, samples), [samples] * clips)


def _own(lengths: Tensor, batch: Tensor) -> Tensor:
    """Return which of `batch` (clips, longest, ...) are a clip's own, (clips, longest)."""
    return torch.arange(batch.shape[1], device=batch.device) < lengths[:, None]


class FastConformer(Foreign):
    """NeMo's FastConformer with its log-mel; `mel`: {feature_size, n_fft, win_length, hop_length,
    preemphasis}, as transformers names them."""

    def __init__(self, sizes: dict[str, Any], mel: dict[str, Any], window: float) -> None:
        shape = ParakeetEncoderConfig.from_dict(sizes)
        if mel["feature_size"] != shape.num_mel_bins:
            raise ValueError(f"{shape.num_mel_bins} bands are read, {mel['feature_size']} made")
        kernel, stride = shape.subsampling_conv_kernel_size, shape.subsampling_conv_stride
        convolution = [kernel, stride, (kernel - 1) // 2]
        steps = [[mel["hop_length"]] * 2 + [0]]
        steps += [convolution] * round(math.log(shape.subsampling_factor, stride))
        kind = Shape("fastconformer", {name: getattr(shape, name) for name in SIZES} | {"mel": mel})
        super().__init__(kind, steps, (0.08, window))
        with torch.device("meta"):
            self.encoder = ParakeetEncoder(shape)
        self.encoder.encode_positions = Positions(shape)
        self.encoder.config._attn_implementation = "eager"

    def frames_of(self, waveforms: Tensor, samples: list[int]) -> Tensor:
        mels, own = self._log_mel(waveforms, samples)
        return self.encoder(mels, own).last_hidden_state

    def _log_mel(self, waveforms: Tensor, samples: list[int]) -> tuple[Tensor, Tensor]:
        """Log-mel (clips, frames, bands), each band of a clip with mean 0 and deviation 1, zeros
        behind, and which frames are a clip's own. Source: FilterbankFeatures in NVIDIA NeMo."""
        mel, device = self.config.sizes["mel"], waveforms.device
        before = F.pad(waveforms[:, :-1], (1, 0))
        waveforms = (waveforms - mel["preemphasis"] * before) * _own(
            torch.tensor(samples, device=device), waveforms
        )
        n_fft, hop, length = (mel[name] for name in ("n_fft", "hop_length", "win_length"))
        taper = torch.hann_window(length, periodic=False, device=device)
        spectra = torch.stft(
            waveforms, n_fft, hop, length, taper, pad_mode="constant", return_complex=True
        )
        lengths = torch.tensor([each // hop for each in samples], device=device)
        power = torch.view_as_real(spectra).pow(2).sum(-1)[..., : max(samples) // hop]
        bands = torch.from_numpy(filters(mel["feature_size"], n_fft)).to(device)
        x = torch.log(bands @ power + 2**-24).transpose(1, 2)
        own, many = _own(lengths, x), lengths[:, None, None]
        x = (x - (x * own[..., None]).sum(1, keepdim=True) / many) * own[..., None]
        return x / ((x.pow(2).sum(1, keepdim=True) / (many - 1)).sqrt() + 1e-5), own

    def save(self, folder: Path) -> None:
        write_json(folder / "preprocessor_config.json", self.config.sizes["mel"])
        self.encoder.save_pretrained(folder)


@cache
def filters(bands: int, n_fft: int) -> np.ndarray:
    """Return the filters of a log-mel, float32 (bands, n_fft // 2 + 1)."""
    shape = n_fft // 2 + 1, bands, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE
    return mel_filter_bank(*shape, "slaney", "slaney").T.astype(np.float32)


class Waves(Foreign):
    """WavLM or HuBERT, whose convolutions read the waveform itself, each clip's alone."""

    def __init__(self, model: Any, normal: bool, window: float) -> None:
        shape = model.config
        kernels = zip(shape.conv_kernel, shape.conv_stride, strict=True)
        sizes = {name: getattr(shape, name) for name in WAVE_SIZES} | {"do_normalize": normal}
        steps = [[kernel, stride, 0] for kernel, stride in kernels]
        super().__init__(Shape(shape.model_type, sizes), steps, (0.025, window))
        self.encoder, self._normal = model, normal

    def frames_of(self, waveforms: Tensor, samples: list[int]) -> Tensor:
        clips = [clip[:n] for clip, n in zip(waveforms, samples, strict=True)]
        if self._normal:
            clips = [(c - c.mean()) / (c.var(correction=0) + 1e-7).sqrt() for c in clips]
        made = [self.encoder.feature_extractor(clip[None])[0].T for clip in clips]
        vectors = self.encoder.feature_projection(pad_sequence(made, batch_first=True))
        vectors = vectors[0] if isinstance(vectors, tuple) else vectors
        lengths = torch.tensor([len(each) for each in made], device=vectors.device)
        return self.encoder.encoder(vectors, attention_mask=_own(lengths, vectors))[0]

    def save(self, folder: Path) -> None:
        write_json(folder / "preprocessor_config.json", {"do_normalize": self._normal})
        self.encoder.save_pretrained(folder)


class Concatenated(Foreign):
    """Frames of several encoders side by side, as many as the first one's: of the others that
    which stands at the same time."""

    encoders: Any

    def __init__(self, encoders: list[frames.FrameEncoder]) -> None:
        seconds = max(each.shortest for each in encoders), min(each.window for each in encoders)
        super().__init__(Shape("concatenated", {}), encoders[0].steps, seconds)
        self.encoders = nn.ModuleList(encoders)

    def _hash(self) -> str:
        return json_digest([each.identity for each in self.encoders])

    @property
    def width(self) -> int:
        return sum(each.width for each in self.encoders)

    def forward(self, waveforms: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        (first, lengths), *others = [each(waveforms, samples) for each in self.encoders]
        places, parts = torch.arange(first.shape[1], device=first.device), [first]
        for encoder, (found, theirs) in zip(self.encoders[1:], others, strict=True):
            at = (places * (encoder.token_rate / self.token_rate)).long()
            at = torch.minimum(at[None], (theirs - 1).clamp(min=0)[:, None])
            parts.append(found.gather(1, at[..., None].expand(-1, -1, found.shape[2])))
        joined = torch.cat(parts, -1)
        return joined.masked_fill(~_own(lengths, joined)[..., None], 0), lengths

    def silence(self, clips: int) -> Tensor:
        first, *others = [each.silence(clips) for each in self.encoders]
        more = sum(each.shape[-1] for each in others)
        return F.pad(first, (0, more)) + sum(each.sum() for each in others)

    def save(self, folder: Path) -> None:
        write_json(folder / "config.json", {"model_type": "concatenated"})
        for number, encoder in enumerate(self.encoders):
            (folder / str(number)).mkdir()
            encoder.save(folder / str(number))


def of_fastconformer(
    checkpoint: str, window: Positive = WINDOW, sizes: dict[str, Any] | None = None
) -> FastConformer:
    """Return the FastConformer of a Hugging Face folder (Parakeet, Canary), a `.nemo` file or a
    folder of NeMo's SALM (Canary-Qwen). `window`: seconds of the longest clip; `sizes`:
    {hidden_size, ...} as config.json has them, with which a dry run plans where the file is not
    here. Raises ValueError for another architecture."""
    path, marker = Path(checkpoint), "subsampling.linear.weight"
    if sizes and not path.exists():
        mel = MEL | {"feature_size": sizes["num_mel_bins"]}
        return FastConformer(sizes, mel, window).eval()
    found, mel, tensors = _of_folder(path) if path.is_dir() else nemo_file.read(path)
    starts = [name.removesuffix(marker) for name in tensors if name.endswith(marker)]
    if len(starts) != 1:
        raise ValueError(f"{path} holds {len(starts)} FastConformers: one is needed")
    if differ := [name for name in sizes or {} if found.get(name) != (sizes or {})[name]]:
        raise ValueError(f"{path} has other sizes than the recipe states: {', '.join(differ)}")
    start = starts[0]
    own = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    try:
        if found.get("num_hidden_layers", 1) > len(own):  # such a model would take hours to build
            raise ValueError(f"it has {len(own)} tensors")
        encoder = FastConformer(found, mel, window)
        for name in encoder.encoder.state_dict():
            if name.endswith("num_batches_tracked"):  # which nothing reads, and some files lack
                own.setdefault(name, torch.tensor(0))
        encoder.encoder.load_state_dict(own, assign=True)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        message = f"{path} does not hold the encoder that its configuration describes: {error}"
        raise ValueError(message) from None
    return encoder.float().eval().requires_grad_()


def _of_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    shape = read_config(folder)
    if "perception" in shape:  # of NeMo's SALM
        return nemo_file.encoder_of(folder, shape, weights.every(folder))
    sizes = shape if shape.get("model_type") == "parakeet_encoder" else shape.get("encoder_config")
    if not isinstance(sizes, dict) or sizes.get("model_type") != "parakeet_encoder":
        raise ValueError(
            f"{folder} holds no FastConformer: its config.json is of a {shape.get('model_type')}"
        )
    mel, stated = MEL | {"feature_size": sizes.get("num_mel_bins", 80)}, read_preprocessor(folder)
    mel |= {name: stated[name] for name in mel if name in stated}
    return sizes, mel, weights.every(folder)


def of_wavlm(checkpoint: str, window: Positive = WINDOW) -> Waves:
    """Return the WavLM or HuBERT of a Hugging Face folder, its last layer. Raises ValueError for
    another one."""
    folder = Path(checkpoint)
    kind = WAVES.get(str(read_config(folder).get("model_type")))
    weights.files(folder)
    if kind is None:
        raise ValueError(f"{folder}: its config.json is of no {' or '.join(WAVES)}")
    options: dict[str, Any] = {
        "local_files_only": True,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    # without random masks, which also lack weights at times
    options |= {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "dtype": torch.float32}
    model, report = kind.from_pretrained(folder, **options)
    if lacking := sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])}):
        raise ValueError(f"{folder} lacks weights of its config.json: {weights.few(lacking)}")
    if getattr(model, "adapter", None):
        raise ValueError(f"{folder} has an adapter behind its encoder, which is not read here")
    return Waves(model, bool(read_preprocessor(folder).get("do_normalize", True)), window).eval()


def concatenated(encoders: list[dict[str, Any]]) -> Concatenated:
    """Return the encoders that `encoders` names, at least two, side by side."""
    if len(encoders) < 2:
        raise ValueError(f"encoders: {len(encoders)} given, and two at least are concatenated")
    return Concatenated([config.instantiate(each) for each in encoders])


def trained(folder: Path) -> frames.FrameEncoder:
    """Return the encoder that a training wrote to `folder`, of any kind. Raises ValueError for
    another folder."""
    kind = read_config(folder).get("model_type")
    if kind is None:
        return frames.trained(folder)
    if kind == "concatenated":
        parts = sorted(folder.glob("[0-9]*"), key=lambda part: int(part.name))
        return Concatenated([trained(part) for part in parts])
    return (of_wavlm if kind in WAVES else of_fastconformer)(str(folder))
