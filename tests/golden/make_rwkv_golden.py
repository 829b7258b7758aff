"""Write what the official runtime makes of a model: rwkv6.safetensors, rwkv7.safetensors.

    python tests/golden/make_rwkv_golden.py 6              (in an environment with rwkv 0.8.32)
    python tests/golden/make_rwkv_golden.py 7
    python tests/golden/make_rwkv_golden.py 6 MODEL.pth IN.safetensors OUT.safetensors

The first two make a tiny model of random numbers under BlinkDL's names, token ids and a random
initial state, and write them with the logits that the runtime gives without and with that state,
and the ids that it goes on with. The last does the same with another model: IN has ids and, of
RWKV-7, whose runtime takes the state as an argument, `state` (layers, heads, value, key).
"""

import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VERSION = int(sys.argv[1])
os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "01"[VERSION == 7]}
RWKV: Any = import_module("rwkv.model").RWKV  # which reads the environment
VOCABULARY, WIDTH, LAYERS, HEADS, FFN = 40, 32, 2, 2, 48
AT_MOST = 12  # tokens that it goes on with


def weights(random: torch.Generator) -> dict[str, torch.Tensor]:
    def some(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * scale

    def square(outer: int, inner: int) -> torch.Tensor:
        return some(outer, inner, scale=inner**-0.5)

    w = {"emb.weight": some(VOCABULARY, WIDTH), "head.weight": square(VOCABULARY, WIDTH)}
    norms = ["ln_out", "blocks.0.ln0"]
    for layer in range(LAYERS):
        block = f"blocks.{layer}."
        att, ffn, size = f"{block}att.", f"{block}ffn.", WIDTH // HEADS
        norms += [f"{block}ln1", f"{block}ln2", f"{att}ln_x"]
        for name in ("receptance", "key", "value", "output"):
            w[f"{att}{name}.weight"] = square(WIDTH, WIDTH)
        w[f"{ffn}key.weight"], w[f"{ffn}value.weight"] = square(FFN, WIDTH), square(WIDTH, FFN)
        if VERSION == 6:
            w[f"{att}gate.weight"] = square(WIDTH, WIDTH)
            w[f"{ffn}receptance.weight"] = square(WIDTH, WIDTH)
            for name in (*(f"{att}time_maa_{n}" for n in "xwkvrg"), f"{ffn}time_maa_k"):
                w[name] = some(1, 1, WIDTH, scale=0.5)
            w[f"{ffn}time_maa_r"] = some(1, 1, WIDTH, scale=0.5)
            w[f"{att}time_maa_w1"], w[f"{att}time_maa_w2"] = some(WIDTH, 20), some(5, 4, WIDTH)
            w[f"{att}time_decay"] = some(1, 1, WIDTH, scale=2.0) - 1
            w[f"{att}time_decay_w1"], w[f"{att}time_decay_w2"] = square(WIDTH, 6), square(6, WIDTH)
            w[f"{att}time_faaaa"] = some(HEADS, size)
        else:
            names = [f"x_{n}" for n in "rwkvag"] + ["w0", "a0", "k_k", "k_a"] + ["v0"] * bool(layer)
            for name in [f"{att}{n}" for n in names] + [f"{ffn}x_k"]:
                w[name] = some(1, 1, WIDTH, scale=0.5)
            for name, rank in (("w", 4), ("a", 5), ("g", 7), *([("v", 6)] * bool(layer))):
                w[f"{att}{name}1"], w[f"{att}{name}2"] = square(WIDTH, rank), square(rank, WIDTH)
            w[f"{att}r_k"] = some(HEADS, size)
    for name in norms:
        w[f"{name}.weight"], w[f"{name}.bias"] = 1 + some(WIDTH, scale=0.1), some(WIDTH, scale=0.1)
    return w


def run(model: Any, ids: list[int], memory: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The logits of each id, and the ids that the model goes on with. `memory`: that of RWKV-7, to
    begin with; RWKV-6 has it in its file."""
    state = model.generate_zero_state() if VERSION == 7 else None
    for layer, own in enumerate(memory if memory is not None else ()):
        state[3 * layer + 1] = own.clone()
    logits, state = model.forward(ids, state, full_output=True)
    reply, last = [], logits[-1]
    for _ in range(AT_MOST):
        reply.append(int(last.argmax()))
        last, state = model.forward(reply[-1:], state)
    return {"logits": logits, "reply": torch.tensor(reply)}


def load(tensors: dict[str, torch.Tensor]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(tensors, f"{folder}/model.pth")
        return RWKV(model=f"{folder}/model", strategy="cpu fp32")


def make() -> None:
    random = torch.Generator().manual_seed(VERSION)
    w, size = weights(random), WIDTH // HEADS
    ids = torch.randint(0, VOCABULARY, (40,), generator=random)
    memory = torch.randn(LAYERS, HEADS, size, size, generator=random)
    with_state = w if VERSION == 7 else w | dict(zip(state_names(), memory, strict=True))
    results = {"zero": run(load(w), ids.tolist(), None)}
    results["state"] = run(load(with_state), ids.tolist(), memory if VERSION == 7 else None)
    out = {f"{kind}.{name}": t for kind, each in results.items() for name, t in each.items()}
    out |= {f"model.{name}": tensor for name, tensor in w.items()}
    out |= {"ids": ids} | {
        f"model_state.{n}": t for n, t in zip(state_names(), memory, strict=True)
    }
    save_file(out, Path(__file__).parent / f"rwkv{VERSION}.safetensors")


def state_names() -> list[str]:
    return [f"blocks.{layer}.att.time_state" for layer in range(LAYERS)]


def of_file(model: str, asked: str, out: str) -> None:
    given = load_file(asked)
    runtime = RWKV(model=model.removesuffix(".pth"), strategy="cpu fp32")
    save_file(run(runtime, given["ids"].tolist(), given.get("state")), out)


if __name__ == "__main__":
    of_file(*sys.argv[2:]) if sys.argv[2:] else make()
