"""Audio: splitting loses nothing and cuts where it is quiet; loading gives mono at 16 kHz or says
why not."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechfuse import audio

RATE = audio.SAMPLE_RATE


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    count = round(seconds * RATE)
    return np.random.default_rng(seed).uniform(-0.5, 0.5, count).astype(np.float32)


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("limit", [1.0, 5.0, 30.0])
@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.999, 1.0, 4.7, 5.00007, 12.3, 61.0])
def test_pieces_joined_are_the_waveform_and_none_is_too_long(limit, seconds):
    waveform = noise(seconds, seed=round(10 * seconds))
    pieces = audio.split(waveform, limit)
    np.testing.assert_array_equal(np.concatenate(pieces), waveform)
    assert all(len(piece) <= limit * RATE for piece in pieces)
    assert len(pieces) >= np.ceil(len(waveform) / (limit * RATE))
    if seconds > 0:
        assert all(len(piece) for piece in pieces)
    if len(pieces) > 1:  # cuts are looked for near the limit: no piece but the last is short
        assert min(map(len, pieces[:-1])) >= (limit - min(1.0, limit / 2)) * RATE


def test_a_waveform_of_exactly_the_limit_stays_whole():
    assert [len(p) for p in audio.split(noise(5.0), 5.0)] == [5 * RATE]
    longer = np.append(noise(5.0), np.float32(0))
    assert len(audio.split(longer, 5.0)) == 2


@pytest.mark.parametrize("begin", [4.05, 4.3, 4.62, 4.84])
def test_the_cut_is_in_a_silence_near_the_limit(begin):
    waveform = noise(9.0)
    end = begin + 0.15
    waveform[round(begin * RATE) : round(end * RATE)] *= 0.001
    waveform[round(2.0 * RATE) : round(2.5 * RATE)] = 0  # quieter, but too far from the limit
    first = len(audio.split(waveform, 5.0)[0]) / RATE
    assert begin <= first <= end


def test_every_cut_finds_its_own_silence():
    waveform = noise(13.0)
    silences = [4.4, 8.9]  # 4.5 s after the first cut
    for begin in silences:
        waveform[round(begin * RATE) : round((begin + 0.2) * RATE)] = 0
    lengths = [len(piece) / RATE for piece in audio.split(waveform, 5.0)]
    assert len(lengths) == 3
    for begin, cut in zip(silences, np.cumsum(lengths), strict=False):
        assert begin <= cut <= begin + 0.2


def test_channels_are_averaged(tmp_path):
    left, right = noise(0.5, seed=1), noise(0.5, seed=2)
    for channels in ([left, right], [left, -left], [left, right, left]):
        path = tmp_path / "many.wav"
        soundfile.write(path, np.stack(channels, axis=1), RATE, subtype="FLOAT")
        loaded = audio.load(path)
        assert loaded.dtype == np.float32 and loaded.shape == left.shape
        np.testing.assert_allclose(loaded, np.mean(channels, axis=0), atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.01])
def test_any_rate_becomes_16_khz_of_the_same_length_and_pitch(tmp_path, rate, seconds):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(seconds, rate), rate, subtype="FLOAT")
    loaded = audio.load(path)
    assert loaded.dtype == np.float32 and loaded.ndim == 1
    assert abs(len(loaded) - seconds * RATE) <= 1
    inner = slice(RATE // 20, -RATE // 20)  # the filter rings at the edges
    np.testing.assert_allclose(loaded[inner], tone(seconds, RATE)[: len(loaded)][inner], atol=0.01)


def test_what_is_above_8_khz_is_filtered_not_folded(tmp_path):
    path = tmp_path / "high.wav"
    soundfile.write(path, tone(1.0, 44100, hertz=11_000), 44100, subtype="FLOAT")
    assert np.abs(audio.load(path)[RATE // 10 : -RATE // 10]).max() < 0.005


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_formats_that_the_folder_corpus_promises_are_read(tmp_path, suffix):
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, tone(1.0, RATE), RATE)
    loaded = audio.load(path)
    assert abs(len(loaded) / RATE - 1) < 0.1
    assert np.argmax(np.abs(np.fft.rfft(loaded))) * RATE / len(loaded) == pytest.approx(440, abs=5)


def test_no_audio_is_refused_with_the_path_and_the_reason(tmp_path):
    text, nothing, empty = (tmp_path / name for name in ("text.wav", "nothing.wav", "empty.wav"))
    text.write_text("this is no audio " * 100)
    nothing.write_bytes(b"")
    soundfile.write(empty, np.zeros(0), RATE)
    for path in (text, nothing):
        with pytest.raises(ValueError, match=f"{path.name} is not a readable audio file: "):
            audio.load(path)
    with pytest.raises(ValueError, match=r"empty\.wav holds 0 seconds"):
        audio.load(empty)
    with pytest.raises(FileNotFoundError, match=r"absent\.wav"):
        audio.load(tmp_path / "absent.wav")


def test_samples_that_are_no_numbers_are_refused(tmp_path: Path):
    waveform = noise(0.5)
    waveform[100] = np.nan
    path = tmp_path / "broken.wav"
    soundfile.write(path, waveform, RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"broken\.wav"):
        audio.load(path)
