"""Mimi, EnCodec and DAC, as transformers has them. In: a folder of its files. Out: a codec."""

from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch

from speechfuse import artifact
from speechfuse.audio.decoding import SAMPLE_RATE
from speechfuse.codecs.codec import Codec
from speechfuse.components import Count


class HuggingFace(Codec):
    """The model that transformers' class `kind` reads from the folder `checkpoint`; of its
    codebooks the first `codebooks` are used. Raises ValueError for another folder, for more
    codebooks than there are, and for an EnCodec that scales or cuts its input."""

    def __init__(self, kind: str, checkpoint: str, codebooks: int | None) -> None:
        import transformers

        if not (Path(checkpoint) / "config.json").is_file():
            raise ValueError(f"{checkpoint} is no folder of a {kind} of transformers: get it first")
        load = getattr(transformers, kind).from_pretrained
        self.model: Any = load(checkpoint, local_files_only=True).float().eval()
        shape = self.model.config
        self.encode_options, self.decode_options = dict[str, Any](), dict[str, Any]()
        if kind == "EncodecModel":
            if shape.normalize or shape.chunk_length_s:
                raise ValueError(f"{checkpoint} scales or cuts its input: take the 24 kHz EnCodec")
            self.encode_options = {"bandwidth": max(shape.target_bandwidths)}
            self.decode_options = {"audio_scales": [None]}
        with torch.inference_mode():
            one = self.model.encode(torch.zeros(1, 1, shape.sampling_rate), **self.encode_options)
        self.shape = one.audio_codes.shape[:-2]
        most, seconds = one.audio_codes.shape[-2], one.audio_codes.shape[-1]
        self.sample_rate, self.codebook_size = shape.sampling_rate, shape.codebook_size
        hop = getattr(shape, "hop_length", None)  # by which a rate that it states may be rounded
        self.frame_rate = self.sample_rate / hop if hop else shape.frame_rate
        self.codebooks = codebooks or most
        if self.codebooks > most:
            raise ValueError(f"codebooks={codebooks}: {checkpoint} has {most}")
        assert abs(seconds - self.frame_rate) < 2
        files = sorted(path for path in Path(checkpoint).glob("*.*") if path.is_file())
        hashes = [artifact.sha256_of(path) for path in files]
        self.identity = artifact.json_digest([hashes, self.codebooks])

    @torch.inference_mode()
    def encode(self, waveform: np.ndarray) -> np.ndarray:
        samples = torch.from_numpy(soxr.resample(waveform, SAMPLE_RATE, self.sample_rate))
        codes = self.model.encode(samples[None, None], **self.encode_options).audio_codes
        return codes.flatten(0, -2)[: self.codebooks].T.numpy().astype(np.uint16)

    @torch.inference_mode()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        books = torch.from_numpy(codes.astype(np.int64)).T.reshape(*self.shape, self.codebooks, -1)
        return self.model.decode(audio_codes=books, **self.decode_options)[0].flatten().numpy()


def mimi(checkpoint: str, codebooks: Count | None = None) -> Codec:
    """Kyutai's, 24 kHz and 12.5 frames a second."""
    return HuggingFace("MimiModel", checkpoint, codebooks)


def encodec(checkpoint: str, codebooks: Count | None = None) -> Codec:
    """Meta's, 24 kHz and 75 frames a second."""
    return HuggingFace("EncodecModel", checkpoint, codebooks)


def dac(checkpoint: str, codebooks: Count | None = None) -> Codec:
    """Descript's, at 16 kHz 50 frames a second."""
    return HuggingFace("DacModel", checkpoint, codebooks)
