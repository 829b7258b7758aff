"""Let the disk refuse at every kind of write of four jobs, and go on.

    just prove faults                   (about 8 minutes on two cores; needs gcc)

tests/refusing_disk.c counts what tokenize, expand, train (with the export of two epochs) and push
write below one folder, whichever library writes it, and makes the n-th write and all that follow
fail: with ENOSPC and EIO (any write), EROFS and EACCES (what opens, renames or makes a folder).
Each job must end with exit status 2 and one sentence, or do without that write; started again it
must end with the result of a run that was left alone, and without making finished shards again. The
last line counts.
"""

import errno
import gc
import json
import mmap
import os
import runpy
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from speechfuse import failures
from tests.hub_server import HubServer
from tests.small_jobs import Job

ERRNOS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES)
PLACES = {"tokenize": 6, "expand": 5, "train": 8, "push": 3}  # of each errno, at equal distances
ALL, NAMES = 0, 1  # which writes count
NEVER = 1 << 60
INLINE = "runtime.engine._component_=tests.prove_artifact.here"  # no process has to be started


def restart(folder: Path) -> None:
    """Start this program again with the library that refuses, made here."""
    library = folder / "refusing_disk.so"
    source = Path(__file__).with_name("refusing_disk.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    (folder / "numbers").write_bytes(bytes(40))
    (folder / "disk").mkdir()
    own = {"REFUSING_DISK": str(folder / "numbers"), "REFUSED_FOLDER": str(folder / "disk")}
    own |= {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *sys.argv[1:]]
    with HubServer({"good": "me"}) as hub:
        own |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "good", "HF_HOME": str(folder / "disk/hf")}
        root = Path(__file__).parent.parent
        sys.exit(subprocess.run(command, env={**os.environ, **own}, cwd=root).returncode)


class Disk:
    """The folder whose writes are counted and refused."""

    def __init__(self) -> None:
        self.folder = Path(os.environ["REFUSED_FOLDER"])
        with open(os.environ["REFUSING_DISK"], "r+b") as file:
            self._numbers = mmap.mmap(file.fileno(), 40)

    def run(self, job: Job, out: Path, place: int, code: int, which: int) -> tuple[int, str, int]:
        """Run a job in a fork of this process, refused from `place` on. Returns its exit status,
        what it printed on stderr, and how many places it had."""
        log = self.folder.with_name("log")
        sys.stdout.flush()
        self.refuse(place, code, which)
        if not (child := os.fork()):
            self._child(job, out, log)
        _, status = os.waitpid(child, 0)
        places = self.refuse(0, 0, ALL)
        return os.waitstatus_to_exitcode(status), log.read_text("utf-8", "replace"), places

    def refuse(self, place: int, code: int, which: int) -> int:
        """Refuse writes from `place` on; 0: none. Returns how many there were since the last
        call."""
        places = struct.unpack("5q", self._numbers[:])[2]
        self._numbers[:] = struct.pack("5q", place, code, 0, which, 0)
        return places

    def _child(self, job: Job, out: Path, log: Path) -> None:
        status = 1
        try:
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            sys.argv = job.command(out)[2:]
            runpy.run_module(job.module, run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)


def finished(out: Path) -> dict[str, int]:
    """What is whole in a folder: shards and epochs, by name, with the time they were written."""
    paths = [*out.glob("shard-*.parquet"), *out.glob("epoch_*")]
    return {path.name: path.stat().st_mtime_ns for path in paths}


def fault(disk: Disk, job: Job, out: Path, place: int, code: int, which: int) -> str:
    """Return what was wrong with a job that is refused at `place`, "" where nothing was."""
    status, errors, _ = disk.run(job, out, place, code, which)
    lines = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("error:")]
    if "Traceback" in errors or (status, len(lines)) not in ((2, 1), (0, 0)):
        return f"exit {status}, {len(lines)} sentences: {errors[-2500:]}"
    if not status:
        print("    (it did without that write)")
    whole = finished(out)
    status, errors, _ = disk.run(job, out, 0, 0, ALL)
    if status:
        return f"does not go on: {errors[-1500:]}"
    now = finished(out)
    if again := [name for name, written in whole.items() if now.get(name) != written]:
        return f"{again[0]} is made again"
    print(f"    {lines[0] if lines else ''}"[:200])
    return ""


def jobs_of(folder: Path, names: list[str]) -> dict[str, Job]:
    """The jobs; all that they write is below their out's folder."""
    from tests.small_jobs import make
    from tests.small_training import make_parts

    jobs = make(folder, [name for name in names if name != "push"])
    if "tokenize" in jobs:
        jobs["tokenize"].arguments.append(INLINE)
    if "train" in jobs:
        jobs["train"].arguments[1:] = ["epochs=2", "runtime.state_every=8"]
    if "push" in names:
        make_parts(folder / "to push")
        jobs["push"] = Push("stages.push_to_hub", [str(folder / "to push/speech")], fingerprint)
    return jobs


