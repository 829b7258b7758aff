"""The GPU hour: all of it rehearsed on the CPU without a network; parts that fail, hang or end; the
bundle's wheels."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from speechfuse.train.config import set_allocator
from tests import bench_gpu, bench_tokenize, gpu_bundle

ROOT = Path(__file__).parent.parent
STUB = """
import json, os, sys, time
results, *units = sys.argv[1:]
with open(results, "a", buffering=1) as file:
    for n, unit in enumerate(map(json.loads, units)):
        print(json.dumps({"begin": unit["unit"]}), file=file)
        what = unit["unit"]
        if what == "sleeps": time.sleep(60)
        if what == "dies": print("killed by nobody"); os._exit(9)
        if what == "fails" or what == "needs a fresh one" and n:
            print(json.dumps({"failed": "OutOfMemoryError: x"}), file=file)
            sys.exit(1)
        print(json.dumps({"measured": f"{what}, {n}"}), file=file)
        if what == "last of its process": break
"""


def without_network() -> list[str]:
    """What stands before a command to take its network away; nothing where that is not allowed."""
    for command in (["unshare", "-n"], ["unshare", "-rn"]):
        if not subprocess.run([*command, "true"], capture_output=True).returncode:
            return command
    return []


def test_all_parts_are_rehearsed_on_the_cpu_without_a_network(tmp_path):
    gpu_bundle.copy_code(tmp_path / "gpu")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [*without_network(), sys.executable, "run.py", "--rehearse"]
    done = subprocess.run(command, cwd=tmp_path / "gpu", env=env, capture_output=True, text=True)
    names = [unit["unit"] for unit in bench_gpu.units()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"\n| {name} | " in done.stdout for name in names)
    assert done.stdout.count("| yes |") == 6, "the checks"
    lines = (tmp_path / "gpu/recipes/measurements.jsonl").read_text().splitlines()
    rows = {row["unit"]: row for row in map(json.loads, lines)}
    assert list(rows) == names
    assert all(row["rehearsed"] and row["code"] and "not" not in row for row in rows.values())
    trained = rows["8b: bf16, transformers' builder"]
    assert trained["tokens_per_s"] > 0 and trained["said_gib"] > 0 and trained["gpu"] is None
    assert "bit-equal" in rows["kill and resume"]["measured"]
    assert set(rows["8b: first token"]["latency"]) == {"2 s", "10 s"}


def test_without_a_gpu_nothing_is_measured(tmp_path):
    gpu_bundle.copy_code(tmp_path / "gpu")
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path / "gpu", capture_output=True)
    assert done.returncode == 1 and b"torch finds no GPU here" in done.stderr
    assert not (tmp_path / "gpu/recipes/measurements.jsonl").exists()


def stubbed(tmp_path: Path, names: list[str], seconds: float = 30.0) -> dict[str, str]:
    (tmp_path / "stub.py").write_text(STUB)
    units = [{"unit": name, "limit": 1.0} for name in names]
    command = [sys.executable, str(tmp_path / "stub.py")]
    until = time.monotonic() + seconds
    rows = bench_gpu.run(units, command, dict(os.environ), tmp_path / "log", until)
    return {row["unit"]: row.get("not") or row["measured"] for row in rows}


def test_a_part_that_fails_hangs_or_dies_leaves_the_others(tmp_path):
    """The number is that of the unit in its process."""
    names = ["a", "needs a fresh one", "b", "fails", "c", "sleeps", "dies", "last of its process"]
    assert stubbed(tmp_path, [*names, "d", "e"]) == {
        "a": "a, 0",
        "needs a fresh one": "needs a fresh one, 0",
        "b": "b, 0",
        "fails": "failed: OutOfMemoryError: x",
        "c": "c, 0",
        "sleeps": "stopped after 1 s",
        "dies": "failed: exit status 9, killed by nobody",
        "last of its process": "last of its process, 0",
        "d": "d, 0",
        "e": "e, 1",
    }


def test_parts_for_which_the_time_is_over_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu, "LEAST", 1.0)
    found = stubbed(tmp_path, ["a", "sleeps", "b"], seconds=1.5)
    assert found == {
        "a": "a, 0",
        "sleeps": "stopped after 1 s",
        "b": "not begun: the time was over",
    }


def test_where_no_process_starts_none_is_tried_again(tmp_path):
    log, until = tmp_path / "log", time.monotonic() + 30
    units = [{"unit": name, "limit": 9} for name in "ab"]
    command = [sys.executable, "-c", "import no_such_module"]
    rows = list(bench_gpu.run(units, command, dict(os.environ), log, until))
    reason = "not begun: no process starts: exit status 1, ModuleNotFoundError: No module named "
    assert [row["not"] for row in rows] == [f"{reason}'no_such_module'"] * 2
    assert log.read_text().count("Traceback") == 1


def make_wheel(path: Path, module: str) -> Path:
    files = {f"{module}/__init__.py": "", f"{module}/include/big.h": "x" * 1000}
    record = "".join(f"{name},sha256=0,1\n" for name in files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in {**files, f"{module}-1.dist-info/RECORD": record}.items():
            archive.writestr(name, text)
    return path


def test_wheels_are_packed_without_what_is_not_needed_and_unpacked_where_they_lack(
    tmp_path, monkeypatch
):
    there = tmp_path / "there"
    (there / "wheels").mkdir(parents=True)
    monkeypatch.setattr(bench_gpu, "ROOT", there)
    monkeypatch.setattr(bench_gpu, "MODULES", {"py-lacking": "lacking_here", "numpy": "numpy"})
    with pytest.raises(SystemExit, match=r"lacking_here is not installed and wheels/ has no py-la"):
        bench_gpu.unpack()
    monkeypatch.setattr(gpu_bundle, "LEFT_OUT", ["lacking_here/include/*"])
    wheel = make_wheel(tmp_path / "whole.whl", "lacking_here")
    gpu_bundle.pack(wheel, there / "wheels/py_lacking-1-py3-none-any.whl")
    packages = bench_gpu.unpack()
    assert (packages / "lacking_here/__init__.py").is_file()
    assert not (packages / "lacking_here/include").exists()
    record = (packages / "lacking_here-1.dist-info/RECORD").read_text()
    assert record == "lacking_here/__init__.py,sha256=0,1\n"


def test_every_package_of_the_bundle_is_pinned():
    text = (ROOT / "constraints.txt").read_text().lower()
    assert [name for name in bench_gpu.MODULES if f"\n{name}==" not in text] == []


def test_the_encoders_speed_counts_every_window_of_a_batch(monkeypatch):
    """A batch of 64 windows is 64 clips, also where there are fewer."""
    monkeypatch.setattr(bench_tokenize, "timed", lambda work, device: 1.0)
    options = bench_tokenize.DEFAULTS | {"size": "micro", "clips": "2", "only": "encode, float32"}
    options["repeats"] = "1"
    heard = {
        batch: bench_tokenize.speeds(options | {"batch": batch})[1]["encode, float32"]
        for batch in ("1", "32", "64")
    }
    assert heard["64"] == 2 * heard["32"] == 2 * heard["1"]


def test_a_training_sets_the_allocator_before_torch_is_imported(monkeypatch):
    code = """
import sys
from speechfuse.train.config import Finetune, Runtime
from stages import train
train.set_allocator = lambda: sys.exit("torch" in sys.modules)
job = dict(out="o", checkpoint="c", model={}, datasets=[], seq_len=2, batch_size=1, epochs=1)
train.main(Finetune(**job, optimizer={}, warmup_steps=0, runtime=Runtime(dry_run=True)))
raise SystemExit("it was not called")
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    for name, value in (("PYTORCH_CUDA_ALLOC_CONF", "x:1"), ("PYTORCH_ALLOC_CONF", "x:1")):
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
        monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
        set_allocator()
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
        monkeypatch.setenv(name, value)
        set_allocator()
        assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "x:1") == "x:1"
