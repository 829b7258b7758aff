"""`just ask` and `just say`: what a user may do wrong ends in one sentence and exit status 2."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechfuse import config
from speechfuse.audio import decoding
from speechfuse.quantizer.model import Quantizer
from speechfuse.tokens import expansion
from stages import ask, expand_vocab
from tests.demo_code import demo

say = demo("say")

DEMO = Path(__file__).parent.parent / "recipes/demo"


def called(monkeypatch, capsys, job, *overrides: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a job called as from the command line."""
    schema = {ask: ask.Ask, say: say.Say}[job]
    name = {ask: "ask.yaml", say: "say.yaml"}[job]
    monkeypatch.chdir(DEMO.parent.parent)
    monkeypatch.setattr(sys, "argv", ["job", str(DEMO / name), *overrides])
    status = 0
    try:
        config.main(job.main, schema, job.__doc__)
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def expanded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ask") / "expanded"
    expand_vocab.main(
        expand_vocab.ExpandVocab(
            str(folder), str(DEMO / "models/base"), str(DEMO / "models/quantizer")
        )
    )
    return folder


def wrong_files(folder: Path) -> dict[str, tuple[Path, str]]:
    text = folder / "notes.wav"
    text.write_text("this is not audio")
    empty = folder / "empty.wav"
    soundfile.write(empty, np.zeros(0, np.float32), decoding.SAMPLE_RATE)
    return {
        "missing": (folder / "missing.wav", "no audio file at"),
        "text": (text, "is not a readable audio file"),
        "empty": (empty, "holds 0 seconds of audio"),
    }


@pytest.mark.parametrize("kind", ["missing", "text", "empty"])
def test_files_that_cannot_be_asked(kind, expanded, tmp_path, monkeypatch, capsys):
    path, said = wrong_files(tmp_path)[kind]
    status, _, err = called(monkeypatch, capsys, ask, f"file={path}", f"checkpoint={expanded}")
    assert status == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ") and said in line and path.name in line


@pytest.mark.parametrize("value", [0, -1])
def test_a_reply_has_a_token(value, tmp_path, monkeypatch, capsys):
    asked = "--check", f"file={tmp_path}/q.wav", f"max_new_tokens={value}"
    status, _, err = called(monkeypatch, capsys, ask, *asked)
    assert (status, err) == (2, f"error: max_new_tokens={value}: at least 1 is needed\n")


def test_asking_before_there_is_a_report(tmp_path, monkeypatch, capsys):
    wav = tmp_path / "q.wav"
    assert called(monkeypatch, capsys, say, f"file={wav}")[0] == 0
    status, _, err = called(
        monkeypatch, capsys, ask, f"file={wav}", f"report={tmp_path / 'report.json'}"
    )
    assert status == 2 and "no recipe here makes it" in err and "give checkpoint=FOLDER" in err
    status, _, err = called(monkeypatch, capsys, ask, f"file={wav}", "report=out/demo/no.json")
    assert status == 2 and "no report at out/demo/no.json: `just recipe=demo sweep` makes it" in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{oops", "is no report"),
        (b"[1, 2]", "is no report"),
        (b'{"a": 1}', "is no report"),
        (b"7", "is no report"),
        (b'[{"checkpoint": "x"}]', "is no report"),
        ("[]".encode("utf-16"), "is no report"),
        (b"[]", "marks 0 checkpoints"),
        (b'[{"checkpoint": "x", "chosen": NaN}]', "marks 0 checkpoints"),
        (b'[{"checkpoint": null, "chosen": true}]', "is no report"),
    ],
)
def test_a_report_of_another_form_is_one_sentence(content, said, tmp_path, monkeypatch, capsys):
    wav, report = tmp_path / "q.wav", tmp_path / "report.json"
    assert called(monkeypatch, capsys, say, f"file={wav}")[0] == 0
    report.write_bytes(content)
    status, _, err = called(monkeypatch, capsys, ask, f"file={wav}", f"report={report}")
    assert status == 2 and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("repeats", "lines"), [("true", ["heard:  a b", "answer: c"]), ("false", ["answer: a b"])]
)
def test_what_was_heard_is_the_first_line_where_the_model_repeats_it(
    repeats, lines, expanded, tmp_path, monkeypatch, capsys
):
    wav = tmp_path / "q.wav"
    called(monkeypatch, capsys, say, f"file={wav}")
    monkeypatch.setattr("speechfuse.evals.generation.Generator.reply", lambda *_: ["a b\nc\nd"])
    asked = f"file={wav}", f"checkpoint={expanded}", f"repeat_first={repeats}"
    status, out, _ = called(monkeypatch, capsys, ask, *asked)
    assert status == 0 and out.splitlines()[: len(lines)] == lines and out.endswith("c\nd\n")


