"""Files in torch's format, openai-whisper's checkpoints among them: no code in them is run."""

from pathlib import Path
from typing import Any

import torch

Seconds = float | None  # of a shorter window; None: the encoder's own
POSITION_RATE = 50  # of Whisper's encoder, positions a second
ENCODER_DIMS = ("n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer")


def read_torch(path: Path, keys: set[str], what: str) -> dict:
    """The dict in a torch file of plain values and tensors. Raises ValueError, which calls the file
    a `what`, where it is another file or lacks one of `keys`."""
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception:  # of any kind, where the file is none of torch's
        # what torch says of it advises weights_only=False, which would run what the file holds
        raise ValueError(
            f"{path} is not a {what}: it is no torch file of plain values and tensors, or damaged"
        ) from None
    if not isinstance(content, dict) or not keys <= set(content):
        raise ValueError(f"{path} is not a {what}: it must hold {sorted(keys)}")
    return content


def read_whisper(path: Path, window: Seconds = None, downsample: int = 1) -> dict[str, Any]:
    """{dims, model_state_dict} of an openai-whisper checkpoint. With `window` its encoder keeps the
    positions of the first `window` seconds alone, for shorter and faster passes. Raises ValueError
    for another file, and for a window that the encoder does not have or that is no whole number of
    tokens, each of `downsample` positions."""
    content = read_torch(path, {"dims", "model_state_dict"}, "Whisper checkpoint")
    dims, name = content["dims"], "encoder.positional_embedding"
    if not isinstance(dims, dict) or not dims.keys() >= {*ENCODER_DIMS}:
        raise ValueError(f"{path} is not a Whisper checkpoint: its dims lack {ENCODER_DIMS}")
    if window is not None:
        count, own = round(window * POSITION_RATE), dims["n_audio_ctx"]
        if count / POSITION_RATE != window or count % downsample or not 0 < count <= own:
            raise ValueError(
                f"window={window:g}: give a multiple of {downsample / POSITION_RATE:g} s, at most "
                f"the {own / POSITION_RATE:g} s of {path}"
            )
        content["dims"] = dims | {"n_audio_ctx": count}
        if name in (state := content["model_state_dict"]):
            content["model_state_dict"] = state | {name: state[name][:count].clone()}
    return content
