"""The decoder: logits against transformers, recomputation, compiled layers, adapters, sharding over
ranks, exported folders, refusals."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging

from speechfuse.samples.view import IGNORE
from speechfuse.train import attention, backbone, losses
from speechfuse.train import model as models
from speechfuse.train.shape import complete
from tests.small_training import built, exported, on_two_ranks

ROOT = Path(__file__).parent.parent
BASE = ROOT / "recipes/demo/models/base"
CPU = torch.device("cpu")
LLAMA = "torchtune.models.llama3_1.llama3_1"
TIED = "torchtune.models.llama3_2.llama3_2"
THEIRS = "speechfuse.train.llama"
LORA = {
    "_component_": "torchtune.models.llama3_1.lora_llama3_1",
    "apply_lora_to_mlp": True,
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "lora_rank": 4,
    "lora_alpha": 16,
}
ADAPTERS_ALONE = ["^layers[.](?!.*lora_)", "^norm[.]"]


def spec_of(folder: Path, component: str = LLAMA, **changes: Any) -> dict[str, Any]:
    shape = json.loads((folder / "config.json").read_text())
    return {
        "_component_": component,
        "vocab_size": shape["vocab_size"],
        "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"],
        "num_kv_heads": shape["num_key_value_heads"],
        "embed_dim": shape["hidden_size"],
        "intermediate_dim": shape["intermediate_size"],
        "max_seq_len": 9216,
        **changes,
    }


def build(folder: Path, spec: dict[str, Any] | None = None, **options: Any) -> Any:
    return built(folder, spec or spec_of(folder), **options)


def make_tied(folder: Path, factor: float = 32.0) -> Path:
    """Like Llama 3.2: tied, heads that share keys, another rope factor; the demo's tokenizer."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=943,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=936,
        eos_token_id=937,
        initializer_range=0.1,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(BASE / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return make_tied(tmp_path_factory.mktemp("tied"))


def batch_of(rows: int, seed: int = 0) -> dict[str, Any]:
    """Two documents and padding in each row; far apart in the second, where rope's factor tells."""
    generator = torch.Generator().manual_seed(seed)
    document = torch.tensor([[0] * 7 + [1] * 12 + [-1] * 5] * rows)
    positions = torch.cat([torch.arange(7), 150 * torch.arange(12), torch.zeros(5)]).long()
    labels = torch.randint(0, 900, (rows, 24), generator=generator)
    labels[document == -1] = IGNORE
    return {
        "tokens": torch.randint(0, 900, (rows, 24), generator=generator),
        "labels": labels,
        "input_pos": positions.expand(rows, -1),
        "sound": labels > 450,
        "mask": attention.mask_of(document, "dense"),
    }


def total(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return torch.stack([value for value, _ in losses.next_token(model, batch).values()]).sum()


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    total(model, batch).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(batch["tokens"], mask=batch["mask"], input_pos=batch["input_pos"])


def test_logits_are_those_of_transformers_packed_rows_too(tied):
    batch = batch_of(2)
    for folder, spec, theirs in (
        (BASE, spec_of(BASE), spec_of(BASE, THEIRS)),
        (
            tied,
            spec_of(tied, TIED),
            spec_of(tied, THEIRS, scale_factor=32, tie_word_embeddings=True),
        ),
    ):
        ours, exit_ = build(folder, spec), build(folder, theirs)
        stock = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            expected = stock(
                batch["tokens"],
                attention_mask=batch["mask"][:, None],
                position_ids=batch["input_pos"],
            ).logits
        close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
        close(logits(ours, batch), expected)
        close(logits(exit_, batch), expected)
        # and the rows are what they are alone: positions and mask are used
        alone = dict(batch, mask=None) | {
            key: batch[key][:, 7:19] for key in ("tokens", "input_pos")
        }
        close(logits(ours, alone), expected[:, 7:19])
        close(total(exit_, batch), total(ours, batch))


def test_the_other_rope_factor_would_give_other_logits(tied, tmp_path):
    """Or the test above would say nothing of scale_factor."""
    batch, other = batch_of(1), make_tied(tmp_path, factor=8.0)
    model = build(other, spec_of(other, TIED, scale_factor=8))
    apart = logits(model, batch) - logits(build(tied, spec_of(tied, TIED)), batch)
    assert apart.abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "given", "said"),
    [
        ({}, {"scale_factor": 32}, "model.scale_factor=32 .* set model.scale_factor=8"),
        ({}, {"rope_base": 10_000}, "model.rope_base=10000 .* rope_theta=500000"),
        ({}, {"norm_eps": 1e-6}, "model.norm_eps=1e-06 .* rms_norm_eps=1e-05"),
        ({}, {"num_kv_heads": 2}, "model.num_kv_heads=2 .* num_key_value_heads=4"),
        ({}, {"_component_": TIED, "tie_word_embeddings": True}, "tie_word_embeddings=False: set"),
        ({"tie_word_embeddings": True}, {}, "choose a builder that takes it"),
        ({"head_dim": 64}, {}, "head_dim=64"),
        ({"attention_bias": True}, {}, "attention_bias=True"),
        (
            {"rope_parameters": {"rope_theta": 500_000, "rope_type": "yarn", "factor": 8}},
            {},
            "rope_type=yarn",
        ),
        ({"rope_parameters": None, "rope_theta": 500_000}, {"scale_factor": 8}, "rope factor=1"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, {}, "llama3 lacks high_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, {}, "rope_type=linear"),
        ({"model_type": "mistral"}, {}, "model_type=mistral: Llama 3 has llama"),
        ({"partial_rotary_factor": 0.5}, {}, "partial_rotary_factor=0.5"),
        ({}, LORA | {"quantize_base": True}, "quantize_base"),
        ({}, LORA | {"apply_lora_to_output": True}, "apply_lora_to_output"),
    ],
)
def test_a_builder_that_does_not_fit_the_checkpoint_is_refused(tmp_path, changes, given, said):
    shape = json.loads((BASE / "config.json").read_text()) | changes
    with pytest.raises(ValueError, match=said):
        complete(spec_of(BASE) | given, shape, str(tmp_path))


def test_what_a_recipe_leaves_out_comes_from_config_json(tied):
    shape = json.loads((BASE / "config.json").read_text())
    assert complete({"_component_": LLAMA}, shape, "a/folder") == spec_of(BASE)
    wide = shape | {"rms_norm_eps": 1e-6, "rope_parameters": None, "rope_theta": 10_000.0}
    filled = complete({"_component_": THEIRS}, wide, "a/folder")
    assert (filled["norm_eps"], filled["rope_base"], filled["scale_factor"]) == (1e-6, 10_000, 1)
    shape = json.loads((tied / "config.json").read_text())
    filled = complete({"_component_": THEIRS, "max_seq_len": 64}, shape, "a/folder")
    assert filled["max_seq_len"] == 64 and filled["tie_word_embeddings"] is True
    batch = batch_of(2)
    expected = logits(build(tied, spec_of(tied, TIED)), batch)
    assert torch.equal(logits(build(tied, {"_component_": TIED}), batch), expected)


def test_llamas_config_of_before_transformers_5_is_read_too():
    shape = json.loads((BASE / "config.json").read_text())
    rope = shape.pop("rope_parameters")
    shape |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    del shape["tie_word_embeddings"], shape["head_dim"]
    assert complete(spec_of(BASE), shape, "a/folder") == spec_of(BASE)
    with pytest.raises(ValueError, match=r"scale_factor=16"):
        complete(spec_of(BASE, scale_factor=16), shape, "a/folder")


LLAMA_3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": LLAMA_3, "rope_theta": 500_000.0},
        {"rope_scaling": {**LLAMA_3, "type": "llama3"}, "rope_theta": 500_000.0},
        {"rope_scaling": None, "rope_theta": 500_000.0},
        {"rope_theta": 500_000.0},
        {"rope_parameters": LLAMA_3 | {"rope_theta": 1e6}},
        {"rope_parameters": LLAMA_3, "rope_theta": 500_000.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "factor": 8.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": LLAMA_3},
        {},
    ],
)
def test_rope_is_read_as_transformers_reads_it(rope, tmp_path):
    """Forms of Llama 3, 3.1 and 3.2, of transformers 4 and 5, and of a file edited by hand."""
    folder = make_tied(tmp_path)
    shape = json.loads((folder / "config.json").read_text())
    del shape["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(shape | rope))
    batch = batch_of(1)
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(folder)
        mask, places = batch["mask"][:, None], batch["input_pos"]
        expected = stock(batch["tokens"], attention_mask=mask, position_ids=places).logits
    found = logits(build(folder, {"_component_": TIED}), batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_stock_transformers_reads_the_demos_model_without_a_warning(caplog):
    before = logging.get_verbosity()  # this package sets it to errors alone
    logging.set_verbosity_warning()
    try:
        AutoTokenizer.from_pretrained(BASE)
        assert AutoConfig.from_pretrained(BASE).rope_parameters["rope_type"] == "llama3"
        assert not caplog.records
        shape = json.loads((BASE / "config.json").read_text())
        LlamaConfig(**shape | {"max_position_embeddings": 2048})
        assert "original_max_position_embeddings" in caplog.text, "as before: the test can fail"
    finally:
        logging.set_verbosity(before)


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Of all that a forward pass keeps for the backward pass, the weights apart."""
    sizes = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def test_recomputation_does_what_it_says():
    """Of four layers all, two or none run a second time; less is kept; gradients are equal, with
    dropout too."""
    batch, runs, kept, found = batch_of(2), {}, {}, {}
    for mode in models.RECOMPUTED:
        torch.manual_seed(1)
        spec = spec_of(BASE) | LORA | {"lora_dropout": 0.3}
        model = build(BASE, spec, activation_checkpointing=mode)
        assert all("checkpoint" not in name for name, _ in model.named_parameters())
        seen: list[int] = []
        for number, layer in enumerate(model.layers):
            layer.sa_norm.register_forward_pre_hook(lambda *_, n=number, s=seen: s.append(n))
        torch.manual_seed(2)
        kept[mode] = saved_bytes(partial(total, model, batch))
        seen.clear()
        torch.manual_seed(2)
        found[mode] = gradients(model, batch)
        runs[mode] = seen
    assert runs == {
        "none": [0, 1, 2, 3],
        "selective": [0, 1, 2, 3, 3, 1],
        "full": [0, 1, 2, 3, 3, 2, 1, 0],
    }
    assert kept["full"] < 0.6 * kept["selective"] < 0.6 * kept["none"]
    assert any(name.endswith("lora_b.weight") for name in found["none"])
    for mode in ("selective", "full"):
        torch.testing.assert_close(found[mode], found["none"])


@pytest.mark.parametrize("mode", ["none", "full"])
def test_layers_are_compiled_once_for_all_and_compute_the_same(monkeypatch, mode):
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    batch = batch_of(2)
    expected = gradients(build(BASE), batch)
    assert not graphs
    model = build(BASE, compile=True, activation_checkpointing=mode)
    torch.testing.assert_close(gradients(model, batch), expected)
    assert len(graphs) == 1, "four layers of one shape share a graph"
    assert set(model.state_dict()) == set(build(BASE).state_dict())


def test_masks_are_causal_inside_documents_and_closed_between_them():
    document = torch.tensor([[0, 0, 0, 1, 1, -1, -1], [0, 1, 1, 1, 2, 2, 2]])
    mask = attention.mask_of(document, "dense")
    assert mask.dtype == torch.bool
    for row in range(2):
        for query in range(7):
            for key in range(7):
                same = document[row, query] == document[row, key]
                assert mask[row, query, key] == (same and key <= query)
    assert mask.any(2).all(), "a token that sees nothing would be NaN"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_flex_mask_lets_through_what_the_dense_one_does():
    torch.manual_seed(0)
    document = torch.arange(256).bitwise_right_shift(6).repeat(2, 1)
    document[1] = torch.tensor([0] * 100 + [1] * 130 + [-1] * 26)
    q, k, v = torch.randn(3, 2, 2, 256, 16)
    blocks = attention.mask_of(document, "flex")
    dense = attention.mask_of(document, "dense")[:, None]
    torch.testing.assert_close(
        flex_attention(q, k, v, block_mask=blocks),
        nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense),
    )
    assert blocks.sparsity() > 0, "documents leave blocks empty, which is what makes it fast"


@pytest.mark.parametrize("component", [LLAMA, THEIRS])
def test_one_product_for_each_document_is_the_dense_mask(component):
    model, batch = build(BASE, spec_of(BASE, component)), batch_of(2)
    document = torch.tensor([[0] * 7 + [1] * 12 + [-1] * 5, [0] * 24])
    dense = batch | {"mask": attention.mask_of(document, "dense")}
    alone = batch | {"mask": attention.mask_of(document, "varlen")}
    torch.testing.assert_close(
        gradients(model, alone), gradients(model, dense), atol=1e-4, rtol=1e-4
    )
    whole = batch | {"mask": attention.mask_of(torch.zeros_like(document), "dense")}
    assert not torch.allclose(logits(model, whole), logits(model, alone)), "documents are closed"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_exit_takes_the_flex_mask_too():
    model, batch = build(BASE, spec_of(BASE, THEIRS)), batch_of(2)
    document = torch.tensor([[0] * 7 + [1] * 12 + [-1] * 5] * 2)
    with torch.compiler.set_stance("force_eager"):
        found = logits(model, batch | {"mask": attention.mask_of(document, "flex")})
    torch.testing.assert_close(found, logits(model, batch), atol=1e-5, rtol=1e-5)


def test_flex_is_for_gpus():
    gpu = torch.device("cuda", 0)
    assert attention.kind_of("auto", CPU, True, 2048) == "varlen"
    assert attention.kind_of("auto", CPU, True, 128) == "dense", "short rows"
    assert attention.kind_of("auto", CPU, False, 2048) == "dense"
    assert attention.kind_of("dense", CPU, True, 2048) == "dense"
    assert attention.kind_of("auto", gpu, True, 128) == "flex"
    assert attention.kind_of("auto", gpu, False, 128) == "dense", "rows of many lengths"
    with pytest.raises(ValueError, match="attention=flex is compiled for CUDA"):
        attention.kind_of("flex", CPU, True, 128)
    with pytest.raises(ValueError, match="attention=flex with packed=false"):
        attention.kind_of("flex", gpu, False, 128)
    with pytest.raises(ValueError, match="attention=varlen is for CPUs"):
        attention.kind_of("varlen", gpu, True, 128)


def test_gpus_before_flex_have_dense_masks(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert attention.kind_of("auto", gpu, True, 2048) == "dense"
    with pytest.raises(ValueError, match="attention=flex is not for GPUs before Turing"):
        attention.kind_of("flex", gpu, True, 2048)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert attention.kind_of("auto", gpu, True, 2048) == "flex"


def test_a_document_alone_takes_a_fused_kernel():
    q, k, v = torch.randn(3, 1, 2, 24, 16)
    document = torch.tensor([[0] * 7 + [1] * 17])
    with torch.profiler.profile() as profile:
        attention.by_document(None, q, k, v, mask=document, dropout_p=0.0)
    kernels = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in kernels
    assert "aten::_scaled_dot_product_attention_math" not in kernels


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_begin_as_nothing_train_with_the_rows_and_are_merged(tmp_path, dora):
    batch, spec = batch_of(2), spec_of(BASE) | LORA | {"use_dora": dora}
    model = build(BASE, spec, seed=3)
    begin = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(logits(model, batch), logits(build(BASE), batch))
    for seed, same in ((3, True), (4, False)):
        drawn = build(BASE, spec, seed=seed).layers[0].attn.q_proj.lora_a.weight
        assert torch.equal(drawn, model.layers[0].attn.q_proj.lora_a.weight) == same
    models.freeze(model, ADAPTERS_ALONE if not dora else ["^layers[.](?!.*(lora_|magn))", "^norm"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        gradients(model, batch)
        optimizer.step()
    after = model.state_dict()
    changed = {name for name, tensor in begin.items() if not torch.equal(tensor, after[name])}
    extra = ("lora_a", "lora_b", "magnitude", "tok_embeddings", "output.weight")
    assert changed == {name for name in begin if any(part in name for part in extra)}
    expected = logits(model, batch)
    exported(model, BASE, tmp_path / "epoch_0", {})
    assert torch.equal(logits(model, batch), expected), "the model trains on as it was"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "epoch_0")
    assert set(stock.state_dict()) == set(load_file(tmp_path / "epoch_0/model.safetensors"))
    with torch.no_grad():
        found = stock(
            batch["tokens"], attention_mask=batch["mask"][:, None], position_ids=batch["input_pos"]
        ).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("component", [LLAMA, THEIRS, TIED])
def test_an_epochs_folder_is_whole_for_stock_transformers(tied, tmp_path, component):
    source, options = BASE, {}
    if component == TIED:
        source = tied
        (tied / "generation_config.json").write_text(
            json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 937})
        )
    model = build(source, spec_of(source, component, **options))
    exported(model, source, tmp_path / "epoch_0", {"epoch": 0})
    before, after = load_file(source / "model.safetensors"), tmp_path / "epoch_0"
    written = load_file(after / "model.safetensors")
    assert written.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in written.items())
    assert json.loads((after / "manifest.json").read_text()) == {"epoch": 0}
    tokenizer = AutoTokenizer.from_pretrained(after)
    stock = AutoModelForCausalLM.from_pretrained(after)
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    ends = stock.generation_config.eos_token_id
    assert ends == ([937, end] if component == TIED else [end]), "an answer ends with its turn"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say one"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answers = []
    for seed in range(3):
        torch.manual_seed(seed)
        answers.append(stock.generate(**prompt, max_new_tokens=8)[0].tolist())
    assert answers[0] == answers[1] == answers[2], "stock generation must be greedy"
    assert len(answers[0]) > prompt["input_ids"].shape[1]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rank_main(folder: Path) -> None:
    """What each rank does: its half of a batch, on models sharded in several ways."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    lora = spec_of(BASE) | LORA
    tied = spec_of(folder / "tied", TIED)
    full = {"activation_checkpointing": "full"}
    for name, source, spec, options, patterns in (
        ("fsdp", BASE, spec_of(BASE), full, []),
        ("theirs", BASE, spec_of(BASE, THEIRS), {}, []),
        ("copies", folder / "tied", tied, {"shard_group": 1}, []),
        ("lora", BASE, lora, {"seed": 5}, ADAPTERS_ALONE),
    ):
        model = build(source, spec, **options)
        models.freeze(model, patterns)
        part = {key: value[rank::ranks] for key, value in batch_of(4).items()}
        found = {key: whole(value) * ranks for key, value in gradients(model, part).items()}
        layer = next(backbone.layers_of(model)[0].parameters())
        assert isinstance(layer, DTensor)
        shape = tuple(layer.device_mesh.shape)
        exported(model, source, folder / name, {})
        if rank == 0:
            torch.save({"gradients": found, "mesh": shape}, folder / f"{name}.pt")
    mixed = built(BASE, spec_of(BASE), compute_dtype="bf16")
    gradients(mixed, batch_of(4))
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}, "master weights stay fp32"
    hidden = []
    mixed.norm.register_forward_hook(lambda *three: hidden.append(three[2].dtype))
    total(mixed, batch_of(4))
    assert hidden == [torch.bfloat16], "products are in bf16"
    dist.destroy_process_group()


def test_ranks_have_together_the_gradients_of_one(tmp_path):
    """FSDP2 on two ranks: whole, as transformers' model, two copies (HSDP) with tied embeddings,
    adapters with frozen weights. Losses are within the forward, where the weights are gathered."""
    tied = make_tied(tmp_path / "tied")
    on_two_ranks(rank_main, tmp_path)
    for name, source, spec, options, patterns in (
        ("fsdp", BASE, spec_of(BASE), {}, []),
        ("theirs", BASE, spec_of(BASE, THEIRS), {}, []),
        ("copies", tied, spec_of(tied, TIED), {}, []),
        ("lora", BASE, spec_of(BASE) | LORA, {"seed": 5}, ADAPTERS_ALONE),
    ):
        model = build(source, spec, **options)
        models.freeze(model, patterns)
        result = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert tuple(result["mesh"]) == ((2, 1) if name == "copies" else (2,))
        expected = gradients(model, batch_of(4))
        torch.testing.assert_close(result["gradients"], expected, atol=1e-4, rtol=1e-4)
        written = load_file(tmp_path / name / "model.safetensors")
        before = load_file(source / "model.safetensors")
        assert written.keys() == before.keys()
        assert all(torch.equal(tensor, before[key]) for key, tensor in written.items())
