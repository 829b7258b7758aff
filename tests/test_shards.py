"""Shards: rows come back as they went in, codes stay small, and half a dataset is never read."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speechfuse import artifact
from speechfuse.rows import shards
from speechfuse.rows.rejects import read_rejects, write_rejects

STREAM = {"quantizer": "ab" * 32, "token_rate": 25.0, "codebooks": 1, "codebook_size": 512}
NOTHING = dict.fromkeys(shards.SPEECH.names)


def speech(name: str, codes: list[int] | None, **fields) -> dict:
    return {**NOTHING, "id": name, "codes": codes, **fields}


SPEECH_ROWS = [
    speech(
        "a",
        [0, 511, 65535, 7],
        seconds=1.5,
        text='Gr\u00fc\u00dfe, \u4f60\u597d \U0001f600\u2028 "quoted"\n',
        speaker="s1",
        language="de",
        source={"uri": "x/\u00e9.flac", "offset": 0.25, "seconds": 1.5, "sha256": "00"},
        parent="long",
        part=2,
        extra='{"gender": "f"}',
    ),
    speech("b", None, text="", speaker="", language=""),
    speech("c", [], seconds=0.0, source={"uri": "", "offset": 0.0, "seconds": None, "sha256": ""}),
    speech("", [3]),
]
CONVERSATION_ROWS = [
    {
        "id": "t",
        "turns": [
            {
                "role": "user",
                "segments": [
                    {"text": "Listen: ", "speech": None},
                    {"text": None, "speech": SPEECH_ROWS[0]},
                    {"text": "", "speech": None},
                    {"text": None, "speech": SPEECH_ROWS[1]},
                ],
            },
            {"role": "assistant", "segments": [{"text": "\u4f60\u597d", "speech": None}]},
            {"role": "assistant", "segments": []},
        ],
        "extra": None,
    },
    {"id": "u", "turns": [], "extra": "{}"},
]


def finish(folder: Path, outputs: tuple[str, ...] = ()) -> Path:
    artifact.write_json(folder / "manifest.json", {"outputs": dict.fromkeys(outputs, "sha")})
    return folder


def plain(rows) -> list[dict]:
    """Rows with their top-level codes as lists, so that == compares values."""
    rows = [dict(row) for row in rows]
    for row in rows:
        if isinstance(row.get("codes"), np.ndarray):
            row["codes"] = row["codes"].tolist()
    return rows


@pytest.mark.parametrize(
    ("rows", "schema"),
    [(SPEECH_ROWS, shards.SPEECH), (CONVERSATION_ROWS, shards.CONVERSATIONS)],
    ids=["speech", "conversations"],
)
def test_round_trip(tmp_path, rows, schema):
    shards.write_shard(tmp_path / shards.shard_name(0), iter(rows), schema, STREAM)
    assert plain(shards.read_rows(finish(tmp_path))) == rows
    assert pq.read_schema(tmp_path / "shard-00000.parquet").equals(schema)
    assert shards.read_stream(tmp_path) == STREAM


def test_the_published_schema_stands():
    """Changing this breaks every dataset that was published: add nothing, rename nothing."""
    kinds = {field.name: str(field.type) for field in shards.SPEECH}
    assert {name: kinds[name] for name in ("id", "codes", "seconds", "part", "extra")} == {
        "id": "string",
        "codes": "list<item: uint16>",
        "seconds": "float",
        "part": "int32",
        "extra": "string",
    }
    assert list(kinds) == [
        "id",
        "codes",
        "seconds",
        "text",
        "speaker",
        "language",
        "source",
        "parent",
        "part",
        "extra",
    ]
    assert [field.name for field in shards.SPEECH.field("source").type] == [
        "uri",
        "offset",
        "seconds",
        "sha256",
    ]
    assert shards.CONVERSATIONS.names == ["id", "turns", "extra"]
    turn = shards.CONVERSATIONS.field("turns").type.value_type
    segment = turn.field("segments").type.value_type
    assert [field.name for field in segment] == ["text", "speech"]
    assert pa.schema(list(segment.field("speech").type)) == shards.SPEECH


def test_codes_are_numpy_uint16_or_none_in_and_out(tmp_path):
    rows = [{"id": "a", "codes": np.array([1, 2], np.uint16)}, {"id": "b"}]
    shards.write_shard(tmp_path / shards.shard_name(0), rows, shards.SPEECH, STREAM)
    both = [list(shards.read_rows(finish(tmp_path), columns)) for columns in (None, ["codes"])]
    assert both[1][0].keys() == {"codes"} and len(both[1]) == 2
    for first, second in both:
        assert first["codes"].dtype == np.uint16 and first["codes"].tolist() == [1, 2]
        assert first["codes"].flags.writeable  # or torch.from_numpy complains
        assert second["codes"] is None


@pytest.mark.parametrize("rows", [200, 10_000])
def test_codes_cost_nine_bits_each(tmp_path, rows):
    codes = np.random.default_rng(0).integers(0, 512, (rows, 200_000 // rows), np.uint16)
    path = tmp_path / shards.shard_name(0)
    shards.write_shard(
        path, ({"id": str(i), "codes": row} for i, row in enumerate(codes)), shards.SPEECH, STREAM
    )
    groups = [pq.ParquetFile(path).metadata.row_group(i) for i in range(-(-rows // 8192))]
    assert sum(group.num_rows for group in groups) == rows
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    columns = [column for column in columns if column.path_in_schema.startswith("codes.")]
    assert {column.compression for column in columns} == {"ZSTD"}
    bits = 8 * sum(column.total_compressed_size for column in columns) / codes.size
    assert 9.0 <= bits <= 9.2  # below 9 would mean the codes were not uniform
    read = np.concatenate([row["codes"] for row in shards.read_rows(finish(tmp_path), ["codes"])])
    assert np.array_equal(read, codes.ravel())


def test_rows_come_in_order_over_shards_and_row_groups(tmp_path):
    names = [[f"{shard}-{row}" for row in range(count)] for shard, count in enumerate([9000, 0, 3])]
    for shard in (2, 0, 1):
        rows = ({"id": name} for name in names[shard])
        shards.write_shard(tmp_path / shards.shard_name(shard), rows, shards.SPEECH)
    assert pq.ParquetFile(tmp_path / "shard-00000.parquet").num_row_groups == 2
    (tmp_path / "other.parquet").write_bytes(b"not a shard")
    read = [row["id"] for row in shards.read_rows(finish(tmp_path), ["id"])]
    assert read == [name for part in names for name in part]


def test_a_shard_that_the_manifest_does_not_know_is_no_data(tmp_path):
    work = artifact.Artifact(tmp_path / "set", "test", 1, {}, {})
    work.begin()
    paths = [work.out / shards.shard_name(i) for i in range(2)]
    for path in paths:
        shards.write_shard(path, [{"id": path.name}], shards.SPEECH)
    work.finish({}, paths[:1])
    assert shards.shard_paths(work.out) == paths[:1]


def test_shards_of_two_streams_are_refused(tmp_path):
    other = {**STREAM, "quantizer": "cd" * 32}
    for index, stream in enumerate([STREAM, STREAM, other]):
        shards.write_shard(tmp_path / shards.shard_name(index), [], shards.SPEECH, stream)
    with pytest.raises(ValueError, match=r"shard-00000.*abab.*shard-00002.*cdcd"):
        shards.read_stream(finish(tmp_path))
    shards.write_shard(tmp_path / shards.shard_name(2), [], shards.SPEECH)
    with pytest.raises(ValueError, match=r"shard-00002.*none"):
        shards.read_stream(tmp_path)
    shards.write_shard(tmp_path / shards.shard_name(2), [], shards.SPEECH, STREAM)
    assert shards.read_stream(tmp_path) == STREAM


def test_a_dataset_without_codes_has_no_stream(tmp_path):
    shards.write_shard(tmp_path / shards.shard_name(0), [{"id": "a"}], shards.CONVERSATIONS)
    assert shards.read_stream(finish(tmp_path)) == {}


def test_a_stream_is_described_in_full(tmp_path):
    partial = {key: STREAM[key] for key in ("quantizer", "token_rate", "codebooks")}
    with pytest.raises(ValueError, match="codebook_size"):
        shards.write_shard(tmp_path / shards.shard_name(0), [], shards.SPEECH, partial)


def test_an_incomplete_folder_is_refused(tmp_path):
    for index in range(2):
        shards.write_shard(tmp_path / shards.shard_name(index), [], shards.SPEECH, STREAM)
    for read in (shards.shard_paths, shards.read_stream, lambda path: list(shards.read_rows(path))):
        with pytest.raises(ValueError, match=r"manifest\.json"):
            read(tmp_path)
    finish(tmp_path, ("shard-00000.parquet", "shard-00001.parquet"))
    assert [path.name for path in shards.shard_paths(tmp_path)] == [
        "shard-00000.parquet",
        "shard-00001.parquet",
    ]
    (tmp_path / "shard-00001.parquet").unlink()  # as after half a download
    with pytest.raises(ValueError, match=r"shard-00001\.parquet"):
        shards.shard_paths(tmp_path)


def test_a_folder_without_shards_or_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no shard-"):
        shards.shard_paths(finish(tmp_path))
    shards.write_shard(tmp_path / shards.shard_name(0), [], shards.SPEECH)
    with pytest.raises(ValueError, match="no column 'code'"):
        list(shards.read_rows(tmp_path, ["id", "code"]))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"id": "q", "code": [1]}, r"row 'q'.*'code'; did you mean 'codes'"),
        ({"id": "q", "source": {"url": "x"}}, r"row 'q'.*'url'; did you mean 'uri'"),
        ({"id": "q", "codes": [70000]}, "row 'q'.*65535"),
        ({"id": "q", "codes": [-1]}, "row 'q'.*65535"),
        ({"id": "q", "codes": [1.5]}, "row 'q'.*65535"),
        ({"id": "q", "codes": [1, None]}, "row 'q'.*65535"),
        ({"id": "q", "extra": {"a": 1}}, "row 'q'"),
    ],
)
def test_a_row_that_would_be_altered_is_refused_by_name(tmp_path, row, words):
    path = tmp_path / shards.shard_name(0)
    with pytest.raises(ValueError, match=words):
        shards.write_shard(path, [{"id": "good"}, row], shards.SPEECH, STREAM)
    segment = {"id": "q", "turns": [{"role": "user", "segments": [{"speech": row}]}]}
    with pytest.raises(ValueError, match="row 'q'"):
        shards.write_shard(path, [segment], shards.CONVERSATIONS, STREAM)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_among_the_rows_leaves_no_file(tmp_path):
    def rows():
        for index in range(9000):  # past the first row group, so that bytes were written
            yield {"id": str(index), "codes": [1]}
        raise RuntimeError("the corpus ended in the middle")

    with pytest.raises(RuntimeError):
        shards.write_shard(tmp_path / shards.shard_name(0), rows(), shards.SPEECH, STREAM)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_among_the_rows_leaves_no_shard(tmp_path):
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from speechfuse.rows import shards
        def rows():
            for index in range(9000):
                yield {"id": str(index), "codes": [1]}
            os.kill(os.getpid(), signal.SIGKILL)
        shards.write_shard(Path(sys.argv[1]), rows(), shards.SPEECH)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(artifact.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(tmp_path / shards.shard_name(0))]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 1, "the kill should have come while the temporary file was open"
    with pytest.raises(ValueError, match="no shard-"):
        shards.shard_paths(finish(tmp_path))  # and what is left does not pass for a shard


def test_rejects_stand_beside_their_shard(tmp_path):
    path = tmp_path / shards.shard_name(7)
    rejects = [{"id": "a\u2028b", "reason": "not audio:\nx"}, {"id": "\u00fc", "reason": ""}]
    write_rejects(path, rejects)
    assert [file.name for file in tmp_path.iterdir()] == ["shard-00007.rejects.jsonl"]
    assert read_rejects(path) == rejects
    write_rejects(path, [])
    assert read_rejects(path) == []
