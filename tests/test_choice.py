"""The rule that chooses an epoch: bounds, ties that a paired test finds, what decides them."""

from pathlib import Path

import pytest

from speechfuse.report import choice, results, tables
from speechfuse.report.choice import Floor, Measure, Rule
from speechfuse.report.differences import difference, numbers
from speechfuse.report.results import Run, key
from tests.eval_results import score, scored, worded, write, write_failure

RUNS = [Run("stage1", "stage1"), Run("stage2", "stage2")]
QA = ("qa", "validation")


def read(evals: Path) -> results.Results:
    return results.read(evals, "base", RUNS)


def chosen(evals: Path, **changed) -> choice.Choice:
    usual = {"choose_from": "stage2", "task": "qa", "split": "validation", "metric": "acc"}
    rule = Rule(**usual | changed)
    found = read(evals)
    return choice.choose(found.of(rule.protocol), rule, "base", found.failures)


def epoch(evals: Path, number: int, right: list[bool], errors: list[int] | None = None) -> None:
    qa, items = scored(*QA, right)
    write(evals, f"stage2/epoch_{number}", "qa", [qa], items)
    if errors:
        wer, utterances = worded("asr", "clean", errors)
        write(evals, f"stage2/epoch_{number}", "asr", [wer], utterances)


def answers(right: int, of: int = 200) -> list[bool]:
    return [i < right for i in range(of)]


WER = Measure("asr", "clean", "wer")
BASE = ("mmlu", "all")


def blog(evals: Path) -> None:
    """The published table of Llama3-s v0.2; WER and MMLU as fractions."""
    rows = [
        (3.02, 2.87, 0.9466, 0.5139),
        (3.0, 3.22, 0.6080, 0.4621),
        (3.45, 3.53, 0.4998, 0.4676),
        (3.47, 2.93, 0.6005, 0.4720),
        (3.34, 3.01, 0.6907, 0.4703),
    ]
    known = {"width": None}
    write(evals, "base", "mmlu", [score(*BASE, 0.6380, n=14042, **known)])
    for i, (hermes, alpaca, wer, mmlu) in enumerate(rows, 1):
        name = f"stage2/epoch_{i}"
        write(evals, name, "openhermes", [score("openhermes", "test", hermes, "judge", **known)])
        write(evals, name, "alpaca", [score("alpaca", "test", alpaca, "judge", **known)])
        write(evals, name, "asr", [score("asr", "clean", wer, "wer", n=2617, **known)])
        write(evals, name, "mmlu", [score(*BASE, mmlu, n=14042, **known)])


def test_the_published_table_is_printed_and_its_epoch_chosen(tmp_path, capsys):
    """Its degradations are those of its text, and no interval or test is made up for it."""
    blog(tmp_path)
    found = read(tmp_path).of("clean")
    judged = [tables.Column(task, "test", "judge") for task in ("openhermes", "alpaca")]
    columns = [*judged, tables.Column(*key(WER)), tables.Column(*BASE, "acc", degradation=True)]
    made = choice.choose(
        found,
        Rule(
            "stage2",
            "alpaca",
            "test",
            "judge",
            then=[WER],
            under=[Floor(*BASE, "acc", of_base_at_least=0.7)],
        ),
        "base",
        [],
    )
    table = tables.results(found, list(found), columns, "base", made.checkpoint)
    print(table)
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip("* ") for cell in line.split("|")[1:-1]] for line in lines[2:]]
    worse = [row[-1] for row in cells]
    assert worse == ["", "19.45", "27.57", "26.71", "26.02", "26.29"]
    assert cells[3][:5] == ["stage2/epoch_3", "3.450", "3.530", "0.500", "0.468"]
    assert lines[5].startswith("| **stage2/epoch_3** | **3.450** |") and "\u00b1" not in lines[5]
    assert made.checkpoint == "stage2/epoch_3"
    [reason] = made.reasons
    assert reason.endswith("(point estimates: the results hold no per-item numbers to test).")


@pytest.mark.parametrize(("least", "epochs"), [(0.8, "stage2/epoch_1"), (0.735, "stage2/epoch_5")])
def test_epochs_below_a_bound_do_not_compete(tmp_path, least, epochs):
    blog(tmp_path)  # of base: 0.805, 0.724, 0.733, 0.740, 0.737
    made = chosen(
        tmp_path,
        task="alpaca",
        split="test",
        metric="judge",
        under=[Floor(*BASE, "acc", of_base_at_least=least)],
    )
    assert made.checkpoint == epochs
    assert "stage2/epoch_3 is left out: BELOW mmlu all acc: 0.733" in " ".join(made.reasons)
    with pytest.raises(
        ValueError, match=r"no epoch of stage2 may be chosen: .*epoch_1 is left out"
    ):
        chosen(
            tmp_path,
            under=[Floor(*BASE, "acc", at_least=0.6)],
            task="alpaca",
            split="test",
            metric="judge",
        )


