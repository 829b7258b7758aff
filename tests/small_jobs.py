"""Five jobs small enough to be stopped, or to fail, many times: tokenize, expand, train, sweep,
synthesize."""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

QUANTIZER = "recipes/demo/models/quantizer"


@dataclass(frozen=True)
class Job:
    """`arguments` of the module, but for out=...; `result`: what a finished `out` holds, to be
    compared."""

    module: str
    arguments: list[str]
    result: Callable[[Path], object]

    def command(self, out: Path) -> list[str]:
        return [sys.executable, "-m", self.module, *self.arguments, f"out={out}"]


def content(out: Path) -> str:
    """One hash of weights, tokenizers and losses."""
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.suffix == ".safetensors" or path.name == "tokenizer.json":
            digest.update(path.relative_to(out).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def make(folder: Path, names: list[str]) -> dict[str, Job]:
    """The jobs of these `names`; what they read is made in `folder`."""
    from speechfuse.texts.conversations import Conversation, Turn
    from tests.prove_tokenize import make_corpus, result
    from tests.small_training import make_parts, recipe
    from tests.sweep_parts import make as make_sweep
    from tests.sweep_parts import results
    from tests.test_kinds import texts

    jobs = {}
    if "tokenize" in names:
        make_corpus(folder / "corpus", 48)
        shape = ["shard_size=6", "batch_size=4", f"corpus.path={folder / 'corpus'}"]
        jobs["tokenize"] = Job(
            "stages.tokenize_speech", ["recipes/demo/tokenize.yaml", *shape], result
        )
    if {"expand", "train", "train on 2 ranks"} & {*names}:
        parts = make_parts(folder / "parts")
        keys = [f"base={parts / 'init'}", f"quantizer={QUANTIZER}"]
        jobs["expand"] = Job("stages.expand_vocab", keys, content)
        config = recipe(parts, folder / "train", epochs=4)
        for name, ranks in (("train", 1), ("train on 2 ranks", 2)):
            more = [str(config), f"runtime.ranks={ranks}", "micro_batch_size=2"]
            jobs[name] = Job("stages.train", more, content)
    if "sweep" in names:
        config = make_sweep(folder / "sweep", 2)
        (folder / "sweep.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        more = [str(folder / "sweep.yaml"), "only=[asr]", "runtime.processes=2"]
        jobs["sweep"] = Job("stages.evaluate", more, results)
    if "synthesize" in names:
        questions = (
            [Turn("user", f"say the number {i}"), Turn("assistant", f"{i}")] for i in range(60)
        )
        stored = [Conversation(f"t{i}", turns, "made here") for i, turns in enumerate(questions)]
        texts(folder / "texts", stored, 30)
        spoken = {
            "texts": str(folder / "texts"),
            "kinds": {
                "instruction": {"_component_": "speechfuse.synthesis.Instruction", "share": 1.0}
            },
            "voices": {
                "espeak": {
                    "_component_": "speechfuse.synthesis.Espeak",
                    "accents": ["en-us"],
                    "variants": ["Annie", "m3"],
                }
            },
            "quantizer": {"checkpoint": QUANTIZER},
            "batch_size": 4,
            "shard_size": 8,
            "runtime": {"device": "cpu"},
            "out": "out",
        }
        (folder / "synthesize.yaml").write_text(yaml.safe_dump(spoken))
        jobs["synthesize"] = Job(
            "stages.synthesize_instructions", [str(folder / "synthesize.yaml")], result
        )
    return {name: jobs[name] for name in names}
