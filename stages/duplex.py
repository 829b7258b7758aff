"""Talk to a model of two channels: a recording in, both channels and a timed transcript out.

    python -m stages.duplex recipes/demo/duplex.yaml FILE.wav

In: an audio file, what the user says. Out: a stereo file, the user left, the model right, and a
line for each turn of the model. Frame by frame the model hears and speaks; behind the user's end it
speaks on for `tail` seconds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechfuse import config
from speechfuse.config import key


@dataclass
class Duplex:
    file: str = key("the audio file")
    checkpoint: str = key("folder of the model, RUN/epoch_N")
    encoder: dict[str, Any] = key("what made the frames of its training, of speechfuse.quantizer")
    out: str = key("the file to be written", "out/duplex.wav")
    tail: float = key("seconds after the user's end", 6.0, least=0)


def main(job: Duplex) -> None:
    import numpy as np

    from speechfuse.audio import decoding
    from speechfuse.evals.duplex import Talker, write_stereo
    from speechfuse.quantizer.spec import EncoderSpec

    waveform, encoder = decoding.load(Path(job.file)), EncoderSpec(job.encoder).load("cpu")
    talker = Talker(Path(job.checkpoint), encoder.identity)
    heard = np.pad(waveform, (0, round(job.tail * decoding.SAMPLE_RATE)))
    step = round(decoding.SAMPLE_RATE / talker.codec.frame_rate)
    text, codes = talker.talk(frames[None] for frames in encoder.streamed(heard, step))
    own, rate = talker.sound(codes[0]), talker.codec.sample_rate
    seconds = write_stereo(Path(job.out), heard, own, rate)
    for turn in talker.turns(text[0]):
        print(f"{turn['start']:6.2f} {turn['end']:6.2f}  {turn['text']!r}")
    print(f"{job.out}: {seconds:.1f} s, the user left, the model right")


if __name__ == "__main__":
    config.main(main, Duplex, __doc__, ("file",))
