"""Artifacts: absent, incomplete, complete, stale; nothing lost, nothing half written."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from speechfuse import artifact, provenance
from speechfuse.artifact import Artifact
from speechfuse.locks import exclusive_lock

CONFIG = {
    "out": "ignored",
    "fresh": False,
    "runtime": {"workers": 2},
    "seed": 1,
    "corpus": {"path": "speech", "splits": ["train", "dev"]},
}


def make(out: Path, seed: int = 1, version: int = 1, inputs: str = "aa", **changed) -> Artifact:
    config = {**CONFIG, "seed": seed, **changed}
    return Artifact(out, "tokenize_speech", version, config, {"corpus": inputs})


def complete(out: Path, **changed) -> Artifact:
    made = make(out, **changed)
    assert made.begin({"shards": [["a", "b"], ["c"]]})
    artifact.write_atomic(out / "shard-00000.parquet", b"rows")
    made.finish({"rows": 3}, [out / "shard-00000.parquet"])
    return made


def tree(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_absent_is_planned_and_then_completed(tmp_path):
    out = tmp_path / "data"
    made = make(out)
    assert not made.started() and made.record() == {}
    assert made.begin({"shards": [(1, 2)]})
    assert made.plan == {"shards": [[1, 2]]}  # as it will be read back
    plan = json.loads((out / "plan.json").read_text())
    assert plan["fingerprint"] == made.fingerprint and plan["plan"] == made.plan
    assert plan["git"] == provenance.commit() and "torch" in plan["libraries"]
    assert make(out).started() and artifact.record_of(out) == make(out).record() == plan
    assert not (out / "manifest.json").exists()
    artifact.write_atomic(out / "a" / "x.bin", b"abc")
    made.finish({"rows": 1}, [out / "a" / "x.bin"])
    manifest = artifact.manifest_of(out)
    assert artifact.fingerprint_of(out) == made.fingerprint
    assert manifest["job"] == "tokenize_speech" and manifest["version"] == 1
    assert manifest["config"]["corpus"] == CONFIG["corpus"]
    assert manifest["inputs"] == {"corpus": "aa"} and manifest["totals"] == {"rows": 1}
    sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest["outputs"] == {"a/x.bin": sha}
    assert {"torch", "pyarrow", "python"} <= manifest["libraries"].keys()
    assert manifest["started"] <= manifest["finished"]
    assert manifest["planned"] == {"git": plan["git"], "libraries": plan["libraries"]}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", manifest["finished"])


def test_complete_and_equal_is_one_line_and_no_change(tmp_path, capsys):
    complete(tmp_path / "data")
    before = tree(tmp_path)
    capsys.readouterr()
    assert not make(tmp_path / "data").begin({"shards": "another plan"})
    assert capsys.readouterr().out == f"{tmp_path / 'data'}: complete, nothing to do\n"
    assert tree(tmp_path) == before


def test_runtime_out_and_fresh_do_not_make_another_artifact(tmp_path):
    moved = {**CONFIG, "runtime": {"workers": 64}, "out": "elsewhere", "fresh": True}
    same = Artifact(tmp_path / "elsewhere", "tokenize_speech", 1, moved, {"corpus": "aa"})
    assert same.fingerprint == make(tmp_path).fingerprint
    nested = make(tmp_path, corpus={**CONFIG["corpus"], "out": "b"})
    assert nested.fingerprint != make(tmp_path).fingerprint  # only the top-level keys are left out


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 2}, "seed: 1 there, 2 now"),
        ({"version": 2}, "version: 1 there, 2 now"),
        ({"inputs": "bb"}, 'inputs.corpus: "aa" there, "bb" now'),
        ({"corpus": {"path": "speech"}}, 'corpus.splits: ["train", "dev"] there, absent now'),
        ({"extra": 5}, "extra: absent there, 5 now"),
    ],
)
def test_stale_is_refused_with_what_differs_and_the_cures(tmp_path, finished, changed, words):
    out = tmp_path / "data"
    if finished:
        complete(out)
    else:
        make(out).begin()
    before = tree(tmp_path)
    with pytest.raises(ValueError) as caught:
        make(out, **changed).begin()
    message = str(caught.value)
    assert f"{words}." in message and message.count(" there, ") == 1  # this and nothing else
    assert "another out=" in message and "fresh=true" in message and "data.old-1" in message
    assert tree(tmp_path) == before


def test_incomplete_and_equal_resumes_with_the_frozen_plan(tmp_path):
    make(tmp_path / "data").begin({"shards": [["a"], ["b"]]})
    started = json.loads((tmp_path / "data" / "plan.json").read_text())["started"]
    resumed = make(tmp_path / "data")
    assert resumed.begin({"shards": "what the corpus looks like today"})
    assert resumed.plan == {"shards": [["a"], ["b"]]}
    resumed.finish({}, [])
    assert artifact.manifest_of(tmp_path / "data")["started"] == started


def test_fresh_moves_aside_and_deletes_nothing(tmp_path):
    out = tmp_path / "data"
    complete(out)
    first = tree(out)
    other = make(out, seed=2)
    assert other.begin("second", fresh=True) and other.plan == "second"
    assert tree(tmp_path / "data.old-1") == first
    second = tree(out)
    del second[".lock"]  # of work that goes on
    assert make(out, seed=3).begin("third", fresh=True)
    assert tree(tmp_path / "data.old-1") == first and tree(tmp_path / "data.old-2") == second
    assert make(tmp_path / "never", seed=3).begin(fresh=True)  # nothing there: nothing to move
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "data",
        "data.old-1",
        "data.old-2",
        "never",
    ]


def test_a_complete_artifact_that_has_lost_a_file_is_not_called_complete(tmp_path):
    out = tmp_path / "data"
    complete(out)
    lost = next(p for p in out.iterdir() if p.name not in ("plan.json", "manifest.json"))
    lost.unlink()
    with pytest.raises(ValueError, match=rf"was complete, but {lost.name} .*fresh=true"):
        make(out).begin()
    assert make(out).begin("again", fresh=True)


def test_a_folder_that_no_job_made_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        make(tmp_path).begin()
    assert tree(tmp_path) == {"thesis.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    assert make(tmp_path / "empty").begin()


def test_no_absolute_path_in_plan_or_manifest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out" / "data"
    paths = {"inside": tmp_path / "speech", "outside": ["/somewhere/else/whisper.pt"]}
    made = Artifact(out, "tokenize_speech", 1, {"out": out, "paths": paths}, {})
    made.begin()
    artifact.write_atomic(out / "x", "x")
    made.finish({}, [Path("out/data/x")])
    for name in ("plan.json", "manifest.json"):
        text = (out / name).read_text()
        assert str(tmp_path) not in text and "/somewhere" not in text and '"/' not in text
    stored = artifact.manifest_of(out)
    assert stored["config"]["out"] == "out/data"
    assert stored["config"]["paths"] == {"inside": "speech", "outside": [".../whisper.pt"]}
    assert stored["outputs"].keys() == {"x"}
    relative = {"out": out, "paths": {**paths, "inside": "speech"}}
    assert Artifact(out, "tokenize_speech", 1, relative, {}).fingerprint == made.fingerprint


def test_outputs_stay_inside_the_folder(tmp_path):
    made = make(tmp_path / "data")
    made.begin()
    (tmp_path / "stray").write_text("x")
    with pytest.raises(ValueError, match="stray is outside"):
        made.finish({}, [tmp_path / "stray"])
    with pytest.raises(FileNotFoundError):
        made.finish({}, [tmp_path / "data" / "never-written"])
    assert not (tmp_path / "data" / "manifest.json").exists()


def run_python(code: str, *arguments: object) -> int:
    source = str(Path(artifact.__file__).parents[1])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": source}).returncode


def test_a_kill_between_plan_and_finish_leaves_incomplete(tmp_path):
    out = tmp_path / "data"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from speechfuse.artifact import Artifact\n"
        "Artifact(Path(sys.argv[1]), 'tokenize_speech', 1, {'seed': 1}, {}).begin(['a', 'b'])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert run_python(code, out) == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"incomplete.*'tokenize_speech'.*resume"):
        artifact.fingerprint_of(out)
    resumed = Artifact(out, "tokenize_speech", 1, {"seed": 1}, {})
    assert resumed.begin() and resumed.plan == ["a", "b"]


def test_two_processes_are_not_at_work_in_one_folder(tmp_path):
    """Nor is it moved away from under the first."""
    out = tmp_path / "data"
    first = make(out)
    assert first.begin([])
    (out / "work").write_text("of the first")
    code = (
        "import sys; from pathlib import Path\n"
        "from speechfuse.artifact import Artifact\n"
        f"config = {CONFIG!r}\n"
        "for fresh in (False, True):\n"
        "    other = Artifact(Path(sys.argv[1]), 'tokenize_speech', 1, config, {'corpus': 'aa'})\n"
        "    try:\n"
        "        other.begin([], fresh=fresh)\n"
        "    except ValueError as error:\n"
        "        assert 'another process is at work there' in str(error), error\n"
        "    else:\n"
        "        sys.exit(1)\n"
        "try:\n"
        "    other.complete()\n"
        "except ValueError as error:\n"
        "    assert 'another process is at work there' in str(error), error\n"
        "else:\n"
        "    sys.exit(1)\n"
    )
    assert run_python(code, out) == 0
    assert (out / "work").read_text() == "of the first"


def test_a_job_that_begins_while_another_plans_is_refused(tmp_path):
    """Or the plan of one would stand beside the shards of the other."""
    out, seen = tmp_path / "data", []
    code = (
        "import sys; from pathlib import Path\n"
        "from speechfuse.artifact import Artifact\n"
        "try:\n"
        "    Artifact(Path(sys.argv[1]), 'other', 1, {}, {}).begin(['other'])\n"
        "except ValueError as error:\n"
        "    assert 'another process is at work there' in str(error), error\n"
        "    sys.exit(5)\n"
    )

    def plan() -> list[str]:
        seen.append(run_python(code, out))
        return ["first"]

    first = make(out)
    assert first.begin(plan) and seen == [5] and first.plan == ["first"]


def test_a_folder_whose_job_cannot_be_planned_is_not_there(tmp_path):
    def plan() -> None:
        raise ValueError("no audio")

    with pytest.raises(ValueError, match="no audio"):
        make(tmp_path / "data").begin(plan)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_sentence(tmp_path, monkeypatch, code):
    def lockf(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.lockf", lockf)
    with pytest.raises(ValueError, match=r"data/\.lock cannot be locked .*choose a folder on"):
        make(tmp_path / "data").begin([])
    with pytest.raises(ValueError, match="cannot be locked"), exclusive_lock(tmp_path / "cell"):
        pass


def test_what_differs_is_shown_key_by_key_in_any_order(tmp_path):
    old = [{"path": "a", "share": 0.8, "turns": {"x": 1, "y": [{"m": 1, "n": 2}, 3]}}]
    new = [{"turns": {"y": [{"n": 2, "m": 1}, 3], "x": 1}, "share": 0.7, "path": "a"}]
    make(tmp_path / "data", datasets=old, seed=1).begin()
    with pytest.raises(ValueError, match=r"differs: datasets\.0\.share: 0\.8 there, 0\.7 now\. "):
        make(tmp_path / "data", datasets=new, seed=1).begin()
    with pytest.raises(ValueError, match=r"differs: datasets\.1\.a: absent there, 1 now\. "):
        make(tmp_path / "data", datasets=[*old, {"a": 1}], seed=1).begin()


def test_a_lock_keeps_other_processes_out_and_ends_with_its_block(tmp_path):
    code = (
        "import sys; from pathlib import Path; from speechfuse import locks\n"
        "with locks.exclusive_lock(Path(sys.argv[1]), wait=False) as inside:\n"
        "    sys.exit(0 if inside else 3)\n"
    )
    with exclusive_lock(tmp_path / "cache") as inside:
        assert inside and run_python(code, tmp_path / "cache") == 3
    assert run_python(code, tmp_path / "cache") == 0


def test_moving_aside_takes_the_next_free_name(tmp_path):
    for text in ("first", "second"):
        (tmp_path / "a.jsonl").write_text(text)
        artifact.move_aside(tmp_path / "a.jsonl")
    assert tree(tmp_path) == {"a.jsonl.old-1": b"first", "a.jsonl.old-2": b"second"}


def test_values_are_taken_at_equal_distances():
    assert artifact.take_evenly(range(10), 4) == [0, 2, 5, 7]
    assert artifact.take_evenly("abc", 7) == ["a", "b", "c"] and artifact.take_evenly([], 3) == []


def test_asking_whether_it_is_complete_refuses_the_same_and_writes_nothing(tmp_path):
    out = tmp_path / "data"
    assert not make(out).complete() and not out.exists()
    complete(out)
    before = tree(out)
    assert make(out).complete()
    with pytest.raises(ValueError, match="what differs: seed"):
        make(out, seed=2).complete()
    assert tree(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="no job made it"):
        make(tmp_path / "other").complete()


def test_a_kill_inside_a_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    code = (
        "import os, signal, sys; from pathlib import Path; from speechfuse import artifact\n"
        "os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "artifact.write_atomic(Path(sys.argv[1]), 'new')\n"
    )
    assert run_python(code, path) == -signal.SIGKILL
    assert path.read_text() == "old"
    assert run_python(code, tmp_path / "first") == -signal.SIGKILL
    assert not (tmp_path / "first").exists()


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), artifact.replacing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert tree(tmp_path) == {}
    with artifact.replacing(tmp_path / "file") as temporary:
        temporary.write_text("whole")
        assert not (tmp_path / "file").exists() and temporary.parent == tmp_path
    assert tree(tmp_path) == {"file": b"whole"}


def test_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    artifact.write_json(tmp_path / "a.json", {"b": 1, "a": "\u00fc"})
    assert calls == ["fsync", "replace"]
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n "a": "\u00fc",\n "b": 1\n}\n'


def test_what_is_not_an_artifact_is_said_so(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        artifact.fingerprint_of(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        artifact.manifest_of(tmp_path)
    (tmp_path / "manifest.json").write_text('{"half')
    with pytest.raises(ValueError, match=r"manifest\.json is not readable JSON"):
        artifact.manifest_of(tmp_path)


def test_the_fingerprint_of_files_is_their_paths_and_sizes(tmp_path, monkeypatch):
    for root in ("one", "two"):
        for name, text in [("b/c.wav", "12"), ("a.wav", "1")][:: 1 if root == "one" else -1]:
            artifact.write_atomic(tmp_path / root / name, text)
    one = artifact.fingerprint_of_files(tmp_path / "one")
    assert one == artifact.fingerprint_of_files(tmp_path / "two")
    listing = Path.rglob
    with monkeypatch.context() as patch:  # another file system, another order
        patch.setattr(Path, "rglob", lambda *args: reversed(list(listing(*args))))
        assert one == artifact.fingerprint_of_files(tmp_path / "one")
    (tmp_path / "two" / "a.wav").write_text("12")
    longer = artifact.fingerprint_of_files(tmp_path / "two")
    (tmp_path / "two" / "a.wav").write_text("1")
    (tmp_path / "two" / "a.wav").rename(tmp_path / "two" / "d.wav")
    renamed = artifact.fingerprint_of_files(tmp_path / "two")
    assert len({one, longer, renamed}) == 3
    (tmp_path / "empty").mkdir()
    for bad in ("empty", "absent"):
        with pytest.raises(ValueError, match=bad):
            artifact.fingerprint_of_files(tmp_path / bad)
