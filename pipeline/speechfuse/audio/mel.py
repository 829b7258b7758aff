"""A log-mel of 10 ms that looks back only, and the way from one back to sound.

In: waveforms at 16 kHz. Out: frames of 80 bands. Frame t is of the samples before 160 (t + 1) and
of no later one, and its floor is fixed: what comes later in a recording, or how loud it is, changes
nothing of it. So a stream has the frames of the whole recording.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speechfuse.audio.decoding import SAMPLE_RATE

HOP, WINDOW, BANDS = 160, 400, 80
FLOOR = 1e-6  # power; a recording's own noise is above it
MOMENTUM = 0.99  # of Griffin-Lim; Perraudin et al. 2013


@cache
def _filters() -> Tensor:
    """(201, 80)."""
    from transformers.audio_utils import mel_filter_bank  # half a second, for few of the jobs

    shape = WINDOW // 2 + 1, BANDS, 0, SAMPLE_RATE / 2, SAMPLE_RATE
    filters = mel_filter_bank(*shape, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float()


@cache
def _inverse() -> Tensor:
    return torch.linalg.pinv(_filters())


def log_mel(waveforms: Tensor) -> Tensor:
    """(..., samples) -> (..., samples // 160, 80), log10 of the power in each band."""
    window = torch.hann_window(WINDOW, device=waveforms.device)
    frames = F.pad(waveforms, (WINDOW - HOP, 0)).unfold(-1, WINDOW, HOP)
    power = torch.fft.rfft(frames * window).abs() ** 2
    return (power @ _filters().to(power.device)).clamp(min=FLOOR).log10()


def griffin_lim(mel: Tensor, iterations: int) -> Tensor:
    """Log-mel (frames, 80) -> waveform (160 frames), the same each time: phases that fit the
    magnitudes of `mel`, found by going back and forth (Griffin and Lim 1984)."""
    power = (10**mel @ _inverse()).clamp(min=1e-10)
    magnitude = F.pad(power.sqrt().T, (0, 1), mode="replicate")
    shape: dict[str, Any] = {"n_fft": WINDOW, "hop_length": HOP}
    shape["window"] = torch.hann_window(WINDOW)
    phases = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0))
    angles, before = torch.polar(torch.ones_like(phases), 2 * torch.pi * phases), torch.zeros(())
    for _ in range(iterations):
        rebuilt = torch.stft(torch.istft(magnitude * angles, **shape), **shape, return_complex=True)
        angles = rebuilt - MOMENTUM / (1 + MOMENTUM) * before
        angles, before = angles / (angles.abs() + 1e-12), rebuilt
    waveform = torch.istft(magnitude * angles, **shape)
    late = WINDOW // 2 - HOP  # istft puts the middle of frame t at 160 t; it was 40 samples before
    return F.pad(waveform[late:], (0, late))
