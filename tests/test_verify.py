"""just verify: a dataset as the job leaves it passes; each thing that can be wrong is one sentence.

Changes are made as somebody would who also writes the new sha256 into the manifest, so that every
check has to find its own fault.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from speechfuse import artifact, config
from speechfuse.quantizer import recordings
from speechfuse.rows import making, shards
from stages import tokenize_speech, verify

ROOT = Path(__file__).parent.parent
NAMES = [f"shard-0000{i}" for i in range(3)]
FIRST, SECOND, THIRD = (f"{name}.parquet" for name in NAMES)


def inline(function: Callable, tasks: list[tuple], workers: int, device: str) -> Iterator[Any]:
    """An engine that needs no process."""
    return (function(*task) for task in tasks)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A dataset made by the job: 3 shards of 3, 3 and 1 clips; "long" is split into 3 rows."""
    folder = tmp_path_factory.mktemp("verify")
    audio, rng = folder / "audio", np.random.default_rng(0)
    audio.mkdir()

    def sound(seconds: float, channels: int = 1) -> np.ndarray:
        swell = 0.3 * np.sin(np.arange(int(seconds * 16_000)) / 2000)[:, None]
        return swell * rng.standard_normal((len(swell), channels))

    soundfile.write(audio / "a.wav", sound(1.0), 16_000)
    (audio / "a.txt").write_text("a word")
    soundfile.write(audio / "b.wav", sound(0.7, channels=2), 8_000)
    (audio / "c.wav").write_text("no audio")
    soundfile.write(audio / "long.wav", sound(12.0), 16_000)
    soundfile.write(audio / "n.wav", sound(0.5), 16_000)
    soundfile.write(audio / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(audio / "z.wav", sound(0.9), 16_000)
    job = tokenize_speech.TokenizeSpeech(
        out=str(folder / "data"),
        corpus={"_component_": "speechfuse.corpora.folder", "path": str(audio)},
        quantizer=tokenize_speech.QuantizerSpec(str(ROOT / "recipes/demo/models/quantizer")),
        filters=[{"_component_": "speechfuse.audio.level", "min_dbfs": -60}],
        shard_size=3,
        batch_size=4,
        runtime=recordings.Runtime(
            max_reject_rate=1.0, device="cpu", engine={"_component_": f"{__name__}.inline"}
        ),
    )
    tokenize_speech.main(job)
    return folder / "data"


class Changed:
    """A copy of a dataset, and ways to change it that keep the manifest's sha256 right."""

    def __init__(self, whole: Path, folder: Path) -> None:
        self.folder, self.stream = Path(shutil.copytree(whole, folder)), shards.read_stream(whole)

    def json(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        content = json.loads((self.folder / name).read_text())
        change(content)
        (self.folder / name).write_text(json.dumps(content))

    def manifest(self, change: Callable[[dict[str, Any]], Any]) -> None:
        self.json("manifest.json", change)

    def sign(self, *names: str) -> None:
        hashes = {name: artifact.sha256_of(self.folder / name) for name in names}
        self.manifest(lambda manifest: manifest["outputs"].update(hashes))

    def write(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)
        self.sign(name)

    def rows(
        self, name: str, change: Callable[[list[dict[str, Any]]], Any], **stream: object
    ) -> None:
        path = self.folder / name
        rows, counts = list(shards.read_shard(path)), shards.read_counts(path)
        of = self.stream | stream
        change(rows)
        shards.write_shard(path, rows, shards.SPEECH, of, counts)
        self.sign(name)


@pytest.fixture
def changed(whole, tmp_path) -> Changed:
    return Changed(whole, tmp_path / "data")


def found(folder: Path, capsys) -> list[str]:
    """The faults; [] where it verified."""
    capsys.readouterr()
    try:
        verify.main(verify.Verify(str(folder)))
    except ValueError as error:
        lines = capsys.readouterr().out.splitlines()
        faults = [line.removeprefix("FAULT     ") for line in lines if line.startswith("FAULT")]
        assert str(error).endswith(f"its manifest says; faults, listed above: {len(faults)}")
        assert faults and "verified" not in "".join(lines)
        return faults
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"verified: {folder}: ") and "fault" not in "".join(lines).lower()
    return []


def test_what_the_job_leaves_verifies_and_every_group_says_how_much(whole, capsys):
    assert found(whole, capsys) == []
    totals = artifact.manifest_of(whole)["totals"]
    assert totals["split"] == 1 and totals["pieces"] == 3 and totals["resampled"] == 1
    assert totals["rejected"] and totals["filtered"] and totals["mixed_down"] == 1
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    verify.main(verify.Verify(str(whole)))
    lines = capsys.readouterr().out.splitlines()
    said = {line.split()[0]: line for line in lines}
    assert list(said) == ["manifest", "files", "shards", "rows", "verified:"]
    assert (
        said["files"].endswith(" 6 files of the manifest")
        and "3 of 3 open: speech, 512 codes" in said["shards"]
    )
    assert f"7 rows, {totals['codes']:,} codes, 0.0" in said["rows"]
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def first_code(rows: list[dict[str, Any]], code: int) -> None:
    rows[0]["codes"][0] = code


def files(change: Changed, what: str) -> list[str]:
    """Make a fault that is not in the rows; returns what the faults begin with."""
    folder = change.folder
    match what:
        case "changed byte":
            (folder / f"{NAMES[2]}.rejects.jsonl").write_bytes(b"\n")
            return [f"{NAMES[2]}.rejects.jsonl: its bytes do not have the sha256"]
        case "missing file":
            (folder / f"{NAMES[2]}.rejects.jsonl").unlink()
            return [f"{NAMES[2]}.rejects.jsonl: it is missing"]
        case "folder in place of a file":
            (folder / "extra").mkdir()
            change.manifest(lambda m: m["outputs"].update(extra="00"))
            return ["extra: it is no file"]
        case "path out of the folder":
            change.manifest(lambda m: m["outputs"].update({"../secret": "00"}))
            return ["../secret: it leads out of the folder"]
        case "absolute path":
            inside = str(folder / FIRST)
            change.manifest(lambda m: m["outputs"].update({inside: "00"}))
            return [f"{inside}: it leads out of the folder"]
        case "link out of the folder":
            (folder.parent / "secret").write_text("secret")
            (folder / "link").symlink_to(folder.parent / "secret")
            change.sign("link")
            return ["link: it leads out of the folder"]
        case "stray shard":
            shutil.copy(folder / FIRST, folder / "shard-00003.parquet")
            return ["shard-00003.parquet: the manifest does not list this shard file"]
        case "other configuration":
            change.manifest(lambda m: m["config"].update(batch_size=5))
            return ["manifest.json: its fingerprint is not that of"]
    raise KeyError(what)


@pytest.mark.parametrize(
    "what",
    [
        "changed byte",
        "missing file",
        "folder in place of a file",
        "path out of the folder",
        "absolute path",
        "link out of the folder",
        "stray shard",
        "other configuration",
    ],
)
def test_a_file_that_is_not_as_stated_is_one_fault(changed, capsys, what):
    expected = files(changed, what)
    faults = found(changed.folder, capsys)
    assert len(faults) == len(expected)
    assert all(f.startswith(e) for f, e in zip(faults, expected, strict=True)), faults


@pytest.mark.parametrize(
    ("shard", "change", "fault"),
    [
        (FIRST, lambda rows: first_code(rows, 513), "codes over 512 in 1 row, first 'a'"),
        (FIRST, lambda rows: rows[1].update(id=None), "no id in 1 row"),
    ],
)
def test_a_row_that_is_wrong_is_named(changed, capsys, shard, change, fault):
    changed.rows(shard, change)
    [line] = found(changed.folder, capsys)
    assert line.startswith(f"{shard}: {fault}")


def test_the_mask_code_is_a_code(changed, capsys):
    changed.rows(FIRST, lambda rows: first_code(rows, 512))
    assert found(changed.folder, capsys) == []


def test_totals_are_those_of_the_rows(changed, capsys):
    changed.manifest(lambda manifest: manifest["totals"].update(rows=9999, hours=1.0))
    rows, hours = found(changed.folder, capsys)
    assert "totals: rows is 9999, but the shards hold" in rows and "totals: hours is 1.0" in hours


def test_a_dataset_whose_rows_share_an_id_is_not_finished(tmp_path, monkeypatch):
    work = artifact.Artifact(tmp_path / "data", "tokenize_speech", 3, {}, {})
    paths = [work.out / shards.shard_name(i) for i in range(2)]

    def make(*_: Any) -> tuple[list[Path], list]:
        for path, ids in zip(paths, (["a", "b"], ["c", "a"]), strict=True):
            shards.write_shard(path, [{"id": id} for id in ids], shards.SPEECH)
        return paths, []

    monkeypatch.setattr(making, "make", make)
    job = SimpleNamespace(out=str(work.out), fresh=False, runtime=None)
    with pytest.raises(ValueError, match=r"ids: 1 stand more than once, first 'a' in .*other ids"):
        making.make_dataset(
            job, work, list, str, "clip", shards.SPEECH, None, lambda *_: {}, lambda *_: ""
        )
    assert paths[0].exists() and not (work.out / "manifest.json").exists()


def test_an_id_that_stands_twice_is_found_across_shards(changed, capsys):
    changed.rows(THIRD, lambda rows: rows[0].update(id="a"))
    assert found(changed.folder, capsys) == [
        f"ids: 1 stand more than once, first 'a' in {FIRST} and {THIRD}"
    ]


def test_shards_are_of_one_kind_and_one_stream(changed, capsys):
    changed.rows(SECOND, lambda rows: None, quantizer="cd" * 32)
    [fault] = found(changed.folder, capsys)
    assert fault.startswith(f"{SECOND}: its stream ") and "cdcd" in fault
    shards.write_shard(changed.folder / THIRD, [{"id": "t", "turns": []}], shards.CONVERSATIONS)
    changed.sign(THIRD)
    faults = "\n".join(found(changed.folder, capsys))
    assert f"{THIRD}: it holds conversations among shards of speech" in faults


def test_codes_need_a_stated_quantizer(changed, capsys):
    for name in (FIRST, SECOND, THIRD):
        rows = list(shards.read_shard(changed.folder / name))
        shards.write_shard(changed.folder / name, rows, shards.SPEECH)
        changed.sign(name)
    faults = found(changed.folder, capsys)
    assert f"{FIRST}: codes of no stated quantizer in 2 rows, first 'a'" in faults


@pytest.mark.parametrize(
    ("stream", "said"), [({"token_rate": 0.0}, "rate': 0.0"), ({"codebook_size": "2"}, "'2'")]
)
def test_a_stream_that_is_none_is_refused(changed, capsys, stream, said):
    changed.rows(SECOND, lambda rows: None, **stream)
    fault = found(changed.folder, capsys)[0]
    assert fault.startswith(f"{SECOND}: it does not open: its stream is ") and said in fault


def test_a_stream_that_is_no_mapping_is_a_fault(changed, capsys):
    table = pq.read_table(changed.folder / SECOND)
    metadata = {**table.schema.metadata, b"speechfuse.stream": b"[]"}
    pq.write_table(table.replace_schema_metadata(metadata), changed.folder / SECOND)
    changed.sign(SECOND)
    assert found(changed.folder, capsys) == [f"{SECOND}: it does not open: its stream is []"]


def test_a_shard_of_other_columns_is_no_dataset(changed, capsys):
    pq.write_table(pa.table({"id": ["a"], "tokens": [[1, 2]]}), changed.folder / THIRD)
    changed.sign(THIRD)
    faults = found(changed.folder, capsys)
    assert (
        f"{THIRD}: it does not open: its columns are those of neither speech nor conversations"
        in faults
    )


def test_rows_that_cannot_be_read_end_no_check(changed, capsys):
    column = pq.read_metadata(changed.folder / FIRST).row_group(0).column(1)
    assert column.path_in_schema.startswith("codes.")
    data = bytearray((changed.folder / FIRST).read_bytes())
    start = column.data_page_offset
    data[start : start + 20] = b"\xff" * 20
    changed.write(FIRST, bytes(data))
    changed.rows(SECOND, lambda rows: first_code(rows, 999))
    faults = found(changed.folder, capsys)
    assert faults[0].startswith(f"{FIRST}: its rows cannot be read: ")
    assert faults[1].startswith(f"{SECOND}: codes over 512 in 1 row")


def test_a_file_that_may_not_be_read_is_one_fault(whole, capsys, monkeypatch):
    def refuse(path: Path) -> str:
        if path.name == FIRST:
            raise PermissionError(13, "Permission denied", str(path))
        return hash_of(path)

    hash_of = artifact.sha256_of
    monkeypatch.setattr(artifact, "sha256_of", refuse)
    assert found(whole, capsys) == [f"{FIRST}: it cannot be read: Permission denied"]


def test_a_shard_that_does_not_open_hides_no_other_fault(changed, capsys):
    """All faults are listed, each once."""
    changed.write(FIRST, (changed.folder / FIRST).read_bytes()[:-100])
    changed.rows(SECOND, lambda rows: first_code(rows, 999))
    (changed.folder / "shard-00009.parquet").write_text("stray")
    faults = found(changed.folder, capsys)
    assert len(set(faults)) == len(faults)
    for expected in (
        "shard-00009.parquet: the manifest does not list",
        f"{FIRST}: it does not open: ",
        f"{SECOND}: codes over 512 in 1 row, first 'long#0'",
    ):
        assert any(fault.startswith(expected) for fault in faults), (expected, faults)
    assert len(faults) == 3


def test_speech_inside_conversations_is_checked(tmp_path, capsys):
    stream = {"quantizer": "ab" * 32, "token_rate": 25.0, "codebooks": 1, "codebook_size": 512}

    def dataset(name: str, codes: list[int]) -> Path:
        work = artifact.Artifact(tmp_path / name, "instructions", 1, {}, {})
        work.begin()
        said = {"text": None, "speech": {"id": "s", "codes": codes, "seconds": len(codes) / 25}}
        asked = {"role": "user", "segments": [{"text": "Listen: "}, said, said]}
        answer = {"role": "assistant", "segments": [{"text": "yes"}]}
        rows = [{"id": str(i), "turns": [asked, answer]} for i in range(3)]
        path = tmp_path / name / shards.shard_name(0)
        shards.write_shard(path, [*rows, {"id": "t", "turns": None}], shards.CONVERSATIONS, stream)
        work.finish({"rows": 4, "codes": 6 * len(codes)}, [path])
        return tmp_path / name

    assert found(dataset("good", [0, 512, 511]), capsys) == []
    [fault] = found(dataset("bad", [0, 513]), capsys)
    assert fault == f"{FIRST}: codes over 512 in 6 rows, first 's'"


def test_any_artifact_is_verified_by_its_hashes(tmp_path, capsys):
    work = artifact.Artifact(tmp_path / "model", "expand_vocab", 1, {"seed": 0}, {})
    work.begin()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    work.finish({"parameters": 7}, [tmp_path / "model" / "model.safetensors"])
    assert found(tmp_path / "model", capsys) == []
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weight5")
    [fault] = found(tmp_path / "model", capsys)
    assert fault == "model.safetensors: its bytes do not have the sha256 of the manifest"


def test_the_cache_of_the_hub_is_a_folder_of_links_and_verifies(whole, tmp_path, capsys):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in whole.iterdir():
        if path.name != "plan.json":  # it is not pushed
            shutil.copy(path, blobs / f"blob-{path.name}")
            (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob-{path.name}")
    assert found(snapshot, capsys) == []
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to(whole / FIRST)
    assert f"{FIRST}: it leads out of the folder, so it was not read" in found(snapshot, capsys)


def test_as_a_command(whole, changed, tmp_path):
    def run(path: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "stages.verify", f"path={path}"]
        source = Path(config.__file__).parents[1]
        env = {"PYTHONPATH": f"{source}:{ROOT}", "PATH": "", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    done = run(whole)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("verified: ")
    changed.rows(FIRST, lambda rows: first_code(rows, 513))
    (changed.folder / "shard-00003.parquet").write_text("stray")
    done = run(changed.folder)
    assert done.returncode == 2 and done.stdout.count("\nFAULT ") == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    (changed.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is incomplete"):
        verify.main(verify.Verify(str(changed.folder)))
