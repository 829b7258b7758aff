"""Print what a Whisper hears in audio files, offline.

    python -m stages.transcribe question.wav answer.mp3 whisper=models/tiny.en.pt

In: audio files of any length, and an openai-whisper checkpoint (`just fetch-whisper`). Out, on the
screen: a line for each file with its text; with a `quantizer` that was trained on this Whisper
another one below, with what the Whisper reads in the quantizer's codes, so that one sees what they
lose. A file that cannot be read is named in a sentence, and the others are done; the exit
status is 1, or 2 where none was read.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from speechfuse import config, failures
from speechfuse.audio import decoding
from speechfuse.config import key
from speechfuse.quantizer.spec import check_files


@dataclass
class Transcribe:
    files: list[str] = key("the audio files")
    whisper: str = key("openai-whisper .pt", "models/tiny.en.pt")
    quantizer: str | None = key("with its decoding half: a second line of its codes", None)
    window: float | None = key("seconds that a quantizer's .model was cut to", None, above=0)
    language: str = key("of the speech", "en")


def main(job: Transcribe) -> None:
    if job.window is not None and job.quantizer is None:
        raise ValueError(f"window={job.window:g} is of use only to a quantizer: give quantizer=...")
    if not Path(job.whisper).exists():
        raise FileNotFoundError(f"no Whisper at {job.whisper}: just fetch-whisper tiny.en makes it")
    check_files(job.quantizer, None)
    from speechfuse.quantizer import decoder

    whisper = decoder.load_whisper(Path(job.whisper))
    if job.quantizer:
        reader = decoder.CodeTranscriber.load(job.quantizer, job.whisper, job.language, job.window)
    unread = 0
    for file in job.files:
        try:
            waveform = decoding.load(Path(file))
            text = decoder.transcribe_audio(whisper, waveform, job.language)
            print(f"{file}: {text}", flush=True)
            if job.quantizer:
                pieces = decoding.split(waveform, reader.quantizer.window)
                codes = reader.quantizer.encode(pieces)
                texts = map(str.strip, reader.transcribe(codes))
                print(f"  of its codes: {' '.join(texts)}", flush=True)
        except (ValueError, OSError) as error:
            if (sentence := failures.sentence(error)) is None:
                raise
            where = "" if file in sentence else f"{file}: "
            print("error:", where + " ".join(sentence.split()), file=sys.stderr)
            unread += 1
    if unread:
        sys.exit(1 if unread < len(job.files) else 2)


if __name__ == "__main__":
    config.main(main, Transcribe, __doc__, ("files",))
