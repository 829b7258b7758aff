"""The door: an embedding that puts an adapter's vectors where a batch has frames.

In: token ids, in which FRAME stands for a vector of speech, and the frames themselves, or the
waveforms of which an encoder inside the door makes them. Out: the vectors that the layers of the
language model read. The door takes the place of the model's embedding of tokens and has its weight,
under the same name; so builders, adapters, sharding, packing and masks need not know of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechfuse import config
from speechfuse.fusion.adapters import Adapter, counts

FRAME = -1  # in place of a token id: a vector of speech


class Door(nn.Embedding):
    """An embedding of tokens and, inside `with door.hearing(...)`, of frames. With an `encoder`,
    one of speechfuse.quantizer, of waveforms."""

    def __init__(
        self, words: nn.Embedding, adapter: Adapter, encoder: nn.Module | None = None
    ) -> None:
        super().__init__(words.num_embeddings, words.embedding_dim, _weight=words.weight)
        self.weight, self.adapter, self.encoder = words.weight, adapter, encoder
        self._audio: tuple[Tensor, Tensor, Tensor | None] | None = None

    @contextmanager
    def hearing(
        self, audio: Tensor, lengths: Tensor, codes: Tensor | None = None
    ) -> Iterator[None]:
        """Give the forward the frames (clips, length, width) of the FRAME ids, in their order,
        until the end of the block; `lengths` (clips): frames of each clip. With an encoder: the
        waveforms (clips, length) and samples of each. Where a batch has no clip, one of length 0
        stands in, so that every rank runs encoder and adapter. `codes` (rows, length, codebooks)
        are those of fusion.Channels."""
        if not len(lengths):
            shape = (1, self.adapter.stack, self.adapter.width) if self.encoder is None else (1, 0)
            audio, lengths = audio.new_zeros(shape), lengths.new_zeros(1)
        self._audio = audio, lengths, codes
        try:
            yield
        finally:
            self._audio = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Return vectors (rows, length, width of the model) of `tokens` (rows, length)."""
        vectors = F.embedding(tokens.clamp(min=0), self.weight)
        if self._audio is None:
            return vectors
        frames, lengths, codes = self._audio
        if self.encoder is not None:
            frames, lengths = self.encoder(frames, lengths)
        heard = self.adapter(frames.to(self.weight.dtype), lengths)
        own = torch.arange(heard.shape[1], device=heard.device) < counts(
            lengths, self.adapter.stack
        )
        heard, own = self.adapter.prompted(heard, own)
        return self.adapter.placed(vectors, heard[own].to(vectors.dtype), tokens == FRAME, codes)


def adapter_of(spec: dict[str, Any], out: int) -> Adapter:
    """Return the adapter that `spec` {_component_, width, ...} names, for a model `out` wide; with
    `prompt` of it so many learned vectors. Raises ValueError for a component that is none."""
    adapter = config.instantiate({k: v for k, v in spec.items() if k != "prompt"}, out=out)
    if not isinstance(adapter, Adapter):
        raise ValueError(f"{spec['_component_']} is no adapter of speechfuse.fusion")
    if (prompt := spec.get("prompt", 0)) not in range(1025):
        raise ValueError(f"adapter: prompt={prompt!r}: 0 to 1024 vectors are learned")
    if prompt:
        adapter.prompt = nn.Parameter(0.02 * torch.randn(prompt, out))
    return adapter


def initial_values(spec: dict[str, Any], out: int, seed: int) -> dict[str, Tensor]:
    """Return the first values of an adapter's tensors, by name, as torch draws them by `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return adapter_of(spec, out).state_dict()
