"""Synthetic speech and the corpora: repeatable to the bit, with the right phonemes and voices."""

import ctypes
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import espeakng_loader
import numpy as np
import pytest
import soundfile
import yaml

from speechfuse import artifact, yaml_values
from speechfuse.audio import decoding, espeak_ng
from speechfuse.corpora.clip import Clip
from speechfuse.corpora.folder import Folder
from speechfuse.corpora.synthetic import Synthetic
from speechfuse.rows.rejects import Reject
from speechfuse.synthesis.engines.espeak import Espeak

ROOT = Path(__file__).parent.parent
VOICES = {
    "train": {"accents": ["en-us", "en-gb-scotland"], "variants": ["Alex", "f1", "m3"]},
    "unseen": {
        "accents": ["en-us"],
        "variants": ["Annie", "belinda"],
        "rate": [100, 110],
        "pitch": [5, 9],
    },
}
TEXTS = [
    "what is three plus four",
    "name the capital of france",
    "where does a bee live",
    "nine minus two",
    "what does a duck say",
    "bear honey cave",
    "how much is ten times ten",
    "name the money of japan",
]


def write_lines(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def lines(tmp_path) -> Path:
    rows = [
        {
            "id": f"line-{i}",
            "text": text,
            "answer": f"a{i}",
            "split": "train" if i % 2 else "test",
            "voices": "train" if i < 4 else "unseen",
        }
        for i, text in enumerate(TEXTS)
    ]
    return write_lines(tmp_path / "speak.jsonl", rows)


def made(corpus: Synthetic, shard: dict) -> list[Clip]:
    found = list(corpus.clips(shard))
    assert [clip.id for clip in found] == shard["lines"] and shard["count"] == len(found)
    assert all(isinstance(clip, Clip) for clip in found)
    return found


def test_a_shard_is_the_same_to_the_bit_whatever_was_spoken_before(lines):
    corpus = Synthetic(str(lines), VOICES)
    first, second = corpus.plan(4)
    forth = {u.id: u for shard in (first, second) for u in made(corpus, shard)}
    abandoned = corpus.clips(first)
    next(abandoned)
    abandoned.close()
    back = {
        u.id: u for shard in (second, first) for u in made(Synthetic(str(lines), VOICES), shard)
    }
    assert len(forth) == len(TEXTS)
    for id, utterance in forth.items():
        np.testing.assert_array_equal(utterance.audio, back[id].audio, err_msg=id)
        assert (utterance.speaker, utterance.phonemes) == (back[id].speaker, back[id].phonemes)
    other = Synthetic(str(lines), VOICES, seed=1)
    again = made(other, first)[0]
    assert again.audio.shape != forth[first["lines"][0]].audio.shape or (
        np.abs(again.audio - forth[first["lines"][0]].audio).max() > 0
    )


def test_the_engine_is_unloaded_between_blocks():
    """Without unloading, the second block would go on from the state that the first left."""
    voice = espeak_ng.EspeakVoice("en-us+Annie")
    blocks = []
    for _ in range(2):
        with espeak_ng.EspeakLibrary() as engine:
            blocks.append([engine.speak(text, voice).waveform for text in TEXTS[:3]])
    for one, other in zip(*blocks, strict=True):
        np.testing.assert_array_equal(one, other)


def test_phonemes_are_in_order_inside_the_audio_and_where_the_sound_is():
    with espeak_ng.EspeakLibrary() as engine:
        spoken = [
            engine.speak(t, espeak_ng.EspeakVoice(v))
            for t in TEXTS
            for v in ("en-us+f1", "en-gb-x-rp+Mike")
        ]
        cat = engine.speak("cat", espeak_ng.EspeakVoice("en-us", rate=120))
    for speech in spoken:
        starts = [start for start, _ in speech.phonemes]
        assert len(starts) > 8
        end = len(speech.waveform) / decoding.SAMPLE_RATE
        assert starts[0] >= 0 and starts[-1] <= end + 1 / decoding.SAMPLE_RATE  # resampling rounds
        assert all(a < b for a, b in pairwise(starts))
        assert speech.waveform.dtype == np.float32 and 0.1 < np.abs(speech.waveform).max() <= 1
    names = [name.strip("',") for _, name in cat.phonemes]
    assert names[:3] == ["k", "a", "t"]
    loud = [
        float(np.sqrt(np.mean(cat.waveform[int(a * 16_000) : int(b * 16_000)] ** 2)))
        for (a, _), (b, _) in pairwise(cat.phonemes)
    ]
    assert int(np.argmax(loud)) == 1  # the vowel
    assert loud[1] > 10 * loud[names.index("_:")]  # the pause


def test_rate_and_pitch_are_heard():
    with espeak_ng.EspeakLibrary() as engine:
        slow, fast = (
            engine.speak(TEXTS[0], espeak_ng.EspeakVoice("en-us", rate=r)).waveform
            for r in (100, 250)
        )
        low, high = (
            engine.speak(TEXTS[0], espeak_ng.EspeakVoice("en-us", pitch=p)).waveform
            for p in (5, 95)
        )
    assert len(slow) > 1.8 * len(fast)

    def below_120_hz(waveform: np.ndarray) -> float:
        power = np.abs(np.fft.rfft(waveform)) ** 2
        return float(power[np.fft.rfftfreq(len(waveform), 1 / 16_000) < 120].sum() / power.sum())

    assert below_120_hz(low) > 5 * below_120_hz(high)  # the fundamental is there or above


@pytest.mark.parametrize("name", ["atlantis", "", "en-us+Nobody", "atlantis+Annie"])
def test_an_unknown_voice_is_refused_by_name(name):
    with espeak_ng.EspeakLibrary() as engine:
        with pytest.raises(ValueError, match=f"no voice {re.escape(repr(name))}"):
            engine.speak("hello", espeak_ng.EspeakVoice(name))
        assert len(engine.speak("hello", espeak_ng.EspeakVoice("en-us+Annie")).waveform) > 1600


@pytest.mark.parametrize("text", ["", "  "])
def test_text_without_sound_is_refused(text):
    with espeak_ng.EspeakLibrary() as engine, pytest.raises(ValueError, match="made no sound"):
        engine.speak(text, espeak_ng.EspeakVoice("en-us"))


def measured(clean: np.ndarray, noisy: np.ndarray) -> tuple[float, float]:
    """(signal to noise, gain) in dB, by projection on the clean waveform."""
    level = float(noisy @ clean / (clean @ clean))
    rest = noisy / level - clean
    return 10 * np.log10(np.mean(clean**2) / np.mean(rest**2)), 20 * np.log10(level)


@pytest.mark.parametrize(("snr", "gain"), [(20.0, -10.0), (40.0, -3.0), (5.0, -20.0)])
def test_noise_and_gain_of_a_corpus_are_as_stated(lines, snr, gain):
    corpus = Synthetic(str(lines), VOICES, snr=(snr, snr), gain=(gain, gain))
    utterances = made(corpus, corpus.plan(100)[0])
    with espeak_ng.EspeakLibrary() as engine:
        for utterance in utterances:
            name, rate, pitch = (utterance.speaker or "").rsplit("/", 2)
            voice = espeak_ng.EspeakVoice(name, int(rate), int(pitch))
            clean = engine.speak(utterance.text or "", voice).waveform.astype(np.float64)
            assert measured(clean, utterance.audio) == pytest.approx((snr, gain), abs=0.25)


def test_noise_and_gain_are_drawn_from_the_whole_range_and_never_clip(lines):
    corpus = Synthetic(str(lines), VOICES, snr=(20, 40), gain=(-10, 0))
    found = []
    for utterance in made(corpus, corpus.plan(100)[0]):
        # a fresh engine: the speech itself differs a little, its level does not
        with espeak_ng.EspeakLibrary() as engine:
            name, rate, pitch = (utterance.speaker or "").rsplit("/", 2)
            clean = engine.speak(
                utterance.text or "", espeak_ng.EspeakVoice(name, int(rate), int(pitch))
            ).waveform
        found.append(20 * np.log10(np.std(utterance.audio) / np.std(clean)))
        assert np.abs(utterance.audio).max() <= 1
    assert -11 < min(found) < -6 and -4 < max(found) < 1
    loud = Synthetic(str(lines), VOICES, gain=(30, 30))
    for utterance in made(loud, loud.plan(100)[0]):
        assert np.abs(utterance.audio).max() == pytest.approx(1)


def test_voices_come_only_from_the_group_that_the_line_names(tmp_path):
    rows = [
        {"id": f"{voices}-{i}", "text": "yes", "split": "train", "voices": voices, "kind": "phrase"}
        for voices in VOICES
        for i in range(40)
    ]
    corpus = Synthetic(str(write_lines(tmp_path / "l.jsonl", rows)), VOICES)
    heard: dict[str, set[str]] = {group: set() for group in VOICES}
    for utterance in made(corpus, corpus.plan(100)[0]):
        name, rate, pitch = (utterance.speaker or "").rsplit("/", 2)
        group = utterance.extra["voices"]
        heard[group].add(name)
        fastest, highest = ((140, 215), (25, 75)) if group == "train" else ((100, 110), (5, 9))
        assert fastest[0] <= int(rate) <= fastest[1] and highest[0] <= int(pitch) <= highest[1]
        assert utterance.extra == {"split": "train", "voices": group, "kind": "phrase"}
        assert utterance.uri == f"synthetic:{name}" and utterance.language == "en"
    assert heard == {
        group: {f"{accent}+{variant}" for accent in spec["accents"] for variant in spec["variants"]}
        for group, spec in VOICES.items()
    }


def test_splits_select_and_every_line_is_in_one_shard(lines):
    corpus = Synthetic(str(lines), VOICES, splits=["train"])
    plan = corpus.plan(3)
    assert [shard["count"] for shard in plan] == [3, 1]
    lines_of = [id for shard in plan for id in shard["lines"]]
    assert lines_of == ["line-1", "line-3", "line-5", "line-7"]
    every = Synthetic(str(lines), VOICES).plan(3)
    assert sum(shard["count"] for shard in every) == len(TEXTS)


def test_lines_and_voices_are_refused_in_words(lines, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"line line-4 wants the voices 'unseen'.*\['train'\]"):
        Synthetic(str(lines), {"train": VOICES["train"]})
    with pytest.raises(FileNotFoundError, match="absent"):
        Synthetic(str(tmp_path / "absent.jsonl"), VOICES)
    monkeypatch.setenv("PATH", str(tmp_path))  # neither flite nor festival here
    for program, voice in (("flite", "flite:rms"), ("festival", "festival:ked_diphone")):
        with pytest.raises(ValueError, match=rf"{voice} needs {program}, which is not installed"):
            espeak_ng.speak(None, "yes", espeak_ng.EspeakVoice(voice))  # type: ignore[arg-type]


def seconds(name: str, text: str) -> float:
    with espeak_ng.EspeakLibrary() as engine:
        spoken = espeak_ng.speak(engine, text, espeak_ng.EspeakVoice(name))
    assert np.abs(spoken.waveform).max() > 0.05 and spoken.phonemes == []
    return len(spoken.waveform) / 16_000


@pytest.mark.skipif(not shutil.which("festival"), reason="festival is not installed")
def test_festival_speaks_texts_as_data():
    plain = seconds("festival:kal_diphone", "say no and stay")
    assert 0.5 < plain < 3 and plain == seconds("festival:kal_diphone", "say no and stay")
    for text in ('say "no" and stay', 'say no") (exit 3) (print "and stay', "say no\\ and stay"):
        assert plain <= seconds("festival:kal_diphone", text) < 3 * plain, text
    for text in ("", "..."):
        with pytest.raises(espeak_ng.NoSound, match="festival made no sound for the text"):
            seconds("festival:kal_diphone", text)
    for name in ("absent", "kal_diphone) (exit 0"):
        with pytest.raises(ValueError, match="festival has no voice '"):
            seconds(f"festival:{name}", "yes")


@pytest.mark.skipif(not shutil.which("flite"), reason="flite is not installed")
def test_a_voice_that_flite_has_not_is_refused():
    assert 0.2 < seconds("flite:rms", "yes") < 2
    with pytest.raises(ValueError, match=r"flite has no voice 'rsm'; it has \['kal'"):
        seconds("flite:rsm", "yes")


LINE = {"id": "a", "text": "one plus one", "voices": "v", "split": "train"}
VOICE = {"v": {"accents": ["en-us"], "variants": ["Annie"]}}


def test_lines_are_read_as_people_write_them(tmp_path):
    path = tmp_path / "l.jsonl"
    lines = [json.dumps({**LINE, "id": id}) for id in (0, "1#0", "x\u2028")]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n \r\n".join(lines).encode())
    (shard,) = Synthetic(str(path), VOICE).plan(10)
    assert shard == {"count": 3, "lines": ["0", "1#0", "x\u2028"]}
    assert [clip.text for clip in made(Synthetic(str(path), VOICE), shard)] == 3 * ["one plus one"]


def test_a_line_that_cannot_be_spoken_is_a_reject_with_its_number(tmp_path):
    bad = {
        b"{": "not JSON",
        b"[1]": "not a JSON object",
        b'{"id": null}': "it has no split",
        json.dumps({**LINE, "id": ""}).encode(): "id is ''",
        json.dumps({**LINE, "id": 1.5}).encode(): "id is 1.5",
        json.dumps({**LINE, "voices": None}).encode(): "voices is None",
        json.dumps({**LINE, "text": 7}).encode(): "text is 7, not text",
        json.dumps({**LINE, "text": "the cow\0 eats"}).encode(): "U+0000",
        json.dumps({**LINE, "text": "\ud800"}).encode(): "half a character",
        b"\xff\xfe{\0": "not UTF-8",
    }
    silent = [{**LINE, "id": text, "text": text} for text in ("...", " -- ")]
    last = [*(json.dumps(line).encode() for line in (*silent, {**LINE, "id": "c", "text": ""}))]
    path = tmp_path / "l.jsonl"
    path.write_bytes(b"\n".join([json.dumps(LINE).encode(), *bad, *last]))
    corpus = Synthetic(str(path), VOICE, splits=["train"])
    (shard,) = corpus.plan(100)
    first, *rejects = corpus.clips(shard)
    assert first.id == "a" and len(rejects) == len(bad) + 3 and shard["count"] == 1 + len(rejects)
    for number, (reject, why) in enumerate(zip(rejects, bad.values(), strict=False), 2):
        assert reject.id == f"l.jsonl:{number}"
        assert reject.reason.startswith(f"bad manifest line: line {number}: ")
        assert why in reject.reason
    assert [r.id for r in rejects[len(bad) :]] == ["...", " -- ", "c"]
    assert all(r.reason.startswith("no sound: ") for r in rejects[len(bad) :])


def test_a_voice_that_is_not_there_stops_the_job(tmp_path):
    path = write_lines(tmp_path / "l.jsonl", [LINE])
    corpus = Synthetic(str(path), {"v": {"variants": ["en-us+Nobody"]}})
    with pytest.raises(ValueError, match=r"no voice 'en-us\+Nobody'"):
        list(corpus.clips(corpus.plan(9)[0]))


def test_ids_that_come_twice_and_splits_that_no_line_has_are_refused(tmp_path):
    path = write_lines(tmp_path / "l.jsonl", [{**LINE, "id": 1}, {**LINE, "id": "1"}])
    with pytest.raises(ValueError, match=r"l\.jsonl: lines 1 and 2 have the id '1'"):
        Synthetic(str(path), VOICE)
    path = write_lines(path, [LINE, {**LINE, "split": "dev"}])  # one of them is asked for
    assert Synthetic(str(path), VOICE, splits=["dev"]).plan(9) == [{"count": 1, "lines": ["a"]}]
    with pytest.raises(ValueError, match=r"no line has the split 'tset'; there are \['dev', 'tra"):
        Synthetic(str(path), VOICE, splits=["train", "tset"])


def test_the_language_is_that_of_the_voice(tmp_path):
    path = write_lines(tmp_path / "l.jsonl", [LINE])
    for accent, language in {"de": "de", "pt-br": "pt", "en-gb-x-rp": "en", "German": "de"}.items():
        corpus = Synthetic(str(path), {"v": {"accents": [accent], "variants": ["m3"]}})
        assert [clip.language for clip in corpus.clips(corpus.plan(9)[0])] == [language]
    with pytest.raises(ValueError, match=r"'de\+m3' speaks de, and rows would state en: set langu"):
        Espeak(accents=["de"], variants=["m3"]).check()
    Espeak(accents=["de"], variants=["m3"], language="de").check()
    with espeak_ng.EspeakLibrary() as engine, pytest.raises(ValueError, match=r"holds U\+0000"):
        engine.speak("the cow\0 eats", espeak_ng.EspeakVoice("en-us"))


def test_the_fingerprint_follows_the_lines(lines):
    before = Synthetic(str(lines), VOICES).fingerprint
    assert Synthetic(str(lines), VOICES).fingerprint == before
    lines.write_text(lines.read_text().replace("three", "seven"))
    assert Synthetic(str(lines), VOICES).fingerprint != before


def recipe_voices() -> list[tuple[str, str, dict]]:
    """(file, group, spec) of every corpus in a recipe that has voices."""
    found = []
    for path in sorted((ROOT / "recipes").glob("*/*.yaml")):
        content = yaml_values.with_files(yaml.safe_load(path.read_text()) or {})
        for value in content.values():
            voices = value.get("voices") if isinstance(value, dict) else None
            if isinstance(voices, dict) and "variants" not in voices:  # else it is a group itself
                found += [(path.name, group, spec) for group, spec in voices.items()]
    return found


def test_every_voice_of_the_recipes_exists_and_no_test_voice_is_in_training():
    groups = recipe_voices()
    assert {"train", "unseen", "validation"} <= {group for _, group, _ in groups}
    shipped = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    accents = {accent for _, _, spec in groups for accent in spec.get("accents", [])}
    with espeak_ng.EspeakLibrary() as engine:
        for accent in accents:
            engine.speak("a", espeak_ng.EspeakVoice(accent))
    variants: dict[str, set[str]] = {}
    for _, group, spec in groups:
        if "accents" in spec:
            names = variants.setdefault(group, set(spec["variants"]))
            assert names == set(spec["variants"]), f"the group {group} differs between recipes"
            for name in names:
                assert (shipped / name).is_file(), f"espeak-ng has no variant {name}"
    together = [name for names in variants.values() for name in names]
    assert len(together) == len(set(together)) > 50


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "speech"
    (root / "b").mkdir(parents=True)
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 8000)
    soundfile.write(root / "b" / "said.wav", sound, 8000, subtype="FLOAT")
    (root / "b" / "said.txt").write_text("  what was said\n")
    soundfile.write(root / "silent.FLAC", sound, 16_000, format="FLAC")
    (root / "broken.wav").write_text("not audio")
    (root / "notes.md").write_text("no audio either")
    return root


