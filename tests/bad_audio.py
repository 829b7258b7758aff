"""A corpus of files that are wrong, or good in an unusual way.

    make(folder) -> {id: "used", or the kind of reject that it is to become}

FILES are the ones that a content makes; `make` adds those that the file system makes (links, a
folder with the name of a file, names that are no UTF-8). IGNORED is what lies beside and is no
audio, by how it is counted.
"""

import gzip
import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000
LONG_NAME = "n" * 250
IGNORED = {".md": 1, "hidden file": 1, "hidden folder": 1, "link to a folder": 1, "no suffix": 1}


def sound(seconds: float = 1.0, rate: int = RATE, channels: int = 1) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    tones = [0.3 * np.sin(2 * np.pi * (220 + 50 * c) * time) for c in range(channels)]
    noise = np.random.default_rng(0).uniform(-0.05, 0.05, len(time))
    return np.stack(tones, axis=1) + noise[:, None]


def encoded(
    samples: np.ndarray, rate: int = RATE, format: str = "WAV", subtype: str = "PCM_16"
) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def patched(changes: dict[int, tuple[str, int]], content: bytes | None = None) -> bytes:
    """`content` (by default a wav with its 44 bytes of header) with numbers written at offsets."""
    changed = bytearray(content or encoded(sound()))
    for at, (layout, value) in changes.items():
        struct.pack_into(layout, changed, at, value)
    return bytes(changed)


def cut(content: bytes, share: float = 0.6) -> bytes:
    return content[: int(len(content) * share)]


