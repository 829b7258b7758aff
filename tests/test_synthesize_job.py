"""The job that speaks instruction text: what rows hold, nothing cropped, resuming to the same
bytes, refusals in one line."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import yaml

from speechfuse import artifact, config
from speechfuse.hub import cards
from speechfuse.openai_server import Unavailable
from speechfuse.quantizer.model import Quantizer
from speechfuse.rows import rejects, shards
from speechfuse.rows.rejects import Reject
from speechfuse.samples import datasets
from speechfuse.synthesis import plan as synthesis_plan
from speechfuse.synthesis.engines import Spoken
from speechfuse.synthesis.recording import Recorder, engines_of
from speechfuse.synthesis.round_trip import SynthesizedClip
from speechfuse.texts.conversations import Conversation, Turn
from speechfuse.tokens.expansion import add_sound_tokens
from speechfuse.tokens.vocabulary import SoundLayout, Vocabulary
from speechfuse.workers import prefetch
from stages import synthesize_instructions, verify
from tests.demo_code import demo
from tests.speech_server import SpeechServer
from tests.test_kinds import texts

init_base = demo("init_base")

ROOT = Path(__file__).parent.parent
QUANTIZER = "recipes/demo/models/quantizer"  # its window is 5 s
ENVIRONMENT = {**os.environ, "PYTHONPATH": "pipeline:.", "OMP_NUM_THREADS": "1"}
LONG = "What is this? It is a text of several sentences. " * 4 + "Who can say it in one breath?"
ENDLESS = " ".join(["and"] * 80)
KINDS: dict[str, dict[str, Any]] = {
    "instruction": {"_component_": "speechfuse.synthesis.Instruction", "share": 0.4},
    "transcription": {
        "_component_": "speechfuse.synthesis.Transcription",
        "share": 0.2,
        "requests": ["repeat:"],
    },
    "partly": {"_component_": "speechfuse.synthesis.PartlySpoken", "share": 0.1},
    "turns": {"_component_": "speechfuse.synthesis.MultiTurn", "share": 0.1},
    "refusal": {
        "_component_": "speechfuse.synthesis.Refusal",
        "share": 0.1,
        "replies": ["what?"],
        "most": 2.0,
    },
    "text": {"_component_": "speechfuse.synthesis.Text", "share": 0.1},
}
ESPEAK = {
    "_component_": "speechfuse.synthesis.Espeak",
    "accents": ["en-us"],
    "variants": ["Annie", "m3"],
}


def inline(function: Callable, tasks: list[tuple], workers: int, device: str) -> Iterator[Any]:
    """An engine that needs no process."""
    return (function(*task) for task in tasks)


class Beep:
    """Says every text as a tone of its own, 20 characters a second, or as `codes`."""

    max_characters = None
    language, parallel, not_identity = "en", 4, ()

    def __init__(self, codec: str | None = None, without: str = "") -> None:
        self.codec, self.without = codec, without

    def voices(self) -> list[str]:
        return ["low", "high"]

    def check(self) -> None: ...

    def identity(self) -> dict[str, Any]:
        return {"engine": "beep"}

    def speak(self, text: str, voice: str, seed: int) -> Spoken:
        if self.without and Path(self.without).exists() and "twelve" in text:
            raise Unavailable("the server http://127.0.0.1:1/v1 does not answer; start it")
        if self.codec:
            return Spoken(codes=np.frombuffer(text.encode(), np.uint8).astype(np.uint16) % 256)
        time = np.arange(len(text) * 800) / 16_000
        pitch = (100 if voice == "low" else 300) + sum(text.encode()) % 100
        return Spoken((0.5 * np.sin(2 * np.pi * pitch * time)).astype(np.float32))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class Listener:
    """Hears nothing of what is said high."""

    not_identity = ()

    def check(self, codec: str) -> None: ...

    def identity(self) -> dict[str, Any]:
        return {"listener": "test"}

    def transcribe(self, made: list[SynthesizedClip]) -> list[str]:
        assert all(len(each.codes) and each.waveform is not None for each in made)
        crossings = [np.mean(np.diff(np.sign(m.waveform)) != 0) * 8000 for m in made]
        return [m.text if pitch < 250 else "" for m, pitch in zip(made, crossings, strict=True)]


def stored(folder: Path) -> Path:
    names = "one two three four five six seven eight nine ten eleven twelve".split()
    found = [
        Conversation(
            f"q{i}",
            [Turn("user", f"what is {a} plus {b}"), Turn("assistant", f"{a} and {b}")],
            "sums",
            {"licence": "mit", "level": i % 2},
        )
        for i, (a, b) in enumerate((a, b) for a in names for b in names[:3])
    ]
    found.insert(7, Conversation("long", [Turn("user", LONG), Turn("assistant", "yes")], "talk"))
    found += [
        Conversation(
            f"m{i}",
            [
                Turn("user", f"who is {a}"),
                Turn("assistant", f"{a} is one"),
                Turn("user", f"and after {a}"),
                Turn("assistant", "another"),
                Turn("user", f"no more {a}"),
                Turn("assistant", "fine"),
            ],
            "talk",
        )
        for i, a in enumerate(names)
    ]
    return texts(folder, found, 20)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Of a job over the texts in `folder`."""
    return {
        "out": str(folder / "data"),
        "texts": str(folder / "texts"),
        "kinds": KINDS,
        "voices": {"espeak": ESPEAK},
        "quantizer": {"checkpoint": QUANTIZER},
        "samples": 90,
        "shard_size": 25,
        "batch_size": 4,
        "runtime": {"device": "cpu", "engine": {"_component_": f"{__name__}.inline"}},
        **changes,
    }


