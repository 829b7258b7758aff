"""WebDataset tars made here, whole, odd and broken."""

import io
import json
import random
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechfuse.audio import decoding
from speechfuse.corpora.clip import Clip
from speechfuse.corpora.webdataset import WebDataset
from speechfuse.rows.rejects import Reject
from tests.corpus_clips import everything

RATE = 16_000


def noise(seed: int, count: int = 1600) -> np.ndarray:
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, count)
    return np.round(samples * 32768).astype(np.int16)


def encoded(samples: np.ndarray, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=kind)
    return file.getvalue()


def tar_of(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, **how) -> Path:
    with tarfile.open(path, how.pop("mode", "w"), **how) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def same(clip: Clip, samples: np.ndarray) -> bool:
    assert isinstance(clip.audio, bytes)
    return np.array_equal(decoding.decode(clip.audio).waveform * 32768, samples.astype(np.float32))


def test_members_with_one_key_are_one_clip(tmp_path):
    tar_of(
        tmp_path / "train-000.tar",
        special("./sub.dir", tarfile.DIRTYPE),
        ("./sub.dir/0001.flac", encoded(noise(1), "FLAC")),
        ("./sub.dir/0001.json", b'{"text": "of json", "speaker": 7, "lang": "fr", "k": [1, null]}'),
        ("./sub.dir/0001.cls", b"3\n"),
        ("0002.txt", "  \u00e9t\u00e9 \n".encode()),
        ("0002.json", b'{"text": "not this one"}'),
        ("0002.WAV", encoded(noise(2))),
        ("0003.mp3", encoded(noise(3), "MP3")),
        ("README", b"no suffix"),
        (".hidden.wav", b"of another system"),
    )
    tar_of(tmp_path / "train-001.tar", ("0002.ogg", encoded(noise(4), "OGG")))
    corpus = WebDataset(str(tmp_path / "train-{000..001}.tar"), language="en")
    first, second, third, fourth = everything(corpus)
    assert (first.id, first.uri) == ("train-000/sub.dir/0001", "train-000.tar/sub.dir/0001.flac")
    assert (first.text, first.speaker, first.language) == ("of json", "7", "fr")
    assert first.extra == {"k": [1, None], "cls": "3"} and same(first, noise(1))
    assert (second.id, second.text, second.language) == ("train-000/0002", "\u00e9t\u00e9", "en")
    assert second.uri == "train-000.tar/0002.WAV" and same(second, noise(2))
    assert third.text is None and len(decoding.decode(third.audio).waveform) == 1600
    assert fourth.id == "train-001/0002"  # keys count from the start in every tar
    assert corpus.ignored == {"members without a suffix": 2}
    everything(corpus)
    assert corpus.ignored == {"members without a suffix": 2}
    assert everything(WebDataset(str(tmp_path), language="en")) == [first, second, third, fourth]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_starts_anywhere_in_any_format_and_gives_the_same(tmp_path, kind):
    long = "d" * 90 + "/" + "n" * 90  # more than a plain header holds
    for t in (0, 1):
        members: list[tuple[str, bytes]] = []
        for i in range(11):
            name = f"{long}{i}" if i % 3 else f"{i}"
            members += [(f"{name}.wav", encoded(noise(i, 100 + i))), (f"{name}.txt", b"t%d" % i)]
        tar_of(tmp_path / f"{t}.tar", *members, format=kind)
    whole = everything(WebDataset(str(tmp_path)), 1000)
    assert len(whole) == 22 and whole[5].text == "t5"
    assert all(same(clip, noise(i % 11, 100 + i % 11)) for i, clip in enumerate(whole))
    for shard_size in (1, 2, 4, 11):
        plan = WebDataset(str(tmp_path)).plan(shard_size)
        parts = [list(WebDataset(str(tmp_path)).clips(shard)) for shard in reversed(plan)]
        assert [clip for part in reversed(parts) for clip in part] == whole


