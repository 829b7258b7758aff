"""Channels: label tracks, losses, training, and the model frame by frame."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from speechfuse.codecs.codec import codec_of
from speechfuse.evals.duplex import Talker
from speechfuse.fusion import channels, views
from speechfuse.quantizer.frames import FrameEncoder
from speechfuse.quantizer.model import QuantizerConfig
from speechfuse.samples import datasets
from speechfuse.tokens.vocabulary import Vocabulary
from speechfuse.train import attention, backbone, loop, plan, trainer
from speechfuse.train import model as models
from tests.small_channels import ADAPTER, STACK, WIDTH, WINDOW, duplex, parts_of
from tests.small_sessions import CODEC
from tests.small_training import (
    WORDS,
    begin_and_kill,
    job,
    losses,
    sha256s,
    train_on_two_ranks,
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return parts_of(tmp_path_factory.mktemp("channels"))


@pytest.fixture(scope="module")
def trained(parts) -> Path:
    loop.run(job(duplex(parts, parts / "trained", steps=12)))
    return parts / "trained"


@pytest.fixture(scope="module")
def vocabulary(parts) -> Vocabulary:
    return Vocabulary.load(parts / "init")


def test_label_tracks_of_one_second(vocabulary):
    """The session of NeMo's own test of its data set: turns of 0.3 to 0.4 s and 0.6 to 1.0 s in 13
    frames. There its end mark takes the place of the first turn's only word."""
    one, two = (vocabulary.text(word)[0] for word in WORDS[:2])
    turns = [
        {"role": "user", "start": 0.0, "end": 0.1, "text": "one"},
        {"role": "assistant", "start": 0.3, "end": 0.4, "text": "x", "codes": [7, 8, 9, 10]},
        {"role": "assistant", "start": 0.6, "end": 1.0, "text": "y", "codes": [*range(10, 20)]},
    ]

    class Words:
        end, begin, end_of_turn = 0, 1, 2

        def text(self, text: str) -> list[int]:
            return {"x": [one], "y": [two]}[text]

    text, codes = channels.tracks(Words(), turns, 13, 12.5, np.array([50, 51]), 256)
    assert text.tolist() == [0, 0, 0, 0, 1, one, 2, 0, 1, two, 0, 0, 0]
    begin, end, delay = ([256 + mark] * 2 for mark in channels.MARKS)
    quiet = [50, 51]
    # exactly one frame behind the text; what lies under a mark is lost, in the second turn 10, 11
    assert codes.tolist() == [
        *[delay, quiet, quiet, quiet, quiet, begin, [9, 10], end, quiet],
        *[begin, [12, 13], [14, 15], [16, 17]],
    ]


def test_text_is_cut_by_the_next_turn_and_by_a_stop_alone(vocabulary):
    class Words:
        end, begin, end_of_turn = 0, 1, 2

        def text(self, text: str) -> list[int]:
            return list(range(10, 16))

    def of(*turns: dict) -> list[int]:
        own = [{"role": "assistant", "text": "", "codes": []} | turn for turn in turns]
        return channels.tracks(Words(), own, 12, 12.5, np.zeros(1), 8)[0].tolist()

    first, long = {"start": 0.08, "end": 0.24}, [0, 1, 10, 11, 12, 13, 14, 15, 2, 0, 0, 0]
    assert of(first) == long  # the mark waits for the text
    assert of(first | {"cut": True}) == [0, 1, 10, 2, 0, 0, 0, 0, 0, 0, 0, 0]
    assert of(first, {"start": 0.4, "end": 0.96}) == [0, 1, 10, 11, 12, 1, *range(10, 16)]
    assert of({"start": 0.72, "end": 0.9}) == [0] * 9 + [1, 10, 11]
    assert of() == [0] * 12  # a user who wants no answer


def batch_of(parts: Path, numbers: list[list[int]], length: int = 0) -> dict[str, torch.Tensor]:
    entry = {"_component_": "speechfuse.fusion.duplex", "path": str(parts / "sessions")}
    entry |= {"codec": CODEC, "stack": STACK}
    index = datasets.index.build(entry, parts / "init", parts / "cache")
    rows = [[index[number] for number in row] for row in numbers]
    end = Vocabulary.load(parts / "init").end
    return views.collate(rows, length or datasets.longest(rows), end, None)


