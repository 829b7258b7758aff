"""RWKV-6 and RWKV-7 in the loop, under BlinkDL's names.

In: sizes. Out: a model that the loop, the losses and FSDP2 cannot tell from torchtune's. Documents
are told by their positions, so that no mask is needed.
"""

from typing import Any

from torch import nn

from speechfuse.rwkv.model import Rwkv, Shape
from speechfuse.train.backbone import Backbone, Weights


class Recurrent(Backbone):
    """The backbone of RWKV; a Hugging Face folder has the same names."""

    embedding, layers, head = "emb", "blocks", "head"

    def prepare(self, model: nn.Module) -> None:
        """Do nothing: there is no attention."""

    def seen(self, shape: dict[str, Any]) -> int | None:
        # writing and reading a head's memory are as many products as so many tokens seen
        return int(shape["hidden_size"] // shape["num_attention_heads"])

    def read_hf(self, weights: Weights, shape: dict[str, Any]) -> Weights:
        return weights

    write_hf = read_hf


class Trained(Rwkv):
    backbone = Recurrent()


def rwkv(
    version: int,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    ranks: dict[str, int],
    learned_state: bool = False,
) -> Trained:
    """Build RWKV-6 or RWKV-7; with `learned_state` every layer has an initial memory that trains,
    `time_state`, zeros at first. `ranks`: see rwkv.model.Shape."""
    sizes = (vocab_size, embed_dim, num_layers, num_heads, intermediate_dim)
    return Trained(Shape(version, *sizes, ranks), learned_state)
