"""Write down what a Whisper hears in a corpus, for a cascade to read.

    python -m stages.recognize_speech recipes/demo/recognize_slt.yaml

In: a corpus (speechfuse.corpora) and a recognizer. Out: shards of speech rows without codes, whose
text is what was heard: lower case, no punctuation, numbers in words; reject lists and a manifest,
made as stages.tokenize_speech makes its own. An evaluation reads them as `transcripts`.
"""

from dataclasses import dataclass
from typing import Any

from speechfuse import config
from speechfuse.config import key
from speechfuse.quantizer import recordings
from speechfuse.quantizer.spec import EncoderSpec
from speechfuse.rows import shards


@dataclass(kw_only=True)
class RecognizeSpeech(recordings.Recordings):
    recognizer: dict[str, Any] = key("what hears, of speechfuse.quantizer")


def main(job: RecognizeSpeech) -> None:
    spec = EncoderSpec(job.recognizer)
    recordings.make(job, "recognize_speech", 1, spec, shards.SPEECH, ", {rows:,} transcripts")


if __name__ == "__main__":
    config.main(main, RecognizeSpeech, __doc__)