def called(monkeypatch, path: Path, *overrides: str) -> int:
    """Exit status of the command line, in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["synthesize_instructions", str(path), *overrides])
    this = synthesize_instructions
    try:
        config.main(this.main, this.SynthesizeInstructions, this.__doc__ or "")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **changes)))
    return path


def hashes(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("shard-*"))}


def parquet(files: Iterable[str]) -> int:
    return sum(name.endswith(".parquet") for name in files)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Folder of texts, job.yaml and data: 90 samples of every kind by espeak-ng."""
    folder = tmp_path_factory.mktemp("spoken")
    stored(folder / "texts")
    steps = [
        {"_component_": "speechfuse.audio.Noise", "snr": [10, 30], "probability": 0.5},
        {"_component_": "speechfuse.audio.Gain", "db": [-6, 0]},
    ]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert called(monkeypatch, written(folder, augmentation=steps)) == 0
    return folder


def job_of(folder: Path) -> synthesize_instructions.SynthesizeInstructions:
    return config.load(synthesize_instructions.SynthesizeInstructions, folder / "job.yaml", [])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = list(shards.read_rows(folder / "data"))
    return [{**row, "extra": json.loads(row["extra"])} for row in rows]


def speech_in(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [s["speech"] for t in row["turns"] for s in t["segments"] if s["speech"]]


def test_every_kind_is_made_as_often_as_planned_and_each_row_says_its_text(whole):
    rows, texts = (
        rows_of(whole),
        {c.id: c for _, c in synthesis_plan.conversations(whole / "texts")},
    )
    assert len(rows) == 90
    counted = Counter(row["extra"]["kind"] for row in rows)
    assert counted == {name: 90 * spec["share"] for name, spec in KINDS.items()}
    for row in rows:
        kind, text = row["extra"]["kind"], texts[row["extra"]["text"]]
        assert row["extra"]["source"] == text.source
        assert row["extra"].get("licence") == text.extra.get("licence")
        said = [
            " ".join(
                (s["speech"]["text"] or "-") if s["speech"] else s["text"] for s in turn["segments"]
            )
            for turn in row["turns"]
        ]
        roles = [turn["role"] for turn in row["turns"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        if kind == "transcription":
            assert said == [f"repeat: {text.prompts[0]}", text.prompts[0]]
        elif kind == "refusal":
            assert said[-2:] == ["-", "what?"]
            assert said[:-2] == [turn.text for turn in text.turns][: len(said) - 2]
        else:  # whole, in order, nothing twice
            assert [" ".join(s.split()) for s in said] == [
                " ".join(t.text.split()) for t in text.turns
            ]
        assert bool(speech_in(row)) == (kind != "text")
    spoken = Counter(
        tuple(bool(t["segments"][0]["speech"]) for t in row["turns"][::2])
        for row in rows
        if row["extra"]["kind"] == "turns"
    )
    assert len(spoken) > 2  # speech in any user turn


def test_codes_are_those_of_the_sound_made_again_from_the_plan(whole):
    job, quantizer = job_of(whole), Quantizer.load(ROOT / QUANTIZER)
    assert shards.read_stream(whole / "data") == quantizer.stream
    kinds = synthesis_plan.entries_of(job.kinds, job.texts)
    engines = engines_of(job.voices)
    recording = Recorder(kinds, engines, job.augmentation, job.seed, quantizer)
    plan = json.loads((whole / "data/plan.json").read_text())["plan"]["shards"]
    rows = {row["id"]: row for row in rows_of(whole)}
    augmented, exact, codes = Counter[str](), 0, 0
    for sample, text in synthesis_plan.with_texts(plan[1]["samples"], kinds):
        again = recording.record(sample, text)
        assert not isinstance(again, Reject)
        speech = speech_in(rows[sample["id"]])
        assert len(speech) == len(again.pieces)
        for row, piece in zip(speech, again.pieces, strict=True):
            assert row["seconds"] == pytest.approx(piece.seconds) and piece.seconds <= 5
            extra = json.loads(row["extra"])
            augmented.update(step["name"] for step in extra["augmentation"])
            found = np.array(quantizer.encode([piece.waveform], 4)[0])
            if "shuffled" in extra or not piece.voice:
                assert row["text"] is None
                assert not np.array_equal(row["codes"], found) or "sound" in extra
                if "shuffled" in extra:
                    assert len(row["codes"]) == len(found)
                continue
            assert row["speaker"] == piece.voice and row["language"] == "en"
            assert {"seed", "rate", "pitch", "augmentation"} <= extra.keys()
            exact, codes = exact + np.sum(found == row["codes"]), codes + len(found)
    assert exact / codes > 0.98  # other neighbours in the batch: near-ties
    assert 0 < augmented["noise"] < augmented["gain"]


def test_what_cannot_be_said_in_one_breath_is_said_sentence_by_sentence(whole):
    found = [row for row in rows_of(whole) if row["extra"]["text"] == "long"]
    assert "instruction" in {row["extra"]["kind"] for row in found}
    split = 0
    for row in found:
        speech = [s for s in speech_in(row) if s["text"]]
        if row["extra"]["kind"] in ("instruction", "transcription"):
            assert len(speech) > 2 and " ".join(s["text"] for s in speech) == LONG
            parent = speech[0]["parent"]
            assert [(s["id"], s["part"]) for s in speech] == [
                (f"{parent}#{i}", i) for i in range(len(speech))
            ]
            assert all(s["text"][-1] in ".?" for s in speech)
        split += any(s["parent"] for s in speech_in(row))
    totals = artifact.manifest_of(whole / "data")["totals"]
    assert totals["split"] == split and totals["pieces"] >= 3 * split


def test_the_dataset_verifies_and_its_totals_count_kinds_voices_and_sources(whole, capsys):
    verify.main(verify.Verify(str(whole / "data")))
    assert capsys.readouterr().out.splitlines()[-1].startswith("verified: ")
    rows, totals = rows_of(whole), artifact.manifest_of(whole / "data")["totals"]
    speech = [s for row in rows for s in speech_in(row)]
    assert totals["kinds"]["turns"] == {"planned": 9, "made": 9}
    assert totals["voices"] == Counter(s["speaker"] for s in speech if s["speaker"])
    assert totals["sources"] == Counter(row["extra"]["source"] for row in rows)
    assert totals["licence"] == "mit and unknown" and totals["pieces_of_speech"] == len(speech)
    assert totals["codes"] == sum(len(s["codes"]) for s in speech)
    assert (totals["rejected"], totals["filtered"]) == ({}, {})


def test_the_card_counts_kinds_voices_sources_and_what_was_left_out(whole):
    card = cards.card(whole / "data", ROOT / "data_cards", "me/spoken")
    assert "| samples of the kind `turns` | 9 of 9 planned |" in card
    assert "| voices | 2, each in " in card and "espeak/en-us+Annie" in card
    sums = sum(row["extra"]["source"] == "sums" for row in rows_of(whole))
    assert f"- sums: {sums} samples, licence mit" in card
    assert "- talk: " in card and "licence not stated" in card
    assert "texts were too long for one breath" in card
    assert "`speechfuse.audio.Noise`: probability 0.5, snr [10, 30]" in card
    assert "90 conversations" in card and "of a speech quantizer" in card


def test_training_reads_it_and_a_kind_can_be_chosen(whole):
    tokenizer = init_base.train_tokenizer(["what is one plus two"] * 9, vocab_size=270)
    first = len(tokenizer)
    add_sound_tokens(tokenizer, 512)
    layout = SoundLayout(first, first + 1, first + 2, 512, "q")
    vocabulary = Vocabulary(tokenizer, layout)
    view = datasets.conversations(vocabulary, str(whole / "data"), select={"kind": "partly"})
    partly = [row for row in shards.read_rows(whole / "data") if view.selects(row)]
    assert len(partly) == 9
    for row in partly:
        sample = view.render(row)
        assert sample
        parts = [s["text"] for t in row["turns"] for s in t["segments"] if s["text"]]
        text = tokenizer.decode(sample.tokens)
        assert all(part in text for part in parts)
        sound = [i for i in sample.tokens if i >= first]
        assert len(sound) == 2 + sum(len(s["codes"]) for s in speech_in(row))


def test_a_missing_shard_is_made_again_with_the_same_bytes_by_other_processes(whole, tmp_path):
    before = hashes(whole / "data")
    out = tmp_path / "data"
    out.mkdir()
    for path in [whole / "data/plan.json", *(whole / "data").glob("shard-00001.*")]:
        (out / path.name).write_bytes(path.read_bytes())
    command = [
        sys.executable,
        "-m",
        "stages.synthesize_instructions",
        str(whole / "job.yaml"),
        f"out={out}",
        "runtime.engine._component_=speechfuse.workers.processes",
        "runtime.prefetch=3",
        "runtime.workers=1",
    ]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hashes(out) == before and len(before) > 8 + 3 * (len(KINDS) - 1)
    totals = [artifact.manifest_of(folder)["totals"] for folder in (out, whole / "data")]
    assert totals[0] == totals[1]


@pytest.fixture
def small(tmp_path) -> Path:
    stored(tmp_path / "texts")
    return tmp_path


BEEPS = {"beep": {"_component_": f"{__name__}.Beep"}}
PLAIN = {"instruction": {**KINDS["instruction"], "share": 1.0}}


def test_an_engine_that_goes_away_ends_the_job_and_finished_shards_are_kept(
    small, monkeypatch, capsys
):
    away = small / "away"
    voices = {"beep": {**BEEPS["beep"], "without": str(away)}}
    job = written(small, kinds=PLAIN, voices=voices, samples=None, shard_size=10)
    away.touch()
    assert called(monkeypatch, job) == 2
    assert "error: the server http://127.0.0.1:1/v1 does not answer" in capsys.readouterr().err
    kept = hashes(small / "data")
    assert 0 < parquet(kept) < 4 and not (small / "data/manifest.json").exists()
    away.unlink()
    assert called(monkeypatch, job) == 0
    assert parquet(hashes(small / "data")) == 4
    assert kept.items() <= hashes(small / "data").items()
    out = small / "other"
    assert called(monkeypatch, job, f"out={out}") == 0
    assert hashes(out) == hashes(small / "data")


def test_after_an_error_nothing_more_is_begun():
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if not item:
            time.sleep(0.05)
            raise Unavailable("gone")
        time.sleep(0.05)
        return item

    with pytest.raises(Unavailable, match="gone"):
        list(prefetch(work, range(100), threads=2, depth=50))
    assert len(begun) < 10


def test_a_sentence_that_is_too_long_is_a_reject_and_never_cropped(small, monkeypatch, capsys):
    talk = [Conversation("e", [Turn("user", ENDLESS), Turn("assistant", "a")], "s")]
    talk += [
        Conversation(f"q{i}", [Turn("user", "a b"), Turn("assistant", "a")], "s") for i in range(9)
    ]
    texts(small / "more", talk)
    job = written(small, kinds=PLAIN, voices=BEEPS, texts=str(small / "more"), samples=None)
    assert called(monkeypatch, job) == 0
    assert "1 rejected (1 too long); listed in" in capsys.readouterr().out
    (reject,) = rejects.read_rejects(small / "data/shard-00000.parquet")
    assert reject["id"] == "instruction/e" and reject["reason"].startswith("too long: a sentence")
    assert called(monkeypatch, job, f"out={small}/strict", "runtime.max_reject_rate=0.05") == 2
    assert "1 of 10 samples were rejected" in capsys.readouterr().err
    verify.main(verify.Verify(str(small / "data")))


def test_what_a_listener_does_not_understand_is_left_out_and_counted_by_voice(
    small, monkeypatch, capsys
):
    check = {"listener": {"_component_": f"{__name__}.Listener"}, "max_wer": 0.5}
    job = written(small, kinds=PLAIN, voices=BEEPS, samples=None, round_trip=check)
    assert called(monkeypatch, job) == 0
    rows, totals = rows_of(small), artifact.manifest_of(small / "data")["totals"]
    assert {s["speaker"] for row in rows for s in speech_in(row)} == {"beep/low"}
    assert all(json.loads(s["extra"])["wer"] == 0 for row in rows for s in speech_in(row))
    high, low = totals["round_trip"]["beep/high"], totals["round_trip"]["beep/low"]
    assert list(totals["round_trip"]) == ["beep/high", "beep/low"]  # the worst first
    assert (high["wer"], low["wer"], low["refused"]) == (1.0, 0.0, 0)
    assert high["refused"] == high["pieces"] > 10
    assert totals["filtered"] == {"filter round trip": 37 - len(rows)}
    assert "the worst 100.0% (beep/high)" in capsys.readouterr().out


def test_an_engine_of_codes_must_have_the_quantizers_codec(small, monkeypatch, capsys):
    voices = {"codes": {**BEEPS["beep"], "codec": "another codec than that"}}
    job = written(small, kinds=PLAIN, voices=voices)
    assert called(monkeypatch, job) == 2
    assert "voices.codes makes codes of the codec another code" in capsys.readouterr().err
    voices["codes"]["codec"] = Quantizer.load(ROOT / QUANTIZER).identity
    assert called(monkeypatch, written(small, kinds=PLAIN, voices=voices, samples=30)) == 0
    for row in rows_of(small):
        text = "".join(s["text"] for s in speech_in(row))
        codes = [code for s in speech_in(row) for code in s["codes"]]
        assert bytes(codes).decode() == text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"texts": "TMP/absent"}, "does not exist: no recipe here makes it"),
        ({"texts": "TMP/none"}, "is empty: it holds no conversation"),
        ({"kinds": {"text": {**KINDS["text"], "share": 0.5}}}, "give each one above 0"),
        ({"kinds": {"t": {"_component_": "speechfuse.synthesis.Txt", "share": 1}}}, "'Text'"),
        ({"voices": {"espeak": {**ESPEAK, "variants": ["Nobody"]}}}, "no voice 'en-us+Nobody'"),
        ({"voices": {"espeak": {**ESPEAK, "share": 0.5}}}, "voices: the shares are"),
        (
            {"voices": {"e": {"_component_": "speechfuse.synthesis.engines.Espeak"}}},
            "speechfuse.synthesis.engines",
        ),
        ({"voices": {}}, "voices is empty, but kinds."),
        ({"samples": 0}, "samples=0: at least 1 is needed"),
        ({"quantizer": {"checkpoint": QUANTIZER, "dtype": "float16"}}, "float16"),
        ({"augmentation": [{"_component_": "speechfuse.audio.Noise"}]}, "snr"),
        ({"round_trip": {"listener": {"_component_": f"{__name__}.Listener"}, "wer": 1}}, "wer"),
        ({"sample": 3}, "unknown key 'sample'; did you mean 'samples'?"),
    ],
)
def test_mistakes_end_in_one_line(small, monkeypatch, capsys, changes, said):
    texts(small / "none", [])
    changes = json.loads(json.dumps(changes).replace("TMP", str(small)))
    assert called(monkeypatch, written(small, **changes)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
    assert not list(small.glob("data/*"))


def test_a_dry_run_says_what_it_would_do_and_another_configuration_is_refused(
    whole, monkeypatch, capsys
):
    job = whole / "job.yaml"
    assert called(monkeypatch, job, f"out={whole}/dry", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "36 instruction" in said and "in 4 shards and 2 voices; not started" in said
    assert "voices and listener were not asked" in said
    assert not (whole / "dry").exists()
    assert called(monkeypatch, job, "runtime.workers=7") == 0
    assert capsys.readouterr().out == f"{whole}/data: complete, nothing to do\n"
    assert called(monkeypatch, job, "seed=1") == 2
    assert "what differs: seed: 0 there, 1 now" in capsys.readouterr().err


def test_a_dry_run_asks_no_server(small, monkeypatch, capsys):
    nowhere = "http://127.0.0.1:9/v1"
    engine = {"_component_": "speechfuse.synthesis.Endpoint", "names": ["a"], "tries": 1}
    voices = {"server": {**engine, "url": nowhere, "model": "m", "key_variable": None}}
    job = written(small, kinds=PLAIN, voices=voices)
    assert called(monkeypatch, job, "--dry-run") == 0
    assert called(monkeypatch, job) == 2 and "no connection" in capsys.readouterr().err


def test_help_shows_only_what_this_job_uses(small, monkeypatch, capsys):
    assert called(monkeypatch, written(small), "--help") == 0
    shown = capsys.readouterr().out
    assert "runtime.prefetch" in shown and "decode" not in shown


def test_no_kind_that_speaks_needs_no_voice(small, monkeypatch):
    kinds = {"text": {**KINDS["text"], "share": 1.0}}
    assert called(monkeypatch, written(small, kinds=kinds, voices={}, samples=5)) == 0
    assert artifact.manifest_of(small / "data")["totals"]["rows"] == 5


def test_a_kind_of_too_small_a_share_is_said(small, monkeypatch, capsys):
    kinds = {"text": {**KINDS["text"], "share": 0.99}, "partly": {**KINDS["partly"], "share": 0.01}}
    job = written(small, kinds=kinds, voices=BEEPS, samples=10)
    said = "10 text (too small a share for a sample: partly)"
    for way in (["--dry-run"], []):
        assert called(monkeypatch, job, *way) == 0
        assert said in capsys.readouterr().out
    assert artifact.manifest_of(small / "data")["totals"]["kinds"] == {
        "partly": {"planned": 0, "made": 0},
        "text": {"planned": 10, "made": 10},
    }


TRIP = {"listener": {"_component_": f"{__name__}.Listener"}, "max_wer": 0.5}


def test_nothing_of_a_kind_is_no_dataset(small, monkeypatch, capsys):
    monkeypatch.setattr(Listener, "transcribe", lambda self, made: ["" for _ in made])  # deaf
    kinds = {"text": {**KINDS["text"], "share": 0.5}, "partly": {**KINDS["partly"], "share": 0.5}}
    job = written(small, kinds=kinds, voices=BEEPS, samples=20, round_trip=TRIP, shard_size=10)
    assert called(monkeypatch, job) == 2
    said = capsys.readouterr().err
    assert "nothing was made of the kind partly: of 10 samples 10 were left out for filter" in said
    assert "first: partly/q" in said and "heard: " in said
    assert parquet(hashes(small / "data")) == 2 and not (small / "data/manifest.json").exists()


def test_a_listener_of_another_codec_is_refused_before_work(small, monkeypatch, capsys):
    def check(self: Listener, codec: str) -> None:
        raise ValueError(f"round_trip: not the codec {codec}")

    monkeypatch.setattr(Listener, "check", check)
    assert called(monkeypatch, written(small, kinds=PLAIN, voices=BEEPS, round_trip=TRIP)) == 2
    identity = Quantizer.load(ROOT / QUANTIZER).identity
    assert f"not the codec {identity}" in capsys.readouterr().err
    assert not (small / "data").exists()


def test_other_texts_another_engine_or_listener_is_another_dataset(small, monkeypatch, capsys):
    job = written(small, kinds=PLAIN, voices=BEEPS, samples=20, round_trip=TRIP)
    assert called(monkeypatch, job) == 0
    for owner, named in ((Beep, "voices.beep"), (Listener, "round_trip")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, "identity", lambda self: {"release": 2})
            assert called(patch, job) == 2
        assert f"what differs: inputs.{named}: " in capsys.readouterr().err
    manifest = artifact.manifest_of(small / "texts")
    artifact.write_json(small / "texts/manifest.json", {**manifest, "fingerprint": "another"})
    assert called(monkeypatch, job) == 2
    assert "what differs: inputs.texts.instruction: " in capsys.readouterr().err


def test_how_a_server_is_reached_may_change_and_what_it_is_asked_may_not(
    small, monkeypatch, capsys
):
    monkeypatch.setenv("KEY", "of the test")
    with SpeechServer() as server:
        place = {"url": server.url, "model": "m", "key_variable": None}
        engine = {"_component_": "speechfuse.synthesis.Endpoint", "names": ["echo"], **place}
        heard = {"_component_": "speechfuse.synthesis.TranscriptionEndpoint", **place}

        def run(voice: dict[str, Any], listener: dict[str, Any]) -> int:
            trip = {"listener": heard | listener, "max_wer": 1.0}
            voices = {"server": engine | voice}
            changed = written(small, kinds=PLAIN, voices=voices, samples=4, round_trip=trip)
            return called(monkeypatch, changed)

        assert run({"timeout": 9}, {}) == 0
        manifest = artifact.manifest_of(small / "data")
        assert manifest["config"]["runtime"]["voices"] == {
            "server": {"timeout": 9, "key_variable": None}
        }
        way = {"timeout": 5, "tries": 2, "cache": str(small / "cache"), "key_variable": "KEY"}
        assert run(way | {"parallel": 3}, way) == 0
        assert "complete, nothing to do" in capsys.readouterr().out
        assert run({"speed": [1, 2]}, {}) == 2 and "speed" in capsys.readouterr().err
        assert run({}, {"language": "de"}) == 2 and "language" in capsys.readouterr().err