def test_a_folder_gives_ids_transcripts_and_paths(folder):
    corpus = Folder(str(folder), language="en")
    assert [shard["count"] for shard in corpus.plan(2)] == [2, 1]
    said, broken, silent = corpus.clips(corpus.plan(100)[0])
    assert [clip.id for clip in (said, broken, silent)] == ["b/said", "broken", "silent"]
    assert (said.text, said.language, said.uri) == ("what was said", "en", "b/said.wav")
    assert len(decoding.decode(said.audio).waveform) == 16_000
    assert silent.text is None and len(decoding.decode(silent.audio).waveform) == 8000
    with pytest.raises(ValueError, match=r"^not audio: "):
        decoding.decode(broken.audio)


def test_a_transcript_that_is_not_utf8_rejects_its_own_item_only(folder):
    (folder / "b" / "said.txt").write_bytes(b"caf\xe9")
    corpus = Folder(str(folder))
    said, broken, silent = corpus.clips(corpus.plan(100)[0])
    assert isinstance(said, Reject) and said.id == "b/said"
    assert said.reason.startswith("bad transcript: ") and "said.txt" in said.reason
    assert isinstance(broken, Clip) and isinstance(silent, Clip)


def test_missing_and_empty_folders_are_refused(tmp_path):
    for name in ("absent", "."):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
            Folder(str(tmp_path / name))


