"""NeMo manifests, plain and tarred, and MLS as OpenSLR has it, on files made here."""

import io
import json
import tarfile
import tracemalloc
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechfuse.audio import decoding
from speechfuse.corpora.clip import Clip
from speechfuse.corpora.mls import Mls
from speechfuse.corpora.nemo import Nemo
from speechfuse.json_lines import LIMIT
from speechfuse.rows.rejects import Reject
from tests.corpus_clips import everything, same

RATE = 16_000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE))
    return np.round(samples * 32768).astype(np.int16)


def write(path: Path, samples: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opus = {"format": "OGG", "subtype": "OPUS"} if path.suffix == ".opus" else {}
    soundfile.write(path, samples, RATE, **opus)
    return path


def encoded(samples: np.ndarray, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=kind)
    return file.getvalue()


def listed(path: Path, *entries: object) -> Path:
    """A manifest: dicts as JSON lines, bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [e if isinstance(e, bytes) else json.dumps(e).encode() for e in entries]
    path.write_bytes(b"\n".join(rows) + b"\n")
    return path


def tar_of(path: Path, **contents: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def speech(tmp_path) -> tuple[Path, np.ndarray]:
    """A folder with data/wavs/a.wav (2 s) and its samples."""
    samples = noise(2)
    write(tmp_path / "data/wavs/a.wav", samples)
    return tmp_path / "data", samples


@pytest.mark.parametrize("key", ["audio_filename", "audio_file"])
def test_nemo_has_other_names_for_the_path(speech, key):
    folder, _ = speech
    lines = [{key: "wavs/a.wav", "text": "a"}, {key: ["wavs/a.wav"] * 2, "text": "b"}]
    lines.append({key: "other.wav", "audio_filepath": "wavs/a.wav", "offset": 1})
    one, several, both = everything(Nemo(str(listed(folder / "train.jsonl", *lines))))
    assert (one.id, one.uri, one.text, one.extra) == ("wavs/a", "wavs/a.wav", "a", {})
    assert [each.uri for each in several.recordings] == ["wavs/a.wav"] * 2
    assert both.id == "wavs/a@1" and both.extra == {key: "other.wav"}


def test_a_line_of_nemo_says_all_there_is_to_a_clip(speech):
    folder, samples = speech
    write(folder / "wavs/b.flac", samples[:100])
    manifest = listed(
        folder / "train.jsonl",
        {
            "audio_filepath": "wavs/a.wav",
            "duration": 2.0,
            "text": " what it says ",
            "lang": "pl",
            "speaker": 17,
            "question": "Which?",
            "context": {"of": [1]},
            "answer": "That.",
        },
        {"audio_filepath": str(folder / "wavs/b.flac"), "duration": None},
        {"audio_filepath": "wavs/absent.wav", "answer": "only an answer"},
    )
    first, second, third = everything(Nemo(str(manifest), language="en"))
    assert first == Clip(
        "wavs/a",
        folder / "wavs/a.wav",
        "wavs/a.wav",
        0.0,
        2.0,
        "what it says",
        "17",
        "pl",
        {"question": "Which?", "context": {"of": [1]}, "answer": "That."},
    )
    assert same(first, samples)
    assert (second.id, second.uri, second.text, second.language) == (
        "wavs/b",
        "wavs/b.flac",
        None,
        "en",
    )
    assert second.seconds is None and same(second, samples[:100])
    assert (third.text, third.extra) == (None, {"answer": "only an answer"})
    with pytest.raises(ValueError, match=r"^not found: "):
        decoding.decode(third.audio, third.offset, third.seconds)
    renamed = everything(Nemo(str(manifest), text_key="question"))
    assert renamed[0].text == "Which?" and renamed[0].extra["text"] == " what it says "
    meant = everything(Nemo(str(manifest), text_key="answer"))
    assert [clip.text for clip in meant] == ["That.", None, "only an answer"]
    assert meant[0].extra["answer"] == "That."  # kept there even where it is also the text


def test_offset_and_duration_are_exactly_these_samples(speech):
    folder, samples = speech
    parts = [(0, 0.5), (0.5, 0.25), (1.5, None), (0.12345, 0.5), (0, None), (1.9, 0.15)]
    manifest = listed(
        folder / "cuts.jsonl",
        *({"audio_filepath": "wavs/a.wav", "offset": o, "duration": d} for o, d in parts),
    )
    clips = everything(Nemo(str(manifest)))
    assert [clip.id for clip in clips] == [
        "wavs/a@0+0.5",
        "wavs/a@0.5+0.25",
        "wavs/a@1.5",
        "wavs/a@0.12345+0.5",
        "wavs/a@0",
        "wavs/a@1.9+0.15",
    ]
    for clip, (offset, seconds) in zip(clips, parts, strict=True):
        start = round(offset * RATE)
        end = len(samples) if seconds is None else start + round(seconds * RATE)
        assert same(clip, samples[start:end])


def test_texts_that_stand_in_files_of_their_own_are_read(speech):
    folder, _ = speech
    (folder / "wavs/a.txt").write_text(" what it says\n")
    (folder / "ask.txt").write_text("Which?")
    files = {"text_filepath": "wavs/a.txt", "context_filepath": str(folder / "ask.txt")}
    line = {"audio_filepath": "wavs/a.wav"}
    manifest = listed(
        folder / "files.jsonl",
        line | files,
        line | files | {"text": "own", "offset": 1},
        line | {"text_filepath": "gone.txt"},
    )
    first, second, third = everything(Nemo(str(manifest)))
    assert (first.text, first.extra) == ("what it says", {"context": "Which?"})
    assert second.text == "own"
    assert third.reason.endswith("line 3: gone.txt cannot be read: No such file or directory")
    (folder.parent / "secret.txt").write_text("a key")
    outside = listed(folder / "out.jsonl", line | {"text_filepath": "../secret.txt"})
    assert (
        "../secret.txt leads out of the manifest's folder"
        in everything(Nemo(str(outside)))[0].reason
    )


def test_what_is_wrong_with_the_recording_of_a_line_is_one_sentence(speech):
    folder, _ = speech
    manifest = listed(
        folder / "gone.jsonl",
        {"audio_filepath": "wavs/gone.wav"},
        {"audio_filepath": "wavs/a.wav", "duration": 3.5},
    )
    for clip, why in zip(everything(Nemo(str(manifest))), ("not found: ", "3.5"), strict=True):
        with pytest.raises(ValueError, match=why) as caught:
            decoding.decode(clip.audio, clip.offset, clip.seconds)
        assert "\n" not in str(caught.value)


BAD_LINES = {
    b"{": "not JSON: ",
    b"not json": "not JSON: Expecting value",
    b"[1]": "not a JSON object",
    b"7": "not a JSON object",
    b'{"text": "x"}': "audio_filepath is None, not a name",
    b'{"audio_filepath": ""}': "audio_filepath is '', not a name",
    b'{"audio_filepath": 7}': "audio_filepath is 7, not a name",
    b'{"audio_filepath": ["a.wav", 7]}': "audio_filepath is 7, not a name",
    b'{"audio_filepath": "a\\u0000.wav"}': "not a name",
    b'{"audio_filepath": "\\ud800.wav"}': "half a character",
    b'{"audio_filepath": "wavs/a.wav", "duration": -1}': "duration is -1, not a number of seconds",
    b'{"audio_filepath": "wavs/a.wav", "duration": 0}': "duration is 0",
    b'{"audio_filepath": "wavs/a.wav", "duration": "2"}': "duration is '2'",
    b'{"audio_filepath": "wavs/a.wav", "duration": true}': "duration is True",
    b'{"audio_filepath": "wavs/a.wav", "duration": NaN}': "NaN is no JSON",
    b'{"audio_filepath": "wavs/a.wav", "duration": 1e999}': "duration is inf",
    b'{"audio_filepath": "wavs/a.wav", "offset": -0.5}': "offset is -0.5, not a number",
    b'{"audio_filepath": "wavs/a.wav", "offset": [1]}': "offset is [1], not a number",
    b'{"audio_filepath": "wavs/a.wav", "text": 5}': "text is 5, not text",
    b'{"audio_filepath": "wavs/a.wav", "text": "\\udfff"}': "half a character",
    b'{"audio_filepath": "wavs/a.wav", "speaker": {}}': "speaker is {}, not text",
    b'{"audio_filepath": "wavs/a.wav", "lang": 1}': "lang is 1, not text",
    b'{"audio_filepath": "wavs/\xff.wav"}': "not UTF-8",
    b"\x1e\x8b\x00\x01": "not UTF-8",
    b"[" * 100_000: "nested too deeply",
    b'{"offset": ' + b"9" * 5000 + b"}": "",
    b'{"audio_filepath": "wavs/a.wav", "offset": 1' + b"0" * 400 + b"}": "not a number of seconds",
    b'"' + b"x" * LIMIT + b'"': "longer than 16 MiB",
}


def test_every_bad_line_is_a_reject_with_its_number_and_its_neighbours_stay(speech):
    folder, samples = speech
    good = [{"audio_filepath": "wavs/a.wav", "offset": i, "duration": 1} for i in range(2)]
    manifest = listed(folder / "bad.jsonl", good[0], b"", *BAD_LINES, b"  \r", good[1])
    for shard_size in (100, 1, 7):
        first, *rejects, last = everything(Nemo(str(manifest)), shard_size)
        assert same(first, samples[:RATE]) and same(last, samples[RATE:])
        for number, (reject, why) in enumerate(zip(rejects, BAD_LINES.values(), strict=True), 3):
            assert isinstance(reject, Reject) and reject.id == f"bad.jsonl:{number}"
            assert reject.reason.startswith(f"bad manifest line: line {number}: ")
            assert why in reject.reason and len(reject.reason) < 200


def test_shards_are_byte_ranges_that_give_the_same_clips_in_the_same_order(tmp_path):
    names = [f"{i:03d}.wav" for i in range(57)]
    entries = [{"audio_filepath": name, "text": f"\u2028 \u00e9 {name}"} for name in names]
    listed(tmp_path / "one.json", *entries[:30])
    listed(tmp_path / "deep/er/two.jsonl", *entries[:3])
    (tmp_path / "two.json").write_text("\n\n".join(json.dumps(e) for e in entries[30:]))  # no end
    both = [str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    whole = everything(Nemo(both), 1000)
    assert [clip.uri for clip in whole] == names
    assert whole[40].text == "\u00e9 040.wav"
    for shard_size in (1, 10, 29, 30, 31):
        corpus = Nemo(both)
        assert everything(corpus, shard_size) == whole
        plan = corpus.plan(shard_size)
        backwards = [list(Nemo(both).clips(shard)) for shard in reversed(plan)]
        assert [clip for part in reversed(backwards) for clip in part] == whole
    assert Nemo(str(tmp_path / "{one,two}.json")).plan(10) == Nemo(both).plan(10)
    assert everything(Nemo(str(tmp_path / "*.json"))) == whole
    assert len(everything(Nemo(str(tmp_path / "**/*.jsonl")))) == 3


def test_ids_that_come_twice_are_rejected_across_shards_and_manifests(tmp_path):
    line = {"audio_filepath": "a.wav", "question": "1"}
    listed(tmp_path / "m_0.json", line, {"audio_filepath": "b.wav"}, {**line, "question": "2"})
    listed(tmp_path / "m_1.json", b"{", line, {"audio_filepath": "c.wav", "question": "3"})
    pattern = str(tmp_path / "m__OP_0..1_CL_.json")
    for shard_size in (1, 2, 10):
        items = everything(Nemo(pattern), shard_size)
        found = [item.id for item in items if isinstance(item, Clip)]
        assert found == ["a", "b", "c"]
        reasons = [item.reason for item in items if isinstance(item, Reject)]
        assert [why.partition(": ")[0] for why in reasons] == [
            "duplicate id",
            "bad manifest line",
            "duplicate id",
        ]
        assert "line 3 of m_0.json" in reasons[0] and "id_key" in reasons[0]
    named = everything(Nemo(str(tmp_path / "m_0.json"), id_key="question"))
    assert [item.id for item in named] == ["1", "m_0.json:2", "2"]
    assert isinstance(named[1], Reject)  # it has no such key


def test_lines_to_skip_count_as_asked_for(tmp_path):
    entries = [{"audio_filepath": "a.wav", "_skipme": True}, {"audio_filepath": "b.wav"}]
    listed(tmp_path / "m.json", *entries)
    skipped, kept = everything(Nemo(str(tmp_path / "m.json")))
    assert skipped.reason.startswith("filter skipme: ") and kept.extra == {}


def test_audio_dir_is_where_paths_start_and_a_fence(speech):
    folder, samples = speech
    outside = write(folder.parent / "other/c.wav", samples)
    paths = ["a.wav", str(folder / "wavs/a.wav"), "../../other/c.wav", str(outside), "x/../a.wav"]
    manifest = listed(
        folder.parent / "lists/m.jsonl",
        *({"audio_filepath": path, "key": i} for i, path in enumerate(paths)),
    )
    fenced = everything(Nemo(str(manifest), audio_dir=str(folder / "wavs"), id_key="key"))
    assert [(item.id, type(item)) for item in fenced] == [
        ("0", Clip),
        ("1", Clip),
        ("2", Reject),
        ("3", Reject),
        ("4", Clip),
    ]
    assert [item.uri for item in fenced if isinstance(item, Clip)] == ["a.wav"] * 3
    assert all(same(fenced[i], samples) for i in (0, 1, 4))
    assert all(item.reason.startswith("unsafe path: ") for item in fenced[2:4])
    # without it the manifest is trusted: NeMo's own hold absolute paths and ../audio
    free = everything(Nemo(str(manifest), id_key="key"), 2)
    assert same(free[1], samples) and same(free[3], samples)


def test_uris_tell_nothing_of_the_folders_above_the_audio(tmp_path):
    audio_dir = tmp_path / "home/me/corpus"
    inside = [write(audio_dir / name, noise(0.1)) for name in ("x/a.wav", "x/b.wav", "y/c.wav")]
    lists = tmp_path / "other/lists"
    outside = [{"audio_filepath": str(path), "offset": 0} for path in inside]
    above = [{"audio_filepath": "../../home/me/corpus/x/a.wav"}]
    listed(lists / "m_0.jsonl", *outside)
    listed(lists / "m_1.jsonl", *above, {"audio_filepath": "z.wav"})
    clips = everything(Nemo(str(lists / "m_0.jsonl")), 2)
    assert [clip.uri for clip in clips] == ["x/a.wav", "x/b.wav", "y/c.wav"]
    assert [clip.id for clip in clips] == ["x/a@0", "x/b@0", "y/c@0"]
    assert all(same(clip, noise(0.1)) for clip in clips)
    mixed = everything(Nemo(str(lists / "m_1.jsonl")))
    assert [clip.uri for clip in mixed] == ["home/me/corpus/x/a.wav", "other/lists/z.wav"]
    assert [clip.audio for clip in mixed][1] == lists / "z.wav" and same(mixed[0], noise(0.1))
    listed(lists / "m_1.jsonl", *above)
    assert [clip.id for clip in everything(Nemo(str(lists / "m_1.jsonl")))] == ["a"]


@pytest.fixture
def tarred(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """audio_0.tar and audio_1.tar of two recordings each, the second cut into parts, as NeMo's own
    script writes them; the samples of each."""
    samples = {f"{t}{name}": noise(1, 7 * t + i) for t in (0, 1) for i, name in enumerate("ab")}
    for t in (0, 1):
        tar_of(
            tmp_path / f"audio_{t}.tar",
            **{
                "a.wav": encoded(samples[f"{t}a"]),
                "dir_b.flac": encoded(samples[f"{t}b"], "FLAC"),
            },
        )
        listed(tmp_path / f"manifest_{t}.json", *tarred_lines(t))
    listed(tmp_path / "tarred_audio_manifest.json", *tarred_lines(0), *tarred_lines(1))
    return tmp_path, samples


def tarred_lines(t: int) -> list[dict]:
    parts = [{"offset": 0.0, "duration": 0.25}, {"offset": 0.25, "duration": 0.5}, {"offset": 0.75}]
    names = ["dir_b.flac", "dir_b-sub1.flac", "dir_b-sub2.flac"]
    return [{"audio_filepath": "a.wav", "duration": 1.0, "text": f"a of {t}", "shard_id": t}] + [
        {"audio_filepath": name, "shard_id": t, **part}
        for name, part in zip(names, parts, strict=True)
    ]


@pytest.mark.parametrize("manifests", ["manifest__OP_0..1_CL_.json", "tarred_audio_manifest.json"])
@pytest.mark.parametrize("tars", ["audio_{0..1}.tar", "audio__OP_0..1_CL_.tar"])
def test_tarred_nemo_is_read_at_its_place_in_the_tars(tarred, manifests, tars):
    folder, samples = tarred
    corpus = Nemo(str(folder / manifests), tars=str(folder / tars))
    clips = everything(corpus, 3)
    assert [clip.id for clip in clips] == [
        f"audio_{t}/{name}"
        for t in (0, 1)
        for name in ("a", "dir_b@0.0+0.25", "dir_b-sub1@0.25+0.5", "dir_b-sub2@0.75")
    ]
    uris = ["audio_1.tar/a.wav"] + 3 * ["audio_1.tar/dir_b.flac"]
    assert [clip.uri for clip in clips[4:]] == uris
    assert clips[4].text == "a of 1" and clips[4].extra == {"shard_id": 1}
    for t, part in ((0, clips[:4]), (1, clips[4:])):
        whole = samples[f"{t}b"]
        cuts = [samples[f"{t}a"], whole[:4000], whole[4000:12000], whole[12000:]]
        assert all(same(clip, cut) for clip, cut in zip(part, cuts, strict=True))
    assert all(isinstance(clip.audio, bytes) for clip in clips)


def test_what_a_tarred_manifest_may_get_wrong(tarred):
    folder, _ = tarred
    member = encoded(noise(0.1))
    contents = {"../up.wav": member, "/abs.wav": member, "ok.wav": member}
    tar_of(folder / "audio_7.tar", **contents)
    with tarfile.open(folder / "audio_7.tar", "a") as tar:
        link = tarfile.TarInfo("link.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    names = ["ok.wav", "../up.wav", "/abs.wav", "link.wav", "absent.wav", "./ok.wav"]
    wrong = [{"audio_filepath": name, "shard_id": 7} for name in names]
    entries = [*wrong, {"audio_filepath": "ok.wav", "shard_id": 5}, {"audio_filepath": "ok.wav"}]
    manifest = listed(folder / "single.json", *entries)
    tars = [str(folder / "audio_{0..1}.tar"), str(folder / "audio_7.tar")]
    ok, *rejects = everything(Nemo(str(manifest), tars=tars))
    assert same(ok, noise(0.1))
    assert [reject.reason.partition(": ")[0] for reject in rejects] == [
        "unsafe path",
        "unsafe path",
        "unsafe path",
        "not found",
        "duplicate id",
        "bad manifest line",
        "bad manifest line",
    ]
    assert "shard_id is 5; the tars are 0, 1, 7" in rejects[5].reason
    content = (folder / "audio_7.tar").read_bytes()
    for length in (1024, 4096, 5120):  # inside up.wav, after it, after abs.wav
        (folder / f"cut_{length}.tar").write_bytes(content[:length])
        listed(folder / "one.json", entries[0])
        cut = Nemo(str(folder / "one.json"), tars=str(folder / f"cut_{length}.tar"))
        (reject,) = everything(cut)
        assert reject.reason.startswith("unreadable: the tar is ")
    with pytest.raises(ValueError, match=r"3 tar files beside 2 manifests"):
        Nemo(str(folder / "manifest_{0..1}.json"), tars=tars)


def shards_of(folder: Path, tars: dict[str, int], manifests: dict[str, int], **line) -> Path:
    """Tars and manifests {name: number of their only clip}: all members have one name."""
    for name, number in tars.items():
        folder.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        tar_of(folder / name, **{"000000.wav": encoded(noise(0.01, number))})
    for name, number in manifests.items():
        entry = {"audio_filepath": "000000.wav", "text": str(number), **line}
        listed(folder / name, entry)
    return folder


PAIRS = [  # tars, manifests, both in the order of a list or of a glob
    ("audio_{}.tar", "manifest_{}.json", range(12)),
    ("audio_{}.tar", "manifest_{:03d}.json", range(0, 120, 10)),
    ("audio16k_{}_v2.tar", "m_{}_of_12.json", range(12)),
    ("{}.tar", "{}.jsonl", ("de", "en", "fr")),
    ("set{0}/audio_{0}.tar", "set{0}/m.json", range(9, 12)),
]


@pytest.mark.parametrize(("tar", "manifest", "numbers"), PAIRS)
@pytest.mark.parametrize("order", ["listed", "sorted as text", "reversed"])
def test_manifests_and_tars_belong_together_by_what_differs_in_their_names(
    tmp_path, tar, manifest, numbers, order
):
    names = list(numbers)
    tars = {tar.format(n): i for i, n in enumerate(names)}
    manifests = {manifest.format(n): i for i, n in enumerate(names)}
    shards_of(tmp_path, tars, manifests)
    paths = [str(tmp_path / name) for name in tars]
    paths = {"listed": paths, "sorted as text": sorted(paths), "reversed": paths[::-1]}[order]
    clips = everything(Nemo([str(tmp_path / name) for name in manifests], tars=paths))
    assert [clip.text for clip in clips] == [str(i) for i in range(len(names))]
    assert all(same(clip, noise(0.01, i)) for i, clip in enumerate(clips))


def test_a_pairing_that_names_or_lines_contradict_is_refused(tmp_path):
    same_number = shards_of(
        tmp_path / "same",
        {f"{s}/audio_{i}.tar": i for s in "ab" for i in (2, 10)},
        {f"{s}/m_{i}.json": i for s in "ab" for i in (2, 10)},
    )
    manifests = [str(same_number / s / f"m_{i}.json") for s in "ab" for i in (2, 10)]
    with pytest.raises(ValueError, match="in another order, and some occur more than once"):
        Nemo(manifests, tars=str(same_number / "*/audio_*.tar"))
    in_order = [name.replace("m_", "audio_").replace("json", "tar") for name in manifests]
    clips = everything(Nemo(manifests, tars=in_order))
    assert [clip.text for clip in clips] == ["2", "10", "2", "10"]
    assert [clip.id for clip in clips][::3] == ["a/audio_2/000000", "b/audio_10/000000"]

    shifted = shards_of(
        tmp_path / "shifted",
        {f"audio_{i}.tar": i for i in (1, 2, 3)},
        {f"m_{i}.json": i for i in range(3)},
    )
    pair = str(shifted / "m_{0..2}.json"), str(shifted / "audio_{1..3}.tar")
    assert len(everything(Nemo(pair[0], tars=pair[1]))) == 3  # nothing says that it is wrong
    for i in range(3):
        listed(shifted / f"m_{i}.json", {"audio_filepath": "000000.wav", "shard_id": i})
    with pytest.raises(ValueError, match=r"m_1\.json: line 1 has shard_id 1, but .* audio_2\.tar"):
        Nemo(pair[0], tars=pair[1]).plan(10)
    entries = [{"audio_filepath": "000000.wav", "offset": i, "shard_id": i} for i in (1, 1, 0)]
    listed(shifted / "all.json", *entries)
    with pytest.raises(ValueError, match=r"line 3 has shard_id 0, those above it 1, but all lines"):
        Nemo(str(shifted / "all.json"), tars=str(shifted / "audio_1.tar")).plan(10)


@pytest.mark.parametrize("key", ["conversations", "turns", "messages"])
def test_a_manifest_of_conversations_says_what_it_is(tmp_path, key):
    turns = [{"value": "<sound> what is it?", "from": "human"}]  # ShareGPT's
    listed(tmp_path / "c.jsonl", {"id": "c1", key: turns})
    said = r"c\.jsonl: line 1 is a conversation.*multimodal_conv.*speechfuse\.texts\.Messages"
    with pytest.raises(ValueError, match=said):
        Nemo(str(tmp_path / "c.jsonl")).plan(10)


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_no_manifest(tmp_path, indent):
    entries = [{"audio_filepath": "a.wav", "text": "a"}]
    (tmp_path / "a.json").write_text(json.dumps(entries, indent=indent))
    with pytest.raises(ValueError, match=r"a\.json: it is a JSON array, and not one object a line"):
        Nemo(str(tmp_path / "a.json")).plan(10)


def test_missing_and_compressed_lists_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    for pattern in ("absent.json", "m_{0..3}.json", "*.json", "empty"):
        with pytest.raises(FileNotFoundError, match="no file at") as error:
            Nemo(str(tmp_path / pattern))
        assert "\n" not in str(error.value)
    listed(tmp_path / "m_0.json", {"audio_filepath": "a.wav"})
    with pytest.raises(FileNotFoundError, match=r"m_1\.json"):
        Nemo(str(tmp_path / "m_{0..3}.json"))
    with pytest.raises(FileNotFoundError, match=r"x\.tar"):
        Nemo(str(tmp_path / "m_0.json"), tars=str(tmp_path / "x.tar"))
    with pytest.raises(FileNotFoundError, match=r"the list of \.tar files is empty"):
        Nemo(str(tmp_path / "m_0.json"), tars=[])
    (tmp_path / "m.json.gz").write_bytes(b"\x1f\x8b\x08 and so on")
    with pytest.raises(ValueError, match=r"compressed.*decompress it first"):
        Nemo(str(tmp_path / "m.json.gz")).plan(10)
    (tmp_path / "none.json").write_text("\n \n")
    assert Nemo(str(tmp_path / "none.json")).plan(10) == []


def test_the_fingerprint_is_that_of_the_lines_and_the_tars(tarred):
    folder, _ = tarred

    def fingerprint() -> str:
        return Nemo(str(folder / "manifest_0.json"), tars=str(folder / "audio_0.tar")).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    content = (folder / "manifest_0.json").read_bytes()
    (folder / "manifest_0.json").write_bytes(content.replace(b"a of 0", b"b of 0"))
    assert fingerprint() != first
    (folder / "manifest_0.json").write_bytes(content)
    with open(folder / "audio_0.tar", "ab") as file:
        file.write(bytes(512))
    assert fingerprint() != first


def test_memory_is_flat_over_a_long_manifest(tmp_path):
    count = 20_000
    with open(tmp_path / "m.jsonl", "w") as file:
        for i in range(count):
            line = {"audio_filepath": f"speaker/book/{i:08d}.wav", "text": "word " * 270}
            file.write(json.dumps(line) + "\n")
        file.write('{"audio_filepath": "speaker/book/00000007.wav"}\n')
    size = (tmp_path / "m.jsonl").stat().st_size
    corpus = Nemo(str(tmp_path / "m.jsonl"))
    tracemalloc.start()
    plan = corpus.plan(500)
    planned = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    last = None
    for shard in plan[::10] + plan[-1:]:
        for last in corpus.clips(shard):  # noqa: B007
            pass
    read = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert size > 25e6 and planned < 3e6, "8 bytes a line, and as much again thrice to sort them"
    assert read < 200_000
    assert len(plan) == 41 and len(json.dumps(plan)) < 100 * len(plan)
    assert isinstance(last, Reject) and last.reason.startswith(f"duplicate id: line {count + 1} ")


IDS = ["10_20_000000", "10_20_000001", "10_21_000000", "11_30_000005", "11_30_000006"]


@pytest.fixture
def german(tmp_path) -> Path:
    """mls_german/train of five clips; the last is opus."""
    folder = tmp_path / "mls_german/train"
    for i, id in enumerate(IDS):
        speaker, book, _ = id.split("_")
        suffix = "opus" if i == 4 else "flac"
        write(folder / "audio" / speaker / book / f"{id}.{suffix}", noise(0.2, i))
    rows = [f"{id}\tder satz {i} \u00fc\n" for i, id in enumerate(IDS)]
    (folder / "transcripts.txt").write_text("".join(rows), "utf-8")
    url = "http://www.archive.org/download/book/book_64kb.mp3"
    rows = [f"{id}\t{url}\t{i}.5\t{i + 1}.25\n" for i, id in enumerate(IDS)]
    (folder / "segments.txt").write_text("".join(rows))
    for name, ids in {"9hr": IDS[1:3], "1hr/0": IDS[3:4], "1hr/1": [IDS[4], "9_9_9"]}.items():
        (folder / "limited_supervision" / name).mkdir(parents=True)
        path = folder / "limited_supervision" / name / "handles.txt"
        path.write_text("".join(f"{id}\n" for id in ids))
    return folder.parent


def test_mls_is_read_from_its_own_layout(german):
    corpus = Mls(str(german), "train")
    clips = everything(corpus, 2)
    assert [clip.id for clip in clips] == IDS
    for i, clip in enumerate(clips):
        speaker, book, _ = clip.id.split("_")
        assert clip.text == f"der satz {i} \u00fc" and clip.language == "de"
        assert clip.speaker == speaker and clip.uri.startswith(f"train/audio/{speaker}/{book}/")
        assert clip.extra == {
            "url": "http://www.archive.org/download/book/book_64kb.mp3",
            "start": i + 0.5,
            "end": i + 1.25,
        }
        assert i == 4 or same(clip, noise(0.2, i))
    assert clips[4].uri.endswith(".opus") and len(decoding.decode(clips[4].audio).waveform) > 3000
    assert corpus.source_name == "mls_german/train" and corpus.licence == "cc-by-4.0"
    assert not corpus.ignored
    for shard in reversed(corpus.plan(1)):
        (clip,) = Mls(str(german), "train").clips(shard)
        assert clip == clips[IDS.index(clip.id)]


@pytest.mark.parametrize(
    ("subset", "ids"),
    [
        ("9hr", IDS[1:3]),
        ("1hr", [*IDS[3:5], "9_9_9"]),
        ("1hr/0", IDS[3:4]),
        ("10hr", [*IDS[1:5], "9_9_9"]),
    ],
)
def test_limited_supervision_is_what_its_handles_name(german, subset, ids):
    items = everything(Mls(str(german), "train", subset), 2)
    assert [item.id for item in items] == ids
    for item in items:
        if item.id == "9_9_9":
            assert item.reason.startswith("bad transcript: ")
        else:
            assert item.extra["start"] == IDS.index(item.id) + 0.5


def test_what_is_wrong_in_mls_is_a_reject_or_said(german):
    train = german / "train"
    with open(train / "transcripts.txt", "ab") as file:
        file.write(b"10_20_000000\tagain\n\nno tab at all\n../../etc_1_2\tpath\n12_1_7\t\xff\n")
        file.write(b"12_1_8\t \n12_1_9\tno audio\n")
    corpus = Mls(str(german), "train")
    items = everything(corpus, 3)
    assert [item.id for item in items[:5]] == IDS
    assert [item.reason.partition(": ")[0] for item in items[5:-1]] == ["duplicate id"] + 4 * [
        "bad transcript"
    ]
    assert "line 6 " in items[5].reason and "line 8: " in items[6].reason
    with pytest.raises(ValueError, match=r"^not found: "):
        decoding.decode(items[-1].audio)
    (train / "segments.txt").write_text("11_30_000005\thttp://x\t1\t2\n" + "junk\n" * 4)
    corpus = Mls(str(german), "train")
    assert all(item.extra == {} for item in everything(corpus) if isinstance(item, Clip))
    assert sum(corpus.ignored.values()) == 5
    (train / "segments.txt").unlink()
    assert everything(Mls(str(german), "train"))[0].extra == {}
    with pytest.raises(FileNotFoundError, match=r"no transcripts at .*one of train, dev, test"):
        Mls(str(german), "dev")
    with pytest.raises(FileNotFoundError, match="choose 9hr, 1hr"):
        Mls(str(german), "train", "100hr")


def test_mls_needs_no_memory_for_its_transcripts(tmp_path):
    folder = tmp_path / "mls_english/train"
    folder.mkdir(parents=True)
    with open(folder / "transcripts.txt", "w") as text, open(folder / "segments.txt", "w") as cut:
        for i in range(20_000):
            text.write(f"1_2_{i:06d}\t{'word ' * 40}\n")
            cut.write(f"1_2_{i:06d}\thttp://x\t{i}\t{i + 10}\n")
    corpus = Mls(str(folder.parent), "train")
    tracemalloc.start()
    plan = corpus.plan(500)
    first, last = next(corpus.clips(plan[0])), deque(corpus.clips(plan[-1]), 1).pop()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (folder / "transcripts.txt").stat().st_size > 4e6 and peak < 1.5e6
    assert (first.id, last.id, last.extra["start"]) == ("1_2_000000", "1_2_019999", 19_999)


def test_a_pattern_pairs_by_what_differs_in_the_names_or_is_refused(tmp_path):
    def tar_of(name: str) -> None:
        with tarfile.open(tmp_path / name, "w") as file:
            file.addfile(tarfile.TarInfo("x.wav"))

    for word in ("en", "de"):
        line = json.dumps({"audio_filepath": "x.wav", "text": word})
        (tmp_path / f"manifest_{word}.json").write_text(line + "\n")
        tar_of(f"audio_{word}.tar")
    manifests = [str(tmp_path / f"manifest_{word}.json") for word in ("en", "de")]
    corpus = Nemo(manifests, tars=str(tmp_path / "audio_*.tar"))
    pairs = {manifest: tar.name for manifest, tar in corpus.tars.items()}
    assert pairs == {"manifest_en.json": "audio_en.tar", "manifest_de.json": "audio_de.tar"}
    (tmp_path / "audio_de.tar").rename(tmp_path / "audio_fr.tar")
    for pattern in ("audio_*.tar", "audio_[a-z][a-z].tar", ""):  # the last: the folder
        with pytest.raises(ValueError, match="does not say which belong together"):
            Nemo(manifests, tars=str(tmp_path / pattern))
    listed = [str(tmp_path / f"audio_{word}.tar") for word in ("en", "fr")]  # the user's own order
    assert [tar.name for tar in Nemo(manifests, tars=listed).tars.values()][1] == "audio_fr.tar"
