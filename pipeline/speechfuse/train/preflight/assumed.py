"""The plan of a run whose checkpoint or data is not here yet, so that a GPU can be chosen first.

In: a recipe. Out: what is missing, with the verb that makes it, and in place of the data's own plan
one in which all but the recipe's sizes is assumed.
"""

import inspect
from pathlib import Path
from typing import Any

import yaml

from speechfuse import config
from speechfuse.train.preflight.report import Data

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
STEPS = 1000  # where the recipe does not say how many
SAMPLE = 400  # tokens; Llama3-s had 372 in stage 1 and 473 in stage 2
USEFUL = {True: 0.97, False: 0.8}  # share of the positions, by `packed`


def missing(job: Any, pins: dict[str, str | None]) -> list[str]:
    """A sentence for the checkpoint and each folder of data that is not there."""
    paths = [job.checkpoint, *(path for path, pin in pins.items() if pin is None)]
    return [f"{path} is not there; {maker(path)}" for path in paths if not Path(path).exists()]


def maker(path: str, recipes: Path = Path("recipes")) -> str:
    """Which verb makes a folder."""
    for file in sorted(recipes.glob("*/*.yaml")):
        verb = "tokenize" if file.stem.startswith("tokenize") else VERBS.get(file.stem)
        out = (yaml.safe_load(file.read_text("utf-8")) or {}).get("out")
        if verb and out and Path(path).is_relative_to(out):
            say = f"tokenize {file}" if verb == "tokenize" else f"recipe={file.parent.name} {verb}"
            return f"`just {say}` makes it"
    return "no recipe here makes it: check the path, or put it there"


def shape(model: dict[str, Any], lacks: list[str]) -> dict[str, Any]:
    """What a plan needs of config.json, from the recipe's `model`."""
    if not {"num_heads", "embed_dim"} <= model.keys():
        raise ValueError(f"{'; '.join(lacks)} (model has no num_heads and embed_dim to plan with)")
    tied = inspect.signature(config.resolve(model["_component_"])).parameters.get(
        "tie_word_embeddings"
    )
    return {
        "num_attention_heads": model["num_heads"],
        "hidden_size": model["embed_dim"],
        "tie_word_embeddings": model.get("tie_word_embeddings", tied.default if tied else False),
    }


def data(job: Any) -> tuple[Data, str]:
    """The assumed plan, and a sentence that says what is assumed."""
    steps, useful = job.steps or STEPS, USEFUL[job.packed]
    row = job.seq_len if job.packed else min(job.seq_len, round(SAMPLE / useful))
    positions = steps * job.batch_size * row
    tokens = int(positions * useful)
    samples = tokens // SAMPLE
    return Data(
        [samples],
        [0],
        tokens,
        tokens,
        positions,
        samples * SAMPLE * (SAMPLE + 1) // 2,
        job.seq_len,
        steps,
        job.epochs,
    ), (
        f"assumed until all is there: {'' if job.steps else f'{steps:,} steps, '}samples of "
        f"{SAMPLE} tokens, {useful:.0%} of the positions useful, every token a target"
    )
