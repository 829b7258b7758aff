"""Our splice against NVIDIA NeMo's SALM, and LoRA against peft: golden/make_speechlm2_golden.py and
golden/make_peft_golden.py made the values."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from speechfuse.fusion import folder, views
from speechfuse.fusion.door import FRAME
from speechfuse.tokens.vocabulary import Vocabulary
from speechfuse.train import model as models
from speechfuse.train import trainer
from tests.small_training import ROOT, job, recipe

GOLDEN = Path(__file__).parent / "golden"
BASE = ROOT / "recipes/demo/models/base"
FACTS = json.loads((GOLDEN / "speechlm2.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "speechlm2.safetensors")


@pytest.fixture(scope="module")
def salm(tensors, tmp_path_factory) -> trainer.Trainer:
    """The demo's base, frozen, with NeMo's projection as its adapter."""
    parts = tmp_path_factory.mktemp("salm")
    frozen = ["^layers", "^norm[.]", "^output[.]", "^tok_embeddings[.]weight$"]
    adapter = {"_component_": "speechfuse.fusion.Linear", "width": 64}
    (parts / "expanded").symlink_to(BASE)
    builder = {"_component_": "torchtune.models.llama3_1.llama3_1"}
    path = recipe(parts, parts / "run", model=builder, adapter=adapter, freeze=frozen)
    settings = job(path)
    made = trainer.Trainer(settings, models.decoder_of(settings))
    linear = made.model.tok_embeddings.adapter.linear
    linear.load_state_dict({name: tensors[f"proj.{name}"] for name in ("weight", "bias")})
    return made


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("packed", [False, True])
def test_splice_targets_loss_and_gradients_are_those_of_salm(salm, tensors, name, packed):
    facts, number = FACTS[name], list(FACTS).index(name)
    clips = [tensors[f"{number}.frames.{i}"].numpy() for i in range(len(facts["frames"]))]
    assert [len(clip) for clip in clips] == facts["frames"]
    rest, samples = list(clips), []
    for ids, learned in zip(facts["prompts"], facts["targets"], strict=True):
        audio = [rest.pop(0) for id in ids if id is None]
        counts = iter(map(len, audio))
        tokens: list[Any] = []
        for id in ids:
            tokens += [FRAME] * next(counts) if id is None else [id]
        targets = np.arange(len(tokens)) >= len(tokens) - learned
        samples.append(views.SplicedSample("", np.array(tokens, np.int32), targets, tuple(audio)))
    rows = [samples] if packed else [[sample] for sample in samples]
    length = max(sum(len(sample.tokens) for sample in row) for row in rows)
    batch = views.collate(rows, length, Vocabulary.load(BASE).end, None)

    # the inputs: theirs are padded on the left and lack the last place
    door = salm.model.tok_embeddings
    with door.hearing(batch["audio"].float(), batch["audio_lengths"]), torch.no_grad():
        ours = door(batch["tokens"]).flatten(0, 1)[batch["document"].flatten() >= 0]
    starts = np.cumsum([0, *(len(sample.tokens) for sample in samples)])
    for row, (theirs, start, sample) in enumerate(
        zip(tensors[f"{number}.embeds"], starts, samples, strict=False)
    ):
        seen = facts["attention_mask"][row]
        own = theirs[-(len(sample.tokens) - 1) :]
        assert sum(seen) == len(own)
        torch.testing.assert_close(ours[start : start + len(own)], own, rtol=1e-5, atol=1e-6)
        labels = facts["target_ids"][row][-len(own) :]
        expected = [
            int(token) if target else -100
            for token, target in zip(sample.tokens[1:], sample.targets[1:], strict=True)
        ]
        assert labels == expected

    salm.optimizer.zero_grad()
    result, _ = salm.backward([batch])
    loss, count = result["text"]
    assert count == sum(facts["targets"])
    assert loss / count == pytest.approx(facts["loss"], rel=1e-5)
    for key, parameter in door.adapter.linear.named_parameters():
        golden = tensors[f"{number}.gradient.{key}"]
        torch.testing.assert_close(
            parameter.grad, golden, rtol=1e-5, atol=1e-5 * golden.abs().max()
        )


def test_a_lora_of_peft_gives_pefts_logits(tmp_path):
    golden = load_file(GOLDEN / "peft_lora.safetensors")
    recorded = json.loads((GOLDEN / "peft_lora.json").read_text())
    parts = {
        part: {n.removeprefix(part): t for n, t in golden.items() if n.startswith(part)}
        for part in ("base.", "lora.")
    }
    model = LlamaForCausalLM(LlamaConfig(**recorded["shape"])).eval()
    model.load_state_dict(parts["base."])
    model.save_pretrained(tmp_path)
    (tmp_path / "lora").mkdir()
    save_file(parts["lora."], tmp_path / folder.LORA)
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(recorded["adapter_config"]))
    with torch.no_grad():
        torch.testing.assert_close(model(golden["ids"]).logits, golden["plain"])
        folder.add_lora(model, tmp_path)
        torch.testing.assert_close(model(golden["ids"]).logits, golden["logits"])
    assert not torch.allclose(golden["plain"], golden["logits"], atol=1e-3)
