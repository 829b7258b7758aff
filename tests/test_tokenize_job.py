"""The tokenizing job: split, rejects, resuming to the same bytes, refusals in one line."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from speechfuse import artifact
from speechfuse.audio import decoding, espeak_ng
from speechfuse.config import main
from speechfuse.quantizer.model import Quantizer
from speechfuse.rows import rejects, shards
from stages import tokenize_speech
from tests import bad_audio

ROOT = Path(__file__).parent.parent
QUANTIZER = "recipes/demo/models/quantizer"
ENVIRONMENT = {**os.environ, "PYTHONPATH": "pipeline", "OMP_NUM_THREADS": "1"}
SILENCES = (4.4, 8.9)  # seconds into the 12 s of long.wav; the window of the quantizer is 5 s


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """Five items: good (with transcript), long (12 s), no audio, short of one token, good."""
    folder = tmp_path_factory.mktemp("speech")
    with espeak_ng.EspeakLibrary() as engine:
        said = engine.speak(
            "what is three plus four", espeak_ng.EspeakVoice("en-us+Annie")
        ).waveform
        talk = engine.speak("where does a bee live " * 30, espeak_ng.EspeakVoice("en-us")).waveform[
            : 12 * 16_000
        ]
    assert len(talk) == 12 * 16_000
    talk = talk + 0.01 * np.random.default_rng(0).standard_normal(len(talk))
    for begin in SILENCES:
        talk[int(begin * 16_000) : int((begin + 0.2) * 16_000)] = 0
    soundfile.write(folder / "a-good.wav", said, 16_000)
    (folder / "a-good.txt").write_text("what is three plus four\n")
    soundfile.write(folder / "b-long.wav", talk, 16_000)
    (folder / "b-long.txt").write_text("words of which nobody knows in which piece they are")
    (folder / "c-text.wav").write_text("this is no audio")
    soundfile.write(folder / "d-click.wav", np.full(400, 0.1), 16_000)
    soundfile.write(folder / "e-good.flac", said[::2], 8000)
    return folder


def config(path: Path, folder: Path, out: Path, **changes) -> Path:
    content = {
        "out": str(out),
        "corpus": {"_component_": "speechfuse.corpora.folder", "path": str(folder)},
        "quantizer": {"checkpoint": QUANTIZER},
        "shard_size": 2,
        "batch_size": 4,
        "runtime": {"workers": 1, "max_reject_rate": 0.5},
    }
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


def process(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "stages.tokenize_speech", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def called(monkeypatch, *arguments: object) -> int:
    """Exit status of the same command line in this process, for what ends before workers start."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["tokenize_speech", *map(str, arguments)])
    try:
        main(tokenize_speech.main, tokenize_speech.TokenizeSpeech, tokenize_speech.__doc__ or "")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def hashes(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("shard-*"))}


