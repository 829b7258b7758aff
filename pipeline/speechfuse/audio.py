"""Audio constants, decoding, mono, resampling and splitting.

In: an audio file, its bytes or an array. Out: mono float32 waveforms at 16 kHz. Full scale is 1;
decoders of lossy formats overshoot it, and the overshoot is kept.
libsndfile reads most formats. What it does not read and ffmpeg does (m4a, webm, wma ...) is used
where an `ffmpeg` is on the path.
"""

import errno
import os
import re
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import IO

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # Hz; Whisper's
TOKEN_RATE = 25.0  # codes a second of every WhisperVQ
SEARCH_SECONDS = 1.0  # how far before the limit a quiet place is looked for
QUIET_SECONDS = 0.1  # length of the stretch whose energy is compared
SUFFIXES = (
    ".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".snd",
    ".caf", ".w64", ".rf64", ".sph", ".mp2",
    ".m4a", ".m4b", ".mp4", ".aac", ".webm", ".mka", ".wma", ".amr", ".3gp",  # by ffmpeg
)  # fmt: skip
RATES = (4_000, 768_000)  # Hz; below is no speech, above no recorder
LOUDEST = 8.0  # samples beyond are on another scale, as float samples from -32768 to 32767
SLACK = 0.1  # seconds that may be missing at the end: durations in manifests are rounded
BLOCK = 1 << 17  # samples read at once, of all channels together
FFMPEG_SECONDS = 600.0  # time that ffmpeg has for one file

_CONTAINERS = (  # formats that libsndfile does not read: bytes, where they stand, ffmpeg's name
    (b"ftyp", 4, "mov"),
    (b"\x1a\x45\xdf\xa3", 0, "matroska"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", 0, "asf"),
    (b"\xff\xf1", 0, "aac"),
    (b"\xff\xf9", 0, "aac"),
    (b"#!AMR", 0, "amr"),
)
_CUT = re.compile(  # libsndfile's log: bytes of sound that the header states, and that are there
    r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE
)
_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)  # no file's fault
_STREAMED = 0x7FFF0000  # sizes from here on are written by who does not know the length yet


