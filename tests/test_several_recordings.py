"""Several recordings in a line of a manifest, and NeMo's conversations: read, encoded, trained on,
asked, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from speechfuse import config
from speechfuse.audio import decoding
from speechfuse.corpora.clip import Clip
from speechfuse.corpora.nemo import Nemo
from speechfuse.evals import generation, speech
from speechfuse.fusion import recordings
from speechfuse.quantizer import frames, tokenize
from speechfuse.quantizer.model import Quantizer, QuantizerConfig
from speechfuse.rows import shards
from speechfuse.rows.rejects import Reject
from speechfuse.rows.several import recordings_of
from speechfuse.samples import datasets, instructions
from speechfuse.train import loop, plan
from tests.corpus_clips import everything
from tests.small_training import FROZEN, LORA, WORDS, dataset, job, losses, make_parts, recipe
from tests.test_corpora_manifests import listed, tar_of
from tests.test_on_the_fly import ADAPTER, STACK, encoder, make_corpus

AUDIO = {"from": "User", "type": "audio"}
TEXT = {"from": "User", "type": "text"}
TALK = [
    {"from": "System", "type": "text", "value": "be brief"},
    TEXT | {"value": "first:"},
    AUDIO | {"value": "0/00.wav", "offset": 0.1, "duration": 0.2},
    {"from": "Assistant", "type": "text", "value": "one"},
    AUDIO | {"value": "1/01.wav"},
    AUDIO | {"value": "0/02.wav"},
    TEXT | {"value": "and now?"},
    {"from": "Assistant", "type": "text", "value": "two three"},
]
CONTEXT = {"_component_": "speechfuse.samples.context"}


def name(number: int) -> str:
    return f"{number % 2}/{number:02d}.wav"


def pairs() -> list[dict[str, Any]]:
    """Which word came first, or second: of two recordings in a line."""
    lines = []
    for i in range(40):
        two, asked = [i, (7 * i + 3) % 40], i % 2
        two = [6 if each == 5 else each for each in two]  # 5 is longer than the encoder takes
        lines.append(
            {
                "id": f"p{i}",
                "audio_filepath": [name(each) for each in two],
                "offset": [0, 0.05],
                "duration": [None, 0.25],
                "context": f"<audio> and <audio>: {('first', 'second')[asked]}?",
                "answer": WORDS[two[asked] % 8],
            }
        )
    return lines


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    parts = make_parts(tmp_path_factory.mktemp("several"))
    torch.manual_seed(0)
    Quantizer(QuantizerConfig(16, 4, 2, True, 80, 100, 16, 2, 1)).save(parts / "quantizer")
    make_corpus(parts / "corpus")
    listed(parts / "pairs.jsonl", *pairs())
    quiet = [turn for turn in TALK if turn["type"] == "text"]
    talks = [{"id": f"c{i}", "conversations": TALK} for i in range(11)]
    listed(parts / "talks.jsonl", *talks, {"id": "text", "conversations": quiet})
    made = frames.of_quantizer(str(parts / "quantizer"))
    for which in ("pairs", "talks"):
        rows = tokenize.tokenize(clips_of(parts, which), made, 16, [], 1, 1).rows
        dataset(parts / which, shards.FRAMES, rows, made.stream)
    return parts


def clips_of(parts: Path, which: str) -> list[Clip | Reject]:
    return everything(config.instantiate(corpus(parts, which)))


def corpus(parts: Path, which: str) -> dict[str, Any]:
    spec = {"_component_": "speechfuse.corpora.nemo", "manifest": str(parts / f"{which}.jsonl")}
    return spec | {"audio_dir": str(parts / "corpus"), "id_key": "id"}


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    rows = (row | {"extra": json.loads(row["extra"])} for row in shards.read_rows(folder))
    return {row["id"]: row for row in rows}


def test_no_sound_goes_on_across_two_recordings(tmp_path):
    row = {"id": "p0", "codes": np.arange(4), "extra": json.dumps({"_recordings": [{}, {}]})}
    columns = {"seconds": 0.2, "text": None, "speaker": None, "language": None, "source": None}
    stream = {"quantizer": "q", "token_rate": 25.0, "codebooks": 1, "codebook_size": 16}
    dataset(tmp_path / "rows", shards.SPEECH, [row | columns], stream)
    view = datasets.sound(None, str(tmp_path / "rows"))  # type: ignore[arg-type]
    (row,) = shards.read_rows(tmp_path / "rows")
    assert view.selects(row)
    with pytest.raises(ValueError, match="row p0 has 2 recordings"):
        view.render(row)


def test_each_recording_is_encoded_as_it_is_alone(parts):
    rows = rows_of(parts / "pairs")
    assert len(rows) == 40
    made = frames.of_quantizer(str(parts / "quantizer"))
    for line in pairs()[:7]:
        row = rows[line["id"]]
        columns = line["audio_filepath"], line["offset"], line["duration"]
        clips = [
            Clip(path, parts / "corpus" / path, path, offset, seconds)
            for path, offset, seconds in zip(*columns, strict=True)
        ]
        alone = tokenize.tokenize(clips, made, 16, [], 1, 1).rows
        both = recordings_of(row)
        assert row["seconds"] == pytest.approx(sum(each["seconds"] for each in alone))
        assert [each["frames"] for each in both] == [each["frames"] for each in alone]
        for each, clip in zip(both, clips, strict=True):
            theirs = decoding.decode(clip.audio, clip.offset, clip.seconds).waveform
            assert np.array_equal(recordings.waveform_of(each, parts / "corpus"), theirs)


def test_codes_of_several_are_one_after_the_other(parts):
    quantizer = Quantizer.load(parts / "quantizer")
    row = tokenize.tokenize(clips_of(parts, "pairs")[:1], quantizer, 4, [], 1, 1).rows[0]
    row["extra"] = json.loads(row["extra"])
    first, second = (each["codes"] for each in recordings_of(row))
    assert len(second) == 6 and len(first) > 6
    assert np.array_equal(np.concatenate([first, second]), row["codes"])


def shown(turns: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Roles, and the text or the id of each segment."""
    of = [[s.get("text") or s["speech"]["id"] for s in turn["segments"]] for turn in turns]
    return list(zip([turn["role"] for turn in turns], of, strict=True))


