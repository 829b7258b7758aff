"""Parquet tables of audio, as pyarrow and `datasets` write them, on the disk and as on the Hub."""

import io
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from speechfuse.audio import decoding
from speechfuse.corpora.clip import Clip
from speechfuse.corpora.parquet import Parquet
from speechfuse.rows.rejects import Reject
from tests.corpus_clips import everything, same

RATE = 16_000


def noise(seed: int, count: int = 1600) -> np.ndarray:
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, count)
    return np.round(samples * 32768).astype(np.int16)


def encoded(samples: np.ndarray, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=kind)
    return file.getvalue()


def rows(count: int, first: int = 0) -> list[dict]:
    return [
        {
            "audio": {"bytes": encoded(noise(i)), "path": f"{i}.wav"},
            "transcript": f"text {i}",
            "id": f"utt-{i}",
            "speaker_id": i % 3,
            "other": {"n": i},
        }
        for i in range(first, first + count)
    ]


def table(path: Path, content: list[dict], **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = how.pop("schema", None)
    pq.write_table(pa.Table.from_pylist(content, schema), path, **how)
    return path


def test_columns_named_in_the_configuration_make_clips(tmp_path):
    table(tmp_path / "train-00000.parquet", rows(3))
    table(tmp_path / "train-00001.parquet", rows(2, 3))
    table(tmp_path / "test-00000.parquet", rows(1, 9))
    corpus = Parquet(
        str(tmp_path / "train-{00000..00001}.parquet"),
        text_column="transcript",
        id_column="id",
        speaker_column="speaker_id",
        extra_columns=["other"],
        language="en",
    )
    clips = everything(corpus)
    assert len(clips) == 5
    for i, clip in enumerate(clips):
        uri = f"train-0000{i // 3}.parquet#{i % 3}"
        assert clip == Clip(
            f"utt-{i}",
            encoded(noise(i)),
            uri,
            text=f"text {i}",
            speaker=str(i % 3),
            language="en",
            extra={"other": {"n": i}},
        )
        assert same(clip, noise(i))
    bare = everything(Parquet(str(tmp_path / "train-*.parquet")))
    assert [clip.id for clip in bare[1:4]] == ["train-00000/1", "train-00000/2", "train-00001/0"]
    assert {clip.text for clip in bare} == {clip.speaker for clip in bare} == {None}
    assert len(everything(Parquet(str(tmp_path)))) == 6


def test_what_datasets_writes_for_its_audio_feature_is_read(tmp_path):
    made = datasets.Dataset.from_list(rows(30)).cast_column("audio", datasets.Audio(decode=False))
    assert isinstance(made.features["audio"], datasets.Audio)
    made.to_parquet(tmp_path / "a.parquet", batch_size=7)
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups > 2
    clips = everything(Parquet(str(tmp_path), text_column="transcript", id_column="id"), 10)
    assert [clip.id for clip in clips] == [f"utt-{i}" for i in range(30)]
    assert all(same(clip, noise(i)) for i, clip in enumerate(clips))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_audio_may_be_bytes_or_a_path_below_the_folder(tmp_path, kind):
    schema = pa.schema({"sound": kind})
    table(tmp_path / "bytes.parquet", [{"sound": encoded(noise(1), "FLAC")}], schema=schema)
    (clip,) = everything(Parquet(str(tmp_path / "bytes.parquet"), audio_column="sound"))
    assert same(clip, noise(1))

    soundfile.write(tmp_path / "in.wav", noise(2), RATE)
    absolute = str(tmp_path / "in.wav")
    paths = ["in.wav", "x/../in.wav", "../out.wav", "/etc/passwd", absolute, "no.wav"]
    table(tmp_path / "paths.parquet", [{"sound": path} for path in paths])
    nested = [{"sound": {"bytes": None, "path": path}} for path in paths]
    table(tmp_path / "nested.parquet", nested)
    for name in ("paths", "nested"):
        items = everything(Parquet(str(tmp_path / f"{name}.parquet"), audio_column="sound"))
        assert [type(item) for item in items] == [Clip, Clip, Reject, Reject, Clip, Clip]
        assert all(same(items[i], noise(2)) and items[i].uri == "in.wav" for i in (0, 1, 4))
        assert all(items[i].reason.startswith("unsafe path: ") for i in (2, 3))
        with pytest.raises(ValueError, match=r"^not found: "):
            decoding.decode(items[5].audio)
    (tmp_path / "deep").mkdir()
    (tmp_path / "in.wav").rename(tmp_path / "deep/in.wav")
    moved = Parquet(
        str(tmp_path / "paths.parquet"), audio_column="sound", audio_dir=str(tmp_path / "deep")
    )
    assert same(everything(moved)[0], noise(2))


@pytest.mark.parametrize(
    ("groups", "shard_size", "counts"),
    [
        ([4, 4, 4, 1], 8, [8, 5]),
        ([4, 4, 4, 1], 9, [8, 5]),
        ([4, 4, 4, 1], 3, [3, 1, 3, 1, 3, 2]),
        ([10, 3], 4, [4, 4, 2, 3]),
        ([10, 1], 4, [4, 4, 3]),
        ([13], 100, [13]),
        ([1] * 13, 5, [5, 5, 3]),
    ],
)
def test_shards_follow_row_groups_and_any_cut_gives_the_same(tmp_path, groups, shard_size, counts):
    assert sum(groups) in (11, 13)
    content = pa.Table.from_pylist(rows(sum(groups)))
    with pq.ParquetWriter(tmp_path / "a.parquet", content.schema) as writer:
        start = 0
        for size in groups:
            writer.write_table(content.slice(start, size))
            start += size
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == len(groups)
    table(tmp_path / "b.parquet", rows(2, 20))
    corpus = Parquet(str(tmp_path), id_column="id")
    plan = corpus.plan(shard_size)
    assert [shard["count"] for shard in plan] == [*counts, 2]
    assert all(shard.keys() == {"file", "row", "count"} for shard in plan)
    whole = everything(Parquet(str(tmp_path), id_column="id"), 1000)
    assert [clip.id for clip in whole[:3]] == ["utt-0", "utt-1", "utt-2"]
    parts = [list(Parquet(str(tmp_path), id_column="id").clips(s)) for s in reversed(plan)]
    assert [clip for part in reversed(parts) for clip in part] == whole


def test_only_the_columns_that_are_used_are_read(tmp_path, monkeypatch):
    table(tmp_path / "a.parquet", rows(3))
    asked = []
    read = pq.ParquetFile.iter_batches

    def spy(self, batch_size=65_536, row_groups=None, columns=None, **how):
        asked.append(columns)
        return read(self, batch_size, row_groups, columns, **how)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    everything(Parquet(str(tmp_path), text_column="transcript", id_column="id"))
    assert asked == [["id"], ["audio", "transcript", "id"]]


WRONG_COLUMNS = [
    ({"text_column": "txt"}, r"a\.parquet: no column 'txt' \(text_column\); it has audio, transc"),
    ({"audio_column": "wav"}, r"no column 'wav' \(audio_column\)"),
    ({"id_column": "key"}, r"no column 'key' \(id_column\)"),
    ({"speaker_column": "who"}, r"no column 'who' \(speaker_column\)"),
    ({"extra_columns": ["id", "more"]}, r"no column 'more' \(extra_column"),
    ({"audio_column": "speaker_id"}, r"audio_column 'speaker_id' holds int64; it is to be"),
    ({"audio_column": "other"}, r"audio_column 'other' holds struct"),
    ({"text_column": "speaker_id"}, r"text_column 'speaker_id' holds int64, not strings"),
]


@pytest.mark.parametrize(("columns", "said"), WRONG_COLUMNS)
def test_a_wrong_column_is_one_sentence(tmp_path, columns, said):
    table(tmp_path / "a.parquet", rows(1))
    with pytest.raises(ValueError, match=said) as error:
        Parquet(str(tmp_path), **columns).plan(10)
    assert "\n" not in str(error.value)


def test_odd_rows_are_rejected_and_their_neighbours_stay(tmp_path):
    schema = pa.schema(
        {
            "audio": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "text": pa.string(),
            "id": pa.string(),
        }
    )
    good = {"bytes": encoded(noise(0)), "path": None}
    content = [
        {"audio": good, "text": " ", "id": "a"},
        {"audio": None, "text": "x", "id": "b"},
        {"audio": {"bytes": None, "path": None}, "text": "x", "id": "c"},
        {"audio": good, "text": "x", "id": None},
        {"audio": good, "text": "x", "id": "a"},
        {"audio": good, "text": "not", "id": "d"},
        {"audio": good, "text": None, "id": "e"},
        {"audio": good, "text": None, "id": "not"},
    ]
    whole = pa.Table.from_pylist(content, schema)
    texts = [t.encode() if t != "not" else b"\xff\xfe" for t in ("", "x", "x", "x", "x", "not")]
    for i, name, values in (
        (1, "text", [*texts, None, None]),
        (
            2,
            "id",
            [
                *(row["id"].encode() if row["id"] else None for row in content[:-1]),
                b"\xff",
            ],
        ),
    ):
        wrong = pa.array(values, pa.binary()).view(pa.string())
        whole = whole.set_column(i, name, wrong)
    pq.write_table(whole, tmp_path / "t.parquet")
    table(tmp_path / "u.parquet", [{"audio": good, "text": "", "id": "e"}], schema=schema)
    for shard_size in (1, 3, 100):
        corpus = Parquet(str(tmp_path), text_column="text", id_column="id")
        items = everything(corpus, shard_size)
        assert [item.id for item in items] == [
            "a",
            "b",
            "c",
            "t/3",
            "a",
            "t/5",
            "e",
            "t/7",
            "e",
        ]
        assert items[0].text is None and items[6].text is None and same(items[6], noise(0))
        reasons = [i.reason.partition(": ")[0] if isinstance(i, Reject) else "" for i in items]
        assert reasons == [
            "",
            "not found",
            "not found",
            "bad name",
            "duplicate id",
            "unreadable",
            "",
            "unreadable",
            "duplicate id",
        ]


def test_a_file_that_is_broken_is_counted_and_a_missing_one_refused(tmp_path):
    table(tmp_path / "a.parquet", rows(3))
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[:-50])
    (tmp_path / "c.parquet").write_text("<html></html>")
    (tmp_path / "d.parquet").write_bytes(b"")
    table(tmp_path / "e.parquet", rows(2, 3))
    table(tmp_path / "none.parquet", [], schema=pa.Table.from_pylist(rows(1)).schema)
    for id_column in (None, "id"):
        items = everything(Parquet(str(tmp_path), id_column=id_column))
        assert [isinstance(item, Clip) for item in items] == [True] * 3 + [False] * 3 + [True] * 2
        assert [item.id for item in items[3:6]] == ["b", "c", "d"]
        assert all(item.reason.startswith("unreadable: ") for item in items[3:6])
    assert Parquet(str(tmp_path / "none.parquet")).plan(10) == []
    with pytest.raises(FileNotFoundError, match=r"no file at .*absent\.parquet"):
        Parquet(str(tmp_path / "absent.parquet"))


