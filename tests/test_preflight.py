"""What preflight says, against real trainings, real plans and arithmetic; what it refuses."""

import errno
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.distributed.checkpoint import CheckpointException

from speechfuse import config
from speechfuse.samples import datasets, packing, view
from speechfuse.samples.packing import Counts, Shape
from speechfuse.train import backbone, gpus, plan, state
from speechfuse.train import model as models
from speechfuse.train.config import Expected, Finetune
from speechfuse.train.preflight import data as preflight_data
from speechfuse.train.preflight import machine, memory
from speechfuse.train.preflight import report as preflight_report
from tests.bench_price import RUNS, SHAPE, planned, report_of
from tests.prove_preflight import ADAMW, SIZE, job_of, real
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
DATA = preflight_data.Data(COUNTS, 400_000, 1_250_000, 10**8, 64)


def tiny_job(out: Path | str = "nowhere", **changes: Any) -> SimpleNamespace:
    runtime = {"gpu": "H100", "dollars_per_gpu_hour": 2.0} | changes.pop("runtime", {})
    keys = {
        "out": str(out),
        "batch_size": 8,
        "epochs": 2,
        "steps": None,
        "micro_batch_size": 2,
        "seq_len": 64,
        "packed": True,
        "runtime": SimpleNamespace(**runtime),
        **changes,
    }
    return job_of(TINY, **keys)


def tiny_report(
    job: Any = None, data: preflight_data.Data | None = DATA, **keys: Any
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
        "builder": report.job.model["_component_"],
        "optimizer": report.job.optimizer["_component_"],
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
    changes: list[dict] = [{"gpu": "H200"}, {"seq_len": 128}, {"compile": True}]
    changes += [{"builder": "speechfuse.train.llama"}, {"optimizer": "torchao.optim.AdamW8bit"}]
    other = [row | change for change in changes]
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
    assert "states of 1.6 MB" in rows["disk"] and " GPU seconds" in rows["time"]
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


def test_a_state_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    """What torch raises then is no Exception."""
    model = torch.nn.Linear(2, 2)
    states = state.States(tmp_path, model, torch.optim.AdamW(model.parameters()))
    failed: Future[None] = Future()
    full = {0: (OSError(errno.ENOSPC, "No space left on device"), None)}
    failed.set_exception(CheckpointException("write", full))
    monkeypatch.setattr(state.dcp, "async_save", lambda *_, **__: failed)
    states.save(3)
    with pytest.raises(ValueError, match=r"step 3 could not be written \(no space is left: make"):
        states.wait()


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


def test_a_dry_run_without_data_says_steps_hours_and_dollars_of_the_recipe(capsys):
    """The seed's own steps, and what `just bench price` says of the same run."""
    steps = {  # with 98 % of packed rows filled
        "early_fusion_8b/stage1": 5_000,
        "early_fusion_8b/stage2": 36_305,
        "early_fusion_8b_fast/stage1": 2_420_160 / 0.9 * 372 / (0.98 * 4096 * 48),
        "early_fusion_8b_fast/stage2": 0.7 * 929_408 / 0.6 * 473 / (0.98 * 4096 * 16),
    }
    stages = {f"{p.parent.name}/{p.stem}" for p in (ROOT / "recipes").glob("early*/stage?.yaml")}
    assert stages == steps.keys() | {"early_fusion_1b/stage1", "early_fusion_1b/stage2"}
    benched = {run.recipe: run for run in reversed(RUNS)}  # the first of each recipe
    for recipe_name, expected in steps.items():
        run, path = benched[recipe_name], ROOT / f"recipes/{recipe_name}.yaml"
        keys = [f"runtime.gpu={run.gpu}", f"runtime.gpus={run.gpus}", "runtime.dry_run=true"]
        job = config.load(Finetune, path, keys)
        assert plan.plan_run(job, 0, 1) is None
        printed = [line for line in capsys.readouterr().out.splitlines() if "  " in line]
        rows = {name: text.strip() for name, text in (line.split("  ", 1) for line in printed)}
        assert "EXPECTED" in rows["data"] and "data as the recipe expects it" in rows["time"]
        assert int(rows["steps"].split()[0].replace(",", "")) == pytest.approx(expected, rel=0.02)
        if recipe_name.endswith("stage2"):
            report = report_of(run)
            assert float(rows["price"].split()[0].strip("$")) == pytest.approx(report.dollars, 0.01)
            assert float(rows["time"].split()[2]) == pytest.approx(report.hours * run.gpus, 0.02)
    for stage in ("stage1", "stage2"):  # as many packed tokens a step on the same data
        fast, small = (
            config.load(Finetune, ROOT / f"recipes/early_fusion_{size}/{stage}.yaml", [])
            for size in ("8b_fast", "1b")
        )
        assert small.runtime.expected == fast.runtime.expected
        assert (small.seq_len, small.batch_size) == (fast.seq_len, fast.batch_size)


def test_a_dry_run_of_a_spliced_model_needs_no_files(capsys):
    """The 32,000 hours of the Modular SpeechLLM: 10 s a clip."""
    keys = ["runtime.gpu=H100", "runtime.gpus=8", "runtime.dry_run=true"]
    path = ROOT / "recipes/modular_7b/stage1.yaml"
    assert plan.plan_run(config.load(Finetune, path, keys), 0, 1) is None
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "fastconformer_ctc_large.nemo is not there",
        "speech encoder 108,762,112",
        "steps 90,432 of 128 rows",
        "fits",
        "price $",
    ):
        assert part in said
    with pytest.raises(ValueError, match=r"fastconformer_ctc_large\.nemo is not there"):
        plan.plan_run(config.load(Finetune, path, []), 0, 1)


