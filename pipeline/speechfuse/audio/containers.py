"""Audio files as streams of samples: by libsndfile, or by ffmpeg where libsndfile cannot.

In: an open file. Out: a soundfile.SoundFile to read forwards, and the evidence that a file was cut
off. Formats are told by content, not by name.
"""

import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from itertools import chain, zip_longest
from math import inf
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from speechfuse.audio import mpeg

BLOCK = 1 << 17  # samples read at once, of all channels together
FFMPEG_SECONDS = 600.0  # time that ffmpeg has for one file

_CONTAINERS = (  # formats that libsndfile does not read: bytes, their offset, ffmpeg's name
    (b"ftyp", 4, "mov"),
    (b"\x1a\x45\xdf\xa3", 0, "matroska"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", 0, "asf"),
    (b"\xff\xf1", 0, "aac"),
    (b"\xff\xf9", 0, "aac"),
    (b"#!AMR", 0, "amr"),
)
_OF_MANY_CODECS = {b"RIFF": "wav", b"OggS": "ogg"}  # of which libsndfile does not know all
_PLAIN = {1, 3, 6, 7}  # codecs of a WAV whose samples stand alone: integers, floats, A-law, mu-law
_CUT = re.compile(  # libsndfile's log: bytes of sound that the header states, and that are there
    r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE
)
_SAMPLES = re.compile(rb"sample_count -i (\d+)")
_XING = re.compile(rb"(?:Xing|Info)\0\0\0[\x03\x07\x0b\x0f].{4}(.{4})", re.DOTALL)
_OGG_FIRST = re.compile(rb"OggS\0[\2\3\6\7]")  # a stream's first page
_OGG_LATER = re.compile(rb"OggS\0[\0\1\4\5]")
_TAGS = 1 << 13  # bytes behind the audio that may be tags
_MARKS = (b"ID3", b"TAG", b"APETAGEX")
_STREAMED = 0x7FFF0000  # sizes from here on are placeholders of writers that stream


class Forward(soundfile.SoundFile):
    """soundfile seeks after every read to its own position, which restarts an mp3's decoder, so
    that samples would depend on the block size. A file that cannot seek is read straight on."""

    least = 0.0  # seconds that there are, where the frames were counted

    def seekable(self) -> bool:
        return False


@contextmanager
def stream(fd: int, path: str, seconds: float) -> Iterator[Forward]:
    """The samples of the file that is open as `fd`, which `path` names too.

    `seconds`: how much of it will be read, infinite for all. The stream may be unable to seek.
    Raises ValueError("kind: detail") or LibsndfileError when the file is no audio.
    """
    if not (start := os.pread(fd, 16, 0)):
        raise ValueError("empty: it holds 0 bytes")
    for mark, at, container in _CONTAINERS:
        if start[at:].startswith(mark):
            with _ffmpeg(path, container, seconds == inf) as file:
                yield file
            return
    # not by name: soundfile would read x.raw and libsndfile x.vox as samples without a header; nor
    # as a Python object, whose reads would hold up the other threads
    with ExitStack() as stack:
        try:
            file = stack.enter_context(Forward(fd, closefd=False))
        except soundfile.LibsndfileError:  # it looks at the beginning alone
            other = _mended_wav(fd) or _mp3(fd, seconds)
            if not other and start[:4] in _OF_MANY_CODECS and shutil.which("ffmpeg"):
                other = _ffmpeg(path, _OF_MANY_CODECS[start[:4]], seconds == inf)
            if not other:
                raise
        else:
            other = None
            if file.format == "MP3":
                other = _mp3(fd, seconds, file)
            elif not file.frames:
                other = _mended_wav(fd)
        yield stack.enter_context(other) if other else file


@contextmanager
def _ffmpeg(path: str, container: str, to_the_end: bool) -> Iterator[Forward]:
    """A file of this `container`, decoded by ffmpeg, as an audio file that cannot seek."""
    program = shutil.which("ffmpeg")
    if not program:
        raise ValueError(f"not audio: {container} needs ffmpeg, which is not installed")
    # the demuxer is forced and other protocols are off: no file opens another
    options = f"-nostdin -v error -xerror -protocol_whitelist file,pipe -f {container} -i"
    output = "-map 0:a:0 -c:a pcm_f32be -f au pipe:1"
    command = [program, *options.split(), f"file:{path}", *output.split()]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        )
        assert process.stdout
        timer = threading.Timer(FFMPEG_SECONDS, process.kill)
        timer.start()
        try:
            with Forward(process.stdout.fileno(), closefd=False) as file:
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


