"""Audio: splitting loses nothing and cuts where it is quiet; decoding gives mono at 16 kHz, or says
why not (tests/test_bad_audio.py has the bad files)."""

import errno
import io
import os
import re
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from speechfuse.audio import augmentation, containers, decoding, espeak_ng
from tests.bad_audio import FILES, cut, encoded, mp3, patched, sound, tagged, vorbis

RATE = decoding.SAMPLE_RATE


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    count = round(seconds * RATE)
    return np.random.default_rng(seed).uniform(-0.5, 0.5, count).astype(np.float32)


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("limit", [0.1, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.999, 1.0, 4.7, 5.00007, 12.3, 61.0])
def test_pieces_joined_are_the_waveform_and_none_is_too_long(limit, seconds):
    waveform = noise(seconds, seed=round(10 * seconds))
    pieces = decoding.split(waveform, limit)
    np.testing.assert_array_equal(np.concatenate(pieces), waveform)
    assert all(len(piece) <= limit * RATE for piece in pieces)
    assert len(pieces) >= np.ceil(len(waveform) / (limit * RATE))
    if seconds > 0:
        assert all(len(piece) for piece in pieces)
    if len(pieces) > 1:  # cuts are looked for near the limit: no piece but the last is short
        assert min(map(len, pieces[:-1])) >= (limit - min(1.0, limit / 2)) * RATE


def test_a_waveform_of_exactly_the_limit_stays_whole():
    assert [len(p) for p in decoding.split(noise(5.0), 5.0)] == [5 * RATE]
    longer = np.append(noise(5.0), np.float32(0))
    assert len(decoding.split(longer, 5.0)) == 2


@pytest.mark.parametrize("begin", [4.05, 4.3, 4.62, 4.84])
def test_the_cut_is_in_a_silence_near_the_limit(begin):
    waveform = noise(9.0)
    end = begin + 0.15
    waveform[round(begin * RATE) : round(end * RATE)] *= 0.001
    waveform[round(2.0 * RATE) : round(2.5 * RATE)] = 0  # quieter, but too far from the limit
    first = len(decoding.split(waveform, 5.0)[0]) / RATE
    assert begin <= first <= end


def test_every_cut_finds_its_own_silence():
    waveform = noise(13.0)
    silences = [4.4, 8.9]  # 4.5 s after the first cut
    for begin in silences:
        waveform[round(begin * RATE) : round((begin + 0.2) * RATE)] = 0
    lengths = [len(piece) / RATE for piece in decoding.split(waveform, 5.0)]
    assert len(lengths) == 3
    for begin, end in zip(silences, np.cumsum(lengths), strict=False):
        assert begin <= end <= begin + 0.2


@pytest.mark.parametrize("noise", [0.0, 1e-4, 0.03])
def test_the_silence_at_the_ends_is_cut_but_a_tenth_of_a_second(noise):
    speech = 0.3 * np.sin(np.arange(decoding.SAMPLE_RATE) / 5)
    speech[6000:9000] = 0.0  # a pause inside stays
    recording = np.pad(speech, (decoding.SAMPLE_RATE, 2 * decoding.SAMPLE_RATE))
    recording += noise * np.random.default_rng(0).standard_normal(len(recording))
    margin = decoding.SAMPLE_RATE // 10
    heard = decoding.spoken(recording.astype(np.float32))
    whole = recording[decoding.SAMPLE_RATE - margin : 2 * decoding.SAMPLE_RATE + margin].astype(
        np.float32
    )
    assert np.array_equal(heard, whole)


@pytest.mark.parametrize("recording", [np.zeros(8000), np.ones(8000), np.zeros(0), np.ones(100)])
def test_what_is_everywhere_as_loud_is_kept_whole(recording):
    assert np.array_equal(decoding.spoken(recording.astype(np.float32)), recording)


def test_forty_minutes_are_split_at_once_and_without_copies():
    waveform = np.tile(noise(60), 40)
    start = time.monotonic()
    pieces = decoding.split(waveform, 30.0)
    assert time.monotonic() - start < 2
    assert len(pieces) >= 80 and all(np.shares_memory(piece, waveform) for piece in pieces)
    assert sum(map(len, pieces)) == len(waveform)


