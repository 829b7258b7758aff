"""The quantizer that a job's configuration names.

Neither torch nor whisper is imported before a quantizer is loaded, so that `--help` and a misspelt
key answer at once.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechfuse import config
from speechfuse.config import key

if TYPE_CHECKING:
    from speechfuse.quantizer.frames import FrameEncoder
    from speechfuse.quantizer.model import Quantizer


@dataclass
class EncoderSpec:
    """An encoder of speechfuse.quantizer, {_component_: ..., checkpoint: ...}."""

    component: dict[str, Any]

    def load(self, device: str) -> "FrameEncoder":
        """Returns the encoder on `device`, read once in each process. Raises ValueError for a
        checkpoint that cannot be read."""
        check_files(*(self.component.get(name) for name in ("checkpoint", "whisper")))
        return _encoder(json.dumps(self.component), device)


@dataclass
class QuantizerSpec:
    checkpoint: str = key("folder of ours, or a published WhisperVQ .model file")
    whisper: str | None = key("openai-whisper .pt beside a .model", None)
    window: float | None = key("seconds that the .pt's encoder is cut to", None, above=0)
    dtype: str = key("float32 (exact) or bfloat16 (faster; changes some codes)", "float32")

    def load(self, device: str) -> "Quantizer":
        """Returns the quantizer on `device`, read once in each process. Raises ValueError for
        another dtype and for a checkpoint that cannot be read."""
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"quantizer.dtype={self.dtype!r}: choose float32 or bfloat16")
        check_files(self.checkpoint, self.whisper)
        return _quantizer(self.checkpoint, self.whisper, self.window, self.dtype, device)


@cache
def _encoder(spec: str, device: str) -> "FrameEncoder":
    import torch

    torch.set_num_threads(1)
    return config.instantiate(json.loads(spec)).to(device)


def settled(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a job's settings without a `window` that is null, so that what was made before there
    was this key keeps its fingerprint."""
    for each in (settings, settings.get("quantizer")):
        if isinstance(each, dict) and each.get("window", 0) is None:
            del each["window"]
    return settings


def check_files(checkpoint: str | None, whisper: str | None) -> None:
    """Raises FileNotFoundError for a quantizer that is not there, and ValueError for a Whisper
    beside a folder of ours, which has an encoder of its own; before torch is imported."""
    for path in (checkpoint, whisper):
        if path is not None and not Path(path).exists():
            hint = "; `just fetch-whisper tiny.en` gets a Whisper" * path.endswith(".pt")
            raise FileNotFoundError(
                f"no quantizer at {path}: a folder of ours or a published file{hint}"
            )
    if whisper and checkpoint and Path(checkpoint).is_dir():
        raise ValueError(f"whisper={whisper}: {checkpoint} has its own encoder: leave whisper out")


@cache
def _quantizer(
    path: str, whisper: str | None, window: float | None, dtype: str, device: str
) -> "Quantizer":
    import torch

    from speechfuse.quantizer.model import Quantizer

    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    quantizer = Quantizer.load(path, whisper, window)
    quantizer.dtype = getattr(torch, dtype)
    return quantizer.to(device)
