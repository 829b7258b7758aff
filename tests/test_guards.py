"""What is wrong with a step or a row is caught, named, and survived as the policy says."""

import json
import math
from pathlib import Path

import pytest

from speechfuse.train import loop, plan
from speechfuse.train.config import Finetune, Guards
from speechfuse.train.guards import Watch
from stages import bisect_batch
from tests.small_training import MARK, job, lines, losses, make_parts, plant, recipe, weights


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = make_parts(tmp_path_factory.mktemp("parts"))
    plant(folder / "planted")
    return folder


def planted(parts: Path, out: Path, step: str, path: str = "planted", **guards) -> Finetune:
    config = recipe(parts, out, {"guards": guards})
    loaded = job(config, step=f"tests.small_training.{step}", micro_batch_size=1)
    loaded.datasets[0]["path"] = str(parts / path)
    return loaded


def steps_with_the_row(parts: Path, out: Path) -> list[int]:
    mixture = plan.load_data(planted(parts, out, "nan_where_marked"), {})
    found = [
        step
        for step in range(1, mixture.plan.counts.steps + 1)
        if any(MARK in s.tokens for row in mixture.samples(step - 1) for s in row)
    ]
    assert len(found) == 1
    return found


@pytest.mark.parametrize("step", ["nan_where_marked", "explodes_where_marked"])
def test_a_bad_step_stops_the_run_and_its_row_is_found(parts, tmp_path, capsys, step):
    out = tmp_path / "run"
    stopped = planted(parts, out, step)
    (bad,) = steps_with_the_row(parts, out)
    assert step == "nan_where_marked" or bad > 1
    if step == "explodes_where_marked":
        stopped.runtime.guards.enough = min(bad - 1, 20)
    with pytest.raises(ValueError, match=f"step {bad}: (loss|gradient norm) .*bisect-batch"):
        loop.run(stopped)
    assert [line["step"] for line in lines(out)] == list(range(1, bad))
    written = (out / f"quarantine/step_{bad}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in written[1:]]
    assert "planted" in [row["id"] for row in rows] and all(row["tokens"] for row in rows)
    assert (out / f"state/step_{bad - 1}/.metadata").exists()
    capsys.readouterr()
    values = {key: getattr(stopped, key) for key in stopped.__dataclass_fields__}
    bisect_batch.main(bisect_batch.BisectBatch(**values, at=bad))
    found = (out / f"quarantine/step_{bad}.samples.jsonl").read_text().splitlines()
    assert json.loads(found[0])["id"] == "planted" and len(found) == len(rows)
    assert "planted: loss" in capsys.readouterr().out
    stopped.runtime.guards.policy = "quarantine"  # and the run goes on where it stopped
    loop.run(stopped)
    again = lines(out)
    assert [line["step"] for line in again if "quarantined" in line] == [bad]
    assert (out / "manifest.json").exists()


def test_a_step_in_quarantine_leaves_the_weights_as_they_are(parts, tmp_path):
    (bad,) = steps_with_the_row(parts, tmp_path / "unused")
    cut = {}
    for name, steps in (("before", bad - 1), ("bad", bad)):
        out = tmp_path / name
        one = planted(parts, out, "nan_where_marked", policy="quarantine")
        one.steps, one.warmup_steps = steps, 0
        one.optimizer["lr"] = 1e-3
        loop.run(one)
        cut[name] = weights(out)
    assert all(math.isfinite(float(t.sum())) for t in cut["bad"].values())
    # the schedules of both differ in length, so only what the last step did is compared
    assert lines(tmp_path / "bad")[-1]["quarantined"] == "loss is nan"
    totals = json.loads((tmp_path / "bad/manifest.json").read_text())["totals"]
    assert totals["quarantined_steps"] == 1
    assert losses(tmp_path / "bad")[-1] is None and totals["last_loss"] is not None


def test_too_many_bad_steps_stop_even_a_run_that_goes_on(parts, tmp_path):
    many = planted(parts, tmp_path / "run", "nan_where_marked", policy="quarantine", most=0)
    with pytest.raises(ValueError, match="0 steps before it were left out"):
        loop.run(many)


def test_rows_with_ids_out_of_range_stop_or_are_left_out(parts, tmp_path, capsys):
    plant(parts / "range", codes=[1, 17])
    with pytest.raises(ValueError, match=r"1 rows cannot be trained on; first planted: code 17"):
        loop.run(planted(parts, tmp_path / "stop", "nan_where_marked", "range"))
    kept = planted(parts, tmp_path / "kept", "nan_where_marked", "range", policy="quarantine")
    loop.run(kept)
    assert "1 rows in quarantine; first planted: code 17" in capsys.readouterr().out
    totals = json.loads((tmp_path / "kept/manifest.json").read_text())["totals"]
    assert totals["rejected"] == [1, 0] and totals["samples"][0] == 200


def test_what_a_step_is_compared_with():
    watch = Watch(Guards(spike=3.0), [])
    assert [watch.fault(i, 1.0 + i % 2, 5.0) for i in range(1, 31)] == [None] * 30
    assert watch.fault(31, 4.4, 5.0) is None
    assert "loss 6.1 is more than 3 times the median" in (watch.fault(32, 6.1, 5.0) or "")
    assert "gradient norm 16 is more" in (watch.fault(32, 1.0, 16.0) or "")
    assert watch.fault(32, float("inf"), 1.0) == "loss is inf"
    assert watch.fault(32, 1.0, float("nan")) == "gradient norm is nan"
    earlier = [{"step": i, "loss": 1.0, "grad_norm": 1.0} for i in range(1, 20)]
    earlier += [{"step": 20, "loss": 99.0, "grad_norm": 1.0, "quarantined": "loss"}]
    assert Watch(Guards(spike=3.0), earlier).fault(21, 50.0, 1.0) is None, "19 are not enough"
    earlier += [{"step": 21, "loss": 1.0, "grad_norm": 1.0}]
    resumed = Watch(Guards(spike=3.0), earlier)
    assert resumed.fault(22, 50.0, 1.0) and resumed.quarantined == 1


def test_steps_are_not_compared_with_those_that_trained_other_weights():
    lines = [{"step": i, "loss": 1.0, "grad_norm": 1.0} for i in range(1, 41)]
    lines += [{"step": i, "loss": 1.0, "grad_norm": 50.0} for i in range(41, 71)]
    for begun in (0, 30, 40, 55):  # undisturbed, and resumed in either part
        watch = Watch(Guards(), lines[:begun], first=40)
        for line in lines[begun:]:
            assert watch.fault(line["step"], line["loss"], line["grad_norm"]) is None
        assert watch.fault(71, 1.0, 501.0)
    assert Watch(Guards(), lines[:40]).fault(41, 1.0, 50.0), "without a first part it is a spike"
