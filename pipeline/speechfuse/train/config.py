"""The keys of a training's YAML (`stages/train.py`), their defaults and what they mean.

Nothing heavy is imported here, so that `--help` and a misspelt key answer at once.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Guards:
    policy: str = field(
        default="stop", metadata={"help": "what a bad row or step does: stop, or quarantine"}
    )
    spike: float = field(
        default=10.0,
        metadata={"help": "a loss or gradient norm so many times the median of 100 steps is bad"},
    )
    enough: int = field(
        default=20, metadata={"help": "steps before there is something to compare with"}
    )
    most: int = field(
        default=10, metadata={"help": "steps or rows in quarantine after which a run stops"}
    )

    def __post_init__(self) -> None:
        if self.policy not in ("stop", "quarantine"):
            raise ValueError(f"guards.policy={self.policy!r}: choose stop or quarantine")
        if self.spike <= 1:
            raise ValueError(f"guards.spike={self.spike}: it must be above 1")


@dataclass
class Runtime:
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where present"})
    threads: int = field(
        default=0, metadata={"help": "CPU threads a rank; 0 divides the cores among ranks"}
    )
    state_every: int = field(default=200, metadata={"help": "steps between saved states"})
    loader_workers: int = field(
        default=0, metadata={"help": "processes a rank that render batches ahead; 0: none"}
    )
    tracker: str = field(
        default="none", metadata={"help": "wandb or trackio, beside TensorBoard; or none"}
    )
    ranks: int = field(
        default=1, metadata={"help": "processes, one a GPU, that stages/train.py starts"}
    )
    dry_run: bool = field(default=False, metadata={"help": "say what it would take; train nothing"})
    gpu: str | None = field(
        default=None, metadata={"help": "plan for such GPUs (H100, ...) instead of those here"}
    )
    gpus: int | None = field(default=None, metadata={"help": "plan for so many instead of ranks"})
    dollars_per_gpu_hour: float | None = field(
        default=None, metadata={"help": "price, for the bill beforehand and so far"}
    )
    cache: str = field(
        default="out/cache", metadata={"help": "folder of indexes and plans; may be deleted"}
    )
    guards: Guards = field(default_factory=Guards)


@dataclass
class Finetune:
    out: str = field(metadata={"help": "folder of the run"})
    checkpoint: str = field(
        metadata={"help": "Hugging Face folder to start from, made by a job here"}
    )
    model: dict[str, Any] = field(metadata={"help": "builder of that checkpoint's shape"})
    datasets: list[dict[str, Any]] = field(
        metadata={
            "help": "entries {_component_, path, share of the samples, ...}; path: folder or "
            "repo@revision"
        }
    )
    seq_len: int = field(metadata={"help": "tokens of a row; longer samples are left out"})
    batch_size: int = field(metadata={"help": "rows of an optimizer step, over all ranks"})
    epochs: int = field(metadata={"help": "passes over the first dataset"})
    optimizer: dict[str, Any] = field(metadata={"help": "optimizer with its peak lr"})
    warmup_steps: int = field(metadata={"help": "linear warm-up, then cosine to 0"})
    packed: bool = field(
        default=True,
        metadata={"help": "fill rows with samples; false: one a row, padded to its micro-batch"},
    )
    steps: int | None = field(default=None, metadata={"help": "stop after so many steps"})
    micro_batch_size: int = field(
        default=0, metadata={"help": "rows of one forward a rank; 0: all"}
    )
    clip_grad_norm: float | None = field(default=None, metadata={"help": "null: no clipping"})
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": "regular expressions of parameter names not trained"},
    )
    dtype: str = field(
        default="fp32", metadata={"help": "of the weights and moments: fp32 or bf16"}
    )
    compute_dtype: str = field(default="fp32", metadata={"help": "of the products: fp32 or bf16"})
    activation_checkpointing: str = field(
        default="none", metadata={"help": "recomputed in the backward pass: none, selective, full"}
    )
    compile: bool = field(default=False, metadata={"help": "torch.compile every layer"})
    attention: str = field(
        default="auto", metadata={"help": "dense, varlen, flex (GPU only), or auto: the fastest"}
    )
    loss_chunk: int = field(default=1024, metadata={"help": "targets whose logits exist at a time"})
    shard_group: int | None = field(
        default=None, metadata={"help": "ranks that share one copy of the model; null: all (FSDP)"}
    )
    new_rows_first: int = field(
        default=0,
        metadata={"help": "first steps train the sound tokens' rows alone"},
    )
    step: str = field(
        default="speechfuse.train.next_token",
        metadata={"help": "dotted path of step(model, batch) -> {name: (loss sum, count)}"},
    )
    seed: int = field(default=0, metadata={"help": "of the data's order, and of adapters"})
    fresh: bool = field(default=False, metadata={"help": "move an artifact that differs aside"})
    runtime: Runtime = field(default_factory=Runtime)
