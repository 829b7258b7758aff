"""Whisper's encoder, and the log-mels that it reads."""

import numpy as np
import torch
import torch.nn.functional as F
import whisper
from torch import Tensor
from whisper import log_mel_spectrogram
from whisper.model import AudioEncoder

from speechfuse.audio import mel as causal

HOP_LENGTH = whisper.audio.HOP_LENGTH  # samples of a mel frame
PADDING = -1.5  # normalised log-mel; whisperspeech vq_stoks.py, encode_mel


class Encoder(AudioEncoder):
    """Whisper's encoder, that also takes less than its window. With `look_back` it hears nothing
    that comes later: a position (20 ms) attends to so many, its own and those before it, the less
    the farther (ALiBi, Press et al. 2022), and the convolutions look back too."""

    look_back = 0

    def forward(self, mels: Tensor) -> Tensor:
        """(batch, n_mels, frames) -> (batch, positions, width)."""
        if self.look_back:
            return self._looking_back(mels)
        x = F.gelu(self.conv2(F.gelu(self.conv1(mels)))).permute(0, 2, 1)
        x = (x + self.positional_embedding[: x.shape[1]]).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)

    def _looking_back(self, mels: Tensor) -> Tensor:
        x = F.gelu(F.conv1d(F.pad(mels, (2, 0)), self.conv1.weight, self.conv1.bias))
        x = F.gelu(F.conv1d(F.pad(x, (1, 0)), self.conv2.weight, self.conv2.bias, 2))
        length, back, heads = x.shape[2], self.look_back, self.blocks[0].attn.n_head
        x = F.pad(x, (0, -length % back)).permute(0, 2, 1)
        # in stretches of `back` positions, each of which sees its own and the one before: the work
        # grows with the length, not with its square
        distance = torch.arange(back)[:, None] - torch.arange(-back, back)
        slopes = 2 ** (torch.arange(1, heads + 1) * (-8 / heads))
        bias = slopes[:, None, None] * -distance
        bias = bias.masked_fill((distance < 0) | (distance >= back), -torch.inf)
        bias = bias[:, None].repeat(1, x.shape[1] // back, 1, 1).to(x)
        bias[:, 0, :, :back] = -torch.inf  # before the beginning there is nothing
        for block in self.blocks:  # whose own attention takes no bias of each head
            attend, normal = block.attn, block.attn_ln(x)
            query, key, value = (
                part(normal).unflatten(-1, (heads, -1)).transpose(1, 2)
                for part in (attend.query, attend.key, attend.value)
            )
            key, value = (
                F.pad(part, (0, 0, back, 0)).unfold(2, 2 * back, back).transpose(-1, -2)
                for part in (key, value)
            )
            mixed = F.scaled_dot_product_attention(
                query.unflatten(2, (-1, back)), key, value, attn_mask=bias
            ).flatten(2, 3)
            x = x + attend.out(mixed.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.mlp_ln(x))
        x = x[:, :length]
        return self.ln_post(x)

    @property
    def seen(self) -> int:
        """Mel frames that a position depends on, where there is `look_back`."""
        return 2 * (len(self.blocks) * (self.look_back - 1) + 1) + 4


def log_mel(
    waveform: np.ndarray | Tensor,
    n_mels: int,
    device: torch.device | str = "cpu",
    look_back: bool = False,
) -> Tensor:
    """Log-mel of one clip, (n_mels, frames) of 10 ms. Per clip, because Whisper's floor is the
    maximum of what it is given: in a batch, a clip's tokens would depend on its neighbours. With
    `look_back` that of audio.mel, in Whisper's scale."""
    if isinstance(waveform, np.ndarray):
        samples = np.ascontiguousarray(waveform, dtype=np.float32)
        waveform = torch.from_numpy(samples).to(device)
    if look_back:
        return (causal.log_mel(waveform).T + 4) / 4
    return log_mel_spectrogram(waveform, n_mels)


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
