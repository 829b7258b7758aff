"""How a job ends: a disk that refuses, whatever library says so; Ctrl-C, once and twice."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed.checkpoint import CheckpointException

from speechfuse import config, failures
from tests.demo_code import FOLDER

ROOT = FOLDER.parent.parent


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "no space", "file"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "quota"), errno.EDQUOT),
        (RuntimeError("serializing: I/O error: No space left (os error 28)"), errno.ENOSPC),
        (OSError("[Errno 30] Error writing bytes. Detail: [errno 30]"), errno.EROFS),
        (RuntimeError("</torch_1>: Input/output error"), errno.EIO),
        (OSError("5 requested and 0 written"), errno.ENOSPC),
        (RuntimeError("inline_container.cc:603] . unexpected pos 704 vs 598"), errno.ENOSPC),
        (caused(RuntimeError("not saved"), OSError(errno.EIO, "disk")), errno.EIO),
        (CheckpointException("w", {1: (OSError(errno.EROFS, "ro"), None)}), errno.EROFS),
        (OSError(errno.ENOENT, "no such file", "x"), None),
        (RuntimeError("a bug"), None),
    ],
)
def test_the_errno_behind_an_error_of_any_library(tmp_path, error, code):
    assert failures.errno_of(error) == code
    with pytest.raises(BaseException) as caught, failures.writing(tmp_path / "f"):
        raise error
    if code is None:
        assert caught.value is error
    else:
        assert isinstance(caught.value, OSError)
        assert (caught.value.errno, caught.value.filename) == (code, str(tmp_path / "f"))
        words = failures.sentence(caught.value)
        assert words and words.startswith(f"{tmp_path / 'f'}: {failures.DISK[code]} and run again")


def test_a_sentence_of_ours_stays_as_it_is(tmp_path):
    with pytest.raises(ValueError, match=r"^ours$"), failures.writing(tmp_path):
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError as error:
            raise ValueError("ours") from error


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_every_library_that_writes_names_the_path_when_the_disk_refuses():
    command = [sys.executable, "tests/prove_faults.py", "libraries"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    good, total = done.stdout.split()[0:3:2]
    assert good == total and int(total) > 30


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}/pipeline:{ROOT}", "OMP_NUM_THREADS": "1"}


JOB = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
from speechfuse import workers
from speechfuse.config import main

@dataclass
class Config:
    out: str
    deaf: bool = False

def wait(folder):
    import os
    Path(folder, str(os.getpid())).touch()
    time.sleep(60)

def job(config):
    if config.deaf:
        Path(config.out, str(1)).touch()
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pass
    for _ in workers.processes(wait, [(config.out,)] * 2, 2, "cpu"):
        pass

if __name__ == "__main__":
    main(job, Config, "Wait.")
"""


@pytest.mark.parametrize(("deaf", "times"), [(False, 1), (False, 2), (True, 2)])
def test_ctrl_c_ends_the_job_and_its_workers(tmp_path, deaf, times):
    """deaf: what runs in the main thread goes on after the first."""
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "pids").mkdir()
    process = subprocess.Popen(
        [sys.executable, "job.py", f"out={tmp_path / 'pids'}", f"deaf={deaf}"],
        cwd=tmp_path,
        env=environment(),
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(list((tmp_path / "pids").iterdir())) < (1 if deaf else 2):
        assert process.poll() is None
        time.sleep(0.01)
    began = psutil.Process(process.pid).children(recursive=True)
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=20)
    said = "" if deaf else f"{config.INTERRUPTED}\n"
    assert process.returncode == 130 and errors in (said, said * (times == 1))
    _, left = psutil.wait_procs(began, 5)
    assert not left


def test_a_killed_torchrun_takes_its_ranks_with_it(tmp_path):
    (tmp_path / "rank.py").write_text(
        "import os, time; from pathlib import Path; from speechfuse import failures\n"
        "failures.end_with_parent()\n"
        "Path(str(os.getpid())).touch()\n"
        "time.sleep(60)\n"
    )
    code = "import subprocess, sys; subprocess.run([sys.executable, 'rank.py'])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment())
    while not (ranks := [p for p in tmp_path.iterdir() if p.suffix == ""]):
        time.sleep(0.01)
    rank = psutil.Process(int(Path(ranks[0]).name))
    process.kill()
    process.wait()
    rank.wait(5)
