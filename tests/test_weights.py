"""The one reader of a checkpoint folder reads what transformers reads, and refuses the rest in one
sentence that names the folder."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from speechfuse.evals import cells, generation
from speechfuse.hub import cards, push
from speechfuse.tokens import expansion, weights
from speechfuse.train import backbone
from speechfuse.train import checkpoint as train_checkpoint
from tests.small_training import built
from tests.test_vocab import CODES, INITIALIZE, OURS, checkpoint, init_base

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LLAMA = {"_component_": "torchtune.models.llama3_1.llama3_1", "scale_factor": 1, "max_seq_len": 64}
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    tokenizer = init_base.train_tokenizer(["one two three"], vocab_size=256)
    return checkpoint(tmp_path_factory.mktemp("plain"), tokenizer)


@pytest.fixture
def single(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


@pytest.fixture
def sharded(plain, tmp_path) -> Path:
    """The same model in several files with an index."""
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(plain).save_pretrained(folder, max_shard_size="6KB")
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Write model.safetensors anew with other tensors, by their last names; None: without."""
    path = folder / SINGLE
    content = load_file(path)
    for name in [full for full in content if full in (EMBEDDING, HEAD, NORM)]:
        key = name.split(".")[-2]
        if key in tensors:
            value = tensors.pop(key)
            content.pop(name)
            content |= {} if value is None else {name: value}
    save_file(content | {name: t for name, t in tensors.items() if t is not None}, path)


def configure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def index(folder: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    edit(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(torch.arange(5)[None])
    return getattr(found, "logits", found)


def consolidated(folder: Path) -> None:
    """What lies beside published weights, or was left by a copy: another head among them."""
    stale = {name: tensor + 1 for name, tensor in load_file(folder / SINGLE).items()}
    save_file({"output.weight": stale[HEAD]}, folder / "consolidated.safetensors")
    save_file(stale, folder / "z-old-copy.safetensors")


def cached(folder: Path) -> None:
    """The layout of huggingface_hub's cache: links to blobs outside."""
    for number, path in enumerate([p for p in folder.iterdir() if p.is_file()]):
        blob = folder.parent / f"blob{number}"
        path.rename(blob)
        path.symlink_to(Path("..") / blob.name)


def stale_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {HEAD: "gone.safetensors"}}))


def frequencies(folder: Path) -> None:
    change(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})


