"""RWKV-6 and RWKV-7 in plain torch, with the names and shapes of BlinkDL's files.

In: token ids, and where documents begin. Out: logits. `time_state` (heads, value, key), a learned
initial memory of each layer, is there where it is asked for. A state is what is remembered between
two calls, of each layer (last input of `att`, memory of the heads, last input of `ffn`).
"""

from dataclasses import dataclass
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechfuse.rwkv import recurrence

State = list[tuple[Tensor, Tensor, Tensor]]
Maybe = Tensor | None
Read = tuple[Tensor, Maybe, Tensor]  # what att gives: output, values of the first layer, memory
FASTEST = 0.606531  # exp(-0.5): decays of RWKV-7 are exp(-FASTEST) to 1


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. `ranks`: of the low-rank products, RWKV-6: mix, decay; RWKV-7: decay, rate,
    value, gate."""

    version: int
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    ranks: dict[str, int]

    def __post_init__(self) -> None:
        needed = {6: {"mix", "decay"}, 7: {"decay", "rate", "value", "gate"}}.get(self.version)
        if needed != self.ranks.keys():
            of = f"has the ranks {sorted(needed)}" if needed else "cannot be used here, 6 and 7 can"
            raise ValueError(f"RWKV-{self.version} {of}, and ranks={self.ranks}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"a width of {self.hidden_size} has no {self.num_attention_heads} equal heads"
            )


def _ramp(width: int) -> Tensor:
    return torch.arange(width) / width


def _row(values: Tensor | float, width: int) -> nn.Parameter:
    return nn.Parameter((torch.zeros(1, 1, width) + values).contiguous())


def _linear(inner: int, outer: int, scale: float) -> nn.Linear:
    layer = nn.Linear(inner, outer, bias=False)
    nn.init.uniform_(layer.weight, -scale / inner**0.5, scale / inner**0.5)
    return layer


def _low_rank(width: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    second = torch.empty(rank, width).uniform_(-0.01, 0.01)
    return nn.Parameter(torch.zeros(width, rank)), nn.Parameter(second)


def _before(x: Tensor, last: Maybe, fresh: Maybe) -> Tensor:
    """Return what each token (rows, length, width) follows: zeros where a document begins."""
    last = torch.zeros_like(x[:, 0]) if last is None else last.to(x.dtype)
    before = torch.cat([last[:, None], x[:, :-1]], 1)
    return before if fresh is None else before.masked_fill(fresh[..., None], 0)


class _TimeMix(nn.Module):
    """What both versions have: four products, the norm of the heads, and the initial memory."""

    def __init__(self, shape: Shape, learned_state: bool) -> None:
        super().__init__()
        width, self.heads = shape.hidden_size, shape.num_attention_heads
        self.memory = (self.heads, *2 * [width // self.heads])
        self.receptance, self.value = _linear(width, width, 0.5), _linear(width, width, 0.5)
        self.key, self.output = _linear(width, width, 0.05), _linear(width, width, 0.0)
        self.ln_x = nn.GroupNorm(self.heads, width, eps=64e-5)
        self.time_state = nn.Parameter(torch.zeros(self.memory)) if learned_state else None

    def split(self, x: Tensor) -> Tensor:
        """(rows, length, width) -> (rows, heads, length, width of a head)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def remember(self, tokens: recurrence.Tokens, memory: Maybe) -> tuple[Tensor, Tensor]:
        """Return what the tokens read, normed by head, (rows, length, width), and the memory."""
        learned: Maybe = self.time_state
        initial = tokens.r.new_zeros(self.memory) if learned is None else learned
        out, memory = recurrence.run(tokens, initial.mT, memory)
        out = out.transpose(1, 2).flatten(2)
        return self.ln_x(out.flatten(0, 1)).view_as(out), memory


