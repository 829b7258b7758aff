"""RWKV-6 and RWKV-7: the recurrence, the official runtime's numbers (which
golden/make_rwkv_golden.py wrote), BlinkDL's files, the registered Hugging Face class."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from speechfuse.rwkv import pth, recurrence
from speechfuse.rwkv.model import Rwkv, Shape

GOLDEN = Path(__file__).parent / "golden"
RANKS = {6: {"mix": 4, "decay": 6}, 7: {"decay": 4, "rate": 5, "value": 6, "gate": 7}}
VERSIONS = pytest.mark.parametrize("version", [6, 7])


def golden(version: int, tmp_path: Path) -> tuple[dict[str, Any], Path, Path]:
    """The golden values, the model as `.pth`, and the model with the learned state."""
    values = load_file(GOLDEN / f"rwkv{version}.safetensors")
    model, state = (
        {n.removeprefix(kind): t for n, t in values.items() if n.startswith(kind)}
        for kind in ("model.", "model_state.")
    )
    paths = tmp_path / "zero.pth", tmp_path / "state.pth"
    pth.write(paths[0], model)
    pth.write(paths[1], model | state)
    return values, *paths


def loaded(path: Path) -> Rwkv:
    shape, tensors = pth.read(path)
    model = Rwkv(shape, any(map(pth.is_state, tensors)))
    model.load_state_dict(tensors)
    return model


def random_model(version: int, learned_state: bool = True, width: int = 32) -> Rwkv:
    torch.manual_seed(version)
    model = Rwkv(Shape(version, 40, width, 2, 2, 48, RANKS[version]), learned_state)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def go_on(model: Rwkv, ids: torch.Tensor, count: int) -> list[int]:
    """The ids that follow, one after the other from the state."""
    hidden, state = model.read(model.emb(ids[None]))
    reply = []
    for _ in range(count):
        reply.append(int(model.head(hidden[0, -1]).argmax()))
        hidden, state = model.read(model.emb(torch.tensor([reply[-1:]])), None, state)
    return reply


@VERSIONS
@torch.no_grad()
def test_the_forward_is_the_official_runtimes(version, tmp_path):
    values, *paths = golden(version, tmp_path)
    assert not torch.allclose(values["zero.logits"], values["state.logits"], atol=0.1)
    for kind, path in zip(("zero", "state"), paths, strict=True):
        model = loaded(path)
        logits = model(values["ids"][None])[0]
        torch.testing.assert_close(logits, values[f"{kind}.logits"], atol=1e-5, rtol=1e-5)
        reply = values[f"{kind}.reply"].tolist()
        assert go_on(model, values["ids"], len(reply)) == reply


@pytest.mark.skipif(not importlib.util.find_spec("rwkv"), reason="needs the package rwkv")
@VERSIONS
@torch.no_grad()
def test_a_written_file_runs_in_the_official_runtime(version, tmp_path):
    model = random_model(version, width=64)
    pth.write(tmp_path / "model.pth", model.state_dict())
    state = torch.stack([block.att.time_state for block in model.blocks])
    asked = {"ids": torch.randint(0, 40, (37,))} | ({"state": state} if version == 7 else {})
    save_file(asked, tmp_path / "in.safetensors")
    files = [str(tmp_path / name) for name in ("model.pth", "in.safetensors", "out.safetensors")]
    script = [sys.executable, str(GOLDEN / "make_rwkv_golden.py"), str(version)]
    subprocess.run([*script, *files], check=True, capture_output=True)
    theirs = load_file(files[-1])
    ours = model(asked["ids"][None])[0]
    torch.testing.assert_close(ours, theirs["logits"], atol=1e-5, rtol=1e-5)
    assert go_on(model, asked["ids"], len(theirs["reply"])) == theirs["reply"].tolist()


def tokens_of(version: int, length: int, borders: bool) -> tuple[recurrence.Tokens, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    r, k, v, decay, a, rate = (some(2, 2, length, 8) for _ in range(6))
    fresh = torch.rand(2, length, generator=generator) < 0.1 if borders else None
    common = {"r": r, "k": k, "v": v, "fresh": fresh}
    if version == 6:  # from no decay at all to the fastest
        decay = -(2.5 * decay).exp().clamp(max=-recurrence.FADED)
        return recurrence.Tokens(**common, decay=decay, bonus=some(2, 8)), some(2, 8, 8)
    a = torch.nn.functional.normalize(a, dim=-1)
    decay, b = -0.606531 * decay.sigmoid(), -a * rate.sigmoid()
    return recurrence.Tokens(**common, decay=decay, a=a, b=b), some(2, 8, 8)


@VERSIONS
@pytest.mark.parametrize("borders", [False, True])
def test_chunks_give_what_the_sequence_gives(version, borders):
    for length in [*range(1, 70), 95, 96, 97, 128, 200, 299, 300]:
        tokens, initial = tokens_of(version, length, borders)
        memory = torch.randn(2, *initial.shape, generator=torch.Generator().manual_seed(1))
        ours, theirs = (
            f(tokens, initial, memory) for f in (recurrence.chunked, recurrence.sequential)
        )
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=f"length {length}")


@VERSIONS
def test_decays_at_their_extremes_are_finite(version):
    for extreme in (-200.0, 200.0):
        model = random_model(version)
        for block in model.blocks:
            decay = block.att.time_decay if version == 6 else block.att.w0
            decay.data += extreme * torch.tensor([1, -1]).repeat(16)
        ids = torch.randint(0, 40, (2, 150))
        logits = model(ids)
        logits.square().mean().backward()
        assert all(
            torch.isfinite(each).all() for each in (logits, *(p.grad for p in model.parameters()))
        )
        with torch.no_grad():
            hidden, state = model.read(model.emb(ids[:, :1]))
            parts = [hidden]
            for t in range(1, 150):
                hidden, state = model.read(model.emb(ids[:, t : t + 1]), None, state)
                parts.append(hidden)
        torch.testing.assert_close(model.head(torch.cat(parts, 1)), logits, atol=1e-4, rtol=1e-4)


@VERSIONS
def test_packed_documents_are_as_one_by_one(version):
    """Each begins with the learned state, whose gradient is the sum of theirs."""
    model, lengths = random_model(version), [1, 5, 40, 2, 33, 70]
    documents = [torch.randint(0, 40, (length,)) for length in lengths]
    grads = []
    for rows in ([documents[:4], documents[4:]], [[each] for each in documents]):
        model.zero_grad()
        logits = []
        for row in rows:
            positions = torch.cat([torch.arange(len(each)) for each in row])
            (out,) = model(torch.cat(row)[None], input_pos=positions[None])
            logits += out.split([len(each) for each in row])
        sum(each.square().sum() for each in logits).backward()
        grads.append((logits, [p.grad.clone() for p in model.parameters()]))
    (packed, ours), (alone, theirs) = grads
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * float(other.abs().max()), rtol=1e-4)
    assert all(block.att.time_state.grad.abs().min() > 0 for block in model.blocks)


@VERSIONS
def test_a_file_goes_in_and_out_unchanged(version, tmp_path):
    _, path, with_state = golden(version, tmp_path)
    for each in (path, with_state):
        shape, tensors = pth.read(each)
        assert shape == Shape(version, 40, 32, 2, 2, 48, RANKS[version])
        state = loaded(each).state_dict()
        assert state.keys() == tensors.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_a_file_that_does_not_fit_is_one_sentence(tmp_path):
    def refused(match: str, tensors: dict[str, torch.Tensor]) -> None:
        pth.write(tmp_path / "bad.pth", tensors)
        with pytest.raises(ValueError, match=match):
            pth.read(tmp_path / "bad.pth")

    good = pth.read(golden(6, tmp_path)[1])[1]
    refused(
        r"is no whole RWKV-6: Missing key\(s\) in state_dict: .blocks.1.ffn.key.weight",
        {n: t for n, t in good.items() if n != "blocks.1.ffn.key.weight"},
    )
    refused(
        "Unexpected key.* .blocks.0.att.time_mix_k",
        good | {"blocks.0.att.time_mix_k": torch.ones(1)},
    )
    refused(
        r"size mismatch for head.weight: .*\[41, 32\]", good | {"head.weight": torch.ones(41, 32)}
    )
    refused("is no RWKV-6 or RWKV-7", {"blocks.0.att.time_first": torch.ones(2)})
    first = {f"blocks.0.att.v{n}": torch.ones(1) for n in range(3)}  # of older files, unused
    seven = pth.read(golden(7, tmp_path)[1])[1]
    pth.write(tmp_path / "old.pth", seven | first)
    assert pth.read(tmp_path / "old.pth")[1].keys() == seven.keys()
    (tmp_path / "text.pth").write_text("no file of torch")
    with pytest.raises(ValueError, match=r"text.pth is no file of tensors"):
        pth.read(tmp_path / "text.pth")
