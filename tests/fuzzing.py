"""Valid files, random mutations of them, and what the product's readers make of these.

    seeds(folder) -> the starting files, in `folder`, small and the same each time
    mutate(content, rng) -> damaged bytes
    try_one(seed, mutated, folder) -> "read", "rejected", "refused", or a Fault

Each transcript of a starting corpus names a frequency, at which its own audio and no other's
sounds. A row whose text and audio do not match is a fault, as is any exception that is not a
sentence for the user (ValueError, or OSError about a file), and what takes over TIME_LIMIT seconds.
"""

import io
import json
import random
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import yaml

from speechfuse import config
from speechfuse.audio import decoding
from speechfuse.corpora.clip import Clip, decode
from speechfuse.corpora.folder import Folder
from speechfuse.corpora.nemo import Nemo
from speechfuse.corpora.parquet import Parquet
from speechfuse.corpora.synthetic import Synthetic
from speechfuse.corpora.webdataset import WebDataset
from speechfuse.rows.rejects import Reject
from speechfuse.texts.sources import Alpaca, Columns
from stages.tokenize_speech import TokenizeSpeech

ROOT = Path(__file__).parent.parent
TIME_LIMIT = 10  # seconds for one mutation
RATE = decoding.SAMPLE_RATE
HERTZ = (400, 700, 1000, 1300)  # one for each clip of a corpus
SECONDS = 0.24
_numbers = count()
M4A = ROOT / "tests/golden/fuzz/tone.m4a"  # made by ffmpeg, which is not everywhere


class Fault(Exception):
    """What no mutation may bring about."""


class Mismatch(Fault):
    """A text beside the audio of another clip: (text, hertz)."""

    def __str__(self) -> str:
        return "the text is {!r} and the audio is {} Hz".format(*self.args)


def tone(hertz: int, rate: int = RATE) -> np.ndarray:
    return 0.4 * np.sin(2 * np.pi * hertz * np.arange(round(SECONDS * rate)) / rate)


