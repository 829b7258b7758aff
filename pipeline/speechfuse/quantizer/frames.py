"""Encoders of frames: speech to vectors, for models that take them in place of tokens.

In: mono float32 waveforms at 16 kHz, each no longer than the encoder's window. Out: float32 frames
(frames, width) of each. The encoder is the one of a quantizer, before its codebook, or that of any
openai-whisper checkpoint. A recipe names one by dotted path:

    {_component_: speechfuse.quantizer.of_quantizer, checkpoint: recipes/demo/models/quantizer}
    {_component_: speechfuse.quantizer.of_whisper, checkpoint: models/medium.pt, window: 5.0}

`window` cuts a Whisper's encoder to so many seconds, see checkpoints.read_whisper.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechfuse.audio.decoding import SAMPLE_RATE
from speechfuse.quantizer.checkpoints import ENCODER_DIMS, Seconds, read_whisper
from speechfuse.quantizer.encoder import HOP_LENGTH, Encoder, padded
from speechfuse.quantizer.model import Encoded, Quantizer, QuantizerConfig, below, read_ours


class FrameEncoder(Quantizer):
    """A quantizer's encoder whose batches are frames instead of codes."""

    @property
    def width(self) -> int:
        """Numbers of a frame."""
        return self.config.n_audio_state

    @property
    def stream(self) -> dict[str, object]:
        """The description that every dataset made with this encoder carries."""
        return {"encoder": self.identity, "frame_rate": self.token_rate, "width": self.width}

    @property
    def steps(self) -> list[list[int]]:
        """[kernel, stride, padding] of the convolutions over time that give a frame, from samples
        on: by them alone the number of a clip's frames is known before they are made."""
        hop = round(SAMPLE_RATE / self.token_rate)
        return [[hop, hop, 0]]

    def silence(self, clips: int) -> Tensor:
        """Return the frames of so many windows without sound, for their memory."""
        return self.embed(torch.zeros(clips, self.config.n_mels, self.frames))

    def encode_batch(self, waveforms: list[np.ndarray], batch_size: int) -> Encoded:
        """Start one forward pass: frames (batch_size, window frames, width), as embed_batch."""
        return self.embed_batch(waveforms, batch_size)

    def forward(self, waveforms: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms (clips, longest), of which the first `samples` (clips) count -> frames (clips,
        most frames of one, width), zeros behind, and how many each clip has, as embed_batch."""
        hop = round(SAMPLE_RATE / self.token_rate)
        waveforms, lengths = F.pad(waveforms, (0, hop)), samples // hop
        own = [w[: max(n, hop)] for w, n in zip(waveforms, samples.tolist(), strict=True)]
        mels = [self.mel(waveform) for waveform in own]
        longest = waveforms.shape[1] // hop
        frames = torch.zeros(len(mels), longest, self.width, device=waveforms.device)
        padded_frames = [self.padded_frames(mel.shape[1]) for mel in mels]
        for count in {*padded_frames}:
            rows = [i for i, each in enumerate(padded_frames) if each == count]
            window = padded([mels[i] for i in rows], len(rows), count, waveforms.device)
            with torch.autocast(window.device.type, self.dtype, self.dtype != torch.float32):
                embedded = self.embed(window)[:, :longest].float()
            frames[rows] = F.pad(embedded, (0, 0, 0, longest - embedded.shape[1]))
        behind = torch.arange(frames.shape[1], device=frames.device) >= lengths[:, None]
        return frames.masked_fill(behind[..., None], 0), lengths

    @torch.inference_mode()
    def streamed(self, waveform: np.ndarray, samples: int) -> Iterator[Tensor]:
        """Yield the frames (n, width) of each stretch of so many samples, made of it and of what
        was before: as they can be made while one speaks. The work is the same for each. Raises
        ValueError for an encoder that hears what comes later."""
        if not self.config.look_back:
            raise ValueError("the encoder hears what comes later: take one trained with look_back")
        hop = round(SAMPLE_RATE / self.token_rate)
        encoder: Any = self.encoder
        needed = (encoder.seen + 2 * self.config.downsample) * HOP_LENGTH + samples
        for end in range(samples, len(waveform) + 1, samples):
            start = max(0, end - needed) // hop * hop
            yield self.embed(self.mel(waveform[start:end])[None])[0, -(samples // hop) :]

    def columns(self, codes: np.ndarray) -> dict[str, Any]:
        """Return the columns of a row of speech with these frames (frames, width)."""
        return {"frames": codes.astype(np.float16).tobytes()}


class _Whisper(FrameEncoder):
    """The encoder of an openai-whisper checkpoint: 50 frames a second, nothing behind it."""

    def __init__(self, config: QuantizerConfig) -> None:
        nn.Module.__init__(self)
        self._identity: tuple[list[int], str] = [], ""
        self.dtype, self.config = torch.float32, config
        self.encoder = Encoder(*(getattr(config, name) for name in ENCODER_DIMS))
        self.register_buffer("codebook", torch.zeros(0), persistent=False)

    def embed(self, mels: Tensor) -> Tensor:
        """(batch, n_mels, window frames) -> (batch, frames, width)."""
        return self.encoder(mels)


def of_quantizer(
    checkpoint: str, whisper: str | None = None, window: Seconds = None
) -> FrameEncoder:
    """Return the encoder of a quantizer, ours or a published WhisperVQ with its `whisper`. Raises
    ValueError for another file."""
    return FrameEncoder.load(checkpoint, whisper, window)  # type: ignore[return-value]


def trained(folder: Path, window: Seconds = None) -> FrameEncoder:
    """Return the encoder that a training wrote to `folder`, a quantizer's or a Whisper's. Raises
    ValueError for another folder."""
    kind = FrameEncoder if read_ours(folder)[0].codes else _Whisper
    return kind.load(folder, window=window)  # type: ignore[return-value]


def of_whisper(checkpoint: str, window: Seconds = None) -> FrameEncoder:
    """Return the encoder of an openai-whisper `.pt` file, or of the folder of one that a training
    wrote. Raises ValueError for another file."""
    if Path(checkpoint).is_dir():
        return trained(Path(checkpoint), window)
    content = read_whisper(Path(checkpoint), window)
    sizes = {name: content["dims"][name] for name in ENCODER_DIMS}
    encoder = _Whisper(QuantizerConfig(0, 0, 1, False, **sizes))
    try:
        encoder.load_state_dict(below(content["model_state_dict"], "encoder."))
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not hold the encoder of its dims: {error}") from None
    return encoder.float().eval()
