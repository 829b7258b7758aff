"""A folder of audio: ids, transcripts and what is left out (tests/test_bad_audio.py has the bad
files)."""

import json
import os
from pathlib import Path

import pytest

from speechfuse.audio import decoding
from speechfuse.corpora.clip import Clip
from speechfuse.corpora.disturbed import Disturbed
from speechfuse.corpora.folder import Folder
from speechfuse.rows.rejects import Reject
from tests.bad_audio import encoded, sound

WAV = encoded(sound(0.1))


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def items(corpus: Folder, shard_size: int = 100) -> dict[str, Clip | Reject]:
    plan = json.loads(json.dumps(corpus.plan(shard_size)))
    found = [item for shard in plan for item in corpus.clips(shard)]
    assert len({item.id for item in found}) == len(found) == sum(s["count"] for s in plan)
    return {item.id: item for item in found}


def texts(corpus: Folder) -> dict[str, str | None]:
    return {
        id: item.text if isinstance(item, Clip) else item.reason
        for id, item in items(corpus).items()
    }


def test_transcripts_lie_beside_as_a_file_or_a_line_of_the_chapter(tmp_path):
    write(
        tmp_path,
        {
            "a/x.flac": WAV,
            "a/x.txt": "  what is said\n",
            "a/y.wav": WAV,
            "a/y.txt": b"\xef\xbb\xbfy",
            "84/121/84-121-0000.flac": WAV,
            "84/121/84-121-0001.flac": WAV,
            "84/121/84-121-2.wav": WAV,
            "84/121/84-121.trans.txt": "84-121-0000 GO \u2028DO YOU HEAR\n"
            "84-121-0001   BUT IN LESS\n",
            "84/121/84-121-0001.txt": "a file of its own goes first",
            "tts/8_1.wav": WAV,
            "tts/8_1.normalized.txt": "Normalized.",
            "tts/8_1.original.txt": "Original.",
            "none/z.wav": WAV,
            "none/empty.wav": WAV,
            "none/empty.txt": " \n",
            "none/x.trans.txt": "",
        },
    )
    corpus = Folder(str(tmp_path))
    assert texts(corpus) == {
        "a/x": "what is said",
        "a/y": "y",
        "84/121/84-121-0000": "GO \u2028DO YOU HEAR",
        "84/121/84-121-0001": "a file of its own goes first",
        "84/121/84-121-2": None,
        "tts/8_1": "Normalized.",
        "none/z": None,
        "none/empty": None,
    }
    assert corpus.ignored == {".txt": 1}  # LibriTTS's second text


def test_one_rule_of_letter_case_and_of_accents_for_audio_and_transcripts(tmp_path):
    write(
        tmp_path,
        {
            "DR1/SX0.WAV": WAV,
            "DR1/SX0.TXT": "upper",
            "DR1/SX1.wav": WAV,
            "DR1/SX1.Txt": "mixed",
            "DR1/sx2.wav": WAV,
            "DR1/SX2.TXT": "of sx2, as there is no SX2",
            "DR1/a.wav": WAV,
            "DR1/A.WAV": WAV,
            "DR1/A.TXT": "of A, not of a",
            "DR1/b.wav": WAV,
            "DR1/B.wav": WAV,
            "two/ab.wav": WAV,
            "two/Ab.txt": "which of the two?",
            "two/AB.txt": "which of the two?",
            "84/x-1.wav": WAV,
            "84/X.trans.txt": "x-1 of chapter x",
            "both/x.wav": WAV,
            "both/x.TXT": "second",
            "both/x.txt": "first",
            "tts/8_1.FLAC": WAV,
            "tts/8_1.Normalized.TXT": "normalized",
            "84/84-1.WAV": WAV,
            "84/84.TRANS.TXT": "84-1\tof the chapter",
            "fr/caf\u00e9.wav": WAV,
            "fr/cafe\u0301.txt": "accents apart",
            "fr/e\u0301-1.wav": WAV,
            "fr/\u00e9.trans.txt": "\u00e9-1 composed",
        },
    )
    corpus = Folder(str(tmp_path))
    assert texts(corpus) == {
        "DR1/SX0": "upper",
        "DR1/SX1": "mixed",
        "DR1/sx2": "of sx2, as there is no SX2",
        "DR1/a": None,
        "DR1/A": "of A, not of a",
        "DR1/b": None,
        "DR1/B": None,
        "two/ab": None,
        "84/x-1": "of chapter x",
        "both/x": "first",
        "tts/8_1": "normalized",
        "84/84-1": "of the chapter",
        "fr/caf\u00e9": "accents apart",
        "fr/e\u0301-1": "composed",
    }
    assert corpus.ignored == {".txt": 3}  # Ab.txt, AB.txt and x.TXT


def test_an_empty_transcript_hides_no_other(tmp_path):
    write(
        tmp_path,
        {
            "v-1.wav": WAV,
            "v-1.txt": " \n",
            "v-1.normalized.txt": "normalized",
            "w-1.wav": WAV,
            "w-1.txt": "",
            "w.trans.txt": "w-1 of the chapter",
        },
    )
    assert texts(Folder(str(tmp_path))) == {"v-1": "normalized", "w-1": "of the chapter"}


