"""Filters: what passes and what does not, on both sides of each threshold."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from speechfuse import config
from speechfuse.audio import decoding, espeak_ng, filters

RATE = decoding.SAMPLE_RATE
DATA = Path(__file__).parent.parent.parent / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no recordings of people at {DATA}")
vad = pytest.mark.skipif(not find_spec("silero_vad"), reason="the extra vad is not installed")


def sine(amplitude: float, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return (amplitude * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def noise(amplitude: float, seconds: float = 3.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (amplitude * rng.standard_normal(round(seconds * RATE))).astype(np.float32)


def music(seconds: float = 6.0) -> np.ndarray:
    """Notes of a plucked string: harmonics that die away, four a second."""
    wave = np.zeros(round(seconds * RATE), np.float32)
    length = RATE // 4
    time = np.arange(length) / RATE
    for i, start in enumerate(range(0, len(wave), length)):
        hertz = (261.6, 329.6, 392.0, 523.3, 440.0)[i % 5]
        note = sum(0.2 / h * np.sin(2 * np.pi * hertz * h * time) for h in range(1, 6))
        wave[start : start + length] = note * np.exp(-4 * time)
    return wave


@pytest.fixture(scope="module")
def spoken() -> dict[str, np.ndarray]:
    texts = ["what is three plus four", "where does a bee live and how long does it fly", "seven"]
    with espeak_ng.EspeakLibrary() as engine:
        return {
            f"{voice}: {text}": engine.speak(text, espeak_ng.EspeakVoice(voice)).waveform
            for voice in ("en-us", "en-us+Annie", "en-us+m3")
            for text in texts
        }


def test_duration():
    keep = filters.duration(min_seconds=0.5, max_seconds=2.0)
    for samples in (RATE // 2, RATE, 2 * RATE):
        assert keep(np.zeros(samples, np.float32), None) is None
    assert keep(np.zeros(RATE // 2 - 1, np.float32), "text") == "duration: 0.4999 s is under 0.5"
    assert keep(np.zeros(2 * RATE + 1600, np.float32), None) == "duration: 2.1 s is over 2"
    assert keep(np.zeros(0, np.float32), None) == "duration: 0 s is under 0.5"
    assert filters.duration(max_seconds=2.0)(np.zeros(1, np.float32), None) is None


@pytest.mark.parametrize("decibel", [-60.0, -45.0, -20.0, -3.5])
def test_level(decibel):
    """A full-scale sine has half the power of a full-scale square wave: -3.01 dB."""
    wave = sine(10 ** ((decibel + 3.0103) / 20))
    assert filters.level(min_dbfs=decibel - 0.01, max_dbfs=decibel + 0.01)(wave, None) is None
    assert filters.level(min_dbfs=decibel + 0.01)(wave, None) == (
        f"level: {decibel:.4g} dBFS is under {decibel + 0.01:g}"
    )
    assert filters.level(max_dbfs=decibel - 0.01)(wave, None) == (
        f"level: {decibel:.4g} dBFS is over {decibel - 0.01:g}"
    )


def test_level_of_silence_is_under_every_minimum():
    for wave in (np.zeros(RATE, np.float32), np.zeros(0, np.float32)):
        assert filters.level(min_dbfs=-300)(wave, None) == "level: -inf dBFS is under -300"
        assert filters.level(max_dbfs=0)(wave, None) is None


def test_clipping():
    """Of a sine that is cut at 1, the share that stands at 1 is 2 acos(1 / amplitude) / pi."""
    for amplitude in (1.5, 3.0):
        wave = np.clip(sine(amplitude), -1, 1)
        share = 2 * np.arccos(filters.FULL_SCALE / amplitude) / np.pi
        assert filters.clipping(max_share=share + 0.01)(wave, None) is None
        reason = filters.clipping(max_share=share - 0.01)(wave, None)
        assert reason.startswith("clipping: 0.") and reason.endswith(f" is over {share - 0.01:g}")
    assert filters.clipping(max_share=0)(sine(0.98), None) is None
    largest = np.full(100, 32_767 / 32_768, np.float32)  # of 16 bits, and not 1
    assert filters.clipping(max_share=0.99)(largest, None) == "clipping: 1 is over 0.99"
    assert filters.clipping(max_share=0)(np.zeros(0, np.float32), None) is None


def test_clipping_is_seen_through_files_and_resampling(tmp_path, spoken):
    (speech, *_) = spoken.values()
    speech = speech / np.abs(speech).max()
    keep = filters.clipping(max_share=0.002)
    for rate in (8000, RATE, 44_100):
        path = tmp_path / f"{rate}.wav"
        for gain, passes in ((0.9, True), (8.0, False)):
            wave = soxr.resample(speech, RATE, rate) * gain
            soundfile.write(path, np.clip(wave, -1, 1), rate)
            assert (keep(decoding.load(path), None) is None) == passes


def test_characters_per_second():
    keep = filters.characters_per_second(min=5, max=20)
    two = np.zeros(2 * RATE, np.float32)
    assert keep(two, "x" * 10) is None and keep(two, "x" * 40) is None
    assert keep(two, "x" * 9) == "characters per second: 4.5 is under 5"
    assert keep(two, "x" * 41) == "characters per second: 20.5 is over 20"
    assert keep(two, f"  {'x' * 19}  \n {'x' * 20}\n") is None  # one space between two words
    assert keep(two, "") == "characters per second: 0 is under 5"
    assert keep(two, None) is None  # nothing is said of what has no text
    assert keep(np.zeros(0, np.float32), "x") == "characters per second: inf is over 20"


def test_characters_per_second_tell_another_text_from_the_one_that_is_said(spoken):
    keep = filters.characters_per_second(min=5, max=25)
    for key, wave in spoken.items():
        text = key.partition(": ")[2]
        assert keep(wave, text) is None
        assert keep(wave, text * 5) is not None and keep(wave, text[:1]) is not None


@vad
def test_speech_is_speech_and_other_sound_is_not(spoken):
    keep = filters.speech_share(min_share=0.5)
    for key, wave in spoken.items():
        assert keep(wave, None) is None, key
    others = {
        "silence": np.zeros(3 * RATE),
        "noise": noise(0.1),
        "faint noise": noise(0.001),
        "sine": sine(0.5, 3),
        "music": music(),
        "low noise": np.cumsum(noise(0.001)),
        "nothing": np.zeros(0),
        "a sample": np.zeros(1),
    }
    for name, wave in others.items():
        assert keep(wave.astype(np.float32), "text").startswith("speech share: 0"), name


@vad
def test_the_share_of_speech_is_its_share_of_the_time(spoken):
    speech = next(wave for key, wave in spoken.items() if "bee" in key)
    half = np.concatenate([speech, np.zeros_like(speech)])
    assert filters.speech_share(min_share=0.4)(half, None) is None
    reason = filters.speech_share(min_share=0.6)(half, None)
    assert reason.startswith("speech share: 0.") and reason.endswith(" is under 0.6")
    assert filters.speech_share(min_share=0, threshold=1)(half, None) is None
    assert filters.speech_share(min_share=0.01, threshold=1)(half, None) is not None


@vad
@real
def test_people_speak():
    jfk = decoding.load(DATA / "jfk.flac")
    assert filters.speech_share(min_share=0.6)(jfk, None) is None
    assert filters.speech_share(min_share=0.8)(jfk, None) is not None  # he makes pauses
    digits = [decoding.load(path) for path in sorted(DATA.glob("spoken_digits/*_0.wav"))]
    row = np.concatenate(digits)  # the detector misses words that stand alone and last 0.3 s
    assert filters.speech_share(min_share=0.6)(row, None) is None
    others = filters.level(min_dbfs=-50), filters.clipping(max_share=0.01)
    assert all(keep(wave, None) is None for keep in others for wave in [jfk, *digits])
    text = "And so, my fellow Americans, ask not what your country can do for you, ask what you "
    text += "can do for your country."
    assert filters.characters_per_second(min=5, max=25)(jfk, text) is None


HASHES = """
import hashlib, sys
import numpy as np
import torch
from speechfuse.audio import filters
torch.set_num_threads(3)
wave = np.load(sys.argv[1])
print(hashlib.sha256(filters._silero().audio_forward(wave).tobytes()).hexdigest())
print(filters.level(min_dbfs=0)(wave, None))
print(torch.get_num_threads())
"""


@vad
def test_the_verdict_is_the_same_in_every_thread_and_process(spoken, tmp_path):
    model = filters._silero()
    waves = [*spoken.values(), music()]
    alone = [model.audio_forward(wave).tobytes() for wave in waves]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda wave: model.audio_forward(wave).tobytes(), waves * 2)) == (
            alone * 2
        )
    np.save(tmp_path / "wave.npy", waves[1])
    command = [sys.executable, "-c", HASHES, str(tmp_path / "wave.npy")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [
        hashlib.sha256(alone[1]).hexdigest(),
        filters.level(min_dbfs=0)(waves[1], None),
        "3",  # importing silero_vad would set it to 1
    ]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: filters.duration(2, 1), r"min_seconds=2 is more than max_seconds=1"),
        (lambda: filters.duration(), "give min_seconds or max_seconds"),
        (lambda: filters.level(-20, -45), "min_dbfs=-20 is more than max_dbfs=-45"),
        (lambda: filters.level(float("nan")), "min_dbfs=nan"),
        (lambda: filters.level(), "give min_dbfs or max_dbfs"),
        (lambda: filters.clipping(1.5), r"max_share=1.5 is not a share"),
        (lambda: filters.clipping(-0.1), r"max_share=-0.1 is not a share"),
        (lambda: filters.characters_per_second(9, 3), "min=9 is more than max=3"),
        (lambda: filters.speech_share(50), "min_share=50 is not a share"),
        (lambda: filters.speech_share(0.5, threshold=-1), "threshold=-1 is not a share"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused_when_the_job_starts(
    make: Callable[[], filters.Filter], why: str
):
    with pytest.raises(ValueError, match=why):
        make()


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    filters._silero.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'speechfuse\[vad\]'"):
        filters.speech_share(0.5)


def test_yaml_names_them():
    specs = [
        {"_component_": "speechfuse.audio.duration", "min_seconds": 0.3},
        {"_component_": "speechfuse.audio.level", "min_dbfs": -50},
        {"_component_": "speechfuse.audio.clipping", "max_share": 0.01},
        {"_component_": "speechfuse.audio.characters_per_second", "min": 3, "max": 30},
    ]
    for spec in specs:
        assert config.instantiate(spec)(sine(0.5), "one, two, three") is None