def test_of_epochs_that_tie_the_next_measure_decides_then_the_earliest(tmp_path):
    """Three good epochs within the noise, and one that a paired test finds worse."""
    epoch(tmp_path, 0, answers(80), [0] * 50)
    epoch(tmp_path, 1, answers(150), [4] * 25 + [5] * 25)
    epoch(tmp_path, 2, answers(151), [1] * 24 + [2] * 26)
    epoch(tmp_path, 3, answers(152), [2] * 24 + [1] * 26)
    made = chosen(tmp_path, then=[WER])
    assert made.checkpoint == "stage2/epoch_2" and len(made.reasons) == 3
    first, second, last = made.reasons
    assert "0.760; not significantly worse: stage2/epoch_1 (-0.010" in first
    assert "epoch_0" not in first and "point estimates" not in first
    assert "stage2/epoch_3 has the lowest asr clean wer, 0.148" in second
    assert "stage2/epoch_2 (+0.004" in second and "epoch_1" not in second
    assert last == "The earliest of these is stage2/epoch_2."
    assert chosen(tmp_path).checkpoint == "stage2/epoch_1"
    assert chosen(tmp_path, paired=False, then=[WER]).checkpoint == "stage2/epoch_3"


def test_a_clear_winner_needs_no_second_measure(tmp_path):
    epoch(tmp_path, 0, answers(80), [0] * 50)
    epoch(tmp_path, 1, answers(150), [9] * 50)
    made = chosen(tmp_path, then=[WER])
    assert made.checkpoint == "stage2/epoch_1"
    best = "stage2/epoch_1 has the highest qa validation acc, 0.750"
    assert made.reasons == [f"{best}; every other is significantly worse."]
    assert chosen(tmp_path, task="asr", split="clean", metric="wer").checkpoint == "stage2/epoch_0"


def test_items_that_do_not_give_the_score_are_no_evidence_for_it(tmp_path):
    """A file may hold several scores of the same items; a test of the wrong ones would lie."""
    for number, value in enumerate((0.51, 0.6)):
        qa, items = scored(*QA, answers(100))
        other = score("qa", "validation", value, "exact", n=200)
        write(tmp_path, f"stage2/epoch_{number}", "qa", [qa, other], items)
    found = read(tmp_path).of("clean")
    cell = found["stage2/epoch_0"].files["qa"]
    assert len(numbers(cell, ("qa", "validation", "acc"))) == 200
    assert numbers(cell, ("qa", "validation", "exact")) == []
    assert chosen(tmp_path, metric="exact").checkpoint == "stage2/epoch_1"
    assert chosen(tmp_path).checkpoint == "stage2/epoch_0"


def test_a_missing_verdict_is_paired_with_nothing(tmp_path):
    for number, given in enumerate(([4.0, None, 2.0, 3.0], [4.0, 5.0, None, 3.0])):
        known = [x for x in given if x is not None]
        items = [{"id": str(i), "split": "test", "value": x} for i, x in enumerate(given)]
        judged = score("alpaca", "test", sum(known) / 3, "judge", n=3) | {"paired": True}
        write(tmp_path, f"stage2/epoch_{number}", "alpaca", [judged], items)
    first, second = read(tmp_path).of("clean").values()
    cells = first.files["alpaca"], second.files["alpaca"]
    assert difference(*cells, ("alpaca", "test", "judge")) == (0.0, 0.0, 0.0, 1.0)


def test_an_epoch_whose_cell_failed_is_left_out_and_named(tmp_path):
    epoch(tmp_path, 0, answers(100))
    epoch(tmp_path, 1, answers(180))
    write_failure(tmp_path, "stage2/epoch_1", "qa", "no weights")  # its old result counts no more
    write_failure(tmp_path, "stage2/epoch_2", "qa", "no weights")
    write(tmp_path, "stage2/epoch_1", "asr", [worded("asr", "clean", [1, 2])[0]])
    made = chosen(tmp_path)
    assert made.checkpoint == "stage2/epoch_0"
    assert made.reasons[0] == "stage2/epoch_2 is left out: none of its cells succeeded."
    assert "stage2/epoch_1 is left out: its qa validation acc is missing" in made.reasons[1]
    assert len(read(tmp_path).failures) == 2
    write(tmp_path, "stage2/epoch_3", "asr", [worded("asr", "clean", [1, 2])[0]])
    with pytest.raises(ValueError, match="no qa validation acc of stage2/epoch_3: evaluate it"):
        chosen(tmp_path)


def test_a_rule_of_another_protocol_finds_no_results(tmp_path):
    epoch(tmp_path, 0, answers(100))
    with pytest.raises(ValueError, match="no results of protocol=blog; there are: clean"):
        chosen(tmp_path, protocol="blog")