class _Riff(NamedTuple):
    """Of a WAV: its fmt chunk, the byte where the samples begin (0: nowhere), how many bytes of
    them it states, and how many bytes behind its last chunk are none."""

    format: bytes
    data: int
    stated: int
    rest: int


def _riff(fd: int) -> _Riff:
    size, at, form, data, stated = os.fstat(fd).st_size, 12, b"", 0, 0
    while len(head := os.pread(fd, 8, at)) == 8:
        name, length = head[:4], int.from_bytes(head[4:], "little")
        inside = at + 8 + length <= size
        if not re.fullmatch(rb"[ -~]{4}", name) or not (inside or name == b"data"):
            break
        if name in (b"RIFF", b"RIFX", b"RF64"):  # another file, put behind this one
            break
        if name == b"fmt ":
            form = os.pread(fd, 8 + length, at)
        if name == b"data" and not data:
            data, stated = at + 8, length
        at += 8 + length
        at += length % 2 and os.pread(fd, 1, at) == b"\0"  # some writers leave this byte out
    return _Riff(form, data, stated, max(0, size - at))


def _mended_wav(fd: int) -> AbstractContextManager[Forward] | None:
    """A WAV that libsndfile refuses or finds empty, with a header of its fmt and data alone: its
    recorder did not get to write the sizes, or a chunk before is odd. None for any other file."""
    riff = _riff(fd)
    codec = int.from_bytes(riff.format[8:10], "little")
    if os.pread(fd, 4, 0) != b"RIFF" or codec not in _PLAIN or not riff.data:
        return None
    unknown = not 0 < riff.stated < _STREAMED
    if not (length := os.fstat(fd).st_size - riff.data if unknown else riff.stated):
        return None
    if unknown and not riff.stated and not riff.rest:  # chunks follow, no samples
        return None
    whole = (length + len(riff.format) + 12).to_bytes(4, "little")
    head = b"RIFF%bWAVE%bdata%b" % (whole, riff.format, length.to_bytes(4, "little"))
    return _piped(chain([head], _bytes(fd, riff.data)))


def _bytes(fd: int, at: int) -> Iterator[bytes]:
    while block := os.pread(fd, 1 << 16, at):
        yield block
        at += len(block)


@contextmanager
def _piped(content: Iterable[bytes]) -> Iterator[Forward]:
    """An audio file through a pipe. Of a file, libsndfile takes the length that it states or
    guesses and reads no further; of a pipe it reads all there is."""
    end, into = os.pipe()

    def fill() -> None:
        with suppress(BrokenPipeError), open(into, "wb") as pipe:
            pipe.writelines(content)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        with Forward(end, closefd=False) as file:
            yield file
    finally:
        os.close(end)
        thread.join()


def _mp3_start(fd: int) -> int:
    """Where an mp3 begins, behind its ID3 tag."""
    tag = os.pread(fd, 10, 0)
    size = sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=False))
    return 10 + size if tag.startswith(b"ID3") else 0


def _states_length(fd: int) -> bool:
    """Whether the first frame of an mp3 states the length of the file: a Xing header (4 bytes of
    name, flags, number of frames, number of bytes), which is not that of one of several mp3s in a
    row."""
    start = _mp3_start(fd)
    header = _XING.search(os.pread(fd, 4096, start))
    size = os.fstat(fd).st_size - start - 512  # less a tag behind
    return header is not None and size < 1.01 * int.from_bytes(header[1])


def _mp3(
    fd: int, seconds: float, file: Forward | None = None
) -> AbstractContextManager[Forward] | None:
    """All of an mp3, of which libsndfile opened `file` or refused it; None where `file` is right,
    or there is no mp3."""
    stated = file is not None and _states_length(fd)
    if stated and seconds < inf:
        return None
    content = b"".join(_bytes(fd, 0))
    parts = mpeg.stretches(content, seconds)
    if file and not parts:  # of an open bit rate
        parts = [mpeg.Stretch(_mp3_start(fd), file.samplerate, file.channels, 0)]
    if file and stated and len(parts) == 1:
        file.least = parts[0].least
        if file.least < file.frames / file.samplerate:
            return None
    if len(parts) > 1:
        return _changing_mp3(content, parts)
    return _endless_mp3(content, parts[0]) if parts else None