def test_recordings_stand_where_the_prompt_says(parts):
    row = rows_of(parts / "pairs")["p1"]
    (user, reply) = instructions.context(row)
    asked = [segment.get("text") or segment["speech"]["id"] for segment in user["either"][0][0]]
    assert asked == ["p1[0]", " and ", "p1[1]", ": second?"] and reply["role"] == "assistant"
    for text, places in {"what?": 0, "<audio>": 1, "<audio> <audio> <audio>": 3}.items():
        row["extra"]["context"] = text
        with pytest.raises(ValueError, match=rf"row p1: .*<audio>: {places}, .*recordings: 2; the"):
            instructions.context(row)
    for turns in (instructions.answer, instructions.transcribe):
        with pytest.raises(ValueError, match=r"p1 has 2 recordings.*samples.context"):
            turns(row | {"text": "x"}, **({"requests": ["x"]} if turns.__name__[0] == "t" else {}))


def test_a_conversation_is_asked_turn_by_turn(parts):
    rows = rows_of(parts / "talks")
    whole = [
        ("system", ["be brief"]),
        ("user", ["first: ", "c0[0]"]),
        ("assistant", ["one"]),
        ("user", ["c0[1]", " ", "c0[2]", " and now?"]),
        ("assistant", ["two three"]),
    ]
    assert shown(instructions.context(rows["c0"], system="not this")) == whole
    assert shown(instructions.context(rows["text"])) == [
        ("system", ["be brief"]),
        ("user", ["first:"]),
        ("assistant", ["one"]),
        ("user", ["and now?"]),
        ("assistant", ["two three"]),
    ]
    assert rows["text"]["seconds"] == 0 and rows["text"]["frames"] is None
    rows["c0"]["extra"]["conversations"] = TALK[1:]
    assert shown(instructions.context(rows["c0"], system="this"))[0] == ("system", ["this"])


