"""Augmentation: what is recorded is what was done, and a seed gives the same samples."""

import hashlib
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import soundfile

from speechfuse.audio import augmentation
from speechfuse.synthesis.engines.espeak import Espeak

MODULE = "speechfuse.audio."
EVERY: list[dict[str, Any]] = [
    {"_component_": f"{MODULE}Speed"},
    {"_component_": f"{MODULE}Reverberation"},
    *(
        {"_component_": f"{MODULE}Noise", "snr": [0, 20], "sources": [source]}
        for source in augmentation.NOISES
    ),
    {"_component_": f"{MODULE}Gain", "db": [-10, 3]},
    {"_component_": f"{MODULE}Telephone"},
    *({"_component_": f"{MODULE}Lossy", "formats": [f]} for f in augmentation.FORMATS),
]


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    spoken = Espeak(["Annie"], ["en-us"]).speak("what is three plus four", "en-us+Annie", 0)
    assert spoken.waveform is not None
    return spoken.waveform * 0.5


def one(speech: np.ndarray, seed: int = 0, **spec: Any) -> tuple[np.ndarray, dict[str, Any]]:
    spec["_component_"] = f"{MODULE}{spec.pop('step')}"
    done, (record,) = augmentation.apply(speech, [spec], seed)
    return done, record


@pytest.mark.parametrize("spec", EVERY, ids=lambda spec: spec["_component_"].split(".")[-1])
def test_every_step_is_repeatable_bounded_and_recorded(speech, spec):
    before = speech.copy()
    first, records = augmentation.apply(speech, [spec], 3)
    again, _ = augmentation.apply(speech, [spec], 3)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(speech, before)
    assert first.dtype == np.float32 and np.isfinite(first).all() and np.abs(first).max() <= 1
    assert records[0]["name"] in spec["_component_"].lower()
    assert len(first) == len(speech) or "Speed" in spec["_component_"]
    assert first.shape != speech.shape or np.abs(first - speech).max() > 1e-4
    others = [augmentation.apply(speech, [spec], seed)[1] for seed in range(8)]
    assert any(other != records for other in others) or records[0]["name"] in ("telephone", "lossy")


CHAIN = """
import hashlib, sys, json
import numpy as np
from speechfuse.audio import augmentation
speech = np.sin(np.arange(16000) / 20).astype(np.float32)
done, _ = augmentation.apply(speech, json.loads(sys.argv[1]), 5)
print(hashlib.sha256(done.tobytes()).hexdigest())
"""


def test_a_chain_gives_the_same_bytes_in_another_process():
    speech = np.sin(np.arange(16000) / 20).astype(np.float32)
    done, records = augmentation.apply(speech, EVERY, 5)
    assert [r["name"] for r in records][:3] == ["speed", "reverberation", "noise"]
    assert len(records) == len(EVERY)
    command = [sys.executable, "-c", CHAIN, json.dumps(EVERY)]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert there == hashlib.sha256(done.tobytes()).hexdigest()


def test_a_step_more_changes_none_before_it(speech):
    short, long = EVERY[:4], EVERY[:5]
    assert augmentation.apply(speech, long, 9)[1][:4] == augmentation.apply(speech, short, 9)[1]


def test_a_probability_is_a_share(speech):
    spec = {"_component_": f"{MODULE}Gain", "db": [-6, -6], "probability": 0.3}
    done = sum(len(augmentation.apply(speech[:10], [spec], seed)[1]) for seed in range(2000))
    assert 530 < done < 670


@pytest.mark.parametrize("source", augmentation.NOISES)
@pytest.mark.parametrize("snr", [20.0, 0.0])
def test_noise_is_as_far_below_the_speech_as_recorded(speech, source, snr):
    done, record = one(speech * 0.1, step="Noise", snr=[snr, snr], sources=[source])
    assert record == {"name": "noise", "source": source, "snr": snr}
    noise = done.astype(np.float64) - speech * 0.1
    found = 10 * np.log10(np.mean((speech * 0.1) ** 2) / np.mean(noise**2))
    assert found == pytest.approx(snr, abs=0.01)


def test_noise_has_the_spectrum_of_its_name():
    def share(noise: np.ndarray, low: float, high: float) -> float:
        power = np.abs(np.fft.rfft(noise)) ** 2
        at = np.fft.rfftfreq(len(noise), 1 / 16_000)
        return float(power[(at >= low) & (at < high)].sum() / power.sum())

    rng = np.random.default_rng(0)
    white, pink, babble = (make(160_000, rng) for make in augmentation.NOISES.values())
    for noise in (white, pink, babble):
        assert np.mean(noise**2) == pytest.approx(1, abs=0.02)
    assert share(white, 100, 200) == pytest.approx(share(white, 4000, 4100), rel=0.2)
    assert share(pink, 100, 200) == pytest.approx(share(pink, 2000, 4000), rel=0.2)  # an octave
    assert share(babble, 100, 4000) > 0.9
    levels = [np.std(part) for part in babble.reshape(-1, 800)]
    assert np.std(levels) > 5 * np.std([np.std(part) for part in white.reshape(-1, 800)])