def test_damage_inside_a_file_costs_no_more_than_its_row_group(tmp_path):
    path = table(tmp_path / "a.parquet", rows(40), row_group_size=20, compression="none")
    whole = everything(Parquet(str(path), id_column="id"))
    chunk = pq.read_metadata(path).row_group(1).column(0)
    assert chunk.path_in_schema == "audio.bytes"
    damaged = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    damaged[start : start + 30] = b"\xff" * 30
    path.write_bytes(damaged)
    for shard_size in (7, 100):
        items = everything(Parquet(str(path), id_column="id"), shard_size)
        assert items[:20] == whole[:20] and len(items) == 40
        assert all(item.reason.startswith("unreadable: ") for item in items[20:])


def test_a_fault_of_the_network_is_raised_and_never_a_reject(tmp_path, monkeypatch):
    table(tmp_path / "a.parquet", rows(40), row_group_size=20)
    corpus = Parquet(str(tmp_path))
    (shard,) = corpus.plan(100)
    read, left = io.BufferedReader.read, [0]

    class Reset(io.BufferedReader):
        """A file whose connection is lost after some reads."""

        def read(self, size: int | None = -1, /) -> bytes:
            left[0] -= 1
            if left[0] < 0:
                raise ConnectionResetError(104, "reset by peer")
            return read(self, size)

    def opened(path: str, mode: str, **how) -> Reset:
        return Reset(io.FileIO(path))

    monkeypatch.setattr(corpus.filesystem, "open", opened)
    for allowed in range(12):
        left[0] = allowed
        try:
            items = list(corpus.clips(shard))
        except ConnectionResetError:
            continue
        assert all(isinstance(item, Clip) for item in items)
        break
    assert allowed > 2, "it is lost while the rows are read, too"