def audio(hertz: int, format: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    rate = {"MP3": 44_100, "OGG": 24_000}.get(format, RATE)
    soundfile.write(file, tone(hertz, rate), rate, format=format, subtype=subtype)
    return file.getvalue()


def text_of(hertz: int) -> str:
    return f"tone of {hertz} hertz"


def heard(waveform: np.ndarray) -> int | None:
    """The tone that a waveform is, if it is one of HERTZ and nearly nothing else."""
    spectrum = np.abs(np.fft.rfft(waveform)) ** 2
    hertz = np.fft.rfftfreq(len(waveform), 1 / RATE)
    shares = [spectrum[np.abs(hertz - each) < 40].sum() for each in HERTZ]
    best = int(np.argmax(shares))
    return HERTZ[best] if shares[best] > 0.8 * spectrum.sum() > 0 else None


def check_pair(text: str | None, waveform: np.ndarray) -> None:
    """Raises Mismatch when the text is, unharmed, that of another clip than the audio."""
    named = re.fullmatch(r"tone of (\d+) hertz", text or "")
    sounds = heard(waveform) if len(waveform) > RATE // 10 else None
    if named and sounds and int(named[1]) in HERTZ and int(named[1]) != sounds:
        raise Mismatch(text, sounds)


def file_says(path: Path, text: str, hertz: int) -> bool:
    """Whether the mutation itself put this text beside this audio, as another reader reads it: a
    manifest's line names both, a tar's members have one name, a table has them in one row."""
    content = path.read_bytes()
    if path.suffix == ".jsonl":
        return any(
            text.encode() in line and b"%d.wav" % hertz in line for line in content.split(b"\n")
        )
    pairs: list[tuple[bytes | str | None, bytes]] = []
    try:
        if path.suffix == ".parquet":
            rows = pq.read_table(path).to_pylist()
            pairs = [(row["text"], row["audio"]["bytes"]) for row in rows]
        elif path.suffix == ".tar":
            with tarfile.open(path) as tar:
                members = [(m.name, tar.extractfile(m).read()) for m in tar if m.isreg()]  # type: ignore[union-attr]
            texts = [(n[:-4], c.decode()) for n, c in members if n.endswith(".txt")]
            texts += [(text.split()[2], text)]  # of the manifest beside
            pairs = [(t, a) for n, t in texts for name, a in members if name == f"{n}.wav"]
    except (tarfile.TarError, pa.ArrowException, OSError, ValueError):
        return False
    waveforms = [decoding.decode(each).waveform for said, each in pairs if said == text]
    return any(heard(waveform) == hertz for waveform in waveforms)


def read_corpus(corpus: Any) -> str:
    """Plan, clips and samples, as the tokenizing job reads them."""
    outcome = "rejected"
    for shard in json.loads(json.dumps(corpus.plan(3))):
        items = list(corpus.clips(shard))
        if len(items) != shard["count"]:
            raise Fault(f"{len(items)} clips where {shard['count']} are planned")
        for item in items:
            if isinstance(item, Reject):
                if ": " not in item.reason:
                    raise Fault(f"a reject without a kind: {item.reason!r}")
                continue
            assert isinstance(item, Clip)
            json.dumps([item.id, item.text, item.extra]).encode()
            try:
                check_pair(item.text, decode(item).waveform)
                outcome = "read"
            except ValueError as error:
                if ": " not in str(error):
                    raise Fault(f"a reject without a kind: {str(error)!r}") from error
    return outcome


def read_texts(source: Any) -> str:
    outcome = "rejected"
    for shard in json.loads(json.dumps(source.plan(3))):
        for each in source.conversations(shard):
            outcome = outcome if isinstance(each, Reject) else "read"
    return outcome


def read_folder(path: Path) -> str:
    return read_corpus(Folder(str(path.parent)))


def read_manifest(path: Path) -> str:
    return read_corpus(Nemo(str(path)))


def read_tarred(path: Path) -> str:
    return read_corpus(Nemo(str(path.parent / "tarred.jsonl"), tars=str(path)))


def read_webdataset(path: Path) -> str:
    return read_corpus(WebDataset(str(path)))


def read_parquet(path: Path) -> str:
    return read_corpus(Parquet(str(path), text_column="text", id_column="id"))


def read_alpaca(path: Path) -> str:
    return read_texts(Alpaca(str(path)))


def read_columns(path: Path) -> str:
    return read_texts(Columns(str(path), prompt="text", response="id"))


def read_synthetic(path: Path) -> str:
    corpus = Synthetic(str(path), {"one": {"variants": ["Annie"], "accents": ["en-us"]}})
    corpus.plan(3)
    return "read"


def read_config(path: Path) -> str:
    config.load(TokenizeSpeech, path, [])
    return "read"


@dataclass(frozen=True)
class Seed:
    """A starting file: the format, its path below the folder, and its reader."""

    format: str
    name: str
    read: Callable[[Path], str]


def seeds(folder: Path) -> list[Seed]:
    """Write the starting files; each has a folder of its own, with what its reader needs beside."""
    made: list[Seed] = []

    def add(format: str, name: str, read: Callable[[Path], str], content: bytes) -> Path:
        path = folder / format.replace(" ", "-") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        made.append(Seed(format, path.relative_to(folder).as_posix(), read))
        return path

    first = HERTZ[0]
    for format, suffix, content in (
        ("wav", "wav", audio(first)),
        ("wav stereo", "wav", stereo()),
        ("flac", "flac", audio(first, "FLAC")),
        ("mp3", "mp3", audio(first, "MP3", "MPEG_LAYER_III")),
        ("ogg", "ogg", audio(first, "OGG", "VORBIS")),
        ("opus", "opus", audio(first, "OGG", "OPUS")),
        ("m4a", "m4a", M4A.read_bytes()),
    ):
        path = add(format, f"a.{suffix}", read_folder, content)
        path.with_suffix(".txt").write_text(text_of(first))

    lines = [
        {"audio_filepath": f"{hertz}.wav", "duration": SECONDS, "text": text_of(hertz), "id": i}
        for i, hertz in enumerate(HERTZ)
    ]
    path = add("nemo manifest", "manifest.jsonl", read_manifest, json_lines(lines))
    for hertz in HERTZ:
        (path.parent / f"{hertz}.wav").write_bytes(audio(hertz))
    packed = tar_of({f"{hertz}.wav": audio(hertz) for hertz in HERTZ})
    path = add("nemo tar", "audio_0.tar", read_tarred, packed)
    (path.parent / "tarred.jsonl").write_bytes(json_lines([{**e, "shard_id": 0} for e in lines]))
    members: dict[str, bytes] = {}
    for hertz in HERTZ:
        members |= {f"{hertz}.wav": audio(hertz), f"{hertz}.txt": text_of(hertz).encode()}
    add("webdataset tar", "shard.tar", read_webdataset, tar_of(members))
    table = {
        "audio": [{"bytes": audio(hertz), "path": None} for hertz in HERTZ],
        "text": [text_of(hertz) for hertz in HERTZ],
        "id": [f"clip {hertz}" for hertz in HERTZ],
    }
    add("parquet audio", "t.parquet", read_parquet, parquet_of(table))
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}!"} for n in range(6)]
    add("parquet text", "t.parquet", read_columns, parquet_of(table))
    add("json lines", "t.jsonl", read_alpaca, json_lines(rows))
    add("json array", "t.json", read_alpaca, json.dumps(rows, indent=1).encode())
    spoken = [{"id": f"line {n}", "text": f"Number {n}.", "voices": "one"} for n in range(5)]
    add("synthetic", "lines.jsonl", read_synthetic, json_lines(spoken))
    job = yaml.safe_load((ROOT / "recipes/demo/tokenize.yaml").read_text())
    add("yaml", "job.yaml", read_config, yaml.safe_dump(job).encode())
    return made


