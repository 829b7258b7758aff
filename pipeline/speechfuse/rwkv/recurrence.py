"""The recurrence of RWKV-6 and RWKV-7: the memory of a head, a matrix (key, value).

In: of each token what it adds to the memory, how it fades, and what it asks. With column vectors

    memory_t = diag(exp(decay_t)) memory_(t-1) + k_t v_t' [ + b_t (a_t' memory_(t-1)) in RWKV-7 ]
    RWKV-6: out_t = r_t' (memory_(t-1) + diag(bonus) k_t v_t')      RWKV-7: out_t = r_t' memory_t

Out: what each token reads, and the memory behind the last. `sequential` computes just that, token
by token; `chunked` computes whole chunks by matrix products, and the memory alone from chunk to
chunk. Both give the same numbers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32  # tokens
# The fastest decay of a token that may be asked for. The products inside a chunk have factors up to
# exp(-FADED * CHUNK), which float64 holds; a memory that fades so has 2e-9 of itself left.
FADED = -20.0


@dataclass(frozen=True)
class Tokens:
    """r, k, v, decay (FADED to 0) and, of RWKV-7, a, b: (rows, heads, length, width); `bonus`
    (heads, width) of RWKV-6. `fresh` (rows, length): True where a document begins, whose memory is
    then the initial one; None: nowhere."""

    r: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    bonus: Tensor | None = None
    fresh: Tensor | None = None


def run(x: Tokens, initial: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what the tokens read, as r, and the memory (rows, heads, width, width) behind them.
    `initial` (heads, width, width): the memory where a document begins; `memory` (rows, ...): that
    before the first token; None: the initial one."""
    if memory is None:
        memory = initial.expand(len(x.r), *initial.shape)
    return (sequential if x.r.shape[2] == 1 else chunked)(x, initial, memory)


def sequential(x: Tokens, initial: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """See `run`."""
    memory, out = memory.float(), []
    for t in range(x.r.shape[2]):
        if x.fresh is not None:
            memory = torch.where(x.fresh[:, t, None, None, None], initial.float(), memory)
        r, k, v = (each[:, :, t].float() for each in (x.r, x.k, x.v))
        pair, before = k[..., None] * v[..., None, :], memory
        memory = x.decay[:, :, t, :, None].float().exp() * memory + pair
        if x.a is not None and x.b is not None:
            asked = x.a[:, :, t, None].float() @ before
            memory = memory + x.b[:, :, t, :, None].float() @ asked
        read = memory if x.bonus is None else before + x.bonus.float()[..., None] * pair
        out.append((r[..., None, :] @ read)[..., 0, :])
    return torch.stack(out, 2).to(x.r.dtype), memory


def chunked(x: Tokens, initial: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """See `run`."""
    length, behind = x.r.shape[2], -x.r.shape[2] % CHUNK

    def chunks(each: Tensor) -> Tensor:
        """(rows, heads, length, width) -> (rows, heads, chunks, CHUNK, width), zeros behind."""
        return F.pad(each.double(), (0, 0, 0, behind)).unflatten(2, (-1, CHUNK))

    r, k, v, decay = (chunks(each) for each in (x.r, x.k, x.v, x.decay))
    initial, memory = initial.double()[:, None], memory.double()
    after = decay.cumsum(-2)  # log of what is left, since the chunk began, behind each token
    before = after - decay  # ... and before it
    own, carried, base = _documents(x.fresh, behind, before)

    def pairs(read: Tensor, written: Tensor, diagonal: int) -> Tensor:
        """(..., CHUNK, CHUNK): how much each token reads of what an earlier one has written."""
        return (read @ (written * (-after).exp()).mT * own).tril(diagonal)

    def of_initial(read: Tensor) -> Tensor:
        """What tokens read of the initial memory of a document that begins in their chunk."""
        return (read * ~carried) @ initial if x.fresh is not None else torch.zeros_like(read)

    seen = after if x.bonus is None else before
    from_start = r * (seen - base).exp()
    reads = pairs(r * seen.exp(), k, 0 if x.bonus is None else -1)
    if x.bonus is not None:
        reads = reads + torch.diag_embed((r * x.bonus.double()[:, None, None] * k).sum(-1))
    # what is left of each token's addition behind the chunk: none of documents that have ended
    left = (after[..., -1:, :] - after).exp() * own[..., -1, :, None]
    stays = (after[..., -1, :] - base[..., -1, :]).exp()[..., None]
    goes_on = carried[..., -1:, :]
    out = reads @ v + of_initial(from_start)
    added = (k * left).mT @ v + (stays * initial * ~goes_on if x.fresh is not None else 0.0)
    moved = torch.diag_embed((stays * goes_on)[..., 0])
    writes = of_memory = None
    if x.a is not None and x.b is not None:
        a, b = chunks(x.a), chunks(x.b)
        asks = a * before.exp()
        # what a token asks of the memory depends on what those before it asked: a triangular system
        system = torch.eye(CHUNK, dtype=a.dtype, device=a.device) - pairs(asks, b, -1)
        asks_start = a * (before - base).exp()
        known = pairs(asks, k, -1) @ v + of_initial(asks_start)
        both = torch.cat([known, asks_start * carried], -1)
        both = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
        known, of_memory = both.chunk(2, -1)
        writes = pairs(r * seen.exp(), b, 0)
        out = out + writes @ known
        added = added + (b * left).mT @ known
        moved = moved + (b * left).mT @ of_memory
    memories = []
    for chunk in range(added.shape[2]):
        memories.append(memory)
        memory = moved[:, :, chunk] @ memory + added[:, :, chunk]
    starts = torch.stack(memories, 2)
    out = out + (from_start * carried) @ starts
    if writes is not None and of_memory is not None:
        out = out + writes @ (of_memory @ starts)
    return out.flatten(2, 3)[:, :, :length].to(x.r.dtype), memory.float()


def _documents(fresh: Tensor | None, behind: int, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each chunk which tokens are of one document, (rows, 1, chunks, CHUNK, CHUNK); of
    each token whether its document began before the chunk, (rows, 1, chunks, CHUNK, 1); and
    `before` where the token's document begins in the chunk."""
    if fresh is None:
        yes = torch.ones((), dtype=torch.bool, device=before.device).expand(1, 1, 1, CHUNK, CHUNK)
        return yes, yes[..., :1], torch.zeros_like(before)
    number = fresh.cumsum(1)
    number = torch.cat([number, number[:, -1:].expand(-1, behind)], 1)[:, None]
    number = number.unflatten(2, (-1, CHUNK))
    own = number[..., :, None] == number[..., None, :]
    last = F.pad(number[:, :, :-1, -1], (1, 0))
    first = own.int().argmax(-1)[..., None].expand(before.shape)
    return own, (number == last[..., None])[..., None], before.gather(-2, first)
