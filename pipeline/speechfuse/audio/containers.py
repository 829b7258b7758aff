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
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import soundfile

FFMPEG_SECONDS = 600.0  # time that ffmpeg has for one file

_CONTAINERS = (  # formats that libsndfile does not read: bytes, their offset, ffmpeg's name
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
_SAMPLES = re.compile(rb"sample_count -i (\d+)")
_XING = re.compile(rb"(?:Xing|Info)\0\0\0[\x03\x07\x0b\x0f].{4}(.{4})", re.DOTALL)
_STREAMED = 0x7FFF0000  # sizes from here on are placeholders of writers that stream


class _Forward(soundfile.SoundFile):
    """soundfile seeks after every read to its own position, which restarts an mp3's decoder, so
    that samples would depend on the block size. A file that cannot seek is read straight on."""

    def seekable(self) -> bool:
        return False


@contextmanager
def stream(fd: int, path: str, to_the_end: bool) -> Iterator[soundfile.SoundFile]:
    """The samples of the file that is open as `fd`, which `path` names too.

    `to_the_end`: whether all of it will be read. The stream may be unable to seek. Raises
    ValueError("kind: detail") or LibsndfileError when the file is no audio.
    """
    if not (start := os.pread(fd, 16, 0)):
        raise ValueError("empty: it holds 0 bytes")
    for mark, at, container in _CONTAINERS:
        if start[at:].startswith(mark):
            with _ffmpeg(path, container, to_the_end) as file:
                yield file
            return
    # not by name: soundfile would read x.raw and libsndfile x.vox as samples without a header; nor
    # as a Python object, whose reads would hold up the other threads
    with _Forward(fd, closefd=False) as file:
        if file.format != "MP3" or _states_length(fd):
            yield file
            return
    with _endless_mp3(fd) as file:
        yield file


@contextmanager
def _ffmpeg(path: str, container: str, to_the_end: bool) -> Iterator[_Forward]:
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


@contextmanager
def _endless_mp3(fd: int) -> Iterator[_Forward]:
    """An mp3 through a pipe. Of a file, libsndfile guesses the length from the first bit rate and
    reads no further, though that may be a tenth of it; of a pipe it reads all there is."""
    begin = _mp3_start(fd)
    first = os.pread(fd, 4096, begin).replace(b"Xing", b"none").replace(b"Info", b"none")
    end, into = os.pipe()

    def fill() -> None:
        with suppress(BrokenPipeError), open(into, "wb") as pipe:
            pipe.write(first)
            at = begin + len(first)
            while block := os.pread(fd, 1 << 16, at):
                pipe.write(block)
                at += len(block)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        with _Forward(end, closefd=False) as file:
            yield file
    finally:
        os.close(end)
        thread.join()


def cut_short(file: soundfile.SoundFile, fd: int, end: float, slack: float) -> str | None:
    """Why the file must be longer than the `end` seconds that decode; None where nothing shows it,
    as in formats that state no length: mp3 without a Xing header, mp2, headers of streams."""
    stated = file.frames / file.samplerate
    if file.frames > 1 << 48:  # how libsndfile says that the length is not known
        return None
    if file.format == "OGG":
        size = os.fstat(fd).st_size
        tail = os.pread(fd, 1 << 17, max(0, size - (1 << 17)))  # a page has up to 64 KiB
        page = tail[tail.rfind(b"OggS") :]
        if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
            return "the last Ogg page is cut off"
        if page[14:18] != os.pread(fd, 4, 14):  # the stream's number
            return "another Ogg stream follows, which libsndfile does not read"
        return None
    if cut := _CUT.search(file.extra_info):
        whole, present = map(int, cut.groups())
        stated = 0 if whole >= _STREAMED else end * whole / max(1, present)
    elif file.format == "NIST" and (count := re.search(_SAMPLES, os.pread(fd, 1024, 0))):
        stated = int(count[1]) / file.samplerate
    return f"its header says {stated:.2f} s" if stated > end + slack else None