def test_memory_does_not_grow_with_the_table(tmp_path):
    content = [{"audio": bytes(100_000), "id": str(i)} for i in range(100)]
    table(tmp_path / "a.parquet", content * 2, row_group_size=20, compression="none")

    def peak(count: int) -> int:
        corpus = Parquet(str(tmp_path), id_column="id")
        plan = corpus.plan(20)
        pool, tracked = pa.default_memory_pool(), []
        before = pool.bytes_allocated()
        tracemalloc.start()
        for shard in plan[:count]:
            for _ in corpus.clips(shard):
                tracked.append(pool.bytes_allocated() - before)
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return max(tracked) + traced

    peak(1)
    one, ten = peak(1), peak(10)
    assert ten < 1.1 * one + 100_000 and ten < 8e6, "the table is 20 MB, a row group 2 MB"


def test_the_fingerprint_is_names_and_sizes(tmp_path):
    table(tmp_path / "a.parquet", rows(2))
    first = Parquet(str(tmp_path)).fingerprint
    assert Parquet(str(tmp_path)).fingerprint == first
    table(tmp_path / "b.parquet", rows(2))
    assert Parquet(str(tmp_path)).fingerprint != first


def test_every_arrow_type_of_text_and_bytes_is_read(tmp_path):
    texts = ["a b", "c d"]
    audio = [decoding.encode(noise(i), "WAV") for i in range(2)]
    strings = [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ]
    kinds = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(len(audio[0]))]
    for i, (text, kind) in enumerate((t, k) for t in strings for k in kinds):
        path = tmp_path / f"{i}.parquet"
        plain = pa.array(texts, pa.string())
        text_array = (
            plain.dictionary_encode().cast(text) if "dict" in str(text) else plain.cast(text)
        )
        struct = pa.StructArray.from_arrays([pa.array(audio, kind)], ["bytes"])
        for audio_array in (struct, pa.array(audio, kind)):
            columns = {"audio": audio_array, "text": text_array, "id": text_array}
            pq.write_table(pa.table(columns), path)
            items = everything(Parquet(str(path), text_column="text", id_column="id"))
            assert [(c.id, c.text) for c in items] == [("a b", "a b"), ("c d", "c d")], (text, kind)
            assert all(same(item, noise(n)) for n, item in enumerate(items))


