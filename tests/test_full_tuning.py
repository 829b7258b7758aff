"""An adapter whose language model trains whole: its epoch, its replies, and how it goes on."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from speechfuse.evals import generation
from speechfuse.fusion import door, folder
from speechfuse.hub import cards, push
from speechfuse.train import loop
from tests.small_training import FROZEN, ROOT, job, losses
from tests.test_splice import ENCODER, parts, splice, turns  # noqa: F401
from tests.test_splice import frames_row as row_of

WHOLE = {"_component_": "torchtune.models.llama3_1.llama3_1"}


def test_a_language_model_trains_whole_and_goes_on(parts, tmp_path, capsys):  # noqa: F811
    loop.run(job(splice(parts, tmp_path / "whole", model=WHOLE, freeze=[])))
    first, epoch = losses(tmp_path / "whole"), tmp_path / "whole/epoch_0"
    assert first[-1] < first[0]
    speech = json.loads((epoch / "speech.json").read_text())
    assert speech["base"] is None and speech["encoder"] == ENCODER
    assert {"model.safetensors", folder.SPEECH} == speech["sha256"].keys()
    new, old = (load_file(each / "model.safetensors") for each in (epoch, parts / "init"))
    assert new.keys() == old.keys()
    assert not any(torch.equal(new[name], old[name]) for name in old if "layers" in name)
    text = AutoModelForCausalLM.from_pretrained(epoch)  # the trained one, for any library
    assert not isinstance(text.get_input_embeddings(), door.Door)
    asker = generation.generator(epoch, ENCODER, "x", "cpu")
    rng = np.random.default_rng(5)
    rows = [row_of(number, rng) for number in range(3)]
    assert len(asker.reply([turns(row) for row in rows], 3)) == 3
    sent = push.files_of(epoch)
    assert {"model.safetensors", folder.SPEECH, "speech.json", "config.json"} < sent.keys()
    assert "is not sent" not in capsys.readouterr().out
    card = cards.card(epoch, ROOT / "data_cards", "me/whole")
    tensors = [*new.values(), *load_file(epoch / folder.SPEECH).values()]
    assert f"of {sum(t.numel() for t in tensors):,} parameters that hears speech as frames" in card
    assert f"encoder with the identity `{ENCODER}`" in card and "fusion.Stack" in card
    assert 'from_pretrained("me/whole")' in card and "`speech.safetensors` has the adapter" in card
    assert not any(each in card for each in ("text alone", "not in this repository", "peft"))
    more = splice(parts, tmp_path / "more", model=WHOLE, freeze=[], checkpoint=str(epoch))
    loop.run(job(more))
    assert losses(tmp_path / "more")[0] < first[0]


def test_a_part_of_a_language_model_does_not_train(parts, tmp_path):  # noqa: F811
    with pytest.raises(
        ValueError, match=r"of the language model train .*, and \d+ do not: name all"
    ):
        loop.run(job(splice(parts, tmp_path / "bad", freeze=FROZEN[:1])))
