"""Turn a corpus of speech into a dataset of codes.

    python -m stages.tokenize_speech recipes/demo/tokenize_train.yaml

In: a corpus (speechfuse.corpora) and a quantizer. Out: Parquet shards of speech rows, one reject
list per shard and a manifest. A shard is made whole by one worker process or not at all; after a
stop only missing shards are made. Audio longer than the quantizer's window is split at quiet
places. Clips that are split, resampled, mixed down, filtered or rejected are counted in the
manifest and in the summary line.
"""

from dataclasses import dataclass

from speechfuse import config
from speechfuse.config import key
from speechfuse.quantizer import recordings
from speechfuse.quantizer.spec import QuantizerSpec
from speechfuse.rows import shards


@dataclass(kw_only=True)
class TokenizeSpeech(recordings.Recordings):
    quantizer: QuantizerSpec = key("what makes the codes")


def main(job: TokenizeSpeech) -> None:
    made = ", {codes:,} codes in {rows:,} rows, {bits_per_code} bits a code"
    recordings.make(job, "tokenize_speech", 4, job.quantizer, shards.SPEECH, made)


if __name__ == "__main__":
    config.main(main, TokenizeSpeech, __doc__)