HASHES = """
import hashlib, json, sys
import torch  # in its presence some variants say another thing each time
import yaml
from speechfuse.audio import espeak_ng as tts
groups = yaml.safe_load(open(sys.argv[1]))
own = [spec for spec in groups.values() if "accents" in spec]  # not of other programs
names = [v for spec in own for v in spec["variants"]] + sys.argv[2:]
with tts.EspeakLibrary() as engine:
    said = {n: engine.speak("what is six minus two", tts.EspeakVoice(f"en-us+{n}")) for n in names}
print(json.dumps({n: hashlib.sha256(s.waveform.tobytes()).hexdigest() for n, s in said.items()}))
"""


def test_voices_of_the_demo_are_the_same_in_every_process():
    """Some variants of espeak-ng are not (f5 is one), and a shard made again would be another."""
    command = [sys.executable, "-c", HASHES, str(ROOT / "recipes/demo/voices.yaml"), "f5"]
    runs = [
        json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    differ = {name for name in runs[0] if len({run[name] for run in runs}) > 1}
    assert len(runs[0]) > 60
    assert differ <= {"f5"}, "leave these voices out of the recipes"


def test_noise_of_breathy_voices_does_not_depend_on_the_process():
    def said() -> np.ndarray:
        with espeak_ng.EspeakLibrary() as engine:
            return engine.speak("what is six", espeak_ng.EspeakVoice("en-us+Reed")).waveform

    before = said()
    for _ in range(1000):
        ctypes.CDLL(None).rand()
    np.testing.assert_array_equal(said(), before)


@pytest.mark.parametrize("change", [{"accents": []}, {"variants": []}, {"rate": (200, 100)}])
def test_a_group_without_a_voice_is_refused(change):
    with pytest.raises(ValueError, match=r"^voices: "):
        Espeak(**{"accents": ["en-us"], "variants": ["m3"]} | change)


def test_only_corpora_with_voices_of_flite_are_others_since_these_have_a_rate(tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"id": "a", "voices": "one", "text": "yes"}\n')
    found = [
        Synthetic(str(lines), {"one": {"variants": [name]}}).fingerprint
        for name in ("en-us", "en-us+Annie", "flite:rms")
    ]
    as_before = artifact.json_digest([artifact.sha256_of(lines), []])
    assert found[:2] == [as_before] * 2 and found[2] != as_before