def test_names_as_bytes_are_text_and_what_python_cannot_hold_is_a_reject(tmp_path):
    content = {"audio": [b"x", b"y"], "id": [b"one", b"\xff"], "when": [0, 1 << 50]}
    whole = pa.table(content).set_column(2, "when", pa.array(content["when"], pa.timestamp("s")))
    pq.write_table(whole, tmp_path / "a.parquet")
    corpus = Parquet(str(tmp_path / "a.parquet"), id_column="id")
    first, second = everything(corpus)
    assert first.id == "one" and isinstance(second, Reject)
    first, second = everything(Parquet(str(tmp_path / "a.parquet"), extra_columns=["when"]))
    assert first.extra == {"when": "1970-01-01 00:00:00"}
    assert isinstance(second, Reject) and second.reason.startswith("unreadable: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_no_json_is_a_reject(tmp_path, value):
    content = [{**row, "number": number} for row, number in zip(rows(2), (1.5, value), strict=True)]
    path = str(table(tmp_path / "a.parquet", content))
    nested = {"of": pa.array([[1.5], [value]])}
    pq.write_table(pq.read_table(path).append_column("list", nested["of"]), path)
    for columns in (
        {"extra_columns": ["number"]},
        {"extra_columns": ["list"]},
        {"speaker_column": "number"},
        {"id_column": "number"},
    ):
        first, second = everything(Parquet(path, **columns))
        assert isinstance(first, Clip) and isinstance(second, Reject)
        assert "has NaN or infinity, no JSON" in second.reason


def test_an_id_of_nothing_is_a_reject(tmp_path):
    content = [{**row, "id": id} for row, id in zip(rows(3), ["a", "", " "], strict=True)]
    path = str(table(tmp_path / "t.parquet", content))
    first, *others = everything(Parquet(path, id_column="id"))
    assert first.id == "a" and [other.id for other in others] == ["t/1", "t/2"]
    assert [o.reason for o in others] == ["bad name: its id is ''", "bad name: its id is ' '"]


def test_a_column_of_text_may_be_null_in_all_rows_of_a_file(tmp_path):
    table(tmp_path / "a.parquet", rows(1))
    table(tmp_path / "b.parquet", [{**rows(1)[0], "transcript": None}])
    clips = everything(Parquet(str(tmp_path), text_column="transcript"))
    assert [clip.text for clip in clips] == ["text 0", None]


def test_bytes_that_are_empty_give_way_to_a_path(tmp_path):
    soundfile.write(tmp_path / "in.wav", noise(2), RATE)
    kinds = [{"bytes": b"", "path": "in.wav"}, {"bytes": b"", "path": None}]
    table(tmp_path / "a.parquet", [{"audio": audio} for audio in kinds])
    first, second = everything(Parquet(str(tmp_path / "a.parquet")))
    assert same(first, noise(2)) and first.uri == "in.wav" and second.audio == b""