def test_silence_at_the_ends_is_left_out_and_said(expanded, tmp_path, monkeypatch, capsys):
    wav, noise = tmp_path / "q.wav", np.random.default_rng(0).normal(0, 0.1, 16_000)
    soundfile.write(wav, np.pad(noise, (8_000, 16_000)), 16_000)
    keys = f"file={wav}", f"checkpoint={expanded}", "max_new_tokens=4"
    status, _, err = called(monkeypatch, capsys, ask, *keys)
    assert status == 0 and "1.3 s of silence at its ends are left out" in err


def test_long_audio_is_asked_in_pieces_and_said(expanded, tmp_path, monkeypatch, capsys):
    wav = tmp_path / "long.wav"
    soundfile.write(wav, np.random.default_rng(0).normal(0, 0.1, 12 * 16_000), 16_000)
    keys = f"file={wav}", f"checkpoint={expanded}"
    status, out, err = called(monkeypatch, capsys, ask, *keys, "max_new_tokens=4")
    assert (status, err.count("error")) == (0, 0)
    assert "12.0 s of audio in 3 pieces" in out and "answer:" in out
    status, out, err = called(monkeypatch, capsys, ask, *keys, "max_new_tokens=9000")
    assert status == 2 and "answer:" not in out
    assert f"error: {wav}: with the reply it is 9,3" in err and "9,216 at most" in err


def test_a_checkpoint_of_another_quantizer_is_refused(tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    expansion.expand(
        DEMO / "models/base",
        other,
        256,
        "f" * 64,
        0,
        {"_component_": "speechfuse.tokens.mean_and_covariance"},
    )
    wav = tmp_path / "q.wav"
    called(monkeypatch, capsys, say, f"file={wav}")
    status, _, err = called(monkeypatch, capsys, ask, f"file={wav}", f"checkpoint={other}")
    identity = Quantizer.load(DEMO / "models/quantizer").identity
    assert status == 2 and identity[:12] in err and "ffffffffffff" in err


def test_the_encoder_of_a_published_quantizer_is_cut_as_it_was_for_the_training(
    expanded, tmp_path, monkeypatch, capsys
):
    wav, golden = tmp_path / "q.wav", DEMO.parent.parent / "tests/golden"
    called(monkeypatch, capsys, say, f"file={wav}")
    files = golden / "whispervq.model", golden / "whisper.pt"
    keys = f"file={wav}", f"checkpoint={expanded}", f"quantizer={files[0]}", f"whisper={files[1]}"
    for window in (None, 2.0):  # that of another is refused, which names the one that was asked
        own = Quantizer.load(*files, window).identity
        status, _, err = called(monkeypatch, capsys, ask, *keys, f"window={window or 'null'}")
        assert status == 2 and own[:12] in err
    folder = DEMO / "models/quantizer"
    status, _, err = called(monkeypatch, capsys, ask, *keys, f"quantizer={folder}")
    said = f"error: whisper={files[1]}: {folder} has its own encoder: leave whisper out\n"
    assert (status, err) == (2, said)


@pytest.mark.parametrize("text", ["note: this", "what is 3 + 4", "[a, b]"])
def test_any_text_can_be_said(text, tmp_path, monkeypatch, capsys):
    wav = tmp_path / "said.wav"
    assert called(monkeypatch, capsys, say, f"text={text}", f"file={wav}")[0] == 0
    assert len(decoding.load(wav)) > 8000


def test_nothing_cannot_be_said(tmp_path, monkeypatch, capsys):
    status, _, err = called(monkeypatch, capsys, say, "text=", f"file={tmp_path / 'a.wav'}")
    assert status == 2 and "text is empty" in err


def test_a_prompt_stands_around_the_audio(expanded, tmp_path, monkeypatch, capsys):
    wav, asked = tmp_path / "q.wav", list[list[str]]()
    called(monkeypatch, capsys, say, f"file={wav}")

    def reply(_, turns, *rest):
        asked.append([part.get("text", "speech") for part in turns[0][0]["segments"]])
        return ["x"]

    monkeypatch.setattr("speechfuse.evals.generation.Generator.reply", reply)
    ask_with = f"file={wav}", f"checkpoint={expanded}"
    assert called(monkeypatch, capsys, ask, *ask_with, "prompt=repeat:{speech}")[0] == 0
    assert called(monkeypatch, capsys, ask, *ask_with)[0] == 0
    assert asked == [["repeat:", "speech"], ["speech"]]
    assert called(monkeypatch, capsys, ask, *ask_with, "request=repeat:")[1] == "answer: x\n"
    assert asked[2] == ["repeat:", "speech"]
    for wrong in ("prompt=repeat:", "request=repeat:{speech}"):
        status, _, err = called(monkeypatch, capsys, ask, *ask_with, wrong)
        assert status == 2 and "must hold {speech} once, and request={speech} never" in err