def damaged(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(range(256)) * 8 + content[middle + 2048 :]


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("speech.wav", encoded(sound()))
    return file.getvalue()


def tagged(mp3: bytes) -> bytes:
    """With ID3v2 (a picture of 200 kB) before and ID3v1 after."""
    size = 200_000
    lengths = bytes((size >> shift) & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x03\x00\x00" + lengths + bytes(size) + mp3 + b"TAG" + b"title".ljust(125, b"\0")


def of(*arguments, **options) -> Callable[[], bytes]:
    return lambda: encoded(*arguments, **options)


def mp3() -> bytes:
    return encoded(sound(2, 44_100), 44_100, "MP3", "MPEG_LAYER_III")


def opus() -> bytes:
    return encoded(sound(6, 48_000), 48_000, "OGG", "OPUS")


def vorbis() -> bytes:
    return encoded(sound(6), RATE, "OGG", "VORBIS")


def flac() -> bytes:
    return encoded(sound(2), format="FLAC")


def spoiled(value: float, subtype: str = "FLOAT") -> bytes:
    samples = sound()
    samples[5000] = value
    return encoded(samples, subtype=subtype)


HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20
FILES: dict[str, tuple[str, Callable[[], bytes]]] = {  # name: what becomes of it, its content
    "good.wav": ("used", of(sound())),
    "good too.flac": ("used", flac),
    # good, in an unusual way
    "stereo.wav": ("used", of(sound(channels=2))),
    "channels-8.wav": ("used", of(sound(channels=8))),
    "rate-8000.wav": ("used", of(sound(rate=8000), 8000)),
    "rate-12345.wav": ("used", of(sound(rate=12_345), 12_345)),
    "rate-96000.wav": ("used", of(sound(rate=96_000), 96_000)),
    "bits-8.wav": ("used", of(sound(), subtype="PCM_U8")),
    "bits-24.wav": ("used", of(sound(), subtype="PCM_24")),
    "float-64.wav": ("used", of(sound(), subtype="DOUBLE")),
    "a-law.wav": ("used", of(sound(rate=8000), 8000, subtype="ALAW")),
    "mu-law.au": ("used", of(sound(rate=8000), 8000, "AU", "ULAW")),
    "over-full-scale.wav": ("used", of(4 * sound(), subtype="FLOAT")),
    "silence.wav": ("used", of(np.zeros(RATE))),
    "tagged.mp3": ("used", lambda: tagged(mp3())),
    "flac in a.wav": ("used", flac),
    "wav in a.mp3": ("used", of(sound())),
    "two in a row.mp3": ("used", lambda: mp3() + mp3()),
    "opus in a.ogg": ("used", opus),
    "UPPER.WAV": ("used", of(sound())),
    "dots v1.2.wav": ("used", of(sound())),
    "deep/er/down.wav": ("used", of(sound())),
    "new\nline \u00e9\u4e2d.wav": ("used", of(sound())),
    f"{LONG_NAME}.wav": ("used", of(sound())),
    "streamed, sizes unknown.wav": (
        "used",
        lambda: patched({4: ("<I", 2**32 - 1), 40: ("<I", 2**32 - 1)}),
    ),
    "rubbish behind.wav": ("used", lambda: encoded(sound()) + b"rubbish" * 9),
    # nothing or not all of it
    "empty.wav": ("empty", lambda: b""),
    "empty.d/empty.mp3": ("empty", lambda: b""),
    "header only.wav": ("empty", lambda: encoded(sound())[:44]),
    "no samples.flac": ("empty", of(np.zeros((0, 1)), format="FLAC")),
    "one sample.wav": ("too short", of(np.full((1, 1), 0.5))),
    "one sample at 96000.wav": ("too short", of(np.full((1, 1), 0.5), 96_000)),
    "half a header.wav": ("not audio", lambda: encoded(sound())[:20]),
    "cut.wav": ("truncated", lambda: cut(encoded(sound()))),
    "cut a.aiff": ("truncated", lambda: cut(encoded(sound(), format="AIFF"))),
    "cut b.flac": ("truncated", lambda: cut(flac())),
    "cut c.mp3": ("truncated", lambda: cut(mp3())),
    "cut d.ogg": ("truncated", lambda: cut(vorbis())),
    "cut e.opus": ("truncated", lambda: cut(opus())),
    "cut f.sph": ("truncated", lambda: cut(encoded(sound(), format="NIST"))),
    "two streams.ogg": ("truncated", lambda: vorbis() + vorbis()),
    "damaged.flac": ("truncated", lambda: damaged(flac())),
    # headers that lie
    "size too large.wav": ("truncated", lambda: patched({40: ("<I", 10**9)})),
    "length too large.flac": (
        "truncated",
        lambda: patched({21: (">B", 0xFF), 22: (">I", 2**32 - 1)}, flac()),
    ),
    "rate-0.wav": ("bad rate", lambda: patched({24: ("<I", 0)})),
    "rate-1.wav": ("bad rate", lambda: patched({24: ("<I", 1)})),
    "rate-2000000000.wav": ("bad rate", lambda: patched({24: ("<I", 2 * 10**9)})),
    "channels-0.wav": ("not audio", lambda: patched({22: ("<H", 0)})),
    "channels-65535.wav": ("not audio", lambda: patched({22: ("<H", 65_535)})),
    "bits-0.wav": ("not audio", lambda: patched({34: ("<H", 0)})),
    "unknown codec.wav": ("not audio", lambda: patched({20: ("<H", 999)})),
    # samples that are none
    "nan.wav": ("not finite", lambda: spoiled(np.nan)),
    "infinite.wav": ("not finite", lambda: spoiled(-np.inf)),
    "more than a float.wav": ("not finite", lambda: spoiled(1e300, "DOUBLE")),
    "16-bit numbers as floats.wav": ("out of range", of(32_768 * sound(), subtype="FLOAT")),
    # no audio
    "text.wav": ("not audio", lambda: b"Dear listener, this is no audio.\n" * 9),
    "html.mp3": ("not audio", lambda: HTML),
    "zip.flac": ("not audio", zipped),
    "gzip.wav": ("not audio", lambda: gzip.compress(encoded(sound()), mtime=0)),
    "playlist.m4a": ("not audio", lambda: b"#EXTM3U\n#EXTINF:1,\ngood.wav\n"),
    "box of nothing.m4a": ("not audio", lambda: b"\0\0\0\x18ftypM4A \0\0\0\0isomM4A " + bytes(99)),
    "noise.ogg": ("not audio", lambda: np.random.default_rng(0).bytes(5000)),
    "zeros.wav": ("not audio", lambda: bytes(5000)),
    # beside others
    "twice.flac": ("used", flac),
    "bad text.wav": ("bad transcript", of(sound())),
}


def make(folder: Path, minutes: float = 40) -> dict[str, str]:
    """Write the corpus; `minutes` is the length of its longest recording."""
    expected = {}
    for name, (becomes, content) in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content())
        expected[Path(name).with_suffix("").as_posix()] = becomes
    (folder / "good.txt").write_text("a good one\n")
    (folder / "good too.txt").write_text("a good one too\n")
    (folder / "bad text.txt").write_bytes(b"caf\xe9")
    (folder / f"{minutes} minutes.wav").write_bytes(long(minutes))
    expected[f"{minutes} minutes"] = "used"
    (folder / "twice.wav").write_bytes(encoded(sound()))
    expected["twice.wav"] = "duplicate id"
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    (folder / "dangling.wav").symlink_to("nowhere.wav")
    (folder / "loop.wav").symlink_to("loop.wav")
    (folder / "link.wav").symlink_to("good.wav")
    (folder / "locked.wav").write_bytes(encoded(sound()))
    (folder / "locked.wav").chmod(0)
    expected |= {
        "folder": "not a file",
        "pipe": "not a file",
        "dangling": "not found",
        "loop": "unreadable",
        "link": "used",
        "locked": "used" if os.access(folder / "locked.wav", os.R_OK) else "unreadable",  # root may
    }
    try:
        (folder / os.fsdecode(b"caf\xe9.wav")).write_bytes(encoded(sound()))
        expected["caf\\xe9"] = "bad name"
    except OSError:  # macOS has no such names
        pass
    (folder / "notes.md").write_text("no audio, and not named like it\n")
    (folder / "LICENSE").write_text("none\n")
    (folder / "._good.wav").write_bytes(b"what macOS leaves")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "away.wav").write_bytes(encoded(sound()))
    (folder / "linked").symlink_to("deep", target_is_directory=True)
    return expected


def long(minutes: float) -> bytes:
    """Two seconds of tone every half minute, at 8 kHz in mu-law."""
    half = np.zeros(30 * 8000)
    half[: 2 * 8000] = sound(2, 8000)[:, 0]
    samples = np.tile(half, round(2 * minutes))
    return encoded(samples, 8000, subtype="ULAW")
