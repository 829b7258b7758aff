"""Whisper's encoder, and the log-mels that it reads."""

import numpy as np
import torch
import torch.nn.functional as F
import whisper
from torch import Tensor
from whisper.model import AudioEncoder

HOP_LENGTH = whisper.audio.HOP_LENGTH  # samples of a mel frame
PADDING = -1.5  # normalised log-mel; whisperspeech vq_stoks.py, encode_mel


class Encoder(AudioEncoder):
    """Whisper's encoder, that also takes less than its window."""

    def forward(self, mels: Tensor) -> Tensor:
        """(batch, n_mels, frames) -> (batch, positions, width)."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(mels)))).permute(0, 2, 1)
        x = (x + self.positional_embedding[: x.shape[1]]).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


def log_mel(waveform: np.ndarray, n_mels: int, device: torch.device | str = "cpu") -> Tensor:
    """Log-mel of one clip, (n_mels, frames) of 10 ms. Per clip, because Whisper's floor is the
    maximum of what it is given: in a batch, a clip's tokens would depend on its neighbours."""
    samples = torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32)).to(device)
    return whisper.log_mel_spectrogram(samples, n_mels)


def padded(
    mels: list[Tensor], rows: int, frames: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Log-mels (n_mels, any frames) as a batch, float32 (rows, n_mels, frames), padded behind each
    mel and, where they are fewer than `rows`, with rows of padding."""
    shape = (rows, mels[0].shape[0], frames)
    window = torch.full(shape, PADDING, dtype=torch.float32, device=device)
    for row, mel in zip(window, mels, strict=False):
        row[:, : mel.shape[1]] = mel
    return window
