"""What the seed's two stages cost, and what preflight says they should have.

    just bench price                         (a minute, no GPU)

The seed's recipes (recipes/early_fusion_8b) and ours (early_fusion_8b_fast) go through the real
preflight, with the data that each recipe expects (runtime.expected), as a dry run without data
does. Stage 1: clips of 10 to 20 s, 372 tokens on average (900 million tokens in 2,420,160 clips);
stage 2: 473 (440 million in 929,408 samples); text comes on top in ours. Speed is what is measured,
or assumed where nothing is; each line says.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechfuse import config
from speechfuse.train import backbone, gpus, metrics
from speechfuse.train.config import Finetune
from speechfuse.train.model import freeze
from speechfuse.train.preflight import data as preflight_data
from speechfuse.train.preflight import report as preflight_report

ROOT = Path(__file__).parent.parent
SHAPE = {"num_attention_heads": 32, "hidden_size": 4096}  # of config.json what is needed


@dataclass(frozen=True)
class Run:
    """A recipe with some `keys`, on `gpus` of `gpu` at `dollars` an hour; `paid`: the seed's GPU
    hours and dollars, None for ours."""

    name: str
    recipe: str
    gpu: str
    gpus: int
    dollars: float
    paid: tuple[float, float] | None = None
    keys: tuple[str, ...] = ()


A6000 = ("A6000", 10, 0.80, (300, 240))  # for 30 hours
H100 = ("H100", 8, 2.20, (256, 563))  # for 32 hours
SEED, OURS = "early_fusion_8b", "early_fusion_8b_fast"
CARD = ("steps=null", "batch_size=480", "micro_batch_size=8")
RUNS = [
    Run("stage 1, the blog's 5,000 x 80 clips", f"{SEED}/stage1", *A6000),
    Run("stage 1, its model card's 5,042 x 480 clips", f"{SEED}/stage1", *A6000, CARD),
    Run("stage 2, five epochs", f"{SEED}/stage2", *H100),
    Run("ours: stage 1, all 2,420,160 clips and text", f"{OURS}/stage1", *H100[:3]),
    Run("ours: stage 2, one epoch with text", f"{OURS}/stage2", *H100[:3]),
    Run("ours: stage 2, five epochs", f"{OURS}/stage2", *H100[:3], keys=("epochs=5",)),
]


def planned(
    job: Any, shape: dict[str, Any], data: preflight_data.Data | None, ranks: int, **keys: Any
) -> preflight_report.PreflightReport:
    """What preflight says of `job` on the GPUs that runtime.gpu names, without a checkpoint."""
    model = backbone.empty(job.model, job.dtype)
    freeze(model, job.freeze)
    price, gpu = job.runtime.dollars_per_gpu_hour, gpus.named(job.runtime.gpu)
    meter = metrics.Meter(metrics.Flops.of(model, shape), gpu, ranks, price)
    micro = preflight_report.micro_batch(job, ranks)
    return preflight_report.PreflightReport(job, model, meter, micro, data, **keys)


def report_of(run: Run) -> preflight_report.PreflightReport:
    price = [f"runtime.gpu={run.gpu}", f"runtime.dollars_per_gpu_hour={run.dollars}"]
    job = config.load(Finetune, ROOT / f"recipes/{run.recipe}.yaml", [*run.keys, *price])
    data = preflight_data.Data.expected_by(job, preflight_report.micro_batch(job, run.gpus))
    return planned(job, SHAPE, data, run.gpus, measurements=ROOT / preflight_report.MEASUREMENTS)


def line(run: Run, report: preflight_report.PreflightReport) -> str:
    data, hours = report.data, (report.hours or 0) * run.gpus
    assert data
    tokens = data.counts.tokens
    text = (
        f"| {run.name} | {tokens / 1e6:,.0f} M | {tokens / data.positions:.0%} | "
        f"{run.gpus} x {run.gpu} | {report.speed:,.0f} | {hours:,.0f} | ${report.dollars:,.0f} | "
    )
    if run.paid is None:
        return f"{text}| |"
    paid, dollars = run.paid
    return f"{text}{tokens / paid / 3600:,.0f} | {paid:,.0f} h, ${dollars} |"


def main() -> None:
    print(
        "| run | tokens | useful | GPUs | tokens/s a GPU | GPU hours | price | tokens/s then |"
        " the seed paid |\n|---|---|---|---|---|---|---|---|---|"
    )
    reports = []
    for run in RUNS:
        reports.append(report_of(run))
        print(line(run, reports[-1]), flush=True)
    for run, report in zip(RUNS, reports, strict=True):
        tokens = report.data.counts.tokens
        flops = report.meter.flops.of_tokens(tokens, report.data.pairs) / tokens
        print(
            f"\n{run.name}: {tokens:,} tokens / {report.speed:,.0f} tokens/s / 3600 = "
            f"{tokens / (report.speed or 1) / 3600:,.1f} GPU hours x ${run.dollars:.2f}; "
            f"{flops / 1e9:.2f} GFLOP a token; {report.source}"
        )


if __name__ == "__main__":
    main()
