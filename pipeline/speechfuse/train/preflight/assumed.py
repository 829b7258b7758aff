"""What a dry run is given where the checkpoint or data of a recipe is not here yet.

In: a recipe. Out: what is missing, with the verb that makes it, and the shape of the checkpoint as
the recipe's `model` states it, so that a GPU can be chosen first.
"""

import inspect
from pathlib import Path
from typing import Any

from speechfuse import config
from speechfuse.provenance import maker
from speechfuse.train.config import Finetune


def missing(job: Finetune, pins: dict[str, str | None]) -> list[str]:
    """Return a sentence for checkpoint, encoder and each folder of data that is not there."""
    encoder = (job.encoder or {}).get("checkpoint")
    paths = [
        job.checkpoint,
        *([encoder] if encoder else []),
        *(path for path, pin in pins.items() if pin is None),
    ]
    return [f"{path} is not there; {maker(path)}" for path in paths if not Path(path).exists()]


def shape(model: dict[str, Any], lacks: list[str]) -> dict[str, Any]:
    """Return what a plan needs of config.json, from the recipe's `model`. Raises ValueError where
    that names no sizes."""
    if not {"num_heads", "embed_dim"} <= model.keys():
        raise ValueError(f"{'; '.join(lacks)} (model has no num_heads and embed_dim to plan with)")
    arguments = inspect.signature(config.resolve(model["_component_"])).parameters
    tied = arguments.get("tie_word_embeddings")
    return {
        "num_attention_heads": model["num_heads"],
        "hidden_size": model["embed_dim"],
        "tie_word_embeddings": model.get("tie_word_embeddings", tied.default if tied else False),
    }