def run(parts: Path, out: Path, which: str, cached: bool = True, epochs: int = 1) -> Path:
    data = {"_component_": f"speechfuse.fusion.{'speech' if cached else 'recordings'}"}
    data |= {"path": str(parts / which), "stack": STACK, "turns": CONTEXT, "share": 1.0}
    keys: dict[str, Any] = {"checkpoint": str(parts / "init"), "model": LORA, "freeze": FROZEN}
    keys |= {"adapter": ADAPTER, "datasets": [data], "epochs": epochs, "seq_len": 96}
    runtime = None
    if not cached:
        keys["encoder"] = encoder(parts)
        runtime = {"roots": {data["path"]: str(parts / "corpus")}}
    return recipe(parts, out, runtime, **keys)


@pytest.mark.parametrize("which", ["pairs", "talks"])
def test_frames_made_in_a_training_are_those_of_the_cache(parts, tmp_path, which):
    settings = [job(run(parts, tmp_path / "a", which, cached)) for cached in (False, True)]
    fresh, cached = (plan.load_data(each, plan.pins_of(each)) for each in settings)
    made = frames.of_quantizer(str(parts / "quantizer"))
    index = cached.indexes[0]
    assert len(index) == (40 if which == "pairs" else 12) and not index.rejected
    for number in range(min(8, len(index))):
        mine, theirs = (each.sample(0, 0, number) for each in (fresh, cached))
        assert (mine.tokens == theirs.tokens).all() and len(mine.audio) == len(theirs.audio)
        for waveform, clip in zip(mine.audio, theirs.audio, strict=True):
            with torch.no_grad():
                (found,), (count,) = made(
                    torch.tensor(waveform)[None], torch.tensor([len(waveform)])
                )
            np.testing.assert_allclose(found[:count].numpy(), clip, rtol=1e-3, atol=1e-4)
    text = cached.vocabulary.tokenizer.decode(mine.tokens[mine.targets])
    assert which == "pairs" or text == "one<|eot_id|>two three<|eot_id|>"  # of every reply, no more


def test_a_model_learns_of_two_recordings_and_is_asked_as_it_was_trained(parts, tmp_path):
    loop.run(job(run(parts, tmp_path / "run", "pairs", epochs=6)))
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
    of = {"data": str(parts / "pairs"), "metric": "accuracy", "reference": "answer"}
    task = speech.Speech(turns=CONTEXT, **of, max_new_tokens=4)  # type: ignore[arg-type]
    epoch = tmp_path / "run/epoch_5"
    task.check(epoch)
    settings = job(run(parts, tmp_path / "b", "pairs"))
    sample = plan.load_data(settings, plan.pins_of(settings)).indexes[0][3]
    asker = generation.generator(epoch, task.identity, "", "cpu")
    row = task.rows[sample.name]
    prompt = asker.prompt(task.asked(row, row))
    assert prompt == sample.tokens[: len(prompt)].tolist() and sample.targets[len(prompt)]
    other = task.rows["p7"]
    swapped = asker.prompt(task.asked(row, other)).clips
    assert [len(c) for c in swapped] == [
        len(c) for c in asker.prompt(task.asked(other, other)).clips
    ]
    batches = [entry for batch in task.predict(epoch, task.ids()) for entry in batch]
    scored = task.score(batches)
    assert {entry["id"] for entry in batches} == {*task.rows} and scored.scores[0].n == 40
    with pytest.raises(ValueError, match=r"has 2 recordings.*samples\.context"):
        speech.Speech(prompt="{speech}{context}", **of).check(epoch)  # type: ignore[arg-type]


