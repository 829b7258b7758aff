"""The keys of a training's YAML (`stages/train.py`), their defaults and what they mean.

Nothing heavy is imported here, so that `--help` and a misspelt key answer at once.
"""

import os
from dataclasses import dataclass, field
from typing import Any

from speechfuse.config import key

RECOMPUTED = {"none": 0, "selective": 2, "full": 1}  # every how manyth layer
DTYPES = ("bf16", "fp32")
ATTENTION = ("auto", "dense", "varlen", "flex")


def set_allocator() -> None:
    """Let torch's blocks of GPU memory grow, so that sizes that vary leave no holes between them,
    unless the user has set the allocator. Call it before torch is imported."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


@dataclass
class Guards:
    policy: str = key(
        "what a bad row or step does: stop, or quarantine", "stop", choices=("stop", "quarantine")
    )
    spike: float = key("so many times the median loss or norm of 100 steps is bad", 10.0, above=1)
    enough: int = key("steps before there is something to compare with", 20, least=1)
    most: int = key("steps or rows in quarantine after which a run stops", 10, least=0)


@dataclass
class Expected:
    samples: int = key("samples of an epoch, of all datasets together; 0: not known", 0, least=0)
    tokens: list[int] = key("[fewest, most] tokens of a sample; lengths between are as likely", [])

    def __post_init__(self) -> None:
        if self.samples > 0 and not (
            len(self.tokens) == 2 and 2 <= self.tokens[0] <= self.tokens[1]
        ):
            raise ValueError(f"runtime.expected.tokens={self.tokens}: [fewest, most] is needed")


@dataclass
class Runtime:
    device: str = key("cpu, cuda, auto: cuda where there", "auto", choices=("auto", "cpu", "cuda"))
    threads: int = key("CPU threads a rank; 0 divides the cores among ranks", 0, least=0, most=4096)
    state_every: int = key("steps between saved states", 200, least=1)
    loader_workers: int = key("processes a rank that render ahead; 0: none", 0, least=0, most=4096)
    tracker: str = key(
        "wandb or trackio, beside TensorBoard; or none",
        "none",
        choices=("none", "wandb", "trackio"),
    )
    ranks: int = key("processes, one a GPU, that stages/train.py starts", 1, least=1, most=65_536)
    dry_run: bool = key("say what it would take; train nothing", False)
    gpu: str | None = key("plan for such GPUs (H100, ...) instead of those here", None)
    gpus: int | None = key("plan for so many instead of ranks", None, least=1)
    dollars_per_gpu_hour: float | None = key("for the bill beforehand and so far", None, least=0)
    expected: Expected = field(default_factory=Expected)  # for the bill while data is not here
    cache: str = key("folder of indexes and plans; may be deleted", "out/cache")
    roots: dict[str, str] = key("path of a dataset of recordings -> folder of its corpus", {})
    guards: Guards = field(default_factory=Guards)


@dataclass
class Finetune:
    out: str = key("folder of the run")
    checkpoint: str = key("Hugging Face folder to start from, made by a job here")
    model: dict[str, Any] = key(
        "builder of that checkpoint's model; what is left out of its sizes is read from config.json"
    )
    datasets: list[dict[str, Any]] = key(
        "entries {_component_, path, share of the samples, ...}; path: folder or repo@revision"
    )
    seq_len: int = key("tokens of a row; longer samples are left out", least=2)
    batch_size: int = key("rows of an optimizer step, over all ranks", least=1, most=1_000_000)
    epochs: int = key("passes over the first dataset", least=1)
    optimizer: dict[str, Any] = key("optimizer with its peak lr")
    warmup_steps: int = key("linear warm-up, then cosine to 0; less than the run has", least=0)
    packed: bool = key("fill rows with samples; false: one a row, padded to its micro-batch", True)
    joined: float = key(
        "share of rows whose samples are turns of one conversation", 0.0, least=0, most=1
    )
    steps: int | None = key("stop after so many steps", None, least=1)
    micro_batch_size: int = key("rows of one forward a rank; 0: all", 0, least=0)
    clip_grad_norm: float | None = key("null: no clipping", None, above=0)
    freeze: list[str] = key("regular expressions of parameter names not trained", [])
    keep: list[str] = key("names that train although frozen; an encoder's only if named", [])
    dtype: str = key("of the weights and moments: fp32 or bf16", "fp32", choices=DTYPES)
    compute_dtype: str = key("of the products: fp32 or bf16", "fp32", choices=DTYPES)
    activation_checkpointing: str = key(
        "recomputed in the backward pass: none, selective, full", "none", choices=RECOMPUTED
    )
    compile: bool = key("torch.compile every layer", False)
    attention: str = key(
        "dense, varlen (CPU only), flex (GPU only), or auto: the fastest", "auto", choices=ATTENTION
    )
    adapter: dict[str, Any] | None = key(
        "of speechfuse.fusion, for datasets of frames, {_component_, width, ...}; null: tokens",
        None,
    )
    encoder: dict[str, Any] | None = key(
        "of speechfuse.quantizer, makes the frames of datasets of recordings; null: none", None
    )
    rates: dict[str, float] = key("regular expression of names -> factor on the rate", {})
    loss_chunk: int = key("targets whose logits exist at a time", 1024, least=1)
    shard_group: int | None = key("ranks that share a copy; null: all (FSDP)", None, least=1)
    new_rows_first: int = key("first steps train the sound tokens' rows alone", 0, least=0)
    new_rows_only: bool = key("of embedding and head the sound tokens' rows alone train", False)
    step: str = key(
        "dotted path of step(model, batch) -> {name: (loss sum, count)}",
        "speechfuse.train.next_token",
    )
    seed: int = key("of the data's order, and of adapters", 0, least=0)
    fresh: bool = key("move an artifact that differs aside", False)
    runtime: Runtime = field(default_factory=Runtime)

    def __post_init__(self) -> None:
        self.datasets = ungrouped(self.datasets)
        check_warmup(self.warmup_steps, self.steps or 0)


def ungrouped(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries of `datasets` without groups {share, datasets: [...]}: a group's share is
    divided among its own entries by theirs. Raises ValueError for shares that are not above 0."""
    flat = []
    for entry in entries:
        if "datasets" not in entry:
            flat.append(entry)
            continue
        inner = ungrouped(entry["datasets"])
        shares: list[Any] = [each.get("share") for each in (entry, *inner)]
        stated = [isinstance(share, int | float) and share > 0 for share in shares]
        if entry.keys() > {"share", "datasets"} or not inner or not all(stated):
            raise ValueError(f"a group of datasets and each of its entries need a share: {entry}")
        part = entry["share"] / sum(shares[1:])
        flat += [each | {"share": each["share"] * part} for each in inner]
    return flat


def check_warmup(warmup_steps: int, steps: int) -> None:
    """Raise ValueError where the warm-up of a run of `steps` steps (0: not known) would never
    end."""
    if warmup_steps >= steps > 0 and warmup_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} and the run has {steps:,} steps, so that its learning "
            f"rate would never reach the peak: set warmup_steps={steps // 10} (less than {steps}), "
            "or take more steps, data or epochs"
        )
