"""The demo's conversations: the second question needs the first, and tests are never trained on."""

import json
from pathlib import Path

import pytest

from speechfuse import config
from tests.demo_code import demo

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[dict[str, dict], list[dict]]:
    """Facts by id, and the conversations of the recipe itself."""
    folder = tmp_path_factory.mktemp("dialogues")
    world, dialogues = demo("world"), demo("dialogues")
    overrides = [f"out={folder / 'world'}"]
    world.main(config.load(world.World, ROOT / "recipes/demo/world.yaml", overrides))
    overrides = [f"out={folder / 'd'}", f"world={folder / 'world'}"]
    recipe = ROOT / "recipes/demo/dialogues.yaml"
    dialogues.main(config.load(dialogues.Dialogues, recipe, overrides))
    facts = [json.loads(x) for x in (folder / "world/facts.jsonl").read_text().splitlines()]
    rows = [json.loads(x) for x in (folder / "d/dialogues.jsonl").read_text().splitlines()]
    return {fact["id"]: fact for fact in facts}, rows


def said(row: dict) -> list[str]:
    return [message["content"] for message in row["messages"]]


def test_answers_are_those_of_their_facts(made):
    facts, rows = made
    for row in rows:
        first, answer, _, second = said(row)
        assert first in facts[row["first"]]["wordings"]
        assert answer == facts[row["first"]]["answer"]
        assert second == facts[row["fact"]]["answer"]
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 2


def test_a_follow_up_has_many_answers_until_the_first_turn_says_which(made):
    _, rows = made
    alone: dict[str, set[str]] = {}
    whole: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        first, _, asked, answer = said(row)
        alone.setdefault(asked, set()).add(answer)
        whole.setdefault((first, asked), set()).add(answer)
    assert all(len(answers) == 1 for answers in whole.values())
    open_ended = [len(alone[said(row)[2]]) > 1 for row in rows]
    assert sum(open_ended) > 0.95 * len(rows)


def test_facts_that_are_not_spoken_in_training_are_asked_for_in_tests_alone(made):
    facts, rows = made
    split = {
        "train": "train",
        "seen_facts": "train",
        "validation": "validation",
        "unseen_facts": "test",
    }
    for row in rows:
        assert facts[row["first"]]["split"] == "train"
        assert facts[row["fact"]]["split"] == split[row["split"]]
    trained = {(said(r)[2], r["first"]) for r in rows if r["split"] == "train"}
    tested = {(said(r)[2], r["first"]) for r in rows if r["split"] != "train"}
    assert len(trained) > 1000 and len(tested) > 400 and not trained & tested
