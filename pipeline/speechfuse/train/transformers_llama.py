"""transformers' Llama with the interface of torchtune's decoder, for runs without torchtune's.

In: the arguments of torchtune's llama3_1 and llama3_2 builders. Out: a model that the loop, the
losses and FSDP2 cannot tell from theirs. A recipe changes its `model._component_`, nothing else.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torchtune.modules import TiedLinear
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from speechfuse.train.attention import Mask, mask_of
from speechfuse.train.backbone import Backbone, Weights

HEAD_NAMES = {"lm_head.weight": "output.weight"}  # theirs: ours; all other weights are named alike


class Transformers(Backbone):
    """The backbone of `Llama`."""

    embedding, layers, head = "model.embed_tokens", "model.layers", "output"

    def prepare(self, model: nn.Module) -> None:
        """Do nothing: Llama.forward takes every mask."""

    def read_hf(self, weights: Weights, shape: dict[str, Any]) -> Weights:
        return {HEAD_NAMES.get(name, name): tensor for name, tensor in weights.items()}

    def write_hf(self, weights: Weights, shape: dict[str, Any]) -> Weights:
        theirs = {ours: name for name, ours in HEAD_NAMES.items()}
        return {theirs.get(name, name): tensor for name, tensor in weights.items()}


class Llama(nn.Module):
    """transformers' Llama without its head, and a head `output`."""

    backbone = Transformers()

    def __init__(self, shape: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaModel(shape)
        self.model.set_attn_implementation("sdpa")
        self.output: Any = TiedLinear(self.model.embed_tokens)
        if not shape.tie_word_embeddings:
            self.output = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    def rope_init(self) -> None:
        """Fill the tables of positions, which a model made on the meta device lacks."""
        self.model.rotary_emb = LlamaRotaryEmbedding(self.model.config)

    def forward(
        self, tokens: Tensor, *, mask: Mask | None = None, input_pos: Tensor | None = None
    ) -> Tensor:
        """Compute logits (rows, length, vocabulary), float32, or what the head gives, from tokens
        and positions (rows, length), as torchtune's decoder does; mask: one of attention.mask_of,
        causal when None."""
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            mask = mask_of(mask, "dense")
        kind = "flex_attention" if isinstance(mask, BlockMask) else "sdpa"
        if self.model.config._attn_implementation != kind:
            self.model.set_attn_implementation(kind)
        hidden = self.model(
            tokens,
            attention_mask=mask[:, None] if isinstance(mask, Tensor) else mask,
            position_ids=input_pos,
            use_cache=False,
        ).last_hidden_state
        return self.output(hidden).float()


def llama(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    max_seq_len: int,
    intermediate_dim: int,
    rope_base: int = 500_000,
    norm_eps: float = 1e-5,
    scale_factor: int = 8,
    tie_word_embeddings: bool = False,
) -> Llama:
    """Build a model from torchtune's arguments (those of llama3_1; llama3_2 ties its embeddings and
    has a scale_factor of 32)."""
    rope = {"rope_type": "llama3", "rope_theta": float(rope_base), "factor": float(scale_factor)}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    shape = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=embed_dim,
        intermediate_size=intermediate_dim,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_seq_len,
        rms_norm_eps=norm_eps,
        tie_word_embeddings=tie_word_embeddings,
        rope_parameters=rope,
        pad_token_id=None,
    )
    return Llama(shape)
