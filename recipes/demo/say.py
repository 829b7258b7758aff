"""Speak a text into a wav file, to try the model on.

    python recipes/demo/say.py recipes/demo/say.yaml text="what is three plus four" file=out/say.wav

In: a text and a voice of espeak-ng. Out: a 16 kHz mono wav. The default voice is one that no
training has heard.
"""

from dataclasses import dataclass
from pathlib import Path

import soundfile

from speechfuse import config
from speechfuse.audio import decoding, espeak_ng
from speechfuse.config import key


@dataclass
class Say:
    text: str = key("what to say")
    file: str = key("the wav to write")
    voice: str = key("espeak-ng language+variant", "en-us+Annie")
    rate: int = key("words a minute", 170, least=1)
    pitch: int = key("0 to 99", 50, least=0, most=99)


def main(job: Say) -> None:
    if not job.text.strip():
        raise ValueError("text is empty: give the words to say")
    with espeak_ng.EspeakLibrary() as engine:
        voice = espeak_ng.EspeakVoice(job.voice, job.rate, job.pitch)
        speech = espeak_ng.speak(engine, job.text, voice)
    path = Path(job.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, speech.waveform, decoding.SAMPLE_RATE, format="WAV")
    print(f"{path}: {len(speech.waveform) / decoding.SAMPLE_RATE:.2f} s")


if __name__ == "__main__":
    config.main(main, Say, __doc__, ("text", "file"))