@contextmanager
def _endless_mp3(content: bytes, part: mpeg.Stretch) -> Iterator[Forward]:
    first = part.start
    head = content[first:][:4096].replace(b"Xing", b"none").replace(b"Info", b"none")
    with _piped([head, content[first + 4096 :]]) as file:
        file.least = part.least
        yield file


@contextmanager
def _changing_mp3(content: bytes, parts: list[mpeg.Stretch]) -> Iterator[Forward]:
    """An mp3 whose rate or channels change, where decoders end: all of it at its first rate."""
    rate, channels = parts[0].rate, max(part.channels for part in parts)
    with tempfile.TemporaryFile(buffering=0) as copy:
        with soundfile.SoundFile(
            copy.fileno(), "w", rate, channels, "FLOAT", format="W64", closefd=False
        ) as joined:
            for part, after in zip_longest(parts, parts[1:]):
                stream = soxr.ResampleStream(part.rate, rate, channels)
                with _endless_mp3(content[: after.start if after else None], part) as file:
                    for samples in blocks(file, inf):
                        several = np.repeat(samples, channels // file.channels, axis=1)
                        joined.write(stream.resample_chunk(several))
                joined.write(stream.resample_chunk(np.zeros((0, channels), np.float32), last=True))
        os.lseek(copy.fileno(), 0, os.SEEK_SET)
        with Forward(copy.fileno(), closefd=False) as file:
            file.least = sum(max(0.0, part.least) for part in parts)
            yield file


def blocks(file: Forward, frames: float) -> Iterator[np.ndarray]:
    """Yield at most `frames` frames from here on: float32 (frames, channels). Raises
    ValueError("truncated: detail") where the decoder gives up."""
    size, read = max(1, BLOCK // file.channels), 0
    if file.format == "FLAC":  # behind its last frame, the decoder takes a tag for damage
        frames = min(frames, file.frames - file.tell())
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


def cut_short(file: Forward, fd: int, end: float, slack: float) -> str | None:
    """Why there must be more than the `end` seconds that decode; None where nothing shows it, as in
    formats that state no length: mp2, headers of streams."""
    size = os.fstat(fd).st_size
    if file.least > end + slack:
        return f"its frames make {file.least:.2f} s"
    if file.format == "OGG":
        tail = os.pread(fd, 1 << 17, max(0, size - (1 << 17)))  # a page has up to 64 KiB
        page = tail[tail.rfind(b"OggS") :]
        if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
            return "the last Ogg page is cut off"
        if _chained(fd) or page[14:18] != os.pread(fd, 4, 14):  # the stream's number
            return "another Ogg stream follows, which libsndfile does not read"
        return None
    rest, second = 0, 0
    if file.format == "FLAC":
        rest = size - os.lseek(fd, 0, os.SEEK_CUR)
    elif file.format in ("WAV", "WAVEX") and os.pread(fd, 4, 0) == b"RIFF":
        riff = _riff(fd)
        rest, second = riff.rest if riff.stated else 0, int.from_bytes(riff.format[16:20], "little")
    if rest > max(_TAGS, slack * second):
        begin = os.pread(fd, 1 << 20, size - rest).strip(b"\0")
        if begin and not begin.startswith(_MARKS):
            return f"{rest:,} bytes follow, which its header does not count"
    stated = file.frames / file.samplerate
    if file.frames > 1 << 48:  # how libsndfile says that the length is not known
        return None
    if cut := _CUT.search(file.extra_info):
        whole, present = map(int, cut.groups())
        stated = 0 if whole >= _STREAMED else end * whole / max(1, present)
    elif file.format == "NIST" and (count := re.search(_SAMPLES, os.pread(fd, 1024, 0))):
        stated = int(count[1]) / file.samplerate
    return f"its header says {stated:.2f} s" if stated > end + slack else None


def _chained(fd: int) -> bool:
    """Whether an Ogg stream begins behind the first pages of another one."""
    content = b"".join(_bytes(fd, 0))
    later = _OGG_LATER.search(content)
    return later is not None and _OGG_FIRST.search(content, later.end()) is not None