def test_what_is_unsafe_or_odd_is_rejected_and_its_neighbours_stay(tmp_path):
    good = encoded(noise(0))
    tar_of(
        tmp_path / "t.tar",
        ("a.wav", good),
        ("../../evil.wav", good),
        ("/etc/evil.wav", good),
        ("x/../y.wav", good),
        special("link.wav", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard.wav", tarfile.LNKTYPE, "a.wav"),
        special("fifo.wav", tarfile.FIFOTYPE),
        special("device.wav", tarfile.CHRTYPE),
        special("folder.wav", tarfile.DIRTYPE),
        ("\udcff.wav", good),
        ("only.json", b"{}"),
        ("two.wav", good),
        ("two.flac", encoded(noise(1), "FLAC")),
        ("list.wav", good),
        ("list.json", b"[1]"),
        ("half.wav", good),
        ("half.json", b'{"text": "\\ud800"}'),
        ("nan.wav", good),
        ("nan.json", b'{"text": "a", "score": NaN}'),
        ("twice.wav", good),
        ("twice.json", b'{"text": "a", "text": "b"}'),
        ("deep.wav", good),
        ("deep.json", b"[" * 100_000),
        ("broken.wav", good),
        ("broken.json", b'{"text": '),
        ("number.wav", good),
        ("number.json", b'{"text": 5}'),
        ("latin.wav", good),
        ("latin.txt", b"\xe9t\xe9"),
        ("long.wav", good),
        ("long.txt", b"x" * (1 << 20) + b"x"),
        ("same.wav", good),
        ("same.wav", good),
        ("apart.wav", good),
        ("between.wav", good),
        ("apart.txt", b"comes too late"),
        ("z.wav", good),
        encoding="utf-8",
        errors="surrogateescape",
    )
    for shard_size in (1, 3, 100):
        items = everything(WebDataset(str(tmp_path / "t.tar")), shard_size)
        clips = [item for item in items if isinstance(item, Clip)]
        assert [clip.id for clip in clips] == ["t/a", "t/same", "t/apart", "t/between", "t/z"]
        assert all(same(clip, noise(0)) for clip in clips)
        found = {i.id: i.reason.partition(": ")[0] for i in items if isinstance(i, Reject)}
        assert found == {
            "t/../../evil.wav": "unsafe path",
            "t//etc/evil.wav": "unsafe path",
            "t/x/../y.wav": "unsafe path",
            "t/link.wav": "unsafe path",
            "t/hard.wav": "unsafe path",
            "t/fifo.wav": "unsafe path",
            "t/device.wav": "unsafe path",
            "t/\\xff.wav": "bad name",
            "t/only": "not found",
            "t/two": "bad name",
            "t/list": "bad transcript",
            "t/half": "bad transcript",
            "t/nan": "bad transcript",
            "t/twice": "bad transcript",
            "t/deep": "bad transcript",
            "t/broken": "bad transcript",
            "t/number": "bad transcript",
            "t/latin": "bad transcript",
            "t/long": "bad transcript",
            "t/same": "duplicate id",
            "t/apart": "duplicate id",
        }
        assert len(items) == len(clips) + len(found)
        json.dumps([item.reason for item in items if isinstance(item, Reject)]).encode()
    chosen = everything(WebDataset(str(tmp_path / "t.tar"), audio_suffix=".flac"))
    assert [item.id for item in chosen if isinstance(item, Clip)] == ["t/two"]


def sample_tar(path: Path, count: int = 6) -> list[int]:
    """Samples 0.wav + 0.txt, ...; where in the file each one ends."""
    ends = []
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            for name, content in ((f"{i}.wav", encoded(noise(i))), (f"{i}.txt", b"text")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            ends.append(tar.offset)
    return ends


def test_a_tar_that_is_cut_off_gives_what_is_whole_and_says_so(tmp_path):
    path = tmp_path / "t.tar"
    ends = sample_tar(path)
    content = path.read_bytes()
    whole = everything(WebDataset(str(path)))
    assert len(whole) == 6 and all(isinstance(clip, Clip) for clip in whole)
    for length in [0, 1, 511, 512, 600, 2000, *ends, *(e - 100 for e in ends), ends[2] + 700]:
        path.write_bytes(content[:length])
        items = everything(WebDataset(str(path)), 2)
        kept = sum(end <= length for end in ends)
        assert items[:kept] == whole[:kept]
        rest = items[kept:]
        assert rest and isinstance(rest[-1], Reject) and rest[-1].reason.startswith("unreadable: ")
        assert len(rest) <= 2 and all(same_clip_or_reject(item, whole, kept) for item in rest)


def same_clip_or_reject(item: Clip | Reject, whole: list, kept: int) -> bool:
    """The sample at the cut may have lost its text, never its audio."""
    if isinstance(item, Reject):
        return True
    return item.id == whole[kept].id and item.audio == whole[kept].audio


def test_damage_never_stops_it_and_never_changes_what_stands_before(tmp_path):
    path = tmp_path / "t.tar"
    ends = sample_tar(path)
    content = path.read_bytes()
    whole = everything(WebDataset(str(path)))
    rng = random.Random(0)
    headers = [e - 512 * k for e in ends for k in (1, 2)]
    for _ in range(200):
        damaged = bytearray(content)
        place = rng.choice(headers) + rng.randrange(512)
        if rng.random() < 0.3:
            place = rng.randrange(len(content))
        for i in range(rng.choice((1, 8, 600))):
            if place + i < len(damaged):
                damaged[place + i] = rng.choice((0, 255, rng.randrange(256)))
        path.write_bytes(damaged)
        items = everything(WebDataset(str(path)), rng.choice((1, 2, 10)))
        kept = sum(end <= place for end in ends)
        assert items[:kept] == whole[:kept]


def header_with(name: str, kind: bytes, size: bytes) -> bytes:
    """A tar header whose size field is what the caller says, with a right checksum."""
    info = special(name, kind)
    raw = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    raw[124:136] = size
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize(
    "size",
    [
        b"77777777777\0",
        b"\x80" + b"\x7f" * 11,
        b"not octal\0\0\0",
        b"\xff" * 12,
        b"\xff" * 11 + b"\x00",
        b"\xff" * 10 + b"\xfc\x00",
        b"\xff" + bytes(11),
    ],
)
def test_a_header_with_an_absurd_size_is_no_harm(tmp_path, kind, size):
    path = tmp_path / "t.tar"
    ends = sample_tar(path, 2)
    content = path.read_bytes()
    forged = header_with("huge.wav", kind, size)
    path.write_bytes(content[: ends[0]] + forged + content[ends[0] :])
    first, *rest = everything(WebDataset(str(path)))
    assert first.id == "t/0" and same(first, noise(0))
    assert 1 <= len(rest) <= 2  # whether tarfile finds the way back differs
    if kind == tarfile.REGTYPE:
        assert isinstance(rest[-1], Reject) and rest[-1].reason.startswith("unreadable: ")


def test_what_is_no_tar_is_one_reject_and_a_compressed_one_is_refused(tmp_path):
    sample_tar(tmp_path / "a.tar", 1)
    (tmp_path / "b.tar").write_text("<html>not here</html>" * 100)
    (tmp_path / "c.tar").write_bytes(b"")
    (tmp_path / "d.tar").write_bytes(bytes(10_240))  # a tar of nothing
    clip, page, nothing = everything(WebDataset(str(tmp_path)))
    assert clip.id == "a/0"
    assert page.reason == nothing.reason == "unreadable: not a tar"
    assert page.id == "b/end of the tar"
    for mode in ("w:gz", "w:bz2", "w:xz"):
        tar_of(tmp_path / "e.tar", ("0.wav", b"x"), mode=mode)
        with pytest.raises(ValueError, match=r"e\.tar is compressed.*decompress it first"):
            WebDataset(str(tmp_path)).plan(10)
    with pytest.raises(FileNotFoundError, match=r"no file at .*absent-0\.tar"):
        WebDataset(str(tmp_path / "absent-{0..9}.tar"))
    assert WebDataset(str(tmp_path / "d.tar")).plan(10) == []


def test_nothing_is_written_and_the_fingerprint_is_names_and_sizes(tmp_path):
    sample_tar(tmp_path / "t.tar")
    before = WebDataset(str(tmp_path)).fingerprint
    everything(WebDataset(str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["t.tar"]
    assert WebDataset(str(tmp_path)).fingerprint == before
    sample_tar(tmp_path / "u.tar")
    assert WebDataset(str(tmp_path)).fingerprint != before
    assert WebDataset(str(tmp_path / "t.tar")).fingerprint == before


def test_memory_is_flat_over_many_members(tmp_path):
    content = encoded(noise(0, 400))
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for i in range(6000):
            info = tarfile.TarInfo(f"{i:06d}.wav")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    corpus = WebDataset(str(tmp_path))
    tracemalloc.start()
    plan = corpus.plan(200)
    for shard in (plan[0], plan[-1]):
        for clip in corpus.clips(shard):
            assert clip.audio == content
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(plan) == 30 and plan[29].keys() == {"tar", "start", "count"}
    assert peak < 600_000