class Push(Job):
    """Each folder goes to a repository of its own."""

    def command(self, out: Path) -> list[str]:
        if not out.exists():
            shutil.copytree(self.arguments[0], out)
        name = f"me/speech-{out.stat().st_ino}-{out.stat().st_ctime_ns}"
        return [sys.executable, "-m", self.module, f"path={out}", f"repo={name}"]


def fingerprint(out: Path) -> str:
    return json.loads(out.with_name(f"pushed-{out.name}.json").read_text())["fingerprint"]


def places_of(total: int, count: int) -> Iterator[int]:
    """`count` of the places 1 ... total, the first and the last among them."""
    for i in range(min(count, total)):
        yield 1 + i * (total - 1) // max(1, min(count, total) - 1)


def prove(names: list[str]) -> tuple[int, int]:
    """Return how many places were right, and how many there were."""
    disk, good, total = Disk(), 0, 0
    jobs = jobs_of(disk.folder.parent, names)
    for name, job in jobs.items():
        reference = None
        for which, codes in ((ALL, ERRNOS[:2]), (NAMES, ERRNOS[2:])):
            out = disk.folder / "whole" / "out"
            command = prepared(job, name, disk.folder / "whole")
            status, errors, most = disk.run(command, out, NEVER, 0, which)
            if status:
                sys.exit(f"{name}: exit {status}: {errors[-2000:]}")
            reference = job.result(out)
            shutil.rmtree(disk.folder / "whole")
            for code in codes:
                for place in places_of(most, PLACES[name]):
                    print(f"{name}, {errno.errorcode[code]} at {place} of {most}:", flush=True)
                    root = disk.folder / "try"
                    command = prepared(job, name, root)
                    wrong = fault(disk, command, root / "out", place, code, which)
                    if not wrong and job.result(root / "out") != reference:
                        wrong = "the result DIFFERS"
                    if wrong:
                        print(f"    WRONG: {wrong}", flush=True)
                    good, total = good + (not wrong), total + 1
                    shutil.rmtree(root, ignore_errors=True)
    return good, total


def write_by_libraries(path: Path) -> dict[str, Callable[[], Any]]:
    """Writes of one file, by the library that writes it."""
    import torch
    import torch.distributed.checkpoint as dcp
    from matplotlib.figure import Figure
    from safetensors.torch import save_file

    values = torch.arange(300_000.0)
    table = pa.table({"x": values.numpy()})
    return {
        "json": lambda: path.write_text(json.dumps([1] * 9000)),
        "numpy": lambda: np.save(path.open("wb"), values.numpy()),
        "pyarrow": lambda: pq.write_table(table, path),
        "pyarrow file": lambda: pa.OSFile(str(path), "wb").write(bytes(99_999)),
        "safetensors": lambda: save_file({"x": values}, path),
        "torch": lambda: torch.save(values, path),
        "torch's checkpoints": lambda: dcp.save({"x": values}, checkpoint_id=path),
        "matplotlib": lambda: Figure().savefig(path, format="png"),
    }


def prove_libraries() -> tuple[int, int]:
    """As `prove`, of single writes: each raises OSError of its path, with the errno."""
    disk, good, total = Disk(), 0, 0
    path = disk.folder / "file"

    def places(write: Callable[[], Any]) -> int:
        disk.refuse(NEVER, 0, ALL)
        write()
        gc.collect()  # what was opened is closed
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return disk.refuse(0, 0, ALL)

    for name, write in write_by_libraries(path).items():
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for place in places_of(places(write), 4):
            for code in ERRNOS[:2]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                raised: BaseException | None = None
                disk.refuse(place, code, ALL)
                try:
                    with failures.writing(path):
                        write()
                except BaseException as error:
                    raised = error
                disk.refuse(0, 0, ALL)
                right = isinstance(raised, OSError) and raised.filename == str(path)
                good, total = good + right, total + 1
                if not right:
                    print(f"{name}, {errno.errorcode[code]} at {place}: {raised!r}")
    return good, total


def prepared(job: Job, name: str, root: Path) -> Job:
    """The job with what else it writes below `root`."""
    root.mkdir()
    if name == "push":
        shutil.rmtree(root.with_name("hf"), ignore_errors=True)
        job.command(root / "out")
    if name == "train":
        return replace(job, arguments=[*job.arguments, f"runtime.cache={root / 'cache'}"])
    return job


def main() -> None:
    if "REFUSING_DISK" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            restart(Path(folder))
    if sys.argv[1:] == ["libraries"]:
        good, total = prove_libraries()
        print(f"{good} of {total} writes: OSError of the path")
        sys.exit(good != total)
    import torch
    import torchtune.training  # noqa: F401
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    names = [name for name in PLACES if name in sys.argv[1:] or not sys.argv[1:]]
    good, total = prove(names)
    print(f"{good} of {total} places: one sentence, finished work kept, the result equal")
    sys.exit(good != total)


if __name__ == "__main__":
    main()
