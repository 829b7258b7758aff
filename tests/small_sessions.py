"""Texts and a source for small sessions of two channels, with the shipped codec's replies."""

import json
from pathlib import Path
from typing import Any

from speechfuse.rows import shards
from stages import build_duplex
from tests.small_training import dataset

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "recipes/demo/models/codec"
CODEC = {"_component_": "speechfuse.codecs.patches", "checkpoint": str(FOLDER)}
SHARES = {"answer": 0.25, "twice": 0.125, "barge_in": 0.125, "backchannel": 0.125}
SHARES |= {"pause": 0.125, "user_only": 0.125, "reading": 0.125}


def texts(folder: Path, unknown: int = 0) -> Path:
    """Ten questions whose replies the codec has, and `unknown` others."""
    rows = []
    replies = (row for row in shards.read_shard(shards.shard_paths(FOLDER)[0]))
    words = [row["text"].split() for row in replies if row["extra"] == '{"kind": "reply"}']
    for number, each in enumerate(words[:10] + [["what", "is", "nothing"]] * unknown):
        said = {"user": " ".join(each[:-1]), "assistant": each[-1]}
        turns = [{"role": role, "segments": [{"text": text}]} for role, text in said.items()]
        extra = json.dumps({"source": "test", "fact": f"f{number}"})
        rows.append({"id": f"t{number}", "turns": turns, "extra": extra})
    return dataset(folder, shards.CONVERSATIONS, rows, None)


def job(texts: Path, out: Path, sessions: int = 16, **source: Any) -> build_duplex.BuildDuplex:
    voices = {"accents": ["en-us"], "variants": ["m1", "f1"]}
    spec = {"_component_": "speechfuse.synthesis.Sessions", "texts": str(texts), "kinds": SHARES}
    spec |= {"replies": str(FOLDER), "voices": voices, "sessions": sessions, **source}
    made = build_duplex.BuildDuplex(str(out), spec, CODEC, shard_size=8)
    made.runtime.engine = {"_component_": f"{__name__}.here"}
    return made


def here(function: Any, tasks: list[tuple], workers: int, device: str) -> Any:
    """An engine without processes, whose start would take longer than the work."""
    return (function(*task) for task in tasks)
