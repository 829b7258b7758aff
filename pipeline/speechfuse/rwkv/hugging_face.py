"""RWKV as transformers knows it: AutoConfig and AutoModelForCausalLM of this process.

In: a folder with config.json of model_type `speechfuse_rwkv` and weights under BlinkDL's names.
Out: a model that generates with a state of constant size, once `register` was called; no code is
read from the folder.
"""

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from speechfuse.rwkv.model import Rwkv, Shape
from speechfuse.rwkv.pth import MODEL_TYPE


class Rwkv67Config(PreTrainedConfig):
    """The keys are those of model.Shape; nothing bounds the length but what was trained."""

    model_type = MODEL_TYPE
    version: int = 7
    vocab_size: int = 2
    hidden_size: int = 1
    num_hidden_layers: int = 1
    num_attention_heads: int = 1
    intermediate_size: int = 1
    ranks: dict[str, int] | None = None
    max_position_embeddings: int = 2**20
    tie_word_embeddings: bool = False

    def shape(self) -> Shape:
        return Shape(**{field.name: getattr(self, field.name) for field in fields(Shape)})


@dataclass
class RwkvOutput(ModelOutput):
    """`state`: under the name that transformers' generate passes on to the next step."""

    logits: Tensor | None = None
    state: Any = None


class Rwkv67ForCausalLM(Rwkv, PreTrainedModel, GenerationMixin):
    config_class = Rwkv67Config
    _is_stateful = True  # no token can be taken back

    def __init__(self, config: Rwkv67Config) -> None:
        PreTrainedModel.__init__(self, config)
        self.build(config.shape())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: `build` has."""

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def set_input_embeddings(self, value: Any) -> None:
        self.emb = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the hidden states that the head reads, of tokens padded behind."""
        return self.read(self.emb(tokens))[0]

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        **more: Any,
    ) -> RwkvOutput:
        """`state` in `more`: that of the call before. Without it the prompts begin here; what
        `attention_mask` has as padding before them is a document of its own."""
        vectors = self.emb(input_ids) if inputs_embeds is None else inputs_embeds
        state, fresh = more.get("state"), None
        if state is None and attention_mask is not None:
            fresh = attention_mask.cumsum(1) <= 1
        hidden, state = self.read(vectors, fresh, state)
        return RwkvOutput(self.head(hidden[:, -more.get("logits_to_keep", 0) :]), state)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, state: Any = None, inputs_embeds: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return all of the prompt, or with a state the last token alone."""
        if state is not None:
            return {"input_ids": input_ids[:, -1:], "state": state}
        mask = {"attention_mask": kwargs.get("attention_mask"), "logits_to_keep": 1}
        return mask | {"input_ids": input_ids, "inputs_embeds": inputs_embeds}


def register() -> None:
    """Make transformers open such folders, in this process."""
    AutoConfig.register(MODEL_TYPE, Rwkv67Config, exist_ok=True)
    AutoModelForCausalLM.register(Rwkv67Config, Rwkv67ForCausalLM, exist_ok=True)