def test_channels_are_averaged(tmp_path):
    left, right = noise(0.5, seed=1), noise(0.5, seed=2)
    one_of_six = [np.zeros_like(left)] * 5 + [left]
    for channels in ([left, right], [left, right, left], [left, right] * 4, one_of_six):
        path = tmp_path / "many.wav"
        soundfile.write(path, np.stack(channels, axis=1), RATE, subtype="FLOAT")
        decoded = decoding.decode(path)
        assert (decoded.rate, decoded.channels) == (RATE, len(channels))
        assert decoded.waveform.dtype == np.float32 and decoded.waveform.shape == left.shape
        np.testing.assert_array_equal(
            decoded.waveform, np.stack(channels, axis=1).mean(axis=1).astype(np.float32)
        )
        assert decoded.channel is None


SPEECH, OTHER, HUM = noise(3.0, 1), noise(3.0, 2), 1e-3 * noise(3.0, 3)
LATER = np.arange(len(SPEECH)) >= 2 * RATE


@pytest.mark.parametrize(
    ("channels", "used"),
    [
        ([SPEECH, -SPEECH], 0),
        ([0.9 * SPEECH, -SPEECH + HUM], 1),
        ([SPEECH, -0.8 * SPEECH + HUM], 0),
        ([SPEECH, np.where(LATER, -SPEECH, SPEECH)], 0),  # in a stretch
        ([SPEECH + 0.2, -SPEECH + 0.2], 0),  # a constant part is no sound
        ([HUM, SPEECH, -SPEECH, HUM, HUM, HUM], 1),
    ],
)
def test_channels_that_cancel_each_other_are_not_mixed(channels, used):
    file = encoded(np.stack(channels, axis=1), subtype="FLOAT")
    decoded = decoding.decode(file)
    assert (decoded.channels, decoded.channel) == (len(channels), used)
    np.testing.assert_array_equal(decoded.waveform, channels[used].astype(np.float32))


