"""Keys of a training, and what a run begins with: what cannot be meant is refused before it."""

import dataclasses
import importlib
import re
import shutil
import typing
from pathlib import Path

import pytest

from speechfuse.config import load
from speechfuse.samples import packing
from speechfuse.train import loop, plan
from speechfuse.train.config import Finetune, ungrouped
from tests.small_training import job, make_parts, recipe
from tests.test_train import run_until_it_dies


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize(
    "override",
    """epochs=0 steps=0 batch_size=0 seq_len=1 warmup_steps=-1 micro_batch_size=-1 clip_grad_norm=0
    clip_grad_norm=-1 clip_grad_norm=.nan loss_chunk=0 shard_group=0 new_rows_first=-3 seed=-1
    seed=100000000000000000000 runtime.threads=-1 runtime.state_every=0 runtime.loader_workers=-1
    runtime.ranks=0 runtime.gpus=0 runtime.dollars_per_gpu_hour=-1 runtime.guards.enough=0
    runtime.guards.spike=1 runtime.guards.most=-1 runtime.guards.policy=go runtime.device=gpu
    runtime.tracker=mlflow dtype=fp16 runtime.expected.samples=-1""".split(),
)
def test_a_value_out_of_bounds_is_refused_by_its_key_at_once(parts, tmp_path, override):
    with pytest.raises(ValueError, match=rf"^{override.split('=')[0]}="):
        load(Finetune, recipe(parts, tmp_path / "bad"), [override])


def test_a_recipes_joined_rows_reach_the_data(parts, tmp_path):
    settings = job(recipe(parts, tmp_path / "run", joined=1.0))
    assert plan.load_data(settings, {}).joined == 1.0
    assert plan._artifact(settings, {})._config["joined"] == 1.0


def test_a_group_of_datasets_divides_its_share():
    """As nested weights of NeMo's input_cfg."""
    a, b, c = ({"path": name, "share": share} for name, share in (("a", 3), ("b", 1), ("c", 0.5)))
    group = {"share": 0.5, "datasets": [a, {"share": 1, "datasets": [b, b]}]}
    found = [(each["path"], each["share"]) for each in ungrouped([c, group])]
    assert found == [("c", 0.5), ("a", 0.375), ("b", 0.0625), ("b", 0.0625)]
    for wrong in (
        {"datasets": [a]},
        {"share": 1, "datasets": [{"path": "a"}]},
        {"share": 1, "datasets": []},
        group | {"path": 1},
    ):
        with pytest.raises(
            ValueError, match="a group of datasets and each of its entries need a sh"
        ):
            ungrouped([wrong])


def schemas_of(module: str) -> set[type]:
    """The dataclasses of a job whose fields are keys, those below them too."""
    waiting, found = [*vars(importlib.import_module(module)).values()], set()
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, type) and dataclasses.is_dataclass(schema) and schema not in found:
            found.add(schema)
            waiting += typing.get_type_hints(schema).values()
    return {s for s in found if any("help" in f.metadata for f in dataclasses.fields(s))}


@pytest.mark.parametrize("path", sorted(Path("stages").glob("[a-z]*.py")))
def test_every_number_of_a_job_has_bounds(path):
    """All keys that are numbers, so that a new one is not forgotten."""
    for schema in schemas_of(f"stages.{path.stem}"):
        for field in dataclasses.fields(schema):
            if re.match(r"(int|float)\b", str(getattr(field.type, "__name__", field.type))):
                bounds = field.metadata["least"], field.metadata["above"]
                assert bounds != (None, None), field.name


@pytest.mark.parametrize(
    ("config", "override", "said"),
    [
        ("tokenize", "runtime.max_reject_rate=1.1", "at most 1 is possible"),
        ("tokenize", "runtime.max_reject_rate=-1", "at least 0"),
        ("tokenize", "runtime.workers=1000000", "at most 4096"),
        ("tokenize", "batch_size=1000000000", "at most 4096"),
        ("tokenize", "shard_size=0", "at least 1"),
        ("synthesize", "shard_size=0", "at least 1"),
        ("curate_texts", "shard_size=0", "at least 1"),
        ("train_quantizer", "warmup_steps=4000", "the run has 3,000 steps"),
        ("train_quantizer", "runtime.threads=0", "at least 1"),
        ("evaluate", "limit=0", "at least 1"),
    ],
)
def test_a_number_out_of_bounds_is_refused_before_the_job(config, override, said):
    job = {"tokenize": "tokenize_speech", "synthesize": "synthesize_instructions"}
    stage = importlib.import_module(f"stages.{job.get(config, config)}")
    schema = typing.get_type_hints(stage.main)["job"]
    path = Path(f"recipes/demo/{config}.yaml")
    with pytest.raises(ValueError, match=rf"^{override.replace('1000000000', '.*')}.*{said}"):
        load(schema, path, [override])


def test_a_warm_up_longer_than_the_run_is_refused(parts, tmp_path, capsys):
    config = recipe(parts, tmp_path / "short")
    with pytest.raises(ValueError, match="warmup_steps=2 and the run has 2 steps"):
        load(Finetune, config, ["steps=2"])
    assert load(Finetune, config, ["steps=1", "warmup_steps=0"]).steps == 1
    with pytest.raises(ValueError, match=r"warmup_steps=40 and the run has \d+ steps"):
        loop.run(job(config, warmup_steps=40))
    assert not (tmp_path / "short").exists()


def test_a_run_goes_on_with_no_other_plan_of_its_data(parts, tmp_path, monkeypatch):
    settings = job(recipe(parts, tmp_path / "run", {"cache": str(tmp_path / "cache")}))
    run_until_it_dies(settings, monkeypatch)
    shutil.rmtree(tmp_path / "cache")
    packed = packing._packed
    with monkeypatch.context() as patch:  # as if other code packed the rows
        patch.setattr(
            packing, "_packed", lambda samples, shape: packed(reversed([*samples]), shape)
        )
        patch.setattr(packing, "VERSION", 99)
        with pytest.raises(ValueError, match=r"run: it began with another plan of its data"):
            loop.run(settings)
    assert len(list((tmp_path / "cache").glob("plan-*"))) == 1
    loop.run(settings)  # the plan of another version is not taken for its own
    assert len(list((tmp_path / "cache").glob("plan-*"))) == 2
    assert (tmp_path / "run/manifest.json").exists()
