"""What the seed's two stages cost, and what preflight says they should have.

    just bench price                         (a minute, no GPU)

The seed's recipes (recipes/early_fusion_8b) and ours (early_fusion_8b_fast) go through the real
preflight, with samples of the lengths that the sources give instead of the data itself: stage 1:
clips of 10 to 20 s, 372 tokens on average (900 million tokens in 2,420,160 clips); stage 2: 473
(440 million in 929,408). Speed is what is measured, or assumed where nothing is; each line says.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechfuse import config
from speechfuse.samples.packing import Counts, Shape
from speechfuse.train import backbone, gpus, metrics
from speechfuse.train.config import Finetune
from speechfuse.train.model import freeze
from speechfuse.train.preflight import report as preflight_report

ROOT = Path(__file__).parent.parent
SHAPE = {"num_attention_heads": 32, "hidden_size": 4096}  # of config.json what is needed


@dataclass(frozen=True)
class Run:
    """A recipe, on what, for how many samples of what mean length; `paid`: the seed's GPU hours and
    dollars, None for ours."""

    name: str
    recipe: str
    samples: int
    epochs: int
    mean: int
    spread: int
    gpu: str
    gpus: int
    dollars: float
    paid: tuple[float, float] | None = None


RUNS = [
    # 10 A6000 for 30 h at $0.80
    Run(
        "stage 1, the blog's 5,000 x 80 clips",
        "early_fusion_8b/stage1",
        400_000,
        1,
        372,
        122,
        "A6000",
        10,
        0.80,
        (300, 240),
    ),
    Run(
        "stage 1, its model card's 5,042 x 480 clips",
        "early_fusion_8b/stage1",
        2_420_160,
        1,
        372,
        122,
        "A6000",
        10,
        0.80,
        (300, 240),
    ),
    # 8 H100 for 32 h at $2.20
    Run(
        "stage 2, five epochs",
        "early_fusion_8b/stage2",
        929_408,
        5,
        473,
        400,
        "H100",
        8,
        2.20,
        (256, 563),
    ),
    Run(
        "ours: stage 1, all 2,420,160 clips",
        "early_fusion_8b_fast/stage1",
        2_420_160,
        1,
        372,
        122,
        "H100",
        8,
        2.20,
    ),
    Run(
        "ours: stage 2, one epoch",
        "early_fusion_8b_fast/stage2",
        929_408,
        1,
        473,
        400,
        "H100",
        8,
        2.20,
    ),
    Run(
        "ours: stage 2, five epochs",
        "early_fusion_8b_fast/stage2",
        929_408,
        5,
        473,
        400,
        "H100",
        8,
        2.20,
    ),
]


def data_of(run: Run, job: Any, micro: int) -> preflight_report.Data:
    """Its data as preflight would find it, from 20,000 lengths."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(run.mean - run.spread, run.mean + run.spread, 20_000).tolist()
    times = run.samples * run.epochs / len(lengths)
    tokens = int(sum(lengths) * times)
    padded = Shape(job.seq_len, job.batch_size, packed=False)
    positions = preflight_report.positions([[n] for n in lengths], padded, 1, micro) * times
    if job.packed:
        positions = tokens / 0.99  # of a pack's room that the plan fills
    rows = positions / job.seq_len if job.packed else run.samples * run.epochs
    samples = run.samples * run.epochs
    counts = Counts(int(rows / job.batch_size), tokens, [samples], [0], [0] * run.epochs)
    pairs = int(metrics.pairs_of(lengths) * times)
    return preflight_report.Data(counts, tokens, int(positions), pairs, job.seq_len)


def planned(
    job: Any, shape: dict[str, Any], data: preflight_report.Data | None, ranks: int, **keys: Any
) -> preflight_report.PreflightReport:
    """What preflight says of `job` on the GPUs that runtime.gpu names, without a checkpoint."""
    model = backbone.empty(job.model, job.dtype)
    freeze(model, job.freeze)
    price, gpu = job.runtime.dollars_per_gpu_hour, gpus.named(job.runtime.gpu)
    meter = metrics.Meter(metrics.Flops.of(model, shape), gpu, ranks, price)
    micro = preflight_report.micro_batch(job, ranks)
    return preflight_report.PreflightReport(job, model, meter, micro, data, **keys)


def report_of(run: Run) -> preflight_report.PreflightReport:
    job = config.load(
        Finetune,
        ROOT / f"recipes/{run.recipe}.yaml",
        [f"runtime.gpu={run.gpu}", f"runtime.dollars_per_gpu_hour={run.dollars}"],
    )
    data = data_of(run, job, preflight_report.micro_batch(job, run.gpus))
    measurements = ROOT / preflight_report.MEASUREMENTS
    return planned(job, SHAPE, data, run.gpus, measurements=measurements)


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
