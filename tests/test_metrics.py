"""What a run shows: operations counted by hand and by torch, lines and TensorBoard after a resume,
dollars, trackers."""

import json
import math
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from speechfuse.train import attention, backbone, gpus, metrics
from speechfuse.train import model as models
from speechfuse.train.losses import next_token

UNTIED = {
    "_component_": "torchtune.models.llama3_1.llama3_1",
    "vocab_size": 300,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 64,
    "max_seq_len": 64,
}
TIED = UNTIED | {"_component_": "torchtune.models.llama3_2.llama3_2"}
SHAPE = {"num_attention_heads": 4, "hidden_size": 32}
LAYER = 32 * 32 * 2 + 2 * 16 * 32 + 3 * 32 * 64  # weights of matrix products in a layer
HEAD = 300 * 32


def decoder(spec: dict, freeze: list[str] = ()):  # type: ignore[assignment]
    model = backbone.empty(spec, "fp32")
    models.freeze(model, list(freeze))
    return model


def flops_of(spec: dict, freeze: list[str] = ()) -> metrics.Flops:  # type: ignore[assignment]
    shape = SHAPE | {"tie_word_embeddings": spec is TIED}
    return metrics.Flops.of(decoder(spec, freeze), shape)


@pytest.mark.parametrize("spec", [UNTIED, TIED])
def test_six_operations_a_weight_that_trains(spec):
    flops = flops_of(spec)
    assert flops.products == 6 * (2 * LAYER + HEAD)
    assert flops.attention == 12 * 2 * 32  # layers, width
    # a document of n tokens has n (n + 1) / 2 pairs, two of n have twice as many
    assert metrics.pairs_of([3, 3]) == 12 < metrics.pairs_of([6]) == 21
    assert flops.of_tokens(6, 12) == 6 * flops.products + 12 * flops.attention
    assert "6 x 28,032 weights" in flops.formula and "24 x 32 for each token" in flops.formula


@pytest.mark.parametrize(
    ("freeze", "products"),
    [
        (["mlp"], 6 * (2 * 3072 + HEAD) + 4 * 2 * 6144),
        (["tok_embeddings", "layers"], 6 * HEAD + 2 * 2 * LAYER),  # the last norm trains
        (["tok_embeddings", "layers", "norm"], 4 * HEAD + 2 * 2 * LAYER),
        # nothing below layer 1 trains: no gradient goes through layer 0
        (["tok_embeddings", r"layers\.0"], 6 * (LAYER + HEAD) + 2 * LAYER),
    ],
)
def test_frozen_weights_cost_less(freeze, products):
    assert flops_of(UNTIED, freeze).products == products


@pytest.mark.parametrize(
    ("spec", "freeze"),
    [
        (UNTIED, []),
        (UNTIED, ["mlp"]),
        (UNTIED, ["tok_embeddings", "layers", "norm"]),
        (TIED, ["mlp"]),
    ],
)
def test_torch_counts_the_same_in_a_real_step(spec, freeze):
    model = decoder(spec, freeze)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "rope_init"):
            module.rope_init()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(300, (2, 16))
    batch = {
        "tokens": ids,
        "labels": ids,
        "sound": ids > 150,
        "input_pos": torch.arange(16).expand(2, -1),
        "mask": attention.mask_of(torch.zeros_like(ids), "dense"),
    }
    with FlopCounterMode(display=False) as counter:
        losses = next_token(model, batch)
        torch.stack([value for value, _ in losses.values()]).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(
        n for op, n in counted.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    assert products == 32 * flops_of(spec, freeze).products


@pytest.mark.parametrize(
    ("reported", "name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "H100", 989e12),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", "A100", 312e12),
        ("NVIDIA GeForce RTX 4090", "4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX 6000 Ada Generation", "NVIDIA RTX 6000 Ada Generation", None),
    ],
)
def test_a_gpu_has_its_own_peak_or_none(reported, name, peak):
    gpu = gpus.reported(reported, 10**9)
    assert (gpu.name, gpu.peak, gpu.memory) == (name, peak, 10**9)
    meter = metrics.Meter(flops_of(UNTIED), gpu, 2)
    if peak is None:
        assert meter.mfu(100, 100, 1.0) is None and "left out" in meter.about()
    else:
        used = meter.flops.of_tokens(100, 100)
        assert meter.mfu(100, 100, 0.5) == pytest.approx(used / 0.5 / (2 * peak))
        assert f"2 x {peak / 1e12:g} TFLOP/s of {name}" in meter.about()


