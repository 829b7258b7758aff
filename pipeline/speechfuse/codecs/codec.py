"""What a codec is: waveforms to codes, several a frame, and codes to waveforms."""

import json
from functools import cache
from typing import Any

import numpy as np

from speechfuse import config
from speechfuse.audio.decoding import SAMPLE_RATE


class Codec:
    """sample_rate    of the waveforms that `decode` returns, in Hz
    frame_rate     frames a second
    codebooks      codes of a frame, each 0 to codebook_size - 1
    identity       hash of weights and settings, 64 hex digits
    """

    sample_rate: int
    frame_rate: float
    codebooks: int
    codebook_size: int
    identity: str

    @property
    def stream(self) -> dict[str, object]:
        """The description that every dataset with codes of this codec carries."""
        sizes = {"codebooks": self.codebooks, "codebook_size": self.codebook_size}
        return {"quantizer": self.identity, "token_rate": self.frame_rate, **sizes}

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """Mono float32 at 16 kHz -> codes, uint16 (frames, codebooks); a last frame that it fills
        in part counts."""
        raise NotImplementedError

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes (frames, codebooks) -> mono float32 at `sample_rate`."""
        raise NotImplementedError

    def silence(self) -> np.ndarray:
        """Return the codes of a frame without sound, (codebooks,)."""
        codes = self.encode(np.zeros(SAMPLE_RATE, np.float32))
        return codes[len(codes) // 2]


def frame_at(seconds: float, rate: float) -> int:
    """Return the frame that begins nearest to a time, the later one of two as near. A time is taken
    as a number of samples: as a float 1.16 x 12.5 would lie below 14.5."""
    return int(round(seconds * SAMPLE_RATE) * rate / SAMPLE_RATE + 0.5)


def codec_of(spec: dict[str, Any]) -> Codec:
    """Return the codec that `spec` names, read once in each process. Raises ValueError for a
    component that is none."""
    return _codec(json.dumps(spec, sort_keys=True))


@cache
def _codec(spec: str) -> Codec:
    codec = config.instantiate(json.loads(spec))
    if not isinstance(codec, Codec):
        raise ValueError(f"{json.loads(spec)['_component_']} is no codec of speechfuse.codecs")
    return codec
