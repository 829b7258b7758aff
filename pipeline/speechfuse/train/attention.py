"""Which tokens may attend to which: those before them in their own document.

In: the document that every token of a batch belongs to. Out: the mask in the form that the decoder
takes: all pairs (dense), or the blocks of pairs that are not empty (flex, which skips the others).
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

KINDS = ("auto", "dense", "flex")


def kind_of(name: str, device: torch.device, packed: bool) -> str:
    """dense or flex, for `attention` of a recipe; auto is flex for packed rows on a GPU. ValueError
    for flex elsewhere: it is compiled for each length of a row, and after eight of them no more.
    """
    if name not in KINDS:
        raise ValueError(f"attention={name!r}: choose one of {', '.join(KINDS)}")
    if name == "flex" and device.type != "cuda":
        raise ValueError(
            f"attention=flex is compiled for CUDA and the device is {device.type}: choose dense or "
            "auto"
        )
    if name == "flex" and not packed:
        raise ValueError(
            "attention=flex with packed=false: rows of many lengths, for each of which it would be "
            "compiled; choose dense or auto, or pack"
        )
    if name == "auto":
        return "flex" if device.type == "cuda" and packed else "dense"
    return name


def mask_of(document: Tensor, kind: str) -> Tensor | BlockMask:
    """The mask of a batch for `document` (rows, length), integers: dense is bool (rows, length,
    length), True where the second index may be seen from the first.

    Padding is a document like any other: its tokens see each other, so that no token sees nothing
    (which would be NaN), and nobody sees them.
    """
    rows, length = document.shape
    if kind == "dense":
        causal = torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
        return causal & (document[:, :, None] == document[:, None, :])

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[row, query] == document[row, key])

    return create_block_mask(allowed, rows, None, length, length, device=document.device)
