"""Label tracks, losses and gradients against NVIDIA NeMo's DuplexS2S, of which
golden/make_duplex_golden.py made the values.

By decision ours differ from NeMo's in this, and what is compared here leaves it out:

- No end mark is put over text: where a turn is shorter than its text, NeMo's mark takes the place
  of a word, and the words behind it stand behind the mark; ours follows the last word.
- Frames in which nothing is said have a weight of their own, here 1, as NeMo's have; it is our
  text and padding together that are NeMo's text loss.
- Of sessions of unequal lengths in a batch NeMo also scores the frames that fill the shorter ones
  up, and divides by the others; ours are never scored. Here a batch has equal lengths.
- Gradients are of the loss over all targets, texts and codes, of a step; NeMo's over its frames.
- The user's frames go through one matrix in NeMo, through a norm and two matrices in ours. Here
  the first of ours is NeMo's, and the rest is taken out.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from speechfuse.codecs.codec import frame_at
from speechfuse.fusion import channels, views
from speechfuse.fusion.adapters import positions
from speechfuse.tokens.vocabulary import Vocabulary
from speechfuse.train import model as models
from speechfuse.train import trainer
from tests.small_training import ROOT, job, recipe

GOLDEN = Path(__file__).parent / "golden"
BASE = ROOT / "recipes/demo/models/base"
FACTS = json.loads((GOLDEN / "duplex.json").read_text())
TRAP = "an end mark over text"
COMPARABLE = [name for name in FACTS if name != TRAP]
RATE, BOOKS, SIZE = 12.5, 4, 8
BEGIN, END, DELAY = (SIZE + mark for mark in channels.MARKS)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.load(BASE)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "duplex.safetensors")


@pytest.fixture(scope="module")
def duplex(tensors, tmp_path_factory) -> trainer.Trainer:
    """The demo's base, frozen, with NeMo's weights in the adapter."""
    parts = tmp_path_factory.mktemp("duplex")
    (parts / "expanded").symlink_to(BASE)
    adapter = {"_component_": "speechfuse.fusion.Channels", "width": 32, "hidden": 160}
    adapter |= {"codebooks": BOOKS, "codebook_size": SIZE, "window": 50}
    keys: dict[str, Any] = {"model": {"_component_": "torchtune.models.llama3_1.llama3_1"}}
    keys["freeze"] = ["^layers", "^norm[.]", "^output[.]", "^tok_embeddings[.]weight$"]
    keys["step"] = "speechfuse.train.next_frame"
    settings = job(recipe(parts, parts / "run", adapter=adapter, **keys))
    made = trainer.Trainer(settings, models.decoder_of(settings))
    own = made.model.tok_embeddings.adapter
    own.norm = own.between = own.outer = nn.Identity()
    for name, value in theirs(tensors, "weights").items():
        own.get_parameter(name).data.copy_(value)
    return made


def theirs(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """NeMo's weights or gradients by the names of ours."""
    books = [tensors[f"{kind}.embed_audio_tokens.{book}.weight"] for book in range(BOOKS)]
    named = {"codes.weight": torch.cat(books)}
    for name, other in (("inner", "perception.proj"), ("head", "audio_head")):
        for part in ("weight", "bias"):
            named[f"{name}.{part}"] = tensors[f"{kind}.{other}.{part}"]
    return named


def places(turn: dict[str, Any]) -> tuple[int, int]:
    return frame_at(turn["start"], RATE), frame_at(turn["end"], RATE)


def ours(vocabulary: Vocabulary, facts: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Our text and codes of the sessions of a batch, from times, words and the codec's codes."""
    tracks = []
    for turns, length, codes in zip(
        facts["sessions"], facts["frames"], facts["codes"], strict=True
    ):
        own = [
            {**turn, "role": "assistant", "codes": codes[slice(*places(turn))]}
            for turn in turns
            if turn["speaker"] == "agent"
        ]
        silence = np.array(codes[0])  # the agent never begins at once
        tracks.append(channels.tracks(vocabulary, own, length, RATE, silence, SIZE))
    return tracks


@pytest.mark.parametrize("name", COMPARABLE)
def test_label_tracks_are_those_of_nemo(vocabulary, name):
    facts = FACTS[name]
    for number, (text, codes) in enumerate(ours(vocabulary, facts)):
        assert text.tolist() == facts["target_tokens"][number]
        assert text[1:].tolist() == facts["text_labels"][number]
        assert codes[0].tolist() == [DELAY] * BOOKS
        assert codes[1:].tolist() == facts["audio_labels"][number]


@pytest.mark.parametrize("name", FACTS)
def test_a_second_has_13_frames_and_codes_lag_by_one(vocabulary, name):
    facts = FACTS[name]
    # two of our encoders' 25 frames a second are one: of 1 s 13
    assert facts["frames"] == [positions(int(25 * each), 2) for each in facts["seconds"]]
    for text, codes in ours(vocabulary, facts):
        for token, mark in ((vocabulary.begin, BEGIN), (vocabulary.end_of_turn, END)):
            marked = np.flatnonzero((codes == mark).all(1))
            assert (marked - 1).tolist() == np.flatnonzero(text[:-1] == token).tolist()


def test_the_end_mark_that_nemo_puts_over_a_word_is_behind_it_in_ours(vocabulary):
    facts = FACTS[TRAP]
    (text, codes), (word,) = ours(vocabulary, facts)[0], vocabulary.text("seven")
    (begin, end), (turn, _) = (vocabulary.begin, vocabulary.end_of_turn), facts["sessions"][0]
    start, _ = places(turn)
    expected, labels = facts["target_tokens"][0], facts["audio_labels"][0]
    assert expected[start : start + 3] == [begin, end, vocabulary.end]
    expected[start + 1 : start + 3] = word, end
    labels[start + 1], labels[start + 2] = facts["codes"][0][0], [END] * BOOKS
    assert text.tolist() == expected and codes[1:].tolist() == labels


@pytest.mark.parametrize("name", COMPARABLE)
def test_losses_and_gradients_are_those_of_nemo(duplex, tensors, vocabulary, name):
    facts, frames = FACTS[name], tensors[f"{list(FACTS).index(name)}.frames"]
    samples = [
        views.SplicedSample("", text.astype(np.int32), np.ones(len(text), bool), (heard,), codes)
        for (text, codes), heard in zip(ours(vocabulary, facts), frames.numpy(), strict=True)
    ]
    rows, length = [[sample] for sample in samples], facts["frames"][0]
    duplex.optimizer.zero_grad()
    result, _ = duplex.backward([views.collate(rows, length, vocabulary.end, None)])
    (text, said), (padding, silent), (codes, many) = result.values()
    count = len(samples) * (length - 1)
    assert said + silent == count and many == count * BOOKS
    assert (text + padding) / count == pytest.approx(facts["text_loss"], rel=1e-5)
    assert codes / many == pytest.approx(facts["audio_loss"], rel=1e-5)
    adapter = duplex.model.tok_embeddings.adapter
    total = sum(adapter.weights[kind] * value for kind, (value, _) in result.items())
    assert total / count == pytest.approx(facts["loss"], rel=1e-5)
    if len(samples) == 1:
        return
    for key, golden in theirs(tensors, "gradients").items():
        gradient = adapter.get_parameter(key).grad * (1 + BOOKS)
        torch.testing.assert_close(gradient, golden, rtol=1e-5, atol=1e-5 * golden.abs().max())
