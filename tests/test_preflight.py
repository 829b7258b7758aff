"""What preflight says, against real trainings, real plans and arithmetic; what it refuses."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from speechfuse import config
from speechfuse.samples import datasets, view
from speechfuse.samples.packing import Counts
from speechfuse.train import backbone, plan, state
from speechfuse.train import model as models
from speechfuse.train.config import Finetune
from speechfuse.train.preflight import memory
from speechfuse.train.preflight import report as preflight_report
from tests.bench_price import RUNS, SHAPE, planned, report_of
from tests.prove_preflight import ADAMW, job_of, real
from tests.prove_preflight import checkpoint as make_checkpoint
from tests.small_training import ROOT, make_parts, recipe

TINY = {
    "vocab_size": 301,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 96,
    "max_seq_len": 64,
}
EIGHT_BIT = {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-4}
CASES: list[dict[str, Any]] = [
    {},
    {"freeze": ["mlp", "tok_embeddings"]},
    {"dtype": "bf16", "compute_dtype": "bf16", "optimizer": EIGHT_BIT},
    {"compute_dtype": "bf16", "optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-3}},
]
REAL = """
import json, sys, torch.distributed as dist
from pathlib import Path
from tests.prove_preflight import job_of, real
dist.init_process_group("gloo")
folder, size, cases = sys.argv[1], *map(json.loads, sys.argv[2:])
for case in cases:
    measured = real(Path(folder), job_of(size, **case), 2, 16, 1)
    if dist.get_rank() == 0:
        print(json.dumps(measured), flush=True)