def test_a_clip_of_which_no_channel_has_all_and_the_mix_has_not_is_refused():
    left, right = np.where(LATER, SPEECH, OTHER), np.where(LATER, -SPEECH, 0)
    right[: RATE // 2], left[: RATE // 2] = SPEECH[: RATE // 2], 0
    with pytest.raises(ValueError, match=r"^cancelled: "):
        decoding.decode(encoded(np.stack([left, right], axis=1)))


@pytest.fixture(scope="module")
def spoken() -> list[np.ndarray]:
    """Two voices, 3 s each, with pauses."""
    texts = ("What is three plus four? Name a bird.", "The weather was cold and rainy, she said.")
    voices = [espeak_ng.EspeakVoice(name, 170, pitch) for name, pitch in (("en", 30), ("en", 70))]
    with espeak_ng.EspeakLibrary() as library:
        spoken = [library.speak(*pair).waveform for pair in zip(texts, voices, strict=True)]
    return [0.5 * np.resize(waveform, 3 * RATE) for waveform in spoken]


def level(waveform: np.ndarray, db: float, of: np.ndarray) -> np.ndarray:
    return waveform * np.sqrt(np.mean(of**2) / np.mean(waveform**2)) * 10 ** (db / 20)


@pytest.mark.parametrize("part", [slice(None), slice(2 * RATE, None)])
@pytest.mark.parametrize(
    ("sound", "db"),
    [(tone(3.0, RATE, 100), -7.5), (tone(3.0, RATE, 100), 5), (OTHER, -3), (OTHER, -7.5)],
)
def test_speech_that_is_inverted_under_a_noise_that_is_not_is_kept(spoken, sound, db, part):
    speech, other = spoken[0], np.array(spoken[0])
    other[part] *= -1
    shared = level(sound, db, speech)
    channels = [other + shared, speech + shared]
    decoded = decoding.decode(encoded(np.stack(channels, axis=1), subtype="FLOAT"))
    assert decoded.channel is not None
    np.testing.assert_array_equal(decoded.waveform, channels[decoded.channel].astype(np.float32))


def in_a_room(waveform: np.ndarray, seed: int) -> np.ndarray:
    room = augmentation.Reverberation((0.5, 0.5), (6.0, 6.0))
    return room(waveform, np.random.default_rng(seed))[0]


@pytest.mark.parametrize(
    "right",
    [
        *(lambda a, b, lag=lag: np.roll(a, lag) for lag in (1, 3, 5, 8, 16, 31, 80, 240)),
        lambda a, b: 0.2 * a + 1e-3 * OTHER,
        lambda a, b: b - 0.3 * a,  # another speaker, and this one's inverted echo
        lambda a, b: in_a_room(a, 1),
        lambda a, b: level(OTHER, 0, a),
        lambda a, b: a + level(OTHER, 0, a),
    ],
)
def test_speech_that_its_channels_have_in_different_ways_is_mixed(spoken, right):
    left = in_a_room(spoken[0], 2)
    for one in (spoken[0], left):
        decoded = decoding.decode(encoded(np.stack([one, right(one, spoken[1])], axis=1)))
        assert decoded.channel is None


@pytest.mark.parametrize("rate", [8000, 11025, 12345, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.01])
def test_any_rate_becomes_16_khz_of_the_same_length_and_pitch(tmp_path, rate, seconds):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(seconds, rate), rate, subtype="FLOAT")
    loaded = decoding.load(path)
    assert loaded.dtype == np.float32 and loaded.ndim == 1
    assert abs(len(loaded) - seconds * RATE) <= 1
    inner = slice(RATE // 10, round(seconds * RATE) - RATE // 10)  # the filter rings at the edges
    np.testing.assert_allclose(loaded[inner], tone(seconds, RATE)[inner], atol=0.01)


def test_what_is_above_8_khz_is_filtered_not_folded(tmp_path):
    path = tmp_path / "high.wav"
    soundfile.write(path, tone(1.0, 44100, hertz=11_000), 44100, subtype="FLOAT")
    assert np.abs(decoding.load(path)[RATE // 10 : -RATE // 10]).max() < 0.005


FORMATS = [  # format, subtype, rate, channels
    *(("WAV", each, RATE, 1) for each in ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")),
    *(("WAV", each, RATE, 1) for each in ("ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM", "GSM610")),
    ("WAV", "PCM_16", RATE, 1),
    ("WAV", "PCM_16", 44_100, 2),
    ("AIFF", "PCM_16", RATE, 2),
    ("AIFF", "FLOAT", 48_000, 1),
    ("AU", "ULAW", 8000, 1),
    ("CAF", "PCM_24", RATE, 1),
    ("CAF", "ALAC_16", RATE, 2),
    ("W64", "PCM_16", RATE, 1),
    ("RF64", "PCM_16", RATE, 1),
    ("NIST", "PCM_16", RATE, 1),
    ("FLAC", "PCM_16", RATE, 1),
    ("FLAC", "PCM_24", 44_100, 2),
    ("OGG", "VORBIS", RATE, 1),
    ("OGG", "VORBIS", 44_100, 2),
    ("OGG", "OPUS", RATE, 1),
    ("OGG", "OPUS", 48_000, 2),
    ("MP3", "MPEG_LAYER_III", RATE, 1),
    ("MP3", "MPEG_LAYER_III", 44_100, 2),
]


@pytest.mark.parametrize(("format", "subtype", "rate", "channels"), FORMATS)
def test_every_format_is_exactly_what_its_decoder_and_soxr_give(
    tmp_path, monkeypatch, format, subtype, rate, channels
):
    """Whether in a file or in bytes, and however many samples are read at once."""
    samples = np.stack([tone(2.3, rate, 220 + 330 * c) for c in range(channels)], axis=1)
    path = tmp_path / "sound"
    soundfile.write(path, samples, rate, format=format, subtype=subtype)
    with soundfile.SoundFile(path) as file:
        plain = file.read(file.frames, "float32", always_2d=True).mean(axis=1)
    assert abs(len(plain) / rate - 2.3) < 0.1
    wanted = plain if rate == RATE else soxr.resample(plain, rate, RATE)
    for block in (containers.BLOCK, 4001):
        monkeypatch.setattr(containers, "BLOCK", block)
        decoded = decoding.decode(path)
        assert (decoded.rate, decoded.channels) == (rate, channels)
        assert decoded.waveform.dtype == np.float32
        np.testing.assert_array_equal(decoded.waveform, wanted)
        np.testing.assert_array_equal(decoding.decode(path.read_bytes()).waveform, wanted)


@pytest.mark.parametrize("name", ["sound", "sound.raw", "sound.vox", "sound.gsm", "sound.mp3"])
def test_what_a_file_holds_decides_not_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(encoded(tone(1.0, RATE), format="FLAC"))
    assert len(decoding.decode(tmp_path / name).waveform) == RATE
    (tmp_path / name).write_bytes(b"this is no audio " * 100)
    with pytest.raises(ValueError, match=r"^not audio: "):
        decoding.decode(tmp_path / name)


@pytest.mark.parametrize(("format", "subtype", "rate", "channels"), FORMATS)
def test_a_part_of_a_file_is_that_part_of_the_whole(format, subtype, rate, channels):
    file = encoded(sound(2.5, rate, channels), rate, format, subtype)
    whole = decoding.decode(file).waveform
    for offset, seconds in ((0.0, 0.5), (0.25, 1.0), (1.2, None)):
        part = decoding.decode(file, offset, seconds).waveform
        start = round(offset * RATE)
        end = len(whole) if seconds is None else start + round(seconds * RATE)
        assert abs(len(part) - (end - start)) <= 1
        inner = slice(800, min(len(part), end - start) - 800)  # the resampler's edges
        exact = 0.0 if rate == RATE and format != "MP3" else 1e-5
        if subtype == "OPUS":  # its decoder finds its state again only by and by
            exact = 0.01
        np.testing.assert_allclose(part[inner], whole[start:end][inner], atol=exact)


@pytest.mark.parametrize("format", ["WAV", "MP3"])
def test_a_part_that_the_file_has_not_is_refused(format):
    file = encoded(tone(2.0, RATE), format=format, subtype=None)
    assert len(decoding.decode(file, 1.0, 1.05).waveform) == RATE  # durations are rounded
    for offset, seconds, why in (
        (5.0, None, "begins at 5.00 s"),
        (5.0, 1.0, "begins at 5.00 s"),
        (1.0, 3.0, "to 4.00 s of 2.00 s"),
        (-0.1, None, "from -0.1 s"),
        (0.0, 0.0, "for 0.0 s"),
        (float("nan"), 1.0, "from nan s"),
        (0.0, float("inf"), "for inf s"),
        (1e300, None, "from 1e+300 s"),
    ):
        with pytest.raises(ValueError, match=r"^bad offset: .*" + re.escape(why)):
            decoding.decode(file, offset, seconds)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("cut")])
@pytest.mark.parametrize("share", [0.5, 0.99])
def test_a_file_that_lost_its_end_is_refused_but_its_whole_parts_are_used(name, share):
    file = FILES[name][1]()
    file = file[: int(share * len(file))]
    with pytest.raises(ValueError, match=r"^truncated: "):
        decoding.decode(file)
    assert len(decoding.decode(file, 0.0, 0.05).waveform) == 0.05 * RATE


def test_the_last_moment_of_a_file_may_be_missing():
    file = encoded(tone(2.0, RATE))
    assert len(decoding.decode(file[:-1]).waveform) == 2 * RATE - 1
    assert len(decoding.decode(file[:-3000]).waveform) == 2 * RATE - 1500
    with pytest.raises(ValueError, match=r"^truncated: 1\.88 s decode; its header says 2\.00 s"):
        decoding.decode(file[:-4000])


def test_an_mp3_that_does_not_state_its_length_is_read_to_its_end():
    """Its first frame states it; without, libsndfile takes this one to be 1.7 s long."""
    samples = np.concatenate([noise(1.0), np.zeros(8 * RATE), noise(1.0)])
    stated = encoded(samples, format="MP3", subtype="MPEG_LAYER_III")
    bare = stated[stated.index(stated[:4], 4) :]
    assert soundfile.info(io.BytesIO(bare)).duration < 4
    for file in (bare, tagged(bare)):
        waveform = decoding.decode(file).waveform
        assert abs(len(waveform) / RATE - 10) < 0.2
        assert np.abs(waveform[-RATE // 2 :]).mean() > 0.1
        part = decoding.decode(file, 9.5, 0.25).waveform
        np.testing.assert_array_equal(part, waveform[round(9.5 * RATE) :][: RATE // 4])


def test_of_several_files_in_one_all_is_read_or_none():
    first, second = (encoded(sound(s), format="MP3", subtype=None) for s in (2.0, 3.0))
    waveform = decoding.decode(first + second).waveform
    assert abs(len(waveform) / RATE - 5) < 0.3 and np.abs(waveform[-RATE:]).mean() > 0.1
    with pytest.raises(ValueError, match=r"^truncated: .* another Ogg stream follows"):
        decoding.decode(vorbis() + vorbis())


def mp3_of(rate: int, channels: int, seconds: float = 2.0) -> bytes:
    return encoded(sound(seconds, rate, channels), rate, "MP3", "MPEG_LAYER_III")


@pytest.mark.parametrize(
    "formats",
    [
        [(44_100, 1), (24_000, 1)],
        [(8000, 2), (44_100, 2), (8000, 2)],
        [(44_100, 1), (44_100, 2)],
        [(48_000, 2), (16_000, 1), (22_050, 1)],
    ],
)
@pytest.mark.parametrize("before", [lambda mp3: mp3, tagged], ids=["plain", "tagged"])
def test_an_mp3_whose_rate_or_channels_change_is_read_to_its_end(formats, before):
    file = b"".join(before(mp3_of(*each)) for each in formats)
    decoded = decoding.decode(file)
    assert decoded.rate == formats[0][0]
    assert decoded.channels == max(channels for _, channels in formats)
    length = len(decoded.waveform) / RATE
    assert 2 * len(formats) <= length < 2.3 * len(formats)
    for second in np.arange(0.5, length - 0.5, 0.5):  # of the first channel's tone, or of both
        piece = decoded.waveform[round(second * RATE) :][: RATE // 4]
        peak = np.argmax(np.abs(np.fft.rfft(piece))) * 4
        assert peak in (220, 268, 272) or np.abs(piece).max() < 0.1, second  # between two files
    part = decoding.decode(file, 2.5, 1.0).waveform
    whole = decoded.waveform[round(2.5 * RATE) :][: len(part)]
    np.testing.assert_allclose(part[800:-800], whole[800:-800], atol=1e-5)


def test_an_mp3_is_found_behind_padding_and_junk():
    rubbish = np.random.default_rng(0).bytes(3000)
    padded = b"ID3\x03\x00\x00\x00\x00\x08\x00" + bytes(1024 + 70_000)  # more than its size
    for before in (padded, rubbish, bytes(100_000), FILES["html.mp3"][1]()):
        waveform = decoding.decode(before + mp3()).waveform
        assert 2 <= len(waveform) / RATE < 2.1 and np.abs(waveform[-RATE:]).mean() > 0.1


def test_an_mp3_with_less_than_its_frames_is_refused():
    """Between its parts is more than the decoder steps over."""
    with pytest.raises(ValueError, match=r"^truncated: "):
        decoding.decode(mp3() + np.random.default_rng(0).bytes(5000) + mp3())


def wav(*chunks: tuple[bytes, bytes], padded: bool = True) -> bytes:
    body = b"WAVE"
    for name, content in chunks:
        body += name + len(content).to_bytes(4, "little") + content
        body += b"\0" * (padded and len(content) % 2)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


GOOD = encoded(sound(2))
FORM, DATA = (b"fmt ", GOOD[20:36]), (b"data", GOOD[44:])
NO_SIZE = (b"data", b"")


@pytest.mark.parametrize(
    "file",
    [
        wav(FORM, NO_SIZE) + GOOD[44:],  # the recorder crashed
        wav((b"bext", bytes(602)), FORM, NO_SIZE) + GOOD[44:],
        patched({4: ("<I", 0), 40: ("<I", 0)}, GOOD),
        patched({4: ("<I", 36), 40: ("<I", 0)}, GOOD),
        wav((b"LIST", b"odd"), FORM, DATA),
        wav((b"LIST", b"odd"), FORM, DATA, padded=False),
        wav(FORM, (b"id3 ", bytes(601)), DATA, padded=False),
        wav(FORM, DATA, (b"LIST", bytes(100_000))),
        GOOD + bytes(100_000),
        GOOD + b"ID3" + bytes(100_000),
        encoded(sound(2), format="FLAC") + b"TAG" + bytes(125),
    ],
)
def test_all_samples_of_an_unusual_file_are_read(file):
    good = decoding.decode(GOOD).waveform
    np.testing.assert_allclose(decoding.decode(file).waveform, good, atol=2**-14)


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (wav(FORM, NO_SIZE, (b"LIST", bytes(5000))), "empty: it holds 0 seconds"),
        (patched({40: ("<I", 16_000)}, GOOD), r"truncated: 0\.50 s decode; 48,000 bytes follow"),
        (GOOD + GOOD, r"truncated: 2\.00 s decode; 64,044 bytes follow"),
        (2 * encoded(sound(2), format="FLAC"), r"truncated: 2\.00 s decode; [\d,]+ bytes follow"),
        (cut(wav((b"LIST", b"odd"), FORM, DATA, padded=False)), r"truncated: .* says 2\.00 s"),
        (wav(FORM, (b"LIST", bytes(5000))), "not audio: "),
        (2 * vorbis(), r"truncated: .* another Ogg stream follows"),
        (mp3()[:500], "not audio: Format not recognised"),
    ],
)
def test_a_file_with_more_or_less_than_its_header_states_is_refused(file, why):
    with pytest.raises(ValueError, match=f"^{why}"):
        decoding.decode(file)


def test_a_flac_that_states_too_few_samples_is_refused():
    file = encoded(sound(2), format="FLAC")
    stated = int.from_bytes(file[18:26]) - 20_000
    with pytest.raises(ValueError, match=r"^truncated: 0\.75 s decode; [\d,]+ bytes follow"):
        decoding.decode(file[:18] + stated.to_bytes(8) + file[26:])


@pytest.mark.parametrize("size", [0x7FFF0000, 0x80000000, 0xFFFFFFFF])
def test_a_wav_written_to_a_pipe_is_used_though_its_sizes_are_not_known(size):
    file = patched({4: ("<I", size), 40: ("<I", size)})
    assert len(decoding.decode(file).waveform) == RATE


def test_tags_of_an_mp3_are_not_audio():
    plain = decoding.decode(mp3()).waveform
    np.testing.assert_array_equal(decoding.decode(tagged(mp3())).waveform, plain)
    with pytest.raises(ValueError, match=r"^truncated: "):
        decoding.decode(tagged(mp3())[:-9000])


def test_samples_over_full_scale_are_kept_and_those_of_another_scale_refused():
    loud = encoded(3 * noise(1.0), subtype="FLOAT")
    np.testing.assert_array_equal(decoding.decode(loud).waveform, 3 * noise(1.0))
    with pytest.raises(ValueError, match=r"^out of range: .* 163"):
        decoding.decode(encoded(32768 * noise(1.0), subtype="FLOAT"))


def test_threads_decode_alike_and_leave_nothing_open(tmp_path):
    names = ("good.wav", "two in a row.mp3", "opus in a.ogg", "cut b.flac", "nan.wav", "html.mp3")
    files = []
    for i in range(3):
        for name in names:
            files.append(tmp_path / f"{i}-{name}")
            files[-1].write_bytes(FILES[name][1]())

    def result(source: Path | bytes) -> bytes | str:
        try:
            return decoding.decode(source).waveform.tobytes()
        except ValueError as error:
            return str(error)

    sources = [*files, *(path.read_bytes() for path in files)]
    alone = [result(source) for source in sources]
    assert alone[: len(files)] == alone[len(files) :]
    opened = sorted(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else []
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(result, sources)) == alone
    assert not opened or sorted(os.listdir("/proc/self/fd")) == opened


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "locked.wav").write_bytes(encoded(tone(1.0, RATE)))
    (tmp_path / "locked.wav").chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the folders above are closed to others
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(ValueError, match=r"^unreadable: Permission denied"):
            decoding.decode(Path("locked.wav"))
    finally:
        if root:
            os.seteuid(0)


def test_a_fault_of_the_machine_is_no_reject(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    (tmp_path / "good.wav").write_bytes(encoded(tone(1.0, RATE)))
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match="Too many open files"):
        decoding.decode(tmp_path / "good.wav")


def test_no_audio_is_refused_with_the_path_and_the_reason(tmp_path):
    text, nothing, empty = (tmp_path / name for name in ("text.wav", "nothing.wav", "empty.wav"))
    text.write_text("this is no audio " * 100)
    nothing.write_bytes(b"")
    soundfile.write(empty, np.zeros(0), RATE)
    for path, why in ((text, "not audio: "), (nothing, "empty: "), (empty, "empty: it holds 0 s")):
        with pytest.raises(ValueError, match=f"{path.name} is not a readable audio file: {why}"):
            decoding.load(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.wav"):
        decoding.load(tmp_path / "absent.wav")


ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


def by_ffmpeg(path: Path, *options: str) -> Path:
    wav = path.with_suffix(".wav")
    soundfile.write(wav, np.stack([tone(3.0, 44_100)] * 2, axis=1), 44_100)
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", "-i", str(wav), *options, str(path)]
    subprocess.run(command, check=True)
    return path


@ffmpeg
@pytest.mark.parametrize(
    "name", ["x.m4a", "x.mp4", "x.aac", "x.webm", "x.mka", "x.wma", "- odd %d 'name'.m4a"]
)
def test_other_formats_are_read_by_ffmpeg(tmp_path, name):
    path = by_ffmpeg(tmp_path / name)
    decoded = decoding.decode(path)
    assert decoded.rate in (44_100, 48_000) and decoded.channels == 2
    assert abs(len(decoded.waveform) / RATE - 3) < 0.1
    inner = decoded.waveform[RATE:-RATE]
    peak = np.argmax(np.abs(np.fft.rfft(inner))) * RATE / len(inner)
    assert peak == pytest.approx(440, abs=5)
    np.testing.assert_array_equal(decoding.decode(path.read_bytes()).waveform, decoded.waveform)
    part = decoding.decode(path, 1.0, 0.5).waveform
    wanted = decoded.waveform[RATE:][: RATE // 2]
    np.testing.assert_allclose(part[800:-800], wanted[800:-800], atol=1e-5)
    with pytest.raises(ValueError, match=r"^bad offset: "):
        decoding.decode(path, 8.0)


@ffmpeg
@pytest.mark.parametrize("codec", ["g722", "wmav2"])
def test_a_wav_whose_codec_libsndfile_does_not_know_is_read_by_ffmpeg(tmp_path, codec):
    path = by_ffmpeg(tmp_path / "x.mp3", "-f", "wav", "-ar", "16000", "-c:a", codec)
    assert len(decoding.decode(path).waveform) / RATE == pytest.approx(3, abs=0.2)


@ffmpeg
@pytest.mark.parametrize("name", ["x.m4a", "x.aac", "x.webm"])
def test_what_ffmpeg_finds_cut_off_is_refused(tmp_path, name):
    path = by_ffmpeg(tmp_path / name, *(["-movflags", "+faststart"] if name == "x.m4a" else []))
    with pytest.raises(ValueError, match=r"^truncated: "):
        decoding.decode(path.read_bytes()[: path.stat().st_size // 2])


def test_without_ffmpeg_it_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    starts = {"mov": b"\0\0\0\x18ftypM4A ", "matroska": b"\x1aE\xdf\xa3", "aac": b"\xff\xf1P"}
    for name, start in starts.items():
        with pytest.raises(ValueError, match=rf"^not audio: {name} needs ffmpeg, which"):
            decoding.decode(start)


def test_ffmpeg_has_a_time_limit_and_is_ended_with_it(tmp_path, monkeypatch):
    """In the place of ffmpeg, a program that never comes to an end."""
    (tmp_path / "ffmpeg").write_text("#!/bin/sh\necho $$ > $0.pid\nexec sleep 60\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(containers, "FFMPEG_SECONDS", 0.5)
    threads = threading.active_count()
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^not audio: ffmpeg finds none"):
        decoding.decode(b"\0\0\0\x18ftypM4A ")
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "ffmpeg.pid").read_text()), 0)
    assert threading.active_count() == threads
