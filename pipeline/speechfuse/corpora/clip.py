"""The interface of a corpus: it yields clips, not yet decoded, and rejects.

A corpus is any class with

    fingerprint   identifies the data: a revision, or a hash of relative paths and sizes
    source_name   for the data card
    licence       for the data card; None where it is not stated
    plan(shard_size)  -> one dict a shard: {"count": clips, ...arguments of `clips`}; frozen in the
                  artifact's plan.json
    clips(shard)  -> Clip or Reject for each, in order
    ignored       optional: Counter of files and members that are no clips, by kind

`clips` is a pure function of the configuration and the shard, so that a shard made again is the
same shard; it opens and slices but does not decode, so it is cheap and holds one clip at a time.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speechfuse.audio import decoding


@dataclass(frozen=True)
class Clip:
    """One recording. `audio`: an audio file, the bytes of one, or mono float32 samples at 16 kHz.

    `offset` and `seconds` are the part of it that is the clip (`seconds` None: to the end). `uri`
    is relative to the corpus, or a Hub path. `phonemes`: (start in seconds, name), of synthetic
    speech only. `recordings`: of a clip that has several, or none, each of them, in order, in place
    of `audio` and `uri`.
    """

    id: str
    audio: Path | bytes | np.ndarray
    uri: str
    offset: float = 0.0
    seconds: float | None = None
    text: str | None = None
    speaker: str | None = None
    language: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    phonemes: list[tuple[float, str]] = field(default_factory=list)
    recordings: "list[Clip] | None" = None


def decode(clip: Clip) -> decoding.Decoded:
    """Audio of a clip. Raises ValueError("kind: detail") when it cannot be used, or is several
    recordings."""
    if clip.recordings is not None:
        raise ValueError("several recordings: they can be encoded or tokenized, and no more")
    if isinstance(clip.audio, np.ndarray):
        return decoding.Decoded(clip.audio, decoding.SAMPLE_RATE, 1)
    return decoding.decode(clip.audio, clip.offset, clip.seconds)


def clip_fields(entry: dict[str, Any], text_key: str) -> dict[str, Any]:
    """Return {text, speaker, language, extra} of a clip from a JSON object: `text_key`, `speaker`,
    `lang` or `language`, and all other keys.

    Raises ValueError for a value of the wrong type.
    """
    rest = dict(entry)

    def take(keys: tuple[str, ...], kinds: type | tuple[type, ...]) -> str | None:
        for key in keys:
            if (value := rest.pop(key, None)) is not None:
                if isinstance(value, bool) or not isinstance(value, kinds):
                    raise ValueError(f"{key} is {value!r:.40}, not text")
                return utf8(str(value)).strip() or None
        return None

    return {
        "text": take((text_key,), str),
        "speaker": take(("speaker",), (str, int)),
        "language": take(("lang", "language"), str),
        "extra": rest,
    }


def name_of(entry: dict[str, Any], key: str) -> str:
    """Return the name (of a file, a speaker ...) that stands at `key`. A number is taken as a name,
    but not as that of a file. Raises ValueError for anything else."""
    value = entry.get(key)
    if isinstance(value, int) and key != "audio_filepath":
        value = str(value)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError(f"{key} is {value!r:.40}, not a name")
    return utf8(value)


def utf8(text: str) -> str:
    r"""Return `text`. Raises ValueError if it cannot be written as UTF-8 (JSON's "\ud800"), or
    holds U+0000, at which libraries in C would cut it."""
    if "\0" in text:
        raise ValueError(f"{text!r:.40} holds U+0000")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!r:.40} holds half a character") from None
    return text