def stereo() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.stack([tone(HERTZ[0]), tone(HERTZ[0])], axis=1), RATE, format="WAV")
    return file.getvalue()


def json_lines(entries: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def tar_of(contents: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def parquet_of(columns: dict[str, list[Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=2)
    return file.getvalue()


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to three of the changes of CHANGES, one after the other."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = rng.choice(CHANGES)(content, rng)
    return content


def _span(content: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.choice((1, 4, 16, 64, 512, 4096)))


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    near = rng.choice((64, 512, len(content)))  # headers are at the beginning
    for _ in range(rng.choice((1, 1, 4, 20))):
        if changed:
            changed[rng.randrange(min(near, len(changed)))] = rng.randrange(256)
    return bytes(changed)


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def remove(content: bytes, rng: random.Random) -> bytes:
    start, end = _span(content, rng)
    return content[:start] + content[end:]


def duplicate(content: bytes, rng: random.Random) -> bytes:
    start, end = _span(content, rng)
    at = rng.choice((end, rng.randrange(len(content) + 1), len(content)))
    return content[:at] + content[start:end] + content[at:]


def insert(content: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(content) + 1), rng.choice((1, 7, 100, 3000))
    return content[:at] + rng.choice((bytes(size), rng.randbytes(size))) + content[at:]


def swap(content: bytes, rng: random.Random) -> bytes:
    a, b, c, d = sorted(rng.randrange(len(content) + 1) for _ in range(4))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def edit_number(content: bytes, rng: random.Random) -> bytes:
    """A number in text, or four bytes as one of the values that break readers."""
    numbers = [match.span() for match in re.finditer(rb"-?\d+(\.\d+)?", content[:20_000])]
    if numbers and rng.random() < 0.5:
        start, end = rng.choice(numbers)
        values = (b"0", b"-1", b"1e999", b"NaN", b"null", b"999999999999999999999", b"0.001", b"[]")
        return content[:start] + rng.choice(values) + content[end:]
    at = rng.randrange(max(1, min(len(content), rng.choice((64, 4096, len(content))))))
    value = rng.choice(
        (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(content), rng.getrandbits(32))
    )
    return content[:at] + value.to_bytes(4, rng.choice(("little", "big"))) + content[at + 4 :]


def edit_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    rng.choice((lines.pop, lambda i: lines.insert(i, lines[i]), lambda i: rng.shuffle(lines)))(at)
    return b"\n".join(lines)


def twice(content: bytes, rng: random.Random) -> bytes:
    return content + content


CHANGES = (flip, flip, truncate, remove, duplicate, insert, swap, edit_number, edit_lines, twice)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises Fault in the main thread after `seconds`."""

    def late(*_: object) -> None:
        raise Fault(f"it takes over {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def try_one(seed: Seed, content: bytes, folder: Path) -> str:
    """Put `content` in the place of the starting file and read it: "read", "rejected" (nothing but
    rejects) or "refused" (one sentence). Raises Fault."""
    path = folder / seed.name
    path.write_bytes(content)
    # under a name of its own: an index of a file that was read before is kept in memory
    fresh = path.parent.rename(folder / f"{path.parent.name} {next(_numbers)}")
    try:
        with time_limit(TIME_LIMIT):
            return seed.read(fresh / path.name)
    except ValueError as error:
        if isinstance(error, UnicodeError | json.JSONDecodeError):
            raise Fault(f"no sentence for the user: {error!r}") from error
        return "refused"
    except OSError as error:
        if error.filename is None and not isinstance(error, FileNotFoundError):
            raise Fault(f"no sentence for the user: {error!r}") from error
        return "refused"
    except Mismatch as mismatch:
        if not file_says(fresh / path.name, *mismatch.args):
            raise
        return "read"
    except Fault:
        raise
    except Exception as error:
        raise Fault(repr(error)) from error
    finally:
        fresh.rename(path.parent)


def mutation(seed: Seed, original: bytes, number: int) -> bytes:
    """The mutation `number` of a starting file: the same in every run."""
    return mutate(original, random.Random(f"{seed.format} {number}"))


def make_m4a() -> None:
    """tests/golden/fuzz/tone.m4a anew, by ffmpeg."""
    command = "ffmpeg -nostdin -v error -y -f wav -i - -c:a aac -b:a 32k -bitexact".split()
    assert shutil.which("ffmpeg")
    M4A.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*command, str(M4A)], input=audio(HERTZ[0]), check=True)


if __name__ == "__main__":
    make_m4a()