def test_planning_for_an_unknown_gpu_is_refused():
    assert gpus.named("h200").peak == 989e12
    with pytest.raises(ValueError, match=r"runtime\.gpu='H300'.*H100"):
        gpus.named("H300")


def line(run: metrics.Metrics, step: int, loss: float = 1.0, **values) -> None:
    run.add(step, loss, [3, 5], 0.5, **values)


def meter(dollars: float | None = 3.6) -> metrics.Meter:
    return metrics.Meter(flops_of(UNTIED), gpus.named("A100"), 8, dollars)


def test_a_resumed_run_takes_back_what_came_after(tmp_path):
    first = metrics.Metrics(tmp_path, 0, meter())
    for step in range(1, 6):
        line(first, step, loss=float(step))
    first.close()
    with first.path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    time.sleep(1)  # TensorBoard reads files by the second in their names
    again = metrics.Metrics(tmp_path, 3, meter())
    assert [each["step"] for each in metrics.read(again.path)] == [1, 2, 3]
    for step in range(4, 7):
        line(again, step, loss=10.0 * step)
    again.close()
    lines = metrics.read(again.path)
    assert [each["loss"] for each in lines] == [1, 2, 3, 40, 50, 60]
    assert lines[0]["tokens"] == 8 and lines[0]["tokens_per_s"] == 16
    used = again.meter.flops.of_tokens(8, 6 + 15)
    assert lines[0]["mfu"] == pytest.approx(used / 0.5 / (8 * 312e12), abs=1e-4)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    seen = [(event.step, event.value) for event in board.Scalars("loss")]
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_dollars_count_the_steps_that_were_taken_back(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    first = metrics.Metrics(tmp_path, 0, meter())
    for step in (1, 2):
        clock.now += 100
        line(first, step)
    # 200 s on 8 GPUs at $3.60 an hour
    assert first.shown()["spent"] == "$1.60"
    again = metrics.Metrics(tmp_path, 1, meter())
    clock.now += 100
    line(again, 2)
    assert metrics.read(again.path)[-1]["dollars"] == pytest.approx(2.4)
    assert again.shown() == {"loss": "1.000", "tok_s": "16", "MFU": "0.0%", "spent": "$2.40"}
    line(free := metrics.Metrics(tmp_path / "free", 0, meter(None)), 1)
    assert "dollars" not in metrics.read(free.path)[0] and "spent" not in free.shown()


def test_a_loss_that_is_no_number_is_null(tmp_path):
    run = metrics.Metrics(tmp_path, 0, meter())
    line(run, 1, loss=math.nan, grad_norm=math.inf, quarantined="loss is nan")
    (only,) = [json.loads(text, parse_constant=pytest.fail) for text in run.path.open()]
    assert only["loss"] is None and only["grad_norm"] is None
    assert only["quarantined"] == "loss is nan"
    assert run.shown()["loss"] == "none"


def test_a_tracker_is_told_every_step_and_goes_on_with_its_run(tmp_path, monkeypatch):
    told: list = []
    stand_in = ModuleType("wandb")
    stand_in.init = lambda **keys: told.append(keys)  # type: ignore[attr-defined]
    stand_in.log = lambda numbers, step: told.append((step, numbers))  # type: ignore[attr-defined]
    stand_in.finish = lambda: told.append("end")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for done in (0, 1):
        run = metrics.Metrics(tmp_path / "run", done, meter(), "wandb", "abcdef1234", {"a": 1})
        line(run, done + 1)
        run.close()
    begun, (step, numbers), end, begun_again, *_ = told
    assert begun == begun_again and begun["id"] == "run-abcdef12" and begun["resume"] == "allow"
    assert begun["config"] == {"a": 1}
    assert step == 1 and numbers["loss"] == 1.0 and numbers["tokens"] == 8 and end == "end"


def test_a_tracker_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="pip install trackio"):
        metrics.Metrics(tmp_path, 0, meter(), "trackio")
