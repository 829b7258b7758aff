"""The arguments of a model's builder, from config.json of the checkpoint.

In: `model` of a recipe, which may name the builder alone, and config.json. Out: the builder with
all its arguments. What a recipe states nevertheless must agree with config.json.
"""

import inspect
from typing import Any

from speechfuse import config
from speechfuse.rwkv.pth import MODEL_TYPE

BUILDER_KEYS = {  # argument of torchtune's Llama builders, and of ours -> key of config.json
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "embed_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "rope_base": "rope_theta",
    "scale_factor": "rope factor",
    "version": "version",
    "ranks": "ranks",
}
WITHOUT = {"tie_word_embeddings": False, "scale_factor": 1}  # of builders without the argument
FIXED = {  # what every builder has; stands in config.json or may be absent there
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
    "partial_rotary_factor": 1,
}
SCALING = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
REFUSED = {  # argument -> why it must not be true
    "quantize_base": "adapters are merged into weights of full precision",
    "apply_lora_to_output": "the head is trained whole, as its new rows are not yet learned",
}


def complete(spec: dict[str, Any], shape: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """Return `spec` {_component_, ...} with the arguments that it leaves out, from `shape`,
    config.json of `checkpoint`. Raises ValueError for arguments that contradict it, and for a
    checkpoint or an argument that cannot be trained here."""
    # transformers 5 writes rope_parameters, those before rope_scaling and rope_theta; of both it
    # takes the older
    rope = shape.get("rope_scaling") or shape.get("rope_parameters") or {}
    recurrent = shape.get("model_type") == MODEL_TYPE
    theta = {} if recurrent else {"rope_theta": 10_000.0}
    values = {"tie_word_embeddings": False} | theta | shape | rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{checkpoint}/config.json has rope_type={kind}: only llama3 and default")
    if kind == "llama3" and (lacks := sorted(SCALING - rope.keys())):
        raise ValueError(f"{checkpoint}/config.json: its rope_type=llama3 lacks {', '.join(lacks)}")
    values["rope factor"] = rope["factor"] if kind == "llama3" else 1
    takes = inspect.signature(config.resolve(spec["_component_"])).parameters
    filled = {}
    if recurrent != ("ranks" in takes):
        raise ValueError(
            f"{checkpoint}/config.json has model_type={shape.get('model_type')}, and model is "
            f"{spec['_component_']}: for RWKV choose speechfuse.train.rwkv, for Llama another"
        )
    # a recipe may ask for shorter tables of positions
    if "max_position_embeddings" in shape and not recurrent:
        filled["max_seq_len"] = shape["max_position_embeddings"]
    for argument, key in BUILDER_KEYS.items():
        if argument in takes and argument not in spec:
            if takes[argument].default != values.get(key):
                filled[argument] = values[key]
            continue
        value = spec[argument] if argument in takes else WITHOUT.get(argument)
        if value != values.get(key):
            builder = "set" if argument in takes else "choose a builder that takes it, and set"
            raise ValueError(
                f"model.{argument}={value} in the recipe, but {checkpoint}/config.json has "
                f"{key}={values.get(key)}: {builder} model.{argument}={values.get(key)}, or give a "
                "checkpoint that fits"
            )
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    for key, value in ({} if recurrent else FIXED | {"head_dim": head_dim}).items():
        if values.get(key) not in (None, value):
            raise ValueError(
                f"{checkpoint}/config.json has {key}={values[key]}: Llama 3 has {value}, and no "
                "other can be trained here"
            )
    for argument, reason in REFUSED.items():
        if spec.get(argument):
            raise ValueError(f"model.{argument}=true: {reason}; leave it out")
    return filled | spec
