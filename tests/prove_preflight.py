"""Preflight's account of memory against real trainings on the CPU.

    just prove preflight                         (about 5 minutes on one core, 10 GB of memory)

A Llama of 309 million parameters trains for two steps in a process of its own, in float32, in
mixed precision through FSDP2, and recomputed; its peak of resident memory beyond the imports is
compared with what preflight says. State is compared byte by byte. Within 10 %, or exit status 1.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from speechfuse import config
from speechfuse.train import attention
from speechfuse.train import model as models
from speechfuse.train.losses import next_token
from speechfuse.train.preflight import memory
from tests.small_training import built

SIZE = {
    "vocab_size": 32_771,
    "num_layers": 16,
    "num_heads": 16,
    "num_kv_heads": 4,
    "embed_dim": 1024,
    "intermediate_dim": 4096,
    "max_seq_len": 2048,
}
BUILDER = "torchtune.models.llama3_1.llama3_1"
ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-4, "fused": True}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, twice 1 row": {"rows": 1, "passes": 2},
    "fp32, all recomputed": {"activation_checkpointing": "full"},
    # with few tokens: products in bfloat16 are slow on most CPUs
    "fp32 weights, bf16 products": {"compute_dtype": "bf16", "length": 64},
    "bf16": {"dtype": "bf16", "compute_dtype": "bf16", "length": 64},
}


def taken(name: str) -> tuple[Any, int, int, int]:
    """A case's recipe, and the rows, length and number of its forwards."""
    case = dict(CASES[name])
    shape = [case.pop(key, value) for key, value in (("rows", 2), ("length", 512), ("passes", 1))]
    return job_of(SIZE, **case), *shape


def job_of(size: dict[str, Any], **changes: Any) -> SimpleNamespace:
    """A recipe's keys as far as memory depends on them."""
    keys: dict[str, Any] = {
        "model": {"_component_": BUILDER, **size},
        "dtype": "fp32",
        "compute_dtype": "fp32",
        "loss_chunk": 256,
        "adapter": None,
        "encoder": None,
        "keep": [],
        "new_rows_first": 0,
        "new_rows_only": False,
        "freeze": [],
        "shard_group": None,
        "activation_checkpointing": "none",
        "compile": False,
        "attention": "dense",
        "optimizer": ADAMW,
    }
    return SimpleNamespace(**(keys | changes))


def shape_of(size: dict[str, Any]) -> dict[str, Any]:
    """config.json of the checkpoint that a builder's arguments `size` fit."""
    tied = "llama3_2" in size.get("_component_", "")
    return {
        "model_type": "llama",
        "vocab_size": size["vocab_size"],
        "num_hidden_layers": size["num_layers"],
        "num_attention_heads": size["num_heads"],
        "num_key_value_heads": size["num_kv_heads"],
        "hidden_size": size["embed_dim"],
        "intermediate_size": size["intermediate_dim"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": tied,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0 if tied else 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


def checkpoint(folder: Path, size: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """Random weights in a Hugging Face folder, for a builder's arguments `size`."""
    heads, width = size["num_heads"], size["embed_dim"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape_of(size)))
    small = size["num_kv_heads"] * width // heads
    own = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (small, width),
        "self_attn.v_proj": (small, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (size["intermediate_dim"], width),
        "mlp.up_proj": (size["intermediate_dim"], width),
        "mlp.down_proj": (width, size["intermediate_dim"]),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes = {
        "model.embed_tokens": (size["vocab_size"], width),
        "model.norm": (width,),
        "lm_head": (size["vocab_size"], width),
    }
    for layer in range(size["num_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": value for name, value in own.items()}
    if shape_of(size)["tie_word_embeddings"]:
        del shapes["lm_head"]
    tensors = {
        f"{name}.weight": torch.empty(value, dtype=dtype).normal_(std=0.02)
        for name, value in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def own_bytes(tensor: torch.Tensor | None) -> int:
    """Of the part of a tensor that this rank has."""
    if not isinstance(tensor, torch.Tensor):
        return 0
    if isinstance(tensor, DTensor):
        return own_bytes(tensor.to_local())
    if is_traceable_wrapper_subclass(tensor):
        return sum(own_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def real(folder: Path, job: Any, rows: int, length: int, passes: int) -> dict[str, int]:
    """Two real steps: bytes of this rank's weights, gradients and optimizer state, and the peak of
    resident memory beyond what the process had before."""
    before = resident("VmRSS")
    model = built(
        folder,
        job.model,
        dtype=job.dtype,
        compute_dtype=job.compute_dtype,
        loss_chunk=job.loss_chunk,
        activation_checkpointing=job.activation_checkpointing,
    )
    models.freeze(model, job.freeze)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = config.instantiate(job.optimizer, params=trained)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of loading is not asked for
    ids = torch.randint(job.model["vocab_size"], (rows, length))
    used: dict[str, int] = {}
    for _ in range(2):
        for _ in range(passes):
            batch = {
                "tokens": ids,
                "labels": ids,
                "sound": ids > 9,
                "input_pos": torch.arange(length).expand(rows, -1),
                "mask": attention.mask_of(torch.zeros_like(ids), "dense"),
            }
            sums = next_token(model, batch)
            torch.stack([value for value, _ in sums.values()]).sum().backward()
            del sums, batch
        used["gradients"] = sum(own_bytes(p.grad) for p in trained)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    states = [value for each in optimizer.state.values() for value in each.values()]
    return used | {
        "weights": sum(own_bytes(p) for p in model.parameters())
        + sum({b.data_ptr(): own_bytes(b) for b in model.buffers()}.values()),
        "optimizer": sum(map(own_bytes, states)),
        "peak": resident("VmHWM") - before,
    }


def child(folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    job, rows, length, passes = taken(name)
    if job.compute_dtype != job.dtype:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(json.dumps(real(folder, job, rows, length, passes)))


def main() -> None:
    worst = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoint(Path(temporary), SIZE)
        # memory that is freed goes back to the system at once, so that resident is what is in use
        environment = os.environ | {
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_TRIM_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": "1",
        }
        for name in CASES:
            estimate = memory.of(*taken(name), 1, gpu=False)
            done = subprocess.run(
                [sys.executable, __file__, str(folder), name],
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            measured = json.loads(done.stdout.splitlines()[-1])
            off = estimate.peak / measured["peak"] - 1
            worst = max(worst, abs(off))
            exact = all(
                getattr(estimate, part) == measured[part]
                for part in ("weights", "gradients", "optimizer")
            )
            parts = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in estimate.step.items())
            print(
                f"{name}: peak {measured['peak'] / 1e9:.2f} GB, said {estimate.peak / 1e9:.2f} "
                f"({off:+.1%}); weights, gradients, state "
                f"{'exact' if exact else f'NOT exact: {estimate}, {measured}'}; "
                f"beside weights and state: {parts}",
                flush=True,
            )
            if not exact:
                worst = 1.0
    print(f"{len(CASES)} cases, at most {worst:.1%} off")
    sys.exit(worst > 0.1)


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 1 else main()
