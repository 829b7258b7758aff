"""Fit the codec of an agent's voice, and keep what it has to say as codes.

    python -m stages.fit_codec recipes/demo/fit_codec.yaml

In: a finished artifact of conversations, and a voice of speechfuse.audio's synthesizers. Out: the
codec, and a dataset of its codes: each reply of the agent once, and lists of words, which a model
reads so that it can say what no reply of its training holds. With `codec` that codec makes the
codes, and none is fitted. Who has the folder needs the voice no more.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechfuse import artifact, config
from speechfuse.config import key
from speechfuse.rows import shards


@dataclass
class FitCodec:
    out: str = key("folder of the codec")
    texts: str = key("finished artifact of conversations")
    voice: str = key("flite:rms, or another of speechfuse's synthesizers")
    rate: int = key("words a minute", 150, least=80, most=450)
    repeat_first: bool = key("replies repeat the question first", True)
    reading: int = key("lists of 2 to 6 words", 0, least=0)
    fit_on: dict[str, Any] = key("{key: value}: conversations whose replies are fitted on", {})
    codec: dict[str, Any] | None = key("of speechfuse.codecs; null: fit one of 80 ms patches", None)
    codebooks: int = key("of the codec that is fitted", 2, least=1, most=32)
    codebook_size: int = key("codes of each", 256, least=2, most=65_536)
    kept: int = key("principal components of a patch", 64, least=1, most=640)
    seed: int = key("of the word lists and of k-means", 0, least=0)
    fresh: bool = key("move an artifact that differs aside", False)


def main(job: FitCodec) -> None:
    from speechfuse.rows.selection import matches
    from speechfuse.synthesis.plan import conversations
    from speechfuse.synthesis.sessions import replies_of, said

    inputs = {"texts": artifact.fingerprint_of(Path(job.texts))}
    work = artifact.Artifact(Path(job.out), "fit_codec", 1, asdict(job), inputs)
    if not work.begin(fresh=job.fresh):
        return
    replies = dict[str, str]()
    for _, each in conversations(Path(job.texts)):
        fitting = matches({**each.extra, "id": each.id}, job.fit_on)
        for _, reply in replies_of(each, job.repeat_first):
            replies[said(reply)] = "reply" if fitting else replies.get(said(reply), "held out")
    chance, words = random.Random(job.seed), sorted({w for text in replies for w in text.split()})
    lists = [" ".join(chance.choices(words, k=chance.randint(2, 6))) for _ in range(job.reading)]
    lines = {text: "reading" for text in lists} | replies
    rows, files, stream = speak(job, lines)
    shard = work.out / shards.shard_name(0)
    shards.write_shard(shard, rows, shards.SPEECH, stream)
    minutes = sum(row["seconds"] for row in rows) / 60
    totals = {"rows": len(rows), "minutes": round(minutes, 1), **stream}
    work.finish(totals, [*files, shard])
    print(f"{job.out}: {len(rows):,} lines, {minutes:.1f} min of {job.voice} in codes of {stream}")


def speak(job: FitCodec, lines: dict[str, str]) -> tuple[list[Any], list[Path], Any]:
    """Return the rows of the lines {text: kind}, the files of the codec where it was fitted, and
    the stream of its codes."""
    import torch

    from speechfuse.audio import espeak_ng
    from speechfuse.audio.decoding import SAMPLE_RATE
    from speechfuse.codecs import patches
    from speechfuse.codecs.codec import Codec, codec_of
    from speechfuse.synthesis.sessions import trimmed

    voice = espeak_ng.EspeakVoice(job.voice, job.rate)
    with espeak_ng.EspeakLibrary() as engine:
        clips = [
            trimmed(espeak_ng.speak(engine, text, voice).waveform) for text in tqdm(lines, "voice")
        ]
    files = list[Path]()
    if job.codec:
        codec: Codec = codec_of(job.codec)
    else:
        pairs = zip(lines.values(), clips, strict=True)
        frames = torch.cat([patches.patches(c) for kind, c in pairs if kind != "held out"])
        codec = patches.fit(frames, job.kept, job.codebooks, job.codebook_size, job.seed)
        files = codec.save(Path(job.out))
    rows = []
    for number, ((text, kind), clip) in enumerate(zip(lines.items(), clips, strict=True)):
        row = {"id": f"line-{number:05d}", "text": text, "seconds": len(clip) / SAMPLE_RATE}
        row |= {"codes": codec.encode(clip).flatten(), "speaker": job.voice}
        rows.append(row | {"extra": json.dumps({"kind": kind})})
    return rows, files, codec.stream


if __name__ == "__main__":
    config.main(main, FitCodec, __doc__)
