"""The keys of a training's YAML (`stages/train.py`), their defaults and what they mean.

Nothing heavy is imported here, so that `--help` and a misspelt key answer at once.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from speechfuse.config import key

RECOMPUTED = {"none": 0, "selective": 2, "full": 1}  # every how manyth layer
CHOICES: dict[str, Iterable[str]] = {
    "dtype": ("bf16", "fp32"),
    "compute_dtype": ("bf16", "fp32"),
    "activation_checkpointing": RECOMPUTED,
    "attention": ("auto", "dense", "varlen", "flex"),
    "guards.policy": ("stop", "quarantine"),
    "runtime.tracker": ("none", "wandb", "trackio"),
}


def set_allocator() -> None:
    """Let torch's blocks of GPU memory grow, so that sizes that vary leave no holes between them,
    unless the user has set the allocator. Call it before torch is imported."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def _check_choice(key: str, value: str) -> None:
    if value not in CHOICES[key]:
        raise ValueError(f"{key}={value!r}: choose one of {', '.join(CHOICES[key])}")


@dataclass
class Guards:
    policy: str = key("what a bad row or step does: stop, or quarantine", "stop")
    spike: float = key("a loss or gradient norm so many times the median of 100 steps is bad", 10.0)
    enough: int = key("steps before there is something to compare with", 20)
    most: int = key("steps or rows in quarantine after which a run stops", 10)

    def __post_init__(self) -> None:
        _check_choice("guards.policy", self.policy)
        if self.spike <= 1:
            raise ValueError(f"guards.spike={self.spike}: it must be above 1")


@dataclass
class Expected:
    samples: int = key("samples of an epoch, of all datasets together; 0: not known", 0)
    tokens: list[int] = key("[fewest, most] tokens of a sample; lengths between are as likely", [])

    def __post_init__(self) -> None:
        if self.samples and not (len(self.tokens) == 2 and 2 <= self.tokens[0] <= self.tokens[1]):
            raise ValueError(f"runtime.expected.tokens={self.tokens}: [fewest, most] is needed")


@dataclass
class Runtime:
    device: str = key("cpu, cuda, or auto: cuda where present", "auto")
    threads: int = key("CPU threads a rank; 0 divides the cores among ranks", 0)
    state_every: int = key("steps between saved states", 200)
    loader_workers: int = key("processes a rank that render batches ahead; 0: none", 0)
    tracker: str = key("wandb or trackio, beside TensorBoard; or none", "none")
    ranks: int = key("processes, one a GPU, that stages/train.py starts", 1)
    dry_run: bool = key("say what it would take; train nothing", False)
    gpu: str | None = key("plan for such GPUs (H100, ...) instead of those here", None)
    gpus: int | None = key("plan for so many instead of ranks", None)
    dollars_per_gpu_hour: float | None = key("price, for the bill beforehand and so far", None)
    expected: Expected = field(default_factory=Expected)  # for the bill while data is not here
    cache: str = key("folder of indexes and plans; may be deleted", "out/cache")
    guards: Guards = field(default_factory=Guards)

    def __post_init__(self) -> None:
        _check_choice("runtime.tracker", self.tracker)


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
    seq_len: int = key("tokens of a row; longer samples are left out")
    batch_size: int = key("rows of an optimizer step, over all ranks")
    epochs: int = key("passes over the first dataset")
    optimizer: dict[str, Any] = key("optimizer with its peak lr")
    warmup_steps: int = key("linear warm-up, then cosine to 0")
    packed: bool = key("fill rows with samples; false: one a row, padded to its micro-batch", True)
    steps: int | None = key("stop after so many steps", None)
    micro_batch_size: int = key("rows of one forward a rank; 0: all", 0)
    clip_grad_norm: float | None = key("null: no clipping", None)
    freeze: list[str] = key("regular expressions of parameter names not trained", [])
    dtype: str = key("of the weights and moments: fp32 or bf16", "fp32")
    compute_dtype: str = key("of the products: fp32 or bf16", "fp32")
    activation_checkpointing: str = key(
        "recomputed in the backward pass: none, selective, full", "none"
    )
    compile: bool = key("torch.compile every layer", False)
    attention: str = key("dense, varlen, flex (GPU only), or auto: the fastest", "auto")
    loss_chunk: int = key("targets whose logits exist at a time", 1024)
    shard_group: int | None = key("ranks that share one copy of the model; null: all (FSDP)", None)
    new_rows_first: int = key("first steps train the sound tokens' rows alone", 0)
    step: str = key(
        "dotted path of step(model, batch) -> {name: (loss sum, count)}",
        "speechfuse.train.next_token",
    )
    seed: int = key("of the data's order, and of adapters", 0)
    fresh: bool = key("move an artifact that differs aside", False)
    runtime: Runtime = field(default_factory=Runtime)

    def __post_init__(self) -> None:
        for name in ("dtype", "compute_dtype", "activation_checkpointing", "attention"):
            _check_choice(name, getattr(self, name))
        for name, least in (("epochs", 1), ("steps", 1), ("batch_size", 1), ("seq_len", 2)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}={value}: at least {least} is needed")