@pytest.mark.parametrize("packed", [True, False])
def test_data_that_a_recipe_expects_is_planned_as_the_planner_would(packed, tmp_path):
    keys = {"packed": packed, "seq_len": 512, "batch_size": 8, "epochs": 3, "steps": None}
    for name, steps in (("all", None), ("some", 70)):
        expected = SimpleNamespace(samples=4_000, tokens=[73, 600])
        runtime = SimpleNamespace(expected=expected)
        job = SimpleNamespace(**keys | {"steps": steps}, runtime=runtime, seed=0)
        data = preflight_data.Data.expected_by(job, 2)
        lengths = np.random.default_rng(1).integers(73, 601, 4_000).astype(np.int32)
        shape = Shape(512, 8, packed)
        real_plan = packing.make([lengths], [1.0], shape, 3, steps, 0, tmp_path / name)
        counts = real_plan.counts
        assert data.counts.steps == pytest.approx(counts.steps, rel=0.03)
        assert data.counts.tokens == pytest.approx(counts.tokens, rel=0.03)
        assert len(data.counts.epoch_ends) == len(counts.epoch_ends) == (1 if steps else 3)
        rows = [[[int(lengths[n]) for _, n in row] for row in real_plan.rows(s)] for s in range(60)]
        padded = sum(preflight_data.positions(step, shape, 1, 2) for step in rows) / 60
        assert data.positions / data.counts.steps == pytest.approx(padded, rel=0.03)
    job.runtime.expected.tokens = [513, 600]
    with pytest.raises(ValueError, match="at most seq_len=512 tokens"):
        preflight_data.Data.expected_by(job, 2)
    with pytest.raises(ValueError, match=r"runtime.expected.tokens=\[9\]: \[fewest, most\]"):
        Expected(samples=5, tokens=[9])


def test_the_machines_memory_counts_limits_and_what_is_in_use(tmp_path):
    files = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n"}

    def free(**more: str) -> int:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in (files | more).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return machine.free_memory(root)

    assert free() == 5_000 * 1024
    two = {"proc/self/cgroup": "0::/box/job\n", "sys/fs/cgroup/box/memory.max": "3000000\n"}
    two |= {"sys/fs/cgroup/box/memory.current": "2000000", "sys/fs/cgroup/memory.max": "max"}
    two |= {"sys/fs/cgroup/box/memory.stat": "anon 5\ninactive_file 400000\n"}
    assert free(**two) == 1_400_000  # of the group above the job's, whose cached files can go
    one = {"proc/self/cgroup": "9:cpu:/\n4:memory:/elsewhere\n0::/\n"}
    base = "sys/fs/cgroup/memory/memory."  # a container sees its group at the base
    one |= {f"{base}limit_in_bytes": "900", f"{base}usage_in_bytes": "950", f"{base}stat": "a 1\n"}
    assert free(**one) == 0
    assert 0 < machine.free_memory() < 2**50


def test_host_memory_of_states_and_epochs_is_planned(monkeypatch):
    """8B in fp32 on one GPU: a state is 96.4 GB, and must fit beside the process."""
    run = replace(RUNS[3], gpu="H200", gpus=1)
    report = report_of(run)
    assert report.written == report.state_bytes == pytest.approx(96.4e9, rel=0.001)
    rows = dict(line.split("  ", 1) for line in report.lines() if line[0] != " ")
    assert (
        "92.79 GiB on a machine with 1 of the 1 ranks" in rows["host memory"] and report.host_fits
    )
    report.limit = 10**13
    report.host_limit, report.free = 80 * gpus.GIB, 10**13
    assert "of 80.00 GiB: DOES NOT FIT" in "\n".join(report.lines())
    with pytest.raises(
        ValueError, match=r"needs 92.79 GiB of the machine's memory while it writes"
    ):
        report.check()
    # of two ranks on two machines each has half of the state; the epoch is gathered on one
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    half = report_of(replace(run, gpus=2))
    assert half.written == half.state_bytes // 2 and half.host == half.written + 3 * gpus.GIB
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    # with most weights frozen an epoch is more than a state
    small = tiny_report(tiny_job(freeze=["layers", "tok_embeddings"]))
    assert small.written == int(1.1 * small.epoch_bytes) > small.state_bytes


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpus.check_ranks("cuda", 2)
    gpus.check_ranks("cpu", 3)
    with pytest.raises(ValueError, match="3 ranks, and this machine has 2 GPUs"):
        gpus.check_ranks("cuda", 3)


def test_the_seeds_own_arithmetic():
    """Its hours and prices, and what 46 % of an H100 would cost a billion tokens."""
    paid = {run.paid: run.gpus * run.dollars for run in RUNS if run.paid}
    assert paid == {(300, 240): 8.0, (256, 563): 17.6}
    assert 30 * 8.0 == 240 and round(32 * 17.6) == 563
    model = config.load(Finetune, ROOT / "recipes/early_fusion_8b/stage1.yaml", [])
    report = preflight_data.metrics.Flops.of(backbone.empty(model.model, "bf16"), SHAPE)
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
    data = preflight_data.Data.of(mixture, 2, micro)
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


def test_copies_of_old_rows_are_in_the_memory_of_the_weights():
    shape = {"rows": 1, "length": 16, "passes": 1, "ranks": 1, "gpu": False}
    plain, only, first = (
        memory.of(job_of(SIZE, **keys), **shape).weights
        for keys in ({}, {"new_rows_only": True}, {"new_rows_first": 3})
    )
    assert only == first == plain + 2 * 4 * SIZE["vocab_size"] * SIZE["embed_dim"]
