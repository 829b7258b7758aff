"""Sessions of two channels in time: drawn, recorded, built, and read as a corpus."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechfuse import artifact, config
from speechfuse.audio import decoding
from speechfuse.codecs.codec import codec_of
from speechfuse.corpora.sessions import Sessions as Corpus
from speechfuse.rows import shards
from speechfuse.rows.rejects import Reject
from speechfuse.synthesis.sessions import Sessions
from speechfuse.synthesis.stereo import Stereo
from stages import build_duplex
from tests.small_sessions import CODEC, FOLDER, SHARES, job, texts


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sessions")
    texts(folder / "texts")
    build_duplex.main(job(folder / "texts", folder / "duplex"))
    return folder / "duplex"


def clips(built: Path) -> list:
    corpus = Corpus(str(built))
    return [clip for shard in corpus.plan(0) for clip in corpus.clips(shard)]


def test_every_kind_is_there_as_often_as_its_share_says(built):
    kinds = [clip.extra["kind"] for clip in clips(built)]
    assert {kind: kinds.count(kind) for kind in SHARES} == {
        k: int(16 * s) for k, s in SHARES.items()
    }
    assert artifact.manifest_of(built)["totals"]["rows"] == 16
    assert shards.read_stream(built) == codec_of(CODEC).stream


def test_turns_have_the_times_that_were_drawn(built):
    seen, silence = set(), codec_of(CODEC).silence().tolist()
    for clip in clips(built):
        turns, kind, extra = clip.extra["turns"], clip.extra["kind"], clip.extra
        waveform = decoding.decode(clip.audio, clip.offset, clip.seconds).waveform
        assert len(waveform) == round(extra["seconds"] * 16000) and len(waveform) % 1280 == 0
        speaking = np.zeros(len(waveform), bool)
        for turn in turns:
            assert 0 < turn["start"] < turn["end"] < extra["seconds"]
            if turn["role"] == "user":
                speaking[round(turn["start"] * 16000) : round(turn["end"] * 16000)] = True
                continue
            frames = (turn["end"] - turn["start"]) * 12.5
            assert frames == pytest.approx(len(turn["codes"]) / 2) and turn["codes"][:2] == silence
            assert turn["start"] * 12.5 == pytest.approx(round(turn["start"] * 12.5))
        # real silence: never zeros, and below the speech
        assert (np.abs(waveform).reshape(-1, 1280).max(1) > 0).all()
        if speaking.any():
            assert np.square(waveform[speaking]).mean() > 20 * np.square(waveform[~speaking]).mean()
        roles = [turn["role"] for turn in turns]
        assert (
            roles
            == {
                "answer": ["user", "assistant"],
                "pause": ["user", "assistant"],
                "twice": ["user", "assistant"] * 2,
                "barge_in": ["user", "assistant"] * 2,
                "backchannel": ["user", "assistant", "user"],
                "user_only": ["user"],
                "reading": ["assistant"],
            }[kind]
        )
        answers = [pair for pair in pairwise(turns) if [t["role"] for t in pair] == roles[:2]]
        if kind in ("answer", "twice", "pause", "barge_in"):
            for (user, agent), gap in zip(answers, extra["gaps"], strict=True):
                assert abs(agent["start"] - user["end"] - gap) <= 0.041 and 0.4 <= gap <= 1.2
                assert agent["text"].startswith(user["text"] + "\n")
        if kind == "barge_in":
            assert 0 < turns[1]["end"] - turns[2]["start"] < 0.64 + 0.081
            assert turns[1].get("cut") or turns[1]["end"] <= turns[2]["start"] + 0.72
        if kind == "backchannel":
            assert turns[1]["start"] < turns[2]["start"] < turns[1]["end"] and "cut" not in turns[1]
        seen |= {kind} if kind != "pause" else {kind, turns[0]["end"] - turns[0]["start"] > 1.5}
    assert seen >= {*SHARES, True}


def test_a_shard_made_again_is_the_same(built, tmp_path):
    other = tmp_path / "again"
    again = job(built.parent / "texts", other)
    build_duplex.main(again)
    names = [path.name for path in sorted(built.glob("shard-*"))]
    assert len(names) == 6
    for name in names:
        assert (built / name).read_bytes() == (other / name).read_bytes(), name
    (other / "manifest.json").unlink()
    for path in other.glob("shard-00001.*"):
        path.unlink()  # as after a kill between the shards
    build_duplex.main(again)
    for name in names:
        assert (built / name).read_bytes() == (other / name).read_bytes(), name


def test_what_cannot_be_built_is_one_sentence(built, tmp_path):
    own = built.parent / "texts"
    with pytest.raises(ValueError, match="kinds: there is no 'anser'; there are answer, twice"):
        config.instantiate(job(own, tmp_path, kinds={"anser": 1.0}).source)
    with pytest.raises(ValueError, match=r"select={'fact': 'x'} leaves nothing with an answer"):
        config.instantiate(job(own, tmp_path, select={"fact": "x"}).source)
    lost = config.instantiate(
        job(texts(tmp_path / "t", 90), tmp_path, kinds={"answer": 1.0}).source
    )
    assert isinstance(lost, Sessions)
    made = [*lost.made({"first": 0, "count": 8}, codec_of(CODEC))]
    rejects = [each for each in made if isinstance(each, Reject)]
    assert rejects and "no codes: of 'what is nothing'" in rejects[0].reason
    other = codec_of(CODEC).__class__({**codec_of(CODEC).tensors})
    other.identity = "f" * 64
    with pytest.raises(ValueError, match="just fit-codec"):
        next(iter(lost.made({"first": 0, "count": 1}, other)))
    with pytest.raises(ValueError, match="holds no sessions: `just build-duplex` makes them"):
        Corpus(str(own))


def recorded(folder: Path, channels: int, turns: list[dict], seconds: float = 2.0) -> Path:
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((round(8000 * seconds), channels)) * 0.1
    soundfile.write(folder / "call.wav", samples, 8000)
    line = {"audio_filepath": "call.wav", "turns": turns, "call": 7}
    path = folder / "calls.jsonl"
    path.write_text(json.dumps(line) + "\n")
    return path


def test_stereo_recordings_are_sessions_too(tmp_path):
    turns = [
        {"role": "assistant", "start": 0.8, "end": 1.6, "text": "hello"},
        {"role": "user", "start": 0.1, "end": 0.5, "text": "hi"},
    ]
    source = Stereo(str(recorded(tmp_path, 2, turns)))
    assert source.plan(10) == [{"count": 1, "first": 0}]
    (session,) = source.made({"first": 0, "count": 1}, codec_of(CODEC))
    assert [turn["text"] for turn in session.turns] == ["hi", "hello"] and session.extra == {
        "call": 7
    }
    assert session.turns[1]["codes"].shape == (10, 2) and len(session.waveform) == 32000
    spec = {"_component_": "speechfuse.synthesis.Stereo", "manifest": str(tmp_path / "calls.jsonl")}
    made = job(tmp_path, tmp_path / "out")
    made.source = spec
    build_duplex.main(made)
    (clip,) = clips(tmp_path / "out")
    assert clip.extra["turns"][1]["codes"] == session.turns[1]["codes"].flatten().tolist()
    assert clip.extra["turns"][0]["start"] == pytest.approx(0.1) and clip.extra["call"] == 7


@pytest.mark.parametrize(
    ("channels", "turn", "reason"),
    [
        (1, {}, "call.wav has 1 channels: user and agent need one each"),
        (2, {"end": 2.5}, "call.wav has 2.00 s, and a turn"),
        (2, {"role": "agent"}, "its role is user or assistant"),
        (2, {"start": 1.0, "end": 0.5}, "it lies in the file"),
        (2, {"start": None}, "TypeError"),
    ],
)
def test_a_bad_recording_is_a_reject_that_says_why(tmp_path, channels, turn, reason):
    good = {"role": "user", "start": 0.1, "end": 0.5, "text": "hi"}
    source = Stereo(str(recorded(tmp_path, channels, [good | turn])))
    (reject,) = source.made({"first": 0, "count": 1}, codec_of(CODEC))
    assert isinstance(reject, Reject) and reason in reject.reason and "line 1" in reject.reason


def test_a_manifest_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no manifest of stereo recordings at"):
        Stereo(str(tmp_path / "none.jsonl"))
    assert FOLDER.is_dir()
