"""What a dry run is given where the checkpoint or data of a recipe is not here yet.

In: a recipe. Out: what is missing, with the verb that makes it, and the shape of the checkpoint as
the recipe's `model` states it, so that a GPU can be chosen first.
"""

import inspect
from pathlib import Path
from typing import Any

import yaml

from speechfuse import config
from speechfuse.train.config import Finetune

VERBS = {  # recipe file whose `out` it is: the verb that makes it
    "expand_vocab": "expand",
    "init_base": "train-base",
    "train_base": "train-base",
    "train_quantizer": "train-quantizer",
    "stage1": "stage1",
    "stage2": "stage2",
    "world": "data",
    "curate_texts": "synthesize",
    "synthesize": "synthesize",
}


def missing(job: Finetune, pins: dict[str, str | None]) -> list[str]:
    """Return a sentence for the checkpoint and each folder of data that is not there."""
    paths = [job.checkpoint, *(path for path, pin in pins.items() if pin is None)]
    return [f"{path} is not there; {maker(path)}" for path in paths if not Path(path).exists()]


def maker(path: str, recipes: Path = Path("recipes")) -> str:
    """Name the verb that makes a folder."""
    for file in sorted(recipes.glob("*/*.yaml")):
        tokenizes, verb = file.stem.startswith("tokenize"), VERBS.get(file.stem)
        out = (yaml.safe_load(file.read_text("utf-8")) or {}).get("out")
        if (tokenizes or verb) and out and Path(path).is_relative_to(out):
            command = f"tokenize {file}" if tokenizes else f"recipe={file.parent.name} {verb}"
            return f"`just {command}` makes it"
    return "no recipe here makes it: check the path, or put it there"


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