def test_a_piece_of_a_clip_takes_no_id_of_another(tmp_path):
    write(tmp_path, {"take.wav": WAV, "take#1.wav": WAV, "take#1.txt": "said", "other#1.wav": WAV})
    (shard,) = Folder(str(tmp_path)).plan(10)
    assert shard["reserved"] == {str(shard["files"].index("take.wav")): ["1"]}
    assert texts(Folder(str(tmp_path)))["take#1"] == "said"


def test_required_transcripts_that_are_missing_reject_their_clip_alone(tmp_path):
    write(tmp_path, {"a.wav": WAV, "a.txt": "said", "b.wav": WAV, "c.wav": WAV, "c.txt": ""})
    none = "no transcript: no .txt sidecar and no line in a .trans.txt"
    assert texts(Folder(str(tmp_path), require_text=True)) == {"a": "said", "b": none, "c": none}
    assert texts(Folder(str(tmp_path))) == {"a": "said", "b": None, "c": None}


def test_transcripts_that_cannot_be_read_are_named(tmp_path):
    write(
        tmp_path,
        {
            "a-1.wav": WAV,
            "a-2.wav": WAV,
            "a.trans.txt": b"a-1 caf\xe9",
            "b.wav": WAV,
            "c.wav": WAV,
            "b.txt": b"caf\xe9",
            "d.wav": WAV,
            "d.txt": "said".encode("utf-16-le"),
            "e-1.wav": WAV,
            "e.trans.txt": "e-1 one\ne-1 two\ne-1 one",
        },
    )
    os.mkfifo(tmp_path / "c.txt")  # which nobody ever writes to
    assert texts(Folder(str(tmp_path))) == {
        "a-1": "bad transcript: a.trans.txt is not UTF-8 text",
        "a-2": "bad transcript: a.trans.txt is not UTF-8 text",
        "b": "bad transcript: b.txt is not UTF-8 text",
        "c": None,
        "d": "bad transcript: d.txt holds U+0000: it is not UTF-8 text",
        "e-1": "bad transcript: e.trans.txt has 2 lines for it",
    }


def test_the_first_of_files_with_one_id_is_used(tmp_path):
    write(tmp_path, {"x.wav": WAV, "x.WAV": WAV, "x.flac": WAV, "x-y.wav": WAV, "d/x.wav": WAV})
    found = items(Folder(str(tmp_path)), shard_size=2)
    assert {id for id, item in found.items() if isinstance(item, Clip)} == {"x", "x-y", "d/x"}
    assert found["x"].uri == "x.WAV"
    for name in ("x.flac", "x.wav"):
        assert found[name].reason == "duplicate id: x.WAV has the same without suffix"


@pytest.mark.parametrize("other", ["folder", "link"])
def test_what_is_no_file_takes_no_id_from_a_file(tmp_path, other):
    write(tmp_path, {"x.wav": WAV})
    if other == "folder":
        (tmp_path / "x.flac").mkdir()
    else:
        (tmp_path / "x.flac").symlink_to("nowhere")
    plan = Folder(str(tmp_path)).plan(100)
    assert [shard["files"] for shard in plan] == [["x.wav"]]
    (reject,) = plan[0]["rejects"]
    assert reject[1].startswith("not a file: " if other == "folder" else "not found: ")


def test_a_folder_named_like_audio_is_looked_into(tmp_path):
    write(tmp_path, {"x.wav/a.wav": WAV, ".git/b.wav": WAV, ".c.wav": WAV, "d.WAV.bak": WAV})
    corpus = Folder(str(tmp_path))
    assert {id: type(item) for id, item in items(corpus).items()} == {"x": Reject, "x.wav/a": Clip}
    assert corpus.ignored == {"hidden folder": 1, "hidden file": 1, ".bak": 1}


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path):
    elsewhere = write(tmp_path / "elsewhere", {"a.wav": WAV, "b/c.wav": WAV})
    root = write(tmp_path / "root", {"own.wav": WAV})
    (root / "linked.wav").symlink_to(elsewhere / "a.wav")
    (root / "b").symlink_to(elsewhere / "b", target_is_directory=True)
    (root / "round").symlink_to(root, target_is_directory=True)
    corpus = Folder(str(root))
    found = items(corpus)
    assert found.keys() == {"own", "linked"} and corpus.ignored == {"link to a folder": 2}
    assert len(decoding.decode(found["linked"].audio).waveform) == 1600


def test_a_folder_that_may_not_be_read_is_a_reject(tmp_path, monkeypatch):
    write(tmp_path, {"open/a.wav": WAV, "closed/b.wav": WAV})
    for path in (tmp_path, tmp_path / "open"):
        path.chmod(0o755)
    (tmp_path / "closed").chmod(0)
    monkeypatch.chdir(tmp_path)  # the folders above are closed to others
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        found = texts(Folder("."))
    finally:
        if root:
            os.seteuid(0)
        (tmp_path / "closed").chmod(0o700)
    assert found == {"open/a": None, "closed": "unreadable: Permission denied"}


