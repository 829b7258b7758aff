"""Which tokens may attend to which: those before them in their own document.

In: the document that every token of a batch belongs to. Out: the mask in the form that the decoder
takes: all pairs (dense), the blocks of pairs that are not empty (flex, which skips the others), or
the documents themselves (varlen: one product for each, so that no pair of two documents costs).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention

Mask = Tensor | BlockMask
OLDEST = (7, 5)  # compute capability of the oldest GPUs that flex is for
LONG = 512  # tokens of a row: on a CPU dense is 1.2 times as fast for 128, half as fast for 2,048


def kind_of(
    name: str, device: torch.device, packed: bool, seq_len: int, window: int | None = None
) -> str:
    """Return dense, varlen or flex for `attention` of a recipe. auto is dense, but flex for packed
    rows on a GPU and varlen for long packed rows on a CPU. Raises ValueError for flex elsewhere: it
    is compiled anew for each length of a row, and no more after eight of them; on a GPU too old for
    it (torchtune takes its masks from compute capability 7.5 on); and for varlen on a GPU, which
    would wait for it once a row and layer, and with a `window` (positions that each sees).
    """
    old = False
    if device.type == "cuda" and torch.cuda.is_available():
        old = torch.cuda.get_device_capability(device) < OLDEST
    if name == "varlen" and window:
        raise ValueError("attention=varlen takes no adapter.window: choose dense or auto")
    if name == "varlen" and device.type == "cuda":
        raise ValueError("attention=varlen is for CPUs and slow on a GPU: choose flex or auto")
    if name == "flex" and old:
        raise ValueError("attention=flex is not for GPUs before Turing (sm_75): choose dense")
    if name == "flex" and device.type != "cuda":
        raise ValueError(
            f"attention=flex is compiled for CUDA and the device is {device.type}: choose dense, "
            "varlen or auto"
        )
    if name == "flex" and not packed:
        raise ValueError(
            "attention=flex with packed=false: rows of many lengths, for each of which it would be "
            "compiled; choose dense or auto, or pack"
        )
    if name == "auto":
        many = seq_len >= LONG and not window
        long = "flex" if device.type == "cuda" else "varlen" if many else "dense"
        return long if packed and not old else "dense"
    return name


def mask_of(document: Tensor, kind: str, window: int | None = None) -> Mask:
    """Return the mask of a batch for `document` (rows, length), integers: dense is bool (rows,
    length, length), True where the first position sees the second; varlen is `document` itself.

    Padding is a document like any other: its tokens see each other, so that no token sees nothing
    (which would be NaN), and nobody sees them. With `window` a position sees so many, its own and
    those before it.
    """
    rows, length = document.shape
    if kind == "varlen":
        return document
    if kind == "dense":
        causal = torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
        near = causal.triu(1 - window) if window else causal
        return near & (document[:, :, None] == document[:, None, :])

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (query >= key) & (query - key < (window or length))
        return near & (document[row, query] == document[row, key])

    return create_block_mask(allowed, rows, None, length, length, device=document.device)


def by_document(
    otherwise: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *, mask: Any, **options: Any
) -> Tensor:
    """Call `otherwise` (torchtune's attention function), or attend by document where the mask is
    documents.

    q, k, v (rows, heads, length, width of a head) -> as q.
    """
    if not isinstance(mask, Tensor) or mask.dtype == torch.bool:
        return otherwise(q, k, v, mask=mask, **options)
    dropout = options["dropout_p"]
    return torch.stack([_of_row(*row, dropout) for row in zip(q, k, v, mask, strict=True)])


@torch.compiler.disable  # its shapes are data
def _of_row(q: Tensor, k: Tensor, v: Tensor, document: Tensor, dropout: float) -> Tensor:
    lengths = document.unique_consecutive(return_counts=True)[1].tolist()
    pieces = zip(*(each.split(lengths, dim=1) for each in (q, k, v)), strict=True)
    attend = partial(scaled_dot_product_attention, dropout_p=dropout, is_causal=True)
    # with three dimensions torch would take its slowest kernel
    return torch.cat([attend(*(each[None] for each in piece))[0] for piece in pieces], dim=1)
