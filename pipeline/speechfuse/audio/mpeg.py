"""The frames of an mp3 (MPEG audio, layers 1 to 3), walked from header to header.

In: the bytes of a file. Out: its stretches of one sample rate and number of channels, with their
length. What is no frame (tags, padding, junk) is stepped over. So it is known what there is to
decode, whatever a decoder makes of it: libsndfile ends where the rate or the channels change.
"""

import re
from functools import cache
from typing import NamedTuple

IN_A_ROW = 3  # frames; fewer that follow each other may be chance

_KBITS = {  # (version 1, layer): kbit/s by the header's index
    (True, 1): tuple(range(0, 449, 32)),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_THIRD = bytes(b for b in range(256) if b >> 4 not in (0, 15) and b >> 2 & 3 != 3)
_BEGIN = re.compile(  # of a tag, or of a frame: bytes that a header can have
    rb"ID3|\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff][" + re.escape(_THIRD) + rb"]"
)
_MASK = 0xFFFEFEC0  # of a header's bits: sync, version, layer, bit rate, sample rate, padding, mode


class Frame(NamedTuple):
    """`size` in bytes; `samples` of each of its `channels`, at `rate` Hz."""

    size: int
    rate: int
    channels: int
    samples: int


class Stretch(NamedTuple):
    """Neighbouring frames of one format: the byte where they begin; how many samples they hold."""

    start: int
    rate: int
    channels: int
    samples: int

    @property
    def least(self) -> float:
        """Seconds that decode at least: without what encoders add and decoders may take off."""
        return (self.samples - (3456 if self.rate >= 32_000 else 2304)) / self.rate


@cache
def _frame(header: int) -> Frame | None:
    version, layer = header >> 19 & 3, 4 - (header >> 17 & 3)  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    bits, rates = header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or layer == 4 or bits in (0, 15) or rates == 3:
        return None  # an index of 0 leaves the bit rate open, and with it the size of the frame
    rate = (44_100, 48_000, 32_000)[rates] >> (3 - version if version else 2)
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    slot = 4 if layer == 1 else 1
    kbits = _KBITS[version == 3, layer][bits]
    size = (samples // 8 * kbits * 1000 // rate // slot + (header >> 9 & 1)) * slot
    return Frame(size, rate, 1 if header >> 6 & 3 == 3 else 2, samples)


def stretches(data: bytes, seconds: float) -> list[Stretch]:
    """Return the stretches of the first `seconds`, in order; none where the file is no mp3, or one
    whose header leaves the bit rate open. `data`: a file's bytes, or a memory map of it."""
    parts: list[Stretch] = []
    at, counted = 0, 0.0
    while counted < seconds and (at := _sync(data, at, parts)) >= 0:
        start, samples = at, 0
        first = frame = frame_at(data, at)
        assert first
        while frame and (frame.rate, frame.channels) == (first.rate, first.channels):
            at, samples = at + frame.size, samples + frame.samples
            frame = frame_at(data, at)
        counted += samples / first.rate
        if parts and parts[-1][1:3] == (first.rate, first.channels):
            start, samples = parts[-1].start, parts[-1].samples + samples
            parts.pop()
        parts.append(Stretch(start, first.rate, first.channels, samples))
    return parts


def frame_at(data: bytes, at: int) -> Frame | None:
    """Return the frame whose header is at byte `at`, if there is one."""
    return _frame(int.from_bytes(data[at : at + 4]) & _MASK)


def _sync(data: bytes, at: int, parts: list[Stretch]) -> int:
    """Return the first byte from `at` on where frames follow each other, behind tags; -1 if there
    is none."""
    while at >= 0:
        if data[at : at + 3] == b"ID3":
            sizes = zip(data[at + 6 : at + 10], (21, 14, 7, 0), strict=False)
            at += 10 + sum((byte & 127) << shift for byte, shift in sizes)
        end = at
        for number in range(IN_A_ROW):
            if not (frame := frame_at(data, end)):
                # the end of the file counts, unless nothing was an mp3 so far
                if number and parts and end >= len(data):
                    return at
                break
            end += frame.size
        else:
            return at
        match = _BEGIN.search(data, at + 1)
        at = match.start() if match else -1
    return -1
