"""Turn a corpus of speech into frames of an encoder, for models that splice them into their input.

    python -m stages.encode_speech recipes/demo/encode_train.yaml

In: a corpus (speechfuse.corpora) and an encoder. Out: shards of speech rows with the column
`frames` (float16) in place of codes, reject lists and a manifest, made as stages.tokenize_speech
makes its own. It is a cache for one encoder: frames that a frozen encoder always makes alike are
made once. It is not published.
"""

from dataclasses import dataclass
from typing import Any

from speechfuse import config
from speechfuse.config import key
from speechfuse.quantizer import recordings
from speechfuse.quantizer.spec import EncoderSpec
from speechfuse.rows import shards


@dataclass(kw_only=True)
class EncodeSpeech(recordings.Recordings):
    encoder: dict[str, Any] = key("what makes the frames, of speechfuse.quantizer")


def main(job: EncodeSpeech) -> None:
    spec = EncoderSpec(job.encoder)
    made = ", {rows:,} rows of {token_rate:g} frames a second"
    recordings.make(job, "encode_speech", 2, spec, shards.FRAMES, made)


if __name__ == "__main__":
    config.main(main, EncodeSpeech, __doc__)