def resample(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Mono float32 waveform at `rate` Hz -> float32 at 16 kHz."""
    if rate == SAMPLE_RATE:
        return waveform.astype(np.float32, copy=False)
    return soxr.resample(waveform.astype(np.float32, copy=False), rate, SAMPLE_RATE)


@dataclass(frozen=True)
class Decoded:
    """`waveform`: float32 mono at 16 kHz. `rate` (Hz) and `channels` are the source's."""

    waveform: np.ndarray
    rate: int
    channels: int


class _Forward(soundfile.SoundFile):
    """soundfile seeks after every read to where it is, which restarts an mp3's decoder: samples
    at the seams would depend on the block. Told that it cannot seek, it does not."""

    def seekable(self) -> bool:
        return False


def decode(source: Path | bytes, offset: float = 0.0, seconds: float | None = None) -> Decoded:
    """Decode an audio file, or the bytes of one, whatever its name; channels are averaged.

    Only `seconds` from `offset` on are decoded, block by block, so that of a long file only the
    result is in memory. Samples are what the decoder gives: nothing is clipped or scaled.
    ValueError("kind: detail"), without the path, when the file is absent, no audio, or not the
    audio that it says it is (the kinds of speechfuse.corpora.clip.Reject, and "truncated" and "out
    of range").
    """
    if not 0 <= offset < 1e9 or (seconds is not None and not 0 < seconds < 1e9):
        raise ValueError(f"bad offset: from {offset} s on, for {seconds} s")
    try:
        with _opened(source) as handle:
            start = handle.read(16)
            handle.seek(0)
            for mark, at, container in _CONTAINERS:
                if start[at:].startswith(mark):
                    with _ffmpeg(handle.name, container, to_the_end=seconds is None) as file:
                        return _decode(file, handle, offset, seconds)
            # not by name: soundfile would read x.raw and libsndfile x.vox as samples without a
            # header; nor as a Python object, whose reads would hold up the other threads
            with _Forward(handle.fileno(), closefd=False) as file:
                return _decode(file, handle, offset, seconds)
    except soundfile.LibsndfileError as error:
        if error.code == 24:
            raise ValueError("bad rate: its header has no sample rate that could be") from None
        raise ValueError(f"not audio: {error.error_string}") from None
    except OSError as error:
        if error.errno in _OF_THE_MACHINE:
            raise
        raise ValueError(f"unreadable: {error.strerror}") from None


def _opened(source: Path | bytes) -> IO[bytes]:
    if isinstance(source, Path):
        check_file(source)  # to open a named pipe would wait for ever
        return open(source, "rb", buffering=0)
    copy = tempfile.NamedTemporaryFile(buffering=0)
    Path(copy.name).write_bytes(source)
    return copy


def check_file(path: Path) -> None:
    """ValueError("kind: detail") when `path` is no file, whatever it holds."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, ValueError):  # ValueError: no file can have this name
        what = "a link to nothing" if path.is_symlink() else "no such file"
        raise ValueError(f"not found: {what}") from None
    except OSError as error:
        raise ValueError(f"unreadable: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise ValueError(f"not a file: {what}")


@contextmanager
def _ffmpeg(path: str, container: str, to_the_end: bool) -> Iterator[_Forward]:
    """What ffmpeg makes of a file of this `container`, as an audio file that cannot seek."""
    program = shutil.which("ffmpeg")
    if not program:
        raise ValueError(f"not audio: {container} needs ffmpeg, which is not installed")
    command = [  # the demuxer is forced and other protocols are off: no file opens another
        program, "-nostdin", "-v", "error", "-xerror", "-protocol_whitelist", "file,pipe",
        "-f", container, "-i", f"file:{path}", "-map", "0:a:0", "-c:a", "pcm_f32be",
        "-f", "au", "pipe:1",
    ]  # fmt: skip
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        )
        assert process.stdout
        timer = threading.Timer(FFMPEG_SECONDS, process.kill)
        timer.start()
        try:
            with _Forward(process.stdout.fileno(), closefd=False) as file:
                yield file
            if to_the_end:
                failed = process.wait()
                errors.seek(0)
                if failed or b"prematurely" in errors.read():  # matroska: no failure, a line
                    raise ValueError(f"truncated: ffmpeg finds this {container} cut off or damaged")
        except soundfile.LibsndfileError:
            raise ValueError(f"not audio: ffmpeg finds none in this {container}") from None
        finally:
            timer.cancel()
            process.kill()
            process.stdout.close()
            process.wait()


def _decode(
    file: soundfile.SoundFile, handle: IO[bytes], offset: float, seconds: float | None
) -> Decoded:
    rate, channels = file.samplerate, file.channels
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"bad rate: {rate} Hz; {RATES[0]:,} to {RATES[1]:,} Hz are used")
    _skip(file, round(offset * rate))
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32") if rate != SAMPLE_RATE else None
    pieces, frames = [], 0
    for samples in _blocks(file, inf if seconds is None else round(seconds * rate)):
        peak = np.abs(samples).max()
        if not np.isfinite(peak):
            raise ValueError("not finite: it holds samples that are no numbers (NaN or infinite)")
        if peak > LOUDEST:
            raise ValueError(f"out of range: a sample is {peak:.6g}, full scale is 1")
        frames += len(samples)
        mono = samples.mean(axis=1)
        pieces.append(stream.resample_chunk(mono) if stream else mono)
    end = offset + frames / rate
    if not frames and offset:
        raise ValueError(f"bad offset: it begins at {offset:.2f} s, after the end of the audio")
    if not frames:
        raise ValueError("empty: it holds 0 seconds of audio")
    if seconds is not None and end < offset + seconds - SLACK:
        raise ValueError(f"bad offset: to {offset + seconds:.2f} s of {end:.2f} s of audio")
    if seconds is None and (why := _cut_short(file, handle, end)):
        raise ValueError(f"truncated: {end:.2f} s decode; {why}")
    if stream:
        pieces.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    waveform = np.concatenate(pieces)
    if not len(waveform):
        raise ValueError(f"too short: {frames} samples at {rate} Hz are none at {SAMPLE_RATE} Hz")
    return Decoded(waveform, rate, channels)


def _blocks(file: soundfile.SoundFile, frames: float) -> Iterator[np.ndarray]:
    """At most `frames` frames from here on: float32 (frames, channels)."""
    size, read = max(1, BLOCK // file.channels), 0
    while read < frames:
        count = int(min(size, frames - read))
        try:
            samples = file.read(count, "float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"truncated: it breaks off: {error.error_string}") from None
        if len(samples):
            yield samples
        if len(samples) < count:
            return
        read += count


def _skip(file: soundfile.SoundFile, frames: int) -> None:
    if frames:
        try:
            file.seek(frames)
        except soundfile.LibsndfileError:  # beyond the end, or a codec or pipe that cannot
            for _ in _blocks(file, frames):
                pass


def _cut_short(file: soundfile.SoundFile, handle: IO[bytes], end: float) -> str | None:
    """What shows that a file has lost its end, though it decodes to its `end` (seconds)."""
    if file.format == "OGG":
        handle.seek(-min(1 << 17, handle.seek(0, os.SEEK_END)), os.SEEK_END)  # a page has 64 KiB
        page = (tail := handle.read())[tail.rfind(b"OggS") :]
        return "the last Ogg page is cut off" if len(page) < _page_size(page) else None
    stated = file.frames / file.samplerate
    if cut := _CUT.search(file.extra_info):
        whole, there = map(int, cut.groups())
        stated = 0 if whole >= _STREAMED else end * whole / max(1, there)
    elif file.format == "MP3" and not _has_length(handle):
        return None
    elif file.format == "NIST":
        handle.seek(0)
        if count := re.search(rb"sample_count -i (\d+)", handle.read(1024)):
            stated = int(count[1]) / file.samplerate
    known = file.frames < 1 << 48  # more is how FLAC and pipes say that they do not know
    return f"its header says {stated:.2f} s" if known and stated > end + SLACK else None


def _page_size(page: bytes) -> int:
    """RFC 3533: 27 bytes, the last of them the number of lengths that follow, then the content."""
    return 27 + page[26] + sum(page[27 : 27 + page[26]]) if len(page) > 26 else 27


def _has_length(handle: IO[bytes]) -> bool:
    """Whether an mp3 states its length in its first frame; if not, libsndfile guesses it from the
    first bit rate, up to several times too long."""
    handle.seek(0)
    tag = handle.read(10)
    size = sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=False))
    handle.seek(10 + size if tag.startswith(b"ID3") else 0)
    first = handle.read(4096)
    return b"Xing" in first or b"Info" in first


def load(path: Path) -> np.ndarray:
    """The waveform of one file, float32 mono at 16 kHz; FileNotFoundError, or ValueError naming
    it."""
    if not path.is_file():
        raise FileNotFoundError(f"no audio file at {path}")
    try:
        return decode(path).waveform
    except ValueError as error:
        raise ValueError(f"{path} is not a readable audio file: {error}") from None


def split(waveform: np.ndarray, limit: float) -> list[np.ndarray]:
    """Cut into pieces of at most `limit` seconds, each cut at the quietest 0.1 s of the last second
    before the limit. Nothing is dropped: the pieces joined are the waveform."""
    most = int(limit * SAMPLE_RATE)
    search = min(int(SEARCH_SECONDS * SAMPLE_RATE), most // 2)
    quiet = min(int(QUIET_SECONDS * SAMPLE_RATE), search // 2)
    pieces = []
    while len(waveform) > most:
        energy = np.cumsum(np.square(waveform[most - search : most], dtype=np.float64))
        start = int(np.argmin(energy[quiet:] - energy[:-quiet]))
        cut = most - search + start + quiet // 2
        pieces.append(waveform[:cut])
        waveform = waveform[cut:]
    return [*pieces, waveform]
