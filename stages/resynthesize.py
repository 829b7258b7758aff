"""Hear what a codec leaves of a recording.

    python -m stages.resynthesize recipes/demo/resynthesize.yaml FILE.wav

In: an audio file and a codec of speechfuse.codecs. Out: the file once through the codec, at the
codec's rate, and a line with its bits a second.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechfuse import config
from speechfuse.config import key


@dataclass
class Resynthesize:
    file: str = key("the audio file")
    codec: dict[str, Any] = key("of speechfuse.codecs")
    out: str = key("the file to be written", "out/resynthesized.wav")


def main(job: Resynthesize) -> None:
    import soundfile

    from speechfuse.audio import decoding
    from speechfuse.codecs.codec import codec_of

    waveform, codec = decoding.load(Path(job.file)), codec_of(job.codec)
    codes = codec.encode(waveform)
    Path(job.out).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(job.out, codec.decode(codes), codec.sample_rate)
    rate = codec.frame_rate * codec.codebooks * math.log2(codec.codebook_size)
    print(f"{job.out}: {len(codes):,} frames of {codec.codebooks} codes, {rate:,.0f} bit/s")


if __name__ == "__main__":
    config.main(main, Resynthesize, __doc__, ("file",))
