"""Adapters: frames of an encoder to vectors in the place of a language model's embeddings.

In: frames (clips, length, width) and how many of each clip's are its own; those behind are zeros.
Out: vectors (clips, ceil(length / stack), out): `stack` frames next to each other become one, the
last one with zeros where frames lack. A recipe names one by dotted path; `out`, the width of the
language model, is given by the job.
"""

from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechfuse.components import Count, Share


class Adapter(nn.Module):
    """What all adapters have: `width` of a frame, `stack` frames a vector, `out` numbers of it; and
    `prompt`, learned vectors before those of each recording, or None."""

    prompt: nn.Parameter | None

    def __init__(self, width: int, stack: int, out: int) -> None:
        super().__init__()
        if width < 1 or stack < 1:
            raise ValueError(f"adapter: width={width}, stack={stack}: both must be at least 1")
        self.width, self.stack, self.out = width, stack, out
        self.register_parameter("prompt", None)

    def stacked(self, frames: Tensor) -> Tensor:
        """(clips, length, width) -> (clips, ceil(length / stack), stack x width)."""
        frames = F.pad(frames, (0, 0, 0, -frames.shape[1] % self.stack))
        return frames.unflatten(1, (-1, self.stack)).flatten(2)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return the vectors of each clip, of which its first ceil(lengths / stack) count."""
        raise NotImplementedError

    def prompted(self, heard: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors of clips, `heard` (clips, length, out), and which of them count, `own`
        (clips, length), with the learned prompt before those of each clip that has any."""
        if self.prompt is None:
            return heard, own
        prompt = self.prompt.to(heard.dtype).expand(len(heard), -1, -1)
        before = own[:, :1].expand(-1, prompt.shape[1])
        return torch.cat([prompt, heard], 1), torch.cat([before, own], 1)

    def placed(self, words: Tensor, heard: Tensor, places: Tensor, codes: Tensor | None) -> Tensor:
        """Return `words`, the embeddings of tokens (rows, length, out), with the vectors `heard`
        (n, out) in the n `places` (rows, length), in their order; `codes`: see fusion.channels. On
        a GPU vectors that are not as many as their places stop the device."""
        torch._assert_async(places.sum() == len(heard), "frames and their places differ in number")
        return words.masked_scatter(places[..., None], heard)


class Identity(Adapter):
    """The frames as they are; their width must be the language model's."""

    def __init__(self, width: int, out: int, stack: int = 1) -> None:
        super().__init__(width, stack, out)
        if width * stack != out:
            raise ValueError(
                f"adapter: stack={stack} frames of width {width} are {width * stack} numbers, and "
                f"the language model takes {out}: choose speechfuse.fusion.Linear"
            )

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        return self.stacked(frames)


class Linear(Adapter):
    """One matrix, as in the stock models of transformers that splice."""

    def __init__(self, width: int, out: int, stack: int = 1) -> None:
        super().__init__(width, stack, out)
        self.linear = nn.Linear(width * stack, out)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        return self.linear(self.stacked(frames))


class Stack(Adapter):
    """A norm over the stacked frames, and two matrices with a GELU between, `hidden` wide. `plain`:
    without the norm and with a ReLU, as RWKV-ASR and SLAM-ASR have it."""

    def __init__(self, width: int, out: int, stack: int, hidden: Count, plain: bool = False):
        super().__init__(width, stack, out)
        self.norm = nn.Identity() if plain else nn.LayerNorm(width * stack)
        self.between = F.relu if plain else F.gelu
        self.inner, self.outer = nn.Linear(width * stack, hidden), nn.Linear(hidden, out)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        return self.outer(self.between(self.inner(self.norm(self.stacked(frames)))))


class _ScaleAndShift(nn.BatchNorm1d):
    """A batch norm, with its tensors, that never takes the statistics of a batch."""

    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self.running_var + self.eps).sqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None].to(x.dtype) + shift[:, None].to(x.dtype)


class Positions(nn.Module):
    """Sinusoids of relative places for conformer blocks of a `shape`, made anew each time: a table
    of them would be lost with the memory of an empty model."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, vectors: Tensor) -> Tensor:
        from transformers.models.parakeet import modeling_parakeet as parakeet

        table = parakeet.ParakeetEncoderRelPositionalEncoding(self.shape)
        return table.to(vectors.device)(vectors)


class Conformer(Adapter):
    """`layers` conformer blocks, `hidden` wide, between two matrices; transformers' own blocks.
    Their batch norms never take the statistics of a batch: they scale and shift each channel, so
    that a clip's vectors do not depend on which clips share its micro-batch.

    Source: the modality adapter of SALM and of Modular SpeechLLM in NVIDIA NeMo."""

    def __init__(
        self,
        width: int,
        out: int,
        stack: int = 1,
        hidden: Count = 512,
        layers: Count = 2,
        heads: Count = 8,
        kernel: Count = 9,
        dropout: Share = 0.1,
    ) -> None:
        super().__init__(width, stack, out)
        from transformers import ParakeetEncoderConfig
        from transformers.models.parakeet import modeling_parakeet as parakeet

        shape = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
        shape |= {"intermediate_size": 4 * hidden, "conv_kernel_size": kernel}
        rates = dict.fromkeys("dropout activation_dropout attention_dropout".split(), dropout)
        self.shape: Any = ParakeetEncoderConfig.from_dict(shape | rates)
        self.shape._attn_implementation = "eager"
        self.positions = Positions(self.shape)
        self.inner, self.outer = nn.Linear(width * stack, hidden), nn.Linear(hidden, out)
        blocks = [parakeet.ParakeetEncoderBlock(self.shape, i) for i in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        for block in blocks:
            block.conv.norm = _ScaleAndShift(hidden)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        vectors = self.inner(self.stacked(frames))
        positions = self.positions(vectors)
        # a clip of length 0 has one place all the same: nothing to attend to would be no number
        many = counts(lengths, self.stack).clamp(min=1)
        own = torch.arange(vectors.shape[1], device=vectors.device) < many
        # no place attends to one behind its clip, which the blocks then also hide from their kernel
        mask = own[:, None, None, :].expand(-1, 1, vectors.shape[1], -1)
        for block in self.blocks:
            vectors = block(
                vectors.masked_fill(~own[..., None], 0),
                attention_mask=mask,
                position_embeddings=positions,
            )
        return self.outer(vectors)


def counts(lengths: Tensor, stack: int) -> Tensor:
    """Return the number of vectors of each clip, (clips, 1), from its number of frames."""
    return ((lengths + stack - 1) // stack)[:, None]


def positions(frames: int, stack: int) -> int:
    """Return the number of vectors that so many frames of one clip become."""
    return ceil(frames / stack)


def count(samples: int, steps: list[list[int]]) -> int:
    """Return the number of frames that an encoder makes of so many samples; `steps`: [kernel,
    stride, padding] of each of its convolutions over time."""
    for kernel, stride, padding in steps:
        samples = max(0, (samples + 2 * padding - kernel) // stride + 1)
    return samples