def test_the_plan_does_not_depend_on_the_order_on_disk(tmp_path, monkeypatch):
    names = [f"{i % 3}/{i:02d}.wav" for i in range(17)]
    corpora = [
        Folder(str(write(tmp_path / name, dict.fromkeys(order, WAV))))
        for name, order in (("one", names), ("two", names[::-1]))
    ]
    walk = os.walk
    plans = [corpus.plan(5) for corpus in corpora]
    turned = lambda *a, **k: ((x, y[::-1], z[::-1]) for x, y, z in walk(*a, **k))  # noqa: E731
    monkeypatch.setattr(os, "walk", turned)
    assert plans[0] == plans[1] == corpora[0].plan(5)
    assert [shard["count"] for shard in plans[0]] == [5, 5, 5, 2]
    assert corpora[0].fingerprint == corpora[1].fingerprint


def test_a_shard_is_the_same_clips_whenever_and_by_whomever_it_is_made(tmp_path):
    write(tmp_path, {"a.wav": WAV, "a.txt": "said", "b.wav": WAV, "c.wav": WAV, "c.mp3": WAV})
    first = Folder(str(tmp_path), language="en")
    shard = first.plan(10)[0]
    once, again = list(first.clips(shard)), list(Folder(str(tmp_path), language="en").clips(shard))
    assert once == again and [item.id for item in once] == ["c.wav", "a", "b", "c"]
    assert {item.language for item in once if isinstance(item, Clip)} == {"en"}


def test_a_file_that_is_gone_is_not_found_and_one_that_changed_changes_the_fingerprint(tmp_path):
    write(tmp_path, {"a.wav": WAV, "b.wav": WAV})
    corpus = Folder(str(tmp_path))
    (shard,) = corpus.plan(10)
    (tmp_path / "b.wav").unlink()
    (tmp_path / "a.wav").write_bytes(encoded(sound(0.2)))
    a, b = corpus.clips(shard)
    assert len(decoding.decode(a.audio).waveform) == 3200
    with pytest.raises(ValueError, match=r"^not found: "):
        decoding.decode(b.audio)
    before = Folder(str(tmp_path)).fingerprint
    write(tmp_path, {"a.wav": WAV})
    assert Folder(str(tmp_path)).fingerprint != before


def test_disturbed_copies_are_others_and_always_the_same(tmp_path):
    write(tmp_path, {"a.wav": WAV, "b.wav": WAV, "b.txt": "said", "bad.wav": "no audio"})
    of = {"_component_": "speechfuse.corpora.folder", "path": str(tmp_path)}
    steps = [
        {"_component_": "speechfuse.audio.Silence", "seconds": [0.1, 0.2]},
        {"_component_": "speechfuse.audio.Noise", "snr": [10, 20]},
    ]
    corpus = Disturbed(of, steps, copies=3)
    found = items(corpus)
    assert sorted(found) == [f"{name}-{copy}" for name in ("a", "b", "bad") for copy in range(3)]
    assert all(isinstance(found[f"bad-{copy}"], Reject) for copy in range(3))
    waveforms = [found[f"b-{copy}"].audio for copy in range(3)]
    for waveform, clip in zip(waveforms, [found[f"b-{copy}"] for copy in range(3)], strict=True):
        silence, noise = clip.extra["augmentation"]
        added = sum(round(each * decoding.SAMPLE_RATE) for each in silence["seconds"])
        assert len(waveform) == len(decoding.load(tmp_path / "b.wav")) + added
        assert clip.text == "said" and 10 <= noise["snr"] <= 20
    assert len({waveform.tobytes() for waveform in waveforms}) == 3
    again = items(Disturbed(of, steps, copies=3), shard_size=1)  # whatever the shards
    assert all((again[f"b-{copy}"].audio == waveforms[copy]).all() for copy in range(3))
    other = items(Disturbed(of, steps, copies=3, seed=1))
    assert len(other["b-0"].audio) != len(waveforms[0])


def test_disturbed_copies_of_ids_that_come_twice_are_refused_as_those_are(tmp_path):
    write(tmp_path, {"x.wav": WAV, "y.wav": WAV})
    names = ["x.wav", "x.wav", "y.wav"]
    lines = "".join(json.dumps({"audio_filepath": name, "text": "t"}) + "\n" for name in names)
    (tmp_path / "m.jsonl").write_text(lines)
    of = {"_component_": "speechfuse.corpora.nemo", "manifest": str(tmp_path / "m.jsonl")}
    corpus = Disturbed(of, [{"_component_": "speechfuse.audio.Gain", "db": [-3, 0]}], copies=2)
    (shard,) = corpus.plan(10)
    assert (shard["count"], shard["again"]) == (6, [1, 4])
    kinds = [type(item).__name__ for item in corpus.clips(shard)]
    assert kinds == ["Clip", "Reject", "Clip"] * 2