def test_a_room_rings_after_the_sound_and_keeps_its_level(speech):
    click = np.zeros(16_000, np.float32)
    click[1000] = 0.5
    done, record = one(click, step="Reverberation", decay=[0.5, 0.5], wet=[-6, -6])
    assert record == {"name": "reverberation", "decay": 0.5, "wet": -6.0}
    assert np.abs(done[:990]).max() < 1e-6 and np.argmax(np.abs(done)) == 1000
    tail = done[1001:9000].astype(np.float64)
    assert 10 * np.log10(np.sum(tail**2) / done[1000] ** 2) == pytest.approx(-6, abs=0.1)
    early, late = (float(np.mean(tail[a : a + 800] ** 2)) for a in (0, 4000))
    assert 10 * np.log10(early / late) == pytest.approx(30, abs=2)  # 60 dB in 0.5 s
    reverberant, _ = one(speech, step="Reverberation")
    assert np.std(reverberant) == pytest.approx(np.std(speech), rel=0.01)


def test_gain_and_speed_are_as_recorded(speech):
    done, record = one(speech, step="Gain", db=[-12, -3])
    assert -12 <= record["db"] <= -3
    np.testing.assert_allclose(done, speech * 10 ** (record["db"] / 20), rtol=1e-5)
    fast, record = one(speech, step="Speed", factor=[1.2, 1.3])
    assert len(speech) / len(fast) == pytest.approx(record["factor"], abs=1e-3)
    tone = np.sin(2 * np.pi * 500 * np.arange(16_000) / 16_000).astype(np.float32)
    faster, record = one(tone, step="Speed", factor=[1.25, 1.25])
    at = np.fft.rfftfreq(len(faster), 1 / 16_000)[np.argmax(np.abs(np.fft.rfft(faster)))]
    assert at == pytest.approx(625, abs=2)


def test_a_telephone_has_its_band_only():
    noise = augmentation.white(160_000, np.random.default_rng(0)).astype(np.float32) * 0.1
    done, _ = one(noise, step="Telephone")
    power = np.abs(np.fft.rfft(done)) ** 2
    at = np.fft.rfftfreq(len(done), 1 / 16_000)
    inside = power[(at > 500) & (at < 3000)].mean()
    assert power[at < 100].mean() < inside / 1000 and power[at > 4000].mean() < inside / 300


@pytest.mark.parametrize("name", augmentation.FORMATS)
def test_a_codec_loses_something_and_shifts_nothing(speech, name):
    worst, record = one(speech, step="Lossy", formats=[name], compression=[0.97, 0.97])
    best, _ = one(speech, step="Lossy", formats=[name], compression=[0.0, 0.0])
    assert record["format"] == name
    likeness = [float(np.corrcoef(each, speech)[0, 1]) for each in (worst, best)]
    assert 0.7 < likeness[0] <= likeness[1] and likeness[1] > 0.998  # one sample off is 0.9
    if name != "mu-law":
        assert likeness[0] < likeness[1] - 1e-4 and record["compression"] == 0.97


def test_folders_of_noise_and_rooms_are_used_and_are_part_of_the_fingerprint(speech, tmp_path):
    (tmp_path / "deep").mkdir()
    tone = np.sin(2 * np.pi * 1000 * np.arange(4000) / 16_000)
    soundfile.write(tmp_path / "deep/tone.wav", tone, 16_000)
    (tmp_path / "notes.txt").write_text("no audio")
    spec = {"_component_": f"{MODULE}Noise", "snr": [6, 6], "folder": str(tmp_path)}
    done, (record,) = augmentation.apply(speech * 0.1, [spec], 0)
    assert record == {"name": "noise", "source": "deep/tone.wav", "snr": 6.0}
    rest = np.abs(np.fft.rfft(done - speech * 0.1))
    at = np.fft.rfftfreq(len(done), 1 / 16_000)[np.argmax(rest)]
    assert at == pytest.approx(1000, abs=3)  # repeated over the clip
    room = tmp_path / "rooms"
    room.mkdir()
    soundfile.write(room / "late.wav", np.eye(1, 400, 100)[0] * 0.9, 16_000)  # a delay only
    same, record = one(speech, step="Reverberation", folder=str(room))
    np.testing.assert_allclose(same, speech, atol=1e-4)
    assert record == {"name": "reverberation", "source": "late.wav"}
    before = augmentation.check([spec])
    assert before and augmentation.check([{**spec, "folder": str(room)}]) != before
    assert augmentation.check(EVERY) is None


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"_component_": f"{MODULE}Nois", "snr": [0, 1]}, "did you mean 'Noise'"),
        ({"_component_": f"{MODULE}Noise"}, "required snr"),
        ({"_component_": f"{MODULE}Noise", "snr": [9, 1]}, r"snr=\[9, 1\]: give a range"),
        ({"_component_": f"{MODULE}Noise", "snr": [1, 9], "sources": ["brown"]}, "'brown': choose"),
        ({"_component_": f"{MODULE}Noise", "snr": [1, 9], "folder": "/nowhere"}, "no audio in it"),
        ({"_component_": f"{MODULE}Lossy", "formats": ["g729"]}, "'g729': choose"),
        ({"_component_": f"{MODULE}Reverberation", "decay": [1e-5, 1e-5]}, "makes NaN or infinity"),
        ({"_component_": f"{MODULE}Gain", "db": [0, 0], "probability": 3}, "probability=3: give 0"),
    ],
)
def test_mistakes_are_said_before_work(spec, said):
    with pytest.raises(ValueError, match=said):
        augmentation.check([spec])


def test_silence_stays_silence():
    for spec in EVERY:
        done, _ = augmentation.apply(np.zeros(8000, np.float32), [spec], 0)
        assert np.isfinite(done).all() and np.abs(done).max() < 0.01