def step(parts: Path, tmp_path: Path, batches: list[dict], **changes: Any) -> Any:
    settings = job(duplex(parts, tmp_path / "step", **changes))
    made = trainer.Trainer(settings, models.decoder_of(settings))
    for parameter in (*made.model.tok_embeddings.adapter.parameters(),):  # codes begin at zero
        generator = torch.Generator().manual_seed(parameter.numel())
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    result, _ = made.backward(batches)
    gradients = {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}
    return result, gradients, made.model


def test_losses_are_those_of_the_sum_of_channels(parts, tmp_path):
    batch = batch_of(parts, [[0], [1], [25]])
    result, gradients, model = step(parts, tmp_path, [batch])
    door = model.tok_embeddings
    own = batch["codes"][..., 0] >= 0
    audio = batch["audio"].float()
    heard = door.adapter(audio, batch["audio_lengths"])
    tables = door.adapter.codes.weight.unflatten(0, (2, 259))
    text = kinds = 0.0
    vectors = F.embedding(batch["tokens"], door.weight)
    for row in range(3):
        n = int(own[row].sum())
        assert n == -(-int(batch["audio_lengths"][row]) // STACK)
        codes = batch["codes"][row, :n]
        vectors[row, :n] += tables[0][codes[:, 0]] + tables[1][codes[:, 1]] + heard[row, :n]
    places = batch["input_pos"]
    hidden = vectors
    mask = attention.mask_of(batch["document"], "dense", WINDOW)
    for layer in model.layers:
        hidden = layer(hidden, mask=mask, input_pos=places)
    hidden = model.norm(hidden)
    logits = F.linear(hidden, backbone.head_of(model)._owner[0].weight)
    labels, vocabulary = batch["labels"], Vocabulary.load(parts / "init")
    logits[..., [vocabulary.end, vocabulary.begin]] += hidden @ door.adapter.marks.T
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    pad = batch["padding"]
    said = (labels != -100) & ~pad
    spoken = door.adapter.logits(hidden)
    wanted = batch["code_labels"]
    kinds = F.cross_entropy(spoken.flatten(0, 2), wanted.flatten(), reduction="sum")
    text, silent = each[said].sum(), each[pad].sum()
    for name, value, count in (
        ("text", text, said.sum()),
        ("padding", silent, pad.sum()),
        ("codes", kinds, (wanted != -100).sum()),
    ):
        assert result[name] == (pytest.approx(value.item(), rel=1e-5), int(count)), name
    assert int(pad.sum()) > 5 * int(said.sum()) > 0
    total = 3 * text + 1.5 * silent + kinds
    count = sum(n for _, n in result.values())
    for name in ("adapter.head.weight", "adapter.codes.weight", "adapter.inner.weight"):
        parameter = dict(model.named_parameters())[f"tok_embeddings.{name}"]
        (theirs,) = torch.autograd.grad(total, parameter, retain_graph=True)
        assert torch.allclose(gradients[f"tok_embeddings.{name}"], theirs / count, atol=1e-6), name
    assert (labels[2][: int(batch["input_pos"][2].max())] != -100).any()  # behind a reading's end


def test_a_reading_is_scored_behind_its_end_alone(parts):
    batch = batch_of(parts, [[25], [1]])
    reading, answer = batch["labels"]
    end = Vocabulary.load(parts / "init").end
    assert {*reading.tolist()} == {-100, end} and len({*answer.tolist()}) > 3
    assert (batch["code_labels"][0, :20] != -100).all() and batch["padding"][0].any()


def test_packed_accumulated_and_beside_text_is_as_alone(parts, tmp_path):
    numbers = [0, 1, 2, 25]
    alone, one, _ = step(parts, tmp_path, [batch_of(parts, [[n] for n in numbers])])
    packed, two, _ = step(parts, tmp_path, [batch_of(parts, [[0, 1], [2, 25]], 90)])
    parted = [batch_of(parts, [[0], [1]]), batch_of(parts, [[2], [25]])]
    accumulated, three, _ = step(parts, tmp_path, parted)
    for other, gradients in ((packed, two), (accumulated, three)):
        for name, (value, count) in alone.items():
            assert other[name] == (pytest.approx(value, rel=1e-5), count)
        assert all(torch.allclose(g, gradients[n], atol=1e-6) for n, g in one.items())


def test_a_mask_looks_back_as_far_as_its_window():
    document = torch.tensor([[0] * 6 + [1] * 2])
    mask = attention.mask_of(document, "dense", 3)[0]
    assert mask.sum(1).tolist() == [1, 2, 3, 3, 3, 3, 1, 2]
    assert torch.equal(
        attention.mask_of(document, "dense", 8), attention.mask_of(document, "dense")
    )
    assert attention.kind_of("auto", torch.device("cpu"), True, 1024, 3) == "dense"
    with pytest.raises(ValueError, match=r"varlen takes no adapter\.window"):
        attention.kind_of("varlen", torch.device("cpu"), True, 1024, 3)


def test_training_says_its_losses_apart_and_leaves_the_base_as_it_was(parts, trained):
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss_text", "loss_padding", "loss_codes"} <= last.keys()
    epoch = trained / "epoch_0"
    speech = json.loads((epoch / "speech.json").read_text())
    assert speech["codec"]["identity"] == codec_of(CODEC).identity
    assert sha256s(epoch)["model.safetensors"] == sha256s(parts / "init")["model.safetensors"]
    assert losses(trained)[-1] < losses(trained)[0]


def session(parts: Path, length: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 300, (2, length), generator=generator)
    codes = torch.randint(0, 259, (2, length, 2), generator=generator)
    return text, codes, torch.randn(2, length * STACK, WIDTH, generator=generator)


def test_frame_by_frame_is_as_the_whole_session_across_the_window(parts, trained):
    talker = Talker(trained / "epoch_0", "e" * 64)
    text, codes, frames = session(parts, 3 * WINDOW)
    whole = talker.logits(text, codes, frames)
    talker.begin(2)
    for i, part in enumerate(frames.split(STACK, 1)):
        talker.text, talker.codes = text[:, i : i + 1], codes[:, i : i + 1]
        for offline, streamed in zip(whole, talker.step(part), strict=True):
            assert torch.allclose(offline[:, i], streamed[:, 0], atol=1e-4), i
    assert all(layer.keys.shape[2] == WINDOW - 1 for layer in talker.cache.layers)
    # what leaves the window is forgotten after as many layers
    far = WINDOW * 2 + 2
    other = [each.clone() for each in (text, codes, frames)]
    other[2][:, :STACK] *= -1
    changed = talker.logits(*other)
    assert torch.allclose(changed[0][:, far:], whole[0][:, far:], atol=1e-5)
    assert not torch.allclose(changed[0][:, : WINDOW - 1], whole[0][:, : WINDOW - 1], atol=1e-3)


def test_no_output_knows_the_future(parts, trained):
    talker = Talker(trained / "epoch_0", "e" * 64)
    text, codes, frames = session(parts, 30)
    whole = talker.logits(text, codes, frames)
    text, codes, frames = text.clone(), codes.clone(), frames.clone()
    text[:, 17:], codes[:, 17:], frames[:, 17 * STACK :] = 5, 6, 7
    for first, second in zip(whole, talker.logits(text, codes, frames), strict=True):
        assert torch.equal(first[:, :17], second[:, :17])
        assert not torch.equal(first[:, 17:], second[:, 17:])


def test_talk_gives_sound_and_turns_in_time(parts, trained):
    talker = Talker(trained / "epoch_0", "e" * 64)
    text, codes = talker.talk(session(parts, 25)[2].split(STACK, 1))
    assert text.shape == (2, 25) and codes.shape == (2, 25, 2)
    again, _ = talker.talk(session(parts, 25)[2][:1].split(STACK, 1))
    assert np.array_equal(again[0], text[0])
    vocabulary = talker.vocabulary
    said = np.full(25, vocabulary.end)
    said[3], said[4], said[9] = vocabulary.begin, vocabulary.text("one")[0], vocabulary.end_of_turn
    said[20] = vocabulary.begin
    first, second = talker.turns(said)
    assert first["start"] == pytest.approx(0.32) and first["end"] == pytest.approx(0.8)
    assert first["text"] and second == {"start": pytest.approx(1.68), "end": 2.08, "text": ""}
    marked = np.tile(talker.codec.silence(), (25, 1)).astype(np.int64)
    marked[5] = 257
    assert len(talker.sound(marked)) == 25 * 1280 and np.abs(talker.sound(marked)).max() < 0.02


def test_a_turn_begins_where_one_has_more_probably_begun_than_not(trained):
    talker = Talker(trained / "epoch_0", "e" * 64)
    begin, end = talker.vocabulary.begin, talker.vocabulary.end
    talker.begin(3)
    shares = torch.tensor([[0.2], [0.005], [0.6]])
    logits = torch.full((3, 1, len(talker.vocabulary.tokenizer)), -30.0)
    logits[..., begin], logits[..., end] = shares.log(), (1 - shares).log()
    said = torch.cat([talker._begun(logits) for _ in range(9)], 1)
    assert (said[0] == begin).nonzero().flatten().tolist() == [3, 7]  # 0.8 ** 4 < 0.5 < 0.8 ** 3
    assert said[1].tolist() == [end] * 9 and said[2].tolist() == [begin] * 9


def test_ranks_and_a_kill_change_nothing(parts, trained, tmp_path):
    train_on_two_ranks(duplex(parts, tmp_path / "ranks", steps=12))
    assert losses(tmp_path / "ranks") == pytest.approx(losses(trained), rel=1e-4)
    config = duplex(parts, tmp_path / "killed", steps=12, runtime={"state_every": 4})
    begin_and_kill(config)
    loop.run(job(config))
    ends = [
        sha256s(out / "epoch_0")["speech.safetensors"] for out in (tmp_path / "killed", trained)
    ]
    assert ends[0] == ends[1]


def test_what_does_not_fit_is_one_sentence(parts, trained, tmp_path):
    def planned(**changes: Any) -> None:
        plan.plan_run(job(duplex(parts, tmp_path / "x", **changes)), 0, 1)

    with pytest.raises(ValueError, match=r"adapter\.codebook_size=64, .* has codebook_size=256"):
        planned(adapter=ADAPTER | {"codebook_size": 64})
    entry = {"_component_": "speechfuse.fusion.duplex", "path": str(parts / "sessions")}
    entry |= {"codec": CODEC, "share": 1.0}
    with pytest.raises(ValueError, match=r"25 frames a second with stack=1, the codec 12\.5"):
        planned(datasets=[entry | {"stack": 1}])
    with pytest.raises(ValueError, match="holds no frames: `just encode` the sessions"):
        planned(datasets=[entry | {"stack": STACK, "path": str(parts / "texts")}])
    with pytest.raises(ValueError, match="is no model of two channels: it names no codec"):
        Talker(parts / "init", "e" * 64)
    with pytest.raises(ValueError, match=r"encoder|quantizer"):
        Talker(trained / "epoch_0", "f" * 64)


def looking_back() -> FrameEncoder:
    torch.manual_seed(0)
    shape = QuantizerConfig(8, 4, 2, True, 80, 250, 16, 2, 2, pad_to=1.0, look_back=10)
    encoder = FrameEncoder(shape).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder


def test_an_encoder_that_looks_back_streams_and_knows_no_future():
    encoder = looking_back()
    waveform = np.random.default_rng(0).standard_normal(96_000).astype(np.float32) * 0.1
    (whole,), (count,) = encoder.embed_batch([waveform], 1)
    streamed = torch.cat([*encoder.streamed(waveform, 1280)])
    assert count == len(streamed) == 150 and (whole[:150] - streamed).abs().max() < 1e-4
    other = waveform.copy()
    other[48_000:] = 0.3
    (second,), _ = encoder.embed_batch([other], 1)
    assert torch.equal(whole[:75], second[:75]) and not torch.equal(whole[75], second[75])
    own, _ = encoder(torch.from_numpy(waveform)[None], torch.tensor([96_000]))
    assert torch.allclose(own[0, :150], whole[:150], atol=1e-5)
    with pytest.raises(ValueError, match="look_back=10 needs pad_to"):
        QuantizerConfig(8, 4, 2, True, 80, 250, 16, 2, 2, look_back=10)
    plain = FrameEncoder(QuantizerConfig(8, 4, 2, True, 80, 250, 16, 2, 1))
    with pytest.raises(ValueError, match="hears what comes later"):
        next(plain.streamed(waveform, 1280))
