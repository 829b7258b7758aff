"""Conversations of two questions in the closed world, the second of which needs the first.

    python recipes/demo/dialogues.py recipes/demo/dialogues.yaml

In: facts.jsonl of recipes/demo/world.py. Out, one artifact: dialogues.jsonl, an object a line with
`messages` (what is the capital of spain: madrid; and its language: spanish), `first` and `fact`
(the facts that are asked for) and `split`. In `train` and `seen_facts`, which no conversation
shares, both facts are spoken in training; in `validation` and `unseen_facts` the second is not.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechfuse import artifact, config
from speechfuse.config import key

ARITHMETIC = {"add": "plus", "subtract": "minus", "multiply": "times"}


@dataclass
class Dialogues:
    """recipes/demo/dialogues.yaml."""

    out: str = key("folder of the artifact")
    world: str = key("folder of recipes/demo/world.py")
    seed: int = key("of every choice below", 0, least=0)
    train: int = key("conversations to train on", 4000, least=1)
    seen_facts: int = key("conversations to test on", 150, least=1)
    asked: int = key("times each unheard fact comes second", 3, least=1)
    fresh: bool = key("move an artifact that differs aside", False)


def follow_ups(first: dict[str, Any], facts: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Question -> fact of all that can be asked after `first`: of the same thing another relation,
    of another thing the same relation, and what a number makes with another."""
    by_question = {}
    for fact in facts:
        if first["family"] not in ARITHMETIC and fact["family"] == first["family"]:
            same = fact["entity"] == first["entity"]
            if same != (fact["relation"] == first["relation"]):
                question = f"and its {fact['relation']}" if same else f"and of {fact['entity']}"
                by_question[question] = fact
        elif {first["family"], fact["family"]} <= ARITHMETIC.keys():
            sign = ARITHMETIC[fact["family"]]
            for wording in fact["wordings"]:
                left, _, right = wording.rpartition(f" {sign} ")
                if left.split()[-1] == first["answer"]:
                    by_question[f"and {sign} {right}"] = fact
    return by_question


def dialogues(job: Dialogues, facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A third of each split is about countries, about animals and about numbers."""
    rng = random.Random(job.seed)
    by_family: dict[str, list[tuple[dict, str, dict]]] = {}  # first fact, second question, its fact
    for first in (fact for fact in facts if fact["split"] == "train"):
        family = "number" if first["family"] in ARITHMETIC else first["family"]
        pairs = [(first, *item) for item in follow_ups(first, facts).items()]
        by_family.setdefault(family, []).extend(pairs)
    rows = []
    for pairs in by_family.values():
        rng.shuffle(pairs)
        seen = [pair for pair in pairs if pair[2]["split"] == "train"]
        tested = job.seen_facts // len(by_family)
        trained = seen[tested:]
        rows += [_row(*pair, "seen_facts", rng) for pair in seen[:tested]]
        count = job.train // len(by_family)
        rows += [_row(*trained[i % len(trained)], "train", rng) for i in range(count)]
        for split, name in (("validation", "validation"), ("test", "unseen_facts")):
            times: Counter[str] = Counter()
            for pair in pairs:
                fact = pair[2]
                if fact["split"] == split and times[fact["id"]] < job.asked:
                    times[fact["id"]] += 1
                    rows.append(_row(*pair, name, rng))
    return rows


def _row(
    first: dict[str, Any], question: str, second: dict[str, Any], split: str, rng: random.Random
) -> dict[str, Any]:
    texts = [rng.choice(first["wordings"]), first["answer"], question, second["answer"]]
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": text} for r, text in zip(roles, texts, strict=True)]
    return {"messages": messages, "first": first["id"], "fact": second["id"], "split": split}


def main(job: Dialogues) -> None:
    out, world = Path(job.out), Path(job.world)
    inputs = {"world": artifact.fingerprint_of(world)}
    work = artifact.Artifact(out, "dialogues", 1, vars(job), inputs)
    if not work.begin(fresh=job.fresh):
        return
    facts = [json.loads(line) for line in (world / "facts.jsonl").read_text().splitlines()]
    rows = dialogues(job, facts)
    path = out / "dialogues.jsonl"
    artifact.write_atomic(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    totals = dict(Counter(row["split"] for row in rows))
    work.finish(totals, [path])
    print(f"{out}: {totals}")


if __name__ == "__main__":
    config.main(main, Dialogues, __doc__)