BAD = {
    "no name": ({"audio_filepath": ["a.wav", 3]}, "audio_filepath is 3, not a name"),
    "empty": ({"audio_filepath": []}, "has 0 recordings: give a list of as many, one at least"),
    "durations": (
        {"audio_filepath": ["a.wav", "b.wav"], "duration": [1.0]},
        r"duration is \[1.0\], and audio_filepath has 2 recordings",
    ),
    "offset": ({"audio_filepath": ["a.wav", "b.wav"], "offset": 1.0}, "offset is 1.0, and audio"),
    "no id": ({"conversations": TALK}, "id is None, not a name"),
    "no turn": ({"id": "c", "conversations": []}, "has no turn"),
    "no role": ({"id": "c", "conversations": [{"type": "text", "value": "x"}]}, "it needs from"),
    "spoken reply": (
        {"id": "c", "conversations": [AUDIO | {"from": "Assistant", "value": "a.wav"}]},
        r"of a User audio",
    ),
    "zero": (
        {"id": "c", "conversations": [AUDIO | {"value": "a", "duration": 0}]},
        "duration is 0",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_line_is_one_sentence(tmp_path, fault):
    line, why = BAD[fault]
    (reject,) = everything(Nemo(str(listed(tmp_path / "m.jsonl", line))))
    assert isinstance(reject, Reject) and reject.reason.startswith("bad manifest line: line 1: ")
    with pytest.raises(ValueError, match=why):
        raise ValueError(reject.reason)


def test_what_is_wrong_with_a_recording_names_it(parts, tmp_path):
    lines = [
        {"audio_filepath": ["0/00.wav", "gone.wav"]},
        {"audio_filepath": ["0/00.wav", "1/01.wav"], "duration": [99.0, None]},
        {"audio_filepath": ["0/00.wav", "1/05.wav"]},
        {"audio_filepath": ["0/02.wav", "1/01.wav"], "duration": [0.01, None]},
        {"audio_filepath": ["../out.wav", "1/01.wav"]},
    ]
    clips = everything(Nemo(str(listed(tmp_path / "m.jsonl", *lines)), str(parts / "corpus")))
    made = frames.of_quantizer(str(parts / "quantizer"))
    shard = tokenize.tokenize(clips, made, 4, [], 1, 1)
    said = {reject["reason"].partition(":")[0]: reject["reason"] for reject in shard.rejects}
    assert not shard.rows and len(shard.rejects) == 5
    assert said["not found"].endswith("(gone.wav)") and "99.00 s" in said["bad duration"]
    assert "1/05.wav is longer than the 2 s" in said["too long"]
    assert {"too short", "unsafe path"} < said.keys()


def test_lines_of_two_forms_are_refused(tmp_path):
    single = {"audio_filepath": "a.wav"}
    manifest = listed(tmp_path / "m.jsonl", single, {"id": "c", "conversations": TALK})
    with pytest.raises(
        ValueError, match=r"m.jsonl: line 2 is a conversation, and a line above it a"
    ):
        Nemo(str(manifest)).plan(10)


def test_conversations_are_read_from_tars_and_some_are_skipped(parts, tmp_path):
    names = [turn["value"] for turn in TALK if turn["type"] == "audio"]
    files = {path: (parts / "corpus" / path).read_bytes() for path in names}
    tar = tar_of(tmp_path / "audio_0.tar", **files)
    lines = [
        {"id": "c", "conversations": TALK},
        {"id": "s", "conversations": TALK, "custom": {"_skipme": True}},
        {"id": "g", "conversations": [AUDIO | {"value": "gone.wav"}]},
    ]
    manifest = listed(tmp_path / "manifest_0.jsonl", *lines)
    found, skipped, gone = everything(Nemo(str(manifest), tars=str(tar)))
    assert isinstance(skipped, Reject) and skipped.reason.startswith("filter skipme")
    assert isinstance(gone, Reject) and gone.id == "g" and "(audio_0/gone)" in gone.reason
    assert isinstance(found, Clip) and found.recordings and found.extra["answer"] == "two three"
    made = frames.of_quantizer(str(parts / "quantizer"))
    (row,) = tokenize.tokenize([found], made, 4, [], 1, 1).rows
    assert row["frames"] == next(shards.read_rows(parts / "talks"))["frames"]
    assert soundfile.info(parts / "corpus" / names[1]).samplerate == 22_050  # resampled as there