def written(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


@pytest.fixture(scope="module")
def whole(speech, tmp_path_factory) -> tuple[Path, Path, str]:
    """(config, out, what the first run said)."""
    folder = tmp_path_factory.mktemp("whole")
    path = config(folder / "job.yaml", speech, folder / "data")
    done = process(path)
    assert done.returncode == 0, done.stderr
    return path, folder / "data", done.stdout


def test_what_is_made_of_a_folder(whole, speech):
    _, out, said = whole
    rows = list(shards.read_rows(out))
    pieces = [row for row in rows if row["parent"]]
    assert [row["id"] for row in rows if not row["parent"]] == ["a-good", "e-good"]
    assert [row["id"] for row in pieces] == [f"b-long#{i}" for i in range(3)]
    assert [(row["parent"], row["part"], row["text"]) for row in pieces] == [
        ("b-long", i, None) for i in range(3)
    ]
    offset = 0.0
    for row in pieces:
        assert row["source"]["offset"] == pytest.approx(offset)
        assert row["source"]["seconds"] == pytest.approx(row["seconds"], abs=1e-6)
        assert 0 < row["seconds"] <= 5
        offset += row["source"]["seconds"]
    assert offset == pytest.approx(12)
    for begin, row in zip(SILENCES, pieces[1:], strict=True):
        assert begin <= row["source"]["offset"] <= begin + 0.2
    first = rows[0]
    assert first["text"] == "what is three plus four" and first["part"] is None
    assert first["source"] == {
        "uri": "a-good.wav",
        "offset": 0.0,
        "seconds": pytest.approx(first["seconds"]),
        "sha256": artifact.sha256_of(speech / "a-good.wav"),
    }
    manifest = artifact.manifest_of(out)
    totals = manifest["totals"]
    counted = {
        "clips": 5,
        "rows": 5,
        "split": 1,
        "pieces": 3,
        "resampled": 1,
        "mixed_down": 0,
        "without_text": 2,
        "rejected": {"not audio": 1, "too short": 1},
        "filtered": {},
        "ignored": {},
        "source": speech.name,
        "licence": None,
    }
    assert {key: totals[key] for key in counted} == counted
    assert totals["codes"] == sum(len(row["codes"]) for row in rows)
    assert totals["hours"] == pytest.approx(sum(row["seconds"] for row in rows) / 3600, abs=1e-4)
    assert said.strip().endswith(
        "1 split into 3; 1 resampled; 2 without a text; 2 rejected (1 not audio, 1 too short); "
        f"listed in {out}/shard-*.rejects.jsonl"
    )
    assert {name: manifest["outputs"][name] for name in hashes(out)} == hashes(out)
    assert manifest["inputs"]["quantizer"] == Quantizer.load(ROOT / QUANTIZER).identity


def test_codes_are_those_of_the_quantizer_on_each_piece(whole, speech):
    quantizer = Quantizer.load(ROOT / QUANTIZER)
    rows = list(shards.read_rows(whole[1]))
    assert shards.read_stream(whole[1]) == quantizer.stream
    for row in rows:
        waveform = decoding.load(speech / row["source"]["uri"])
        start = round(row["source"]["offset"] * 16_000)
        piece = waveform[start : start + round(row["source"]["seconds"] * 16_000)]
        (codes,) = quantizer.encode([piece], 4)
        assert len(codes) == int(25 * len(piece) / 16_000) == len(row["codes"])
        assert np.mean(codes == row["codes"]) > 0.98  # other neighbours in the batch: near-ties
    assert len(np.unique(np.concatenate([row["codes"] for row in rows]))) > 30


def test_rejects_are_listed_with_their_reason(whole):
    found = {
        path.name: [(r["id"], r["reason"]) for r in rejects.read_rejects(path)]
        for path in shards.shard_paths(whole[1])
    }
    assert found["shard-00000.parquet"] == found["shard-00002.parquet"] == []
    (text, why), (click, short) = found["shard-00001.parquet"]
    assert text == "c-text" and why.startswith("not audio: ")
    assert click == "d-click" and short == "too short: 0.0250 s is less than one token"


def test_a_rerun_does_nothing(whole, monkeypatch, capsys):
    path, out, _ = whole
    before = written(out)
    assert called(monkeypatch, path) == 0
    assert capsys.readouterr().out == f"{out}: complete, nothing to do\n"
    assert called(monkeypatch, path, "runtime.workers=7") == 0  # not part of what is made
    assert written(out) == before


def test_only_a_missing_shard_is_made_again_with_the_same_bytes(whole):
    path, out, said = whole
    before, bytes_before = written(out), hashes(out)
    assert len(bytes_before) == 6
    totals = artifact.manifest_of(out)["totals"]
    (out / "manifest.json").unlink()
    (out / "shard-00000.parquet").unlink()
    (out / "shard-00000.00003-0.flac").touch()  # left by a try that was killed
    done = process(path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == said and artifact.manifest_of(out)["totals"] == totals
    assert hashes(out) == bytes_before
    made = {name for name, when in written(out).items() if when != before[name]}
    assert made == {"shard-00000.parquet", "shard-00000.rejects.jsonl", "manifest.json"}


@pytest.fixture
def started(whole, tmp_path):
    """(process, out) of a job of two workers that has just made the first of its three shards."""
    out = tmp_path / "data"
    command = [
        sys.executable,
        "-m",
        "stages.tokenize_speech",
        str(whole[0]),
        f"out={out}",
        "runtime.workers=2",
    ]
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(out.glob("shard-*.parquet")):
        assert job.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    yield job, out
    try:
        os.killpg(job.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    job.wait()


def test_killed_and_started_again_with_two_workers_gives_the_same_bytes(whole, started):
    job, out = started
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert not (out / "manifest.json").exists()
    assert 0 < len(list(out.glob("shard-*.parquet"))) < 3, "it was not killed in the middle"
    with pytest.raises(ValueError, match=f"incomplete.*out={out}"):
        shards.shard_paths(out)
    done = process(whole[0], f"out={out}", "runtime.workers=2")
    assert done.returncode == 0, done.stderr
    assert hashes(out) == hashes(whole[1])
    totals = [artifact.manifest_of(folder)["totals"] for folder in (out, whole[1])]
    assert totals[0] == totals[1]


def test_no_worker_outlives_a_killed_job(started):
    job, _ = started
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    if not children.exists():
        pytest.skip("needs Linux's /proc")
    workers = [Path("/proc") / pid for pid in children.read_text().split()]
    workers = [w for w in workers if b"spawn_main" in (w / "cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    deadline = time.monotonic() + 8

    def alive(worker: Path) -> bool:
        try:
            return (worker / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


@pytest.mark.parametrize("change", ["shard_size=3", "batch_size=2", "corpus.language=en"])
def test_another_configuration_is_refused_and_nothing_changes(whole, monkeypatch, capsys, change):
    path, out, _ = whole
    before = written(out)
    assert called(monkeypatch, path, change) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: out={out} was made from something else; what differs: ")
    assert change.split("=")[0] in line and "fresh=true" in line and "another out=" in line
    assert written(out) == before


def test_another_folder_of_speech_is_refused(whole, speech, tmp_path, monkeypatch, capsys):
    path, _, _ = whole
    (tmp_path / "new.wav").write_bytes((speech / "a-good.wav").read_bytes())
    assert called(monkeypatch, path, f"corpus.path={tmp_path}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "inputs.corpus" in line and "corpus.path" in line


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["corpus.path=TMP/empty"], "empty is not a folder with files in it"),
        (["corpus.path=TMP/notes"], "no audio to tokenize"),
        (["corpus.path=TMP/absent"], "absent is not a folder"),
        (["shard_sise=3"], "unknown key 'shard_sise'; did you mean 'shard_size'?"),
        (["runtime.worker=3"], "unknown key 'runtime.worker'; did you mean 'runtime.workers'?"),
        (["corpus.pth=x"], "unknown argument 'pth'; did you mean 'path'?"),
        (["corpus._component_=speechfuse.corpora.folders"], "did you mean 'folder'?"),
        (["shard_size=many"], "shard_size"),
        (["quantizer.checkpoint=TMP/absent"], "absent"),
        (["quantizer.checkpoint=TMP/empty"], "empty is not a quantizer: it has no config.json"),
        (["shard_size=0"], "shard_size"),
        (["quantizer.dtype=float16"], "float16"),
        (["runtime.device=cuda"], "no GPU"),
        (["runtime.device=gpu"], "choose auto, cpu or cuda"),
        (["filters=[{_component_: speechfuse.audio.loudness}]"], "loudness"),
    ],
)
def test_mistakes_end_in_one_line(speech, tmp_path, monkeypatch, capsys, overrides, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.txt").write_text("no audio here")
    path = config(tmp_path / "job.yaml", speech, tmp_path / "data")
    overrides = [o.replace("TMP", str(tmp_path)) for o in overrides]
    assert called(monkeypatch, path, *overrides) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
    assert not (tmp_path / "data").exists()


def test_a_folder_of_nothing_but_rejects_fails_in_one_line(tmp_path):
    (tmp_path / "bad").mkdir()
    for i in range(3):
        (tmp_path / f"bad/{i}.wav").write_text("no audio")
    done = process(config(tmp_path / "job.yaml", tmp_path / "bad", tmp_path / "data"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors == done.stderr.splitlines()[-1:]
    assert "2 of 3 clips were rejected, more than runtime.max_reject_rate=0.5" in errors[0]
    assert "0: not audio: " in errors[0]
    assert not (tmp_path / "data/manifest.json").exists()


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(speech, tmp_path, monkeypatch, capsys):
    path = config(tmp_path / "job.yaml", speech, tmp_path / "data")
    assert called(monkeypatch, path, "runtime.dry_run=true") == 0
    assert "5 clips" in (said := capsys.readouterr().out) and "3 shards" in said
    assert not (tmp_path / "data").exists()


def test_of_clips_with_the_same_samples_the_first_is_kept(speech, tmp_path, monkeypatch, capsys):
    """The same speech as another file format, and in another shard, is still the same speech."""
    folder = tmp_path / "twice"
    folder.mkdir()
    samples, _ = soundfile.read(speech / "a-good.wav", dtype="int16")
    soundfile.write(folder / "a.wav", samples, 16_000)
    soundfile.write(folder / "b.wav", samples[:-1], 16_000)
    soundfile.write(folder / "c.flac", samples, 16_000)
    job = config(tmp_path / "job.yaml", folder, tmp_path / "data", drop_duplicate_audio=True)
    assert called(monkeypatch, job) == 0
    totals = artifact.manifest_of(tmp_path / "data")["totals"]
    assert (totals["filtered"], totals["rejected"]) == ({"filter duplicate audio": 1}, {})
    assert [row["id"] for row in shards.read_rows(tmp_path / "data")] == ["a", "b"]
    (reject,) = rejects.read_rejects(tmp_path / "data/shard-00001.parquet")
    assert reject == {"id": "c", "reason": "filter duplicate audio: same as a"}
    assert "1 filtered (1 filter duplicate audio)" in capsys.readouterr().out


def test_reduced_precision_is_part_of_what_is_made_and_its_codes_are_compared(
    whole, speech, tmp_path, monkeypatch, capsys
):
    assert called(monkeypatch, whole[0], "quantizer.dtype=bfloat16") == 2
    assert "quantizer.dtype" in capsys.readouterr().err
    job = config(
        tmp_path / "job.yaml",
        speech,
        tmp_path / "data",
        quantizer={"checkpoint": QUANTIZER, "dtype": "bfloat16"},
    )
    assert called(monkeypatch, job) == 0
    said = capsys.readouterr().out
    equal = artifact.manifest_of(tmp_path / "data")["totals"]["equal_to_float32"]
    assert 100 < equal["equal"] <= equal["codes"]
    assert f"bfloat16 gave float32's code for {equal['equal'] / equal['codes']:.2%}" in said


def test_a_corpus_of_bad_files_is_counted_by_kind_and_stops_nothing(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "speech"
    expected = bad_audio.make(folder, minutes=0.5)
    job = config(
        tmp_path / "job.yaml",
        folder,
        tmp_path / "data",
        shard_size=30,
        runtime={"workers": 2, "max_reject_rate": 1.0},
    )
    assert called(monkeypatch, job) == 0
    out = tmp_path / "data"
    rows = {row["parent"] or row["id"] for row in shards.read_rows(out)}
    found = dict.fromkeys(rows, "used")
    for path in shards.shard_paths(out):
        for reject in rejects.read_rejects(path):
            found[reject["id"]] = reject["reason"].partition(":")[0]
    expected = {id: "too short" if id == "one sample" else kind for id, kind in expected.items()}
    assert len([kind for kind in found.values() if kind != "used"]) >= 25
    assert {id: kind for id, kind in found.items() if kind != "used"} == {
        id: kind for id, kind in expected.items() if kind != "used"
    }
    assert rows == {id for id, kind in expected.items() if kind == "used"}
    totals = artifact.manifest_of(out)["totals"]
    assert sum(totals["rejected"].values()) == len(found) - len(rows)
    assert totals["ignored"] == bad_audio.IGNORED
    said = capsys.readouterr().out
    assert all(f"{n} {kind}" in said for kind, n in totals["rejected"].items())