@pytest.mark.parametrize("what", [consolidated, cached, stale_index, frequencies])
def test_what_is_read_is_what_transformers_reads(what, single, plain, tmp_path):
    expected = logits_of(AutoModelForCausalLM.from_pretrained(plain))
    what(single)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(single)), expected)
    assert torch.equal(logits_of(generation.load(single, "cpu")), expected)
    torch.testing.assert_close(logits_of(built(single, LLAMA)), expected, atol=1e-5, rtol=1e-5)
    expansion.expand(single, tmp_path / "out", CODES, OURS, 0, INITIALIZE)
    expansion.expand(plain, tmp_path / "same", CODES, OURS, 0, INITIALIZE)
    ours, theirs = (load_file(tmp_path / name / SINGLE) for name in ("out", "same"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_files_of_an_index_are_read_and_no_other(sharded, plain):
    expected = logits_of(AutoModelForCausalLM.from_pretrained(plain))
    save_file({HEAD: torch.zeros(3, 3)}, sharded / "model-00009-of-00009.safetensors")
    assert torch.equal(logits_of(generation.load(sharded, "cpu")), expected)
    torch.testing.assert_close(logits_of(built(sharded, LLAMA)), expected, atol=1e-5, rtol=1e-5)
    content = weights.read(sharded)
    assert content.keys() == load_file(plain / SINGLE).keys()


def test_a_stray_file_is_neither_hashed_counted_nor_pushed(single, tmp_path, capsys):
    manifest = {"fingerprint": "f", "epoch": 0, "run": {"fingerprint": "r", "job": "finetune"}}
    manifest["run"] |= {"config": {}, "inputs": {}, "started": "now"}
    (single / "manifest.json").write_text(json.dumps(manifest))

    def told() -> tuple[str, str, set[str]]:
        card = cards.card(single, ROOT / "data_cards", "me/model")
        return cells.fingerprint(single, tmp_path / "evals"), card, {*push.files_of(single)}

    before = told()
    consolidated(single)
    assert told() == before and SINGLE in before[2]
    assert "consolidated.safetensors is none of the model's weights" in capsys.readouterr().out


TIED = {"tie_word_embeddings": True}
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / SINGLE).unlink(), "has no weights: model.safetensors is not"),
    "a pickle": (
        lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"),
        r"only pytorch_model.bin, and pickles are not read: save it with transformers",
    ),
    "a dead link": (
        lambda f: ((f / SINGLE).unlink(), (f / SINGLE).symlink_to("nowhere")),
        "it leads nowhere",
    ),
    "cut short": (lambda f: os.truncate(f / SINGLE, 3000), "is it cut short"),
    "a pointer": (
        lambda f: (f / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "pointer of Git LFS",
    ),
    "no head": (lambda f: change(f, lm_head=None), "lacks lm_head.weight .*tie_word_embeddings"),
    "no norm": (lambda f: change(f, norm=None), r"lacks model\.norm\.weight of"),
    "another size": (
        lambda f: change(f, lm_head=torch.zeros(5, 8)),
        "lm_head.weight is 5 x 8, but config.json says 263 x 8",
    ),
    "a layer more": (
        lambda f: change(f, **{"model.layers.1.mlp.up_proj.weight": torch.zeros(8, 8)}),
        "has weights that a model of its config.json lacks: model.layers.1.mlp",
    ),
    "8 bits": (lambda f: change(f, norm=torch.ones(8).to(torch.int8)), "is I8: quantized"),
    "fp8": (lambda f: change(f, norm=torch.ones(8).to(torch.float8_e4m3fn)), "quantized"),
    "tied, with another head": (
        lambda f: configure(f, **TIED),
        "tie_word_embeddings=true, but lm_head.weight is not",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not readable JSON"),
    "no size": (
        lambda f: configure(f, hidden_size="x"),
        "config.json describes no model: .*hidden_size",
    ),
    "another kind": (lambda f: configure(f, model_type="nope"), "describes no model: .*nope"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
}
BROKEN_INDEX: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is gone": (
        lambda f: next(f.glob("model-00001*")).unlink(),
        r"model-00001-of-.*\.safetensors of .* is not there",
    ),
    "leads out": (
        lambda f: index(f, lambda m: m.update({HEAD: "../other.safetensors"})),
        "names ../other.safetensors, which leads out of the folder",
    ),
    "absolute": (
        lambda f: index(f, lambda m: m.update({HEAD: str(f / m[HEAD])})),
        "which leads out of the folder",
    ),
    "another place": (
        lambda f: index(f, lambda m: m.update({NORM: max({*m.values()} - {m[NORM]})})),
        r"do not agree where model.norm.weight is",
    ),
    "not in the index": (
        lambda f: index(f, lambda m: m.pop(NORM)),
        "do not agree where model.norm.weight is",
    ),
    "not in a file": (
        lambda f: index(f, lambda m: m.update({"extra": m[HEAD]})),
        "do not agree where extra is",
    ),
    "twice": (
        lambda f: [save_file(load_file(p) | {"x": torch.ones(1)}, p) for p in f.glob("model-0*")],
        "do not agree where x is, or it is there twice",
    ),
    "empty": (lambda f: (f / INDEX).write_text("{}"), "names no weights"),
    "no JSON": (lambda f: (f / INDEX).write_text('{"weight_map"'), "is not readable JSON"),
}


def refused(folder: Path, says: str, out: Path) -> None:
    """By each that reads weights, before anything is written."""
    for reader in (
        weights.read,
        lambda f: generation.load(f, "cpu"),
        lambda f: train_checkpoint.read(backbone.Decoder(f, {}, {}, torch.nn.Module())),
        lambda f: expansion.expand(f, out, CODES, OURS, 0, INITIALIZE),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            reader(folder)
        assert str(folder) in str(caught.value) and not out.exists()


@pytest.mark.parametrize("what", BROKEN)
def test_weights_that_do_not_fit_are_refused_by_every_reader(what, single, tmp_path):
    damage, says = BROKEN[what]
    damage(single)
    refused(single, says, tmp_path / "out")


@pytest.mark.parametrize("what", BROKEN_INDEX)
def test_an_index_that_does_not_fit_its_files_is_refused(what, sharded, tmp_path):
    damage, says = BROKEN_INDEX[what]
    damage(sharded)
    refused(sharded, says, tmp_path / "out")


def test_a_tied_head_that_is_stored_too_is_no_contradiction(tmp_path):
    tokenizer = init_base.train_tokenizer(["one two"], vocab_size=256)
    folder = checkpoint(tmp_path / "tied", tokenizer, **TIED)
    stored = load_file(folder / SINGLE)
    assert HEAD not in stored
    save_file(stored | {HEAD: stored[EMBEDDING].clone()}, folder / SINGLE)
    assert weights.read(folder).keys() == stored.keys()
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    spec = LLAMA | {"_component_": "torchtune.models.llama3_2.llama3_2"}
    torch.testing.assert_close(logits_of(built(folder, spec)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "tokenizer.json").unlink(),
        lambda f: (f / "tokenizer.json").write_text('{"version"'),
        lambda f: (f / "tokenizer.json").write_text("{}"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_said_in_one_sentence(damage, single, tmp_path):
    damage(single)
    with pytest.raises(ValueError, match=rf"{single}: tokenizer.json .* cannot be read"):
        expansion.expand(single, tmp_path / "out", CODES, OURS, 0, INITIALIZE)