dist.destroy_process_group()
"""


def parts_of(need: memory.Memory) -> dict[str, int]:
    return {name: getattr(need, name) for name in ("weights", "gradients", "optimizer")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), TINY)


def test_bytes_of_each_part_are_those_of_a_real_training_on_two_ranks(checkpoint, tmp_path):
    """301 rows and two ranks: the first has one row more than the second."""
    script = tmp_path / "real.py"
    script.write_text(REAL)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(script),
            str(checkpoint),
            json.dumps(TINY),
            json.dumps(CASES),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # 8-bit states are compiled, which takes minutes on a CPU and changes no byte of their size
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "pipeline:.", "TORCHDYNAMO_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr
    measured = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(measured) == len(CASES)
    for case, each in zip(CASES, measured, strict=True):
        estimate = parts_of(memory.of(job_of(TINY, **case), 2, 16, 1, 2, False))
        assert estimate == {name: each[name] for name in estimate}, case
    assert len({each["optimizer"] for each in measured}) == len(CASES)


@pytest.mark.parametrize(
    ("builder", "extra", "freeze", "adapters"),
    [
        (
            "torchtune.models.llama3_1.lora_llama3_1",
            {"lora_attn_modules": ["q_proj"], "lora_rank": 8, "lora_alpha": 16.0},
            ["^layers[.](?!.*lora_)", "^norm[.]"],
            3 * 8 * (64 + 64),
        ),
        ("speechfuse.train.llama", {}, [], 0),
    ],
)
def test_adapters_and_the_other_builder_are_counted_too(
    checkpoint, builder, extra, freeze, adapters
):
    job = job_of(TINY, freeze=freeze)
    job.model = {"_component_": builder, **TINY, **extra}
    model = backbone.empty(job.model, "fp32")
    models.freeze(model, freeze)
    counted = preflight_report._count(model)
    assert counted.get("adapters", (0, 0)) == (adapters, adapters)
    assert counted["layers"] == (92_608, 0 if adapters else 92_608)
    need, measured = memory.of(job, 2, 16, 1, 1, False), real(checkpoint, job, 2, 16, 1)
    assert parts_of(need) == {name: measured[name] for name in parts_of(need)}
    job.activation_checkpointing = "full"
    assert memory.of(job, 2, 16, 1, 1, False).step["activations"] < need.step["activations"] / 1.5


@pytest.mark.parametrize("optimizer", [ADAMW, EIGHT_BIT])
def test_an_optimizer_measured_on_few_rows_is_exact_for_many(optimizer):
    # 4,099 x 67 is too odd for blocks, 4,096 x 64 is not; both are measured on fewer rows
    for shape in ((4099, 67), (4096, 64), (300_000,), (5,)):
        job = job_of(TINY, optimizer=optimizer)
        whole, *_ = memory._stepped(job, shape)
        assert memory.optimizer_bytes(job, [shape, shape]) == 2 * whole


def peak(rows: int = 2, passes: int = 1, ranks: int = 2, gpu: bool = False, **changes: Any) -> Any:
    need = memory.of(job_of(TINY, **changes), rows, 32, passes, ranks, gpu)
    return SimpleNamespace(**need.step, total=need.peak, weights=need.weights)


def test_what_saves_memory_is_seen_to_save_it():
    plain = {"ranks": 1}
    none, half, full = (
        peak(activation_checkpointing=mode, **plain) for mode in ("none", "selective", "full")
    )
    assert none.activations > 1.2 * half.activations > 1.2 * full.activations
    assert peak(compile=True, **plain).activations < none.activations
    assert peak(rows=4, **plain).activations == pytest.approx(2 * none.activations, rel=0.1)
    flex = peak(gpu=True, attention="flex", **plain).activations
    assert flex < peak(gpu=True, attention="dense", **plain).activations
    assert peak(loss_chunk=64, **plain).head > peak(loss_chunk=4, **plain).head
    assert peak(ranks=4).weights < 0.51 * peak(ranks=2).weights
    # a second micro-batch begins with the gradients of the first
    assert peak(passes=2, **plain).total > none.total


def test_an_update_of_all_parameters_at_once_needs_more(checkpoint):
    shapes = [(1000, 64), (64, 64)]
    slow = job_of(TINY, optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-4})
    assert memory.optimizer_extra(job_of(TINY), shapes, gpu=True) == 0  # fused
    one = memory.optimizer_extra(slow, shapes, gpu=False)
    # two temporary tensors: weights, gradients and moments are counted elsewhere
    assert 1000 * 64 * 4 < one < 3 * 1000 * 64 * 4
    assert memory.optimizer_extra(slow, shapes, gpu=True) == pytest.approx(1.064 * one)


COUNTS = Counts(500, 10**6, [900, 100], [3, 0], [250, 500])
DATA = preflight_report.Data(COUNTS, 400_000, 1_250_000, 10**8, 64)


def tiny_job(out: Path | str = "nowhere", **changes: Any) -> SimpleNamespace:
    runtime = {"gpu": "H100", "dollars_per_gpu_hour": 2.0} | changes.pop("runtime", {})
    keys = {
        "out": str(out),
        "batch_size": 8,
        "epochs": 2,
        "micro_batch_size": 2,
        "seq_len": 64,
        "packed": True,
        "runtime": SimpleNamespace(**runtime),
        **changes,
    }
    return job_of(TINY, **keys)


def tiny_report(
    job: Any = None, data: preflight_report.Data | None = DATA, **keys: Any
) -> preflight_report.PreflightReport:
    return planned(
        job or tiny_job(), {"num_attention_heads": 4, "hidden_size": 64}, data, 2, **keys
    )


def test_price_is_tokens_by_speed_by_hours(tmp_path):
    report = tiny_report()
    flops = report.meter.flops
    work = flops.products + flops.attention * 100  # of a token, which sees 100
    # 4 forwards of 5 are useful
    assert report.speed == pytest.approx(0.4 * 989e12 / (work * 1.25))
    assert report.hours == pytest.approx(10**6 / report.speed / 2 / 3600)
    assert report.dollars == pytest.approx(report.hours * 2 * 2.0)
    assert "assumed" in report.source
    full = tiny_report(tiny_job(activation_checkpointing="full"))
    assert full.speed == pytest.approx(report.speed * 3 / 4)
    free = tiny_report(tiny_job(runtime={"dollars_per_gpu_hour": None}))
    assert free.dollars is None and not any(line.startswith("price") for line in free.lines())


def test_what_was_measured_comes_before_what_is_assumed(tmp_path):
    path = tmp_path / "measurements.jsonl"
    report = tiny_report()
    counted = sum(count for count, _ in report.parameters.values())
    row = {
        "gpu": "H100",
        "parameters": counted,
        "trained": counted,
        "seq_len": 64,
        "packed": True,
        "dtype": "fp32",
        "compute_dtype": "fp32",
        "activation_checkpointing": "none",
        "compile": False,
        "attention": "dense",
        "tokens_per_s": 5000.0,
        "command": "just bench train",
        "date": "2026-01-01",
    }
    other = [row | change for change in ({"gpu": "H200"}, {"seq_len": 128}, {"compile": True})]
    path.write_text("".join(json.dumps(each) + "\n" for each in [row, *other]))
    faster = tiny_report(measurements=path)
    assert faster.speed == 5000 and faster.source == "measured: just bench train (2026-01-01)"
    # it needs no data, but hours and price do
    faster = tiny_report(data=None, measurements=path)
    assert faster.speed == 5000 and faster.hours is None and faster.dollars is None
    assert faster.memory == report.memory and tiny_report(data=None).speed is None
    path.write_text("".join(json.dumps(each) + "\n" for each in other))
    assert tiny_report(measurements=path).speed == report.speed


def test_the_report_says_it_all():
    text = "\n".join(tiny_report(tiny_job(freeze=["mlp"])).lines())
    for words in (
        "2 x H100",
        "embeddings 19,264",
        "head 19,264",
        "layers 92,608 (of these 37,120 train)",
        "fits",
        "optimizer state",
        "900 + 100 samples (3 too long)",
        "reserve (assumed)",
        "1,000,000 tokens, about 400,000",
        "80.0% of positions",
        "500 of 8 rows, epochs: 2",
        "3 states of",
        "assumed: 40%",
        "GPU seconds",
        "at $2.00",
        "MFU = useful tokens/s",
    ):
        assert words in text, (words, text)


def test_a_small_run_has_sizes_to_read():
    rows = dict(line.split("  ", 1) for line in tiny_report().lines() if line[0] != " ")
    assert "states of 1.6 MB" in rows["disk"] and rows["time"].endswith(" GPU seconds")
    lines = "\n".join(tiny_report().lines())
    assert " 0.00 " not in lines and "MiB" in lines


def test_a_batch_that_does_not_divide_and_no_data_are_refused():
    for change, named in (
        ({"batch_size": 7}, "7 is not a multiple of the 2 ranks: batch_size=6 or 8 is"),
        ({"micro_batch_size": 3}, "micro_batch_size=3 does not divide the 4 rows .* of 1, 2, 4$"),
    ):
        with pytest.raises(ValueError, match=named):
            tiny_report(tiny_job(**change))
    with pytest.raises(ValueError, match="hold no sample"):
        tiny_report(data=replace(DATA, counts=replace(COUNTS, steps=0)))


def test_a_full_disk_is_seen_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    job, size = tiny_job(tmp_path / "run"), 0
    report = tiny_report(job)
    # three states of weights and two moments, two epochs of weights, all in fp32
    weights = 4 * sum(count for count, _ in report.parameters.values())
    assert report.disk == pytest.approx(3 * 3 * weights + 2 * weights, rel=1e-3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, report.disk - 1000 + size))
    with pytest.raises(ValueError, match="MB free: make room"):
        tiny_report(job).check()
    # what a run that is resumed has written already is its own
    saved = tmp_path / "run/state/step_2/part"
    saved.parent.mkdir(parents=True)
    saved.write_bytes(bytes(1000))
    tiny_report(job).check()
    assert state.KEEP == 2


def test_a_state_on_disk_is_as_large_as_said(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(640, 512), torch.nn.Linear(512, 640))
    model[1].requires_grad_(False)  # frozen weights are the checkpoint's and not in a state
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(torch.ones(1, 640)).sum().backward()
    optimizer.step()
    states = state.States(tmp_path, model, optimizer)
    states.save(1)
    states.wait()
    written = sum(path.stat().st_size for path in tmp_path.glob("step_1/*"))
    estimate = memory.optimizer_bytes(job_of(TINY), [tuple(p.shape) for p in trained])
    estimate += sum(p.numel() * 4 for p in trained)
    assert estimate <= written < 1.01 * estimate


def test_8b_does_not_fit_a_24_gb_card_and_fits_where_it_should():
    small = replace(RUNS[3], gpu="4090", gpus=1)
    report = report_of(small)
    assert any("DOES NOT FIT" in line for line in report.lines())
    with pytest.raises(ValueError, match=r"needs 1\d\d\.\d\d GiB .* and 4090 has 23.5"):
        report.check()
    report.limit, report.free = 200 * 2**30, 10**13
    report.check()
    # the bytes of fp32 weights, gradients and two moments
    every = sum(count for count, _ in report.parameters.values())
    assert every == 8_034_480_128
    assert report.memory.gradients == every * 4
    assert report.memory.optimizer == pytest.approx(every * 8, rel=1e-6)


def test_the_seeds_own_arithmetic():
    """Its hours and prices, and what 46 % of an H100 would cost a billion tokens."""
    paid = {run.paid: run.gpus * run.dollars for run in RUNS if run.paid}
    assert paid == {(300, 240): 8.0, (256, 563): 17.6}
    assert 30 * 8.0 == 240 and round(32 * 17.6) == 563
    model = config.load(Finetune, ROOT / "recipes/early_fusion_8b/stage1.yaml", [])
    report = preflight_report.metrics.Flops.of(backbone.empty(model.model, "bf16"), SHAPE)
    law = report.of_tokens(10**9, 10**9 * 190) / (0.46 * 989e12) / 3600 * 2.20
    assert law == pytest.approx(62, rel=0.03)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize(("packed", "micro"), [(True, 1), (False, 2)])
def test_data_is_counted_as_it_comes(parts, tmp_path, packed, micro):
    path = recipe(parts, tmp_path / "run", packed=packed, micro_batch_size=micro)
    job = config.load(Finetune, path, [])
    mixture = plan.load_data(job, {})
    data = preflight_report.Data.of(mixture, 2, micro)
    batches = [
        part
        for step in range(mixture.plan.counts.steps)
        for rank in range(2)
        for part in datasets.Batches(mixture, rank, 2, micro)[step]
    ]
    own = [part["document"] != view.PADDING for part in batches]
    assert data.counts.steps == mixture.plan.counts.steps > 5
    assert data.counts.tokens == sum(int(each.sum()) for each in own)
    assert data.positions == sum(part["tokens"].numel() for part in batches)
    assert data.positions > data.counts.tokens
    seen = sum(int((p["input_pos"] + 1)[o].sum()) for p, o in zip(batches, own, strict=True))
    assert data.pairs == seen
    learned = sum(int((part["labels"] != view.IGNORE).sum()) for part in batches)
    assert data.targets == pytest.approx(learned, rel=0.05)
    assert data.longest == (64 if packed else max(p["tokens"].shape[1] for p in batches))
    assert yaml.safe_load(path.read_text())["packed"] is packed