class TimeMix6(_TimeMix):
    """`att` of RWKV-6."""

    def __init__(self, shape: Shape, layer: int, learned_state: bool) -> None:
        super().__init__(shape, learned_state)
        width, ranks = shape.hidden_size, shape.ranks
        above = 1 - layer / shape.num_hidden_layers
        self.time_maa_x = _row(1 - _ramp(width) ** above, width)
        for name in "wkvrg":
            power = above if name in "wk" else 0.5 * above
            setattr(self, f"time_maa_{name}", _row(1 - _ramp(width) ** power, width))
        self.time_maa_w1 = nn.Parameter(torch.zeros(width, 5 * ranks["mix"]))
        mixed = torch.empty(5, ranks["mix"], width).uniform_(-0.01, 0.01)
        self.time_maa_w2 = nn.Parameter(mixed)
        faster = layer / max(1, shape.num_hidden_layers - 1)
        self.time_decay = _row(-6 + 5 * _ramp(width) ** (0.7 + 1.3 * faster), width)
        self.time_decay_w1, self.time_decay_w2 = _low_rank(width, ranks["decay"])
        self.time_faaaa = nn.Parameter(torch.zeros(self.heads, width // self.heads))
        self.gate = _linear(width, width, 0.5)

    def forward(self, x: Tensor, first: Maybe, fresh: Maybe, last: Maybe, memory: Maybe) -> Read:
        """Return the output, `first` as it was, and the memory behind the last token."""
        change = _before(x, last, fresh) - x
        mixed = torch.tanh((x + change * self.time_maa_x) @ self.time_maa_w1)
        mixed = torch.einsum("btfr,frc->fbtc", mixed.unflatten(-1, (5, -1)), self.time_maa_w2)
        w, k, v, r, g = (
            x + change * (getattr(self, f"time_maa_{name}") + more)
            for name, more in zip("wkvrg", mixed, strict=True)
        )
        decay = self.time_decay + torch.tanh(w @ self.time_decay_w1) @ self.time_decay_w2
        r, k, v = map(self.split, (self.receptance(r), self.key(k), self.value(v)))
        # not clamped behind exp, whose infinity would have NaN for its gradient
        decay = -self.split(decay.float()).clamp(max=log(-recurrence.FADED)).exp()
        tokens = recurrence.Tokens(r, k, v, decay, bonus=self.time_faaaa, fresh=fresh)
        out, memory = self.remember(tokens, memory)
        return self.output(out * F.silu(self.gate(g))), first, memory


class TimeMix7(_TimeMix):
    """`att` of RWKV-7."""

    def __init__(self, shape: Shape, layer: int, learned_state: bool) -> None:
        super().__init__(shape, learned_state)
        width, ranks = shape.hidden_size, shape.ranks
        ramp, above = _ramp(width), 1 - layer / shape.num_hidden_layers
        for name, power in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            setattr(self, f"x_{name}", _row(1 - ramp ** (power * above), width))
        faster = layer / max(1, shape.num_hidden_layers - 1)
        self.w0 = _row(-5.5 + 6 * ramp ** (1 + faster**0.3), width)
        self.w1, self.w2 = _low_rank(width, ranks["decay"])
        self.a0 = _row(-0.19 + 0.4 * (ramp - 0.5), width)
        self.a1, self.a2 = _low_rank(width, ranks["rate"])
        if layer:  # of the first layer there is none to mix with
            self.v0 = _row(0.73 - 0.4 * (ramp - 0.5), width)
            self.v1, self.v2 = _low_rank(width, ranks["value"])
        gate = nn.init.orthogonal_(torch.empty(ranks["gate"], width), 0.1)
        self.g1, self.g2 = nn.Parameter(torch.zeros(width, ranks["gate"])), nn.Parameter(gate)
        self.k_k, self.k_a = _row(0.71 - 0.1 * (ramp - 0.5), width), _row(1.02, width)
        self.r_k = nn.Parameter(torch.full((self.heads, width // self.heads), -0.04))

    def forward(self, x: Tensor, first: Maybe, fresh: Maybe, last: Maybe, memory: Maybe) -> Read:
        """Return the output, the values of the first layer, and the memory behind the last
        token."""
        change = _before(x, last, fresh) - x
        r, w, k, v, a, g = (x + change * getattr(self, f"x_{name}") for name in "rwkvag")
        decay = self.w0 + torch.tanh(w @ self.w1) @ self.w2
        mix = v
        r, k, v = self.receptance(r), self.key(k), self.value(v)
        rate = torch.sigmoid(self.a0 + (a @ self.a1) @ self.a2)
        if first is None:
            first = v
        else:
            v = v + (first - v) * torch.sigmoid(self.v0 + (mix @ self.v1) @ self.v2)
        direction = F.normalize(self.split(k * self.k_k).float(), dim=-1).to(x.dtype)
        k = k * (1 + (rate - 1) * self.k_a)
        r, k, v = map(self.split, (r, k, v))
        decay = -FASTEST * torch.sigmoid(self.split(decay.float()))
        moves = -direction, direction * self.split(rate)
        tokens = recurrence.Tokens(r, k, v, decay, *moves, fresh=fresh)
        out, memory = self.remember(tokens, memory)
        own = (r * k * self.r_k[:, None]).sum(-1, keepdim=True) * v
        out = out + own.transpose(1, 2).flatten(2)
        return self.output(out * (torch.sigmoid(g @ self.g1) @ self.g2)), first, memory


class ChannelMix(nn.Module):
    """`ffn` of both versions."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        width, above = shape.hidden_size, 1 - layer / shape.num_hidden_layers
        self.key = _linear(width, shape.intermediate_size, 0.5)
        self.value = _linear(shape.intermediate_size, width, 0.0)
        self.gated = shape.version == 6
        if self.gated:
            self.receptance = _linear(width, width, 0.5)
            self.time_maa_k = _row(1 - _ramp(width) ** above, width)
            self.time_maa_r = _row(1 - _ramp(width) ** above, width)
        else:
            self.x_k = _row(1 - _ramp(width) ** above**4, width)

    def forward(self, x: Tensor, fresh: Maybe, last: Maybe) -> Tensor:
        change = _before(x, last, fresh) - x
        key = x + change * (self.time_maa_k if self.gated else self.x_k)
        out = self.value(F.relu(self.key(key)) ** 2)
        if self.gated:
            out = torch.sigmoid(self.receptance(x + change * self.time_maa_r)) * out
        return out


class Block(nn.Module):
    """A layer."""

    def __init__(self, shape: Shape, layer: int, learned_state: bool) -> None:
        super().__init__()
        if not layer:
            self.ln0 = nn.LayerNorm(shape.hidden_size)  # of the embedding
        self.ln1, self.ln2 = nn.LayerNorm(shape.hidden_size), nn.LayerNorm(shape.hidden_size)
        kind = TimeMix6 if shape.version == 6 else TimeMix7
        self.att, self.ffn = kind(shape, layer, learned_state), ChannelMix(shape, layer)

    def forward(self, x: Tensor, first: Maybe, fresh: Maybe, state: Any) -> Any:
        """x (rows, length, width) -> the same behind this layer, `first` for the next layer, and
        the state."""
        last, memory, last_of_ffn = state or (None, None, None)
        x = self.ln0(x) if hasattr(self, "ln0") else x
        normed = self.ln1(x)
        out, first, memory = self.att(normed, first, fresh, last, memory)
        x = x + out
        of_ffn = self.ln2(x)
        x = x + self.ffn(of_ffn, fresh, last_of_ffn)
        return x, first, (normed[:, -1], memory, of_ffn[:, -1])


class Rwkv(nn.Module):
    """The whole model."""

    def __init__(self, shape: Shape, learned_state: bool = False) -> None:
        super().__init__()
        self.build(shape, learned_state)

    def build(self, shape: Shape, learned_state: bool = False) -> None:
        """Add the layers, with the first values of a training from nothing."""
        self.emb = nn.Embedding(shape.vocab_size, shape.hidden_size)
        nn.init.normal_(self.emb.weight, std=0.1)
        layers = range(shape.num_hidden_layers)
        self.blocks = nn.ModuleList(Block(shape, layer, learned_state) for layer in layers)
        self.ln_out = nn.LayerNorm(shape.hidden_size)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    def read(
        self, vectors: Tensor, fresh: Maybe = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """Return the hidden states of `vectors` (rows, length, width) before the head, and the
        state behind them. `fresh` (rows, length): True where a document begins; `state`: that
        before them, None: that of a beginning."""
        first, states = None, []
        for layer, block in enumerate(self.blocks):
            before = state[layer] if state else None
            vectors, first, behind = block(vectors, first, fresh, before)
            states.append(behind)
        return self.ln_out(vectors), states

    def forward(self, tokens: Tensor, *, mask: Any = None, input_pos: Maybe = None) -> Tensor:
        """Compute logits (rows, length, vocabulary), float32, or what the head gives, from tokens
        and positions (rows, length), of which each document's begin at 0. `mask` is not needed."""
        fresh = None if input_pos is None else input_pos == 0
        return self.head(self.read(self.emb(tokens), fresh)[0]).float()
