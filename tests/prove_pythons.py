"""Set-up and a smoke run under every Python that is allowed, each in an environment of its own.

    just prove pythons                                  (the first time: minutes and GB for each)
    PYTHONS="/path/to/python3.12 ..." just prove pythons

Tries python3.11, python3.12 and python3.13 of PATH, or the ones that PYTHONS names. Each gets
out/pythons/3.X with the pinned dependencies (kept until a pin changes; remove the folder to try the
set-up again), then runs six test files, which tokenize, change a vocabulary, train, kill and resume
on one and two ranks, and score, and asks every job for its --help. The last lines are a table. A
Python that is not found is said, and is no failure; exit status 1 if one that is fails, or if none
is found.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out/pythons"
PINS = ("pyproject.toml", "constraints.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOUND_BY_NAME = ("python3.11", "python3.12", "python3.13")
FILES = ("tokenizing", "packing", "vocab", "train", "eval_metrics", "choice")


def version(command: str) -> str:
    """3.X.Y of a Python; "" if it does not run: a name on PATH may be a placeholder."""
    try:
        said = subprocess.run(
            [command, "-c", "import platform; print(platform.python_version())"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return ""
    return said.stdout.strip() if said.returncode == 0 else ""


def run(command: list[str], log: Path, **environment: str) -> bool:
    """Whether it ends well; what it says goes to the end of a log, its last lines also here."""
    with log.open("a") as to:
        print("$", shlex.join(command), file=to, flush=True)
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=to,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
    if done.returncode:
        print(*log.read_text().splitlines()[-15:], sep="\n")
    return done.returncode == 0


def set_up(python: str, folder: Path) -> str:
    """As `just setup` does it: "made", "kept" or "failed"."""
    if all((folder / pin).exists() and same(folder / pin, ROOT / pin) for pin in PINS):
        return "kept"
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check"]
    log = folder.with_suffix(folder.suffix + ".setup.log")
    log.unlink(missing_ok=True)
    if not run([python, "-m", "venv", str(folder)], log):
        return "failed"
    if not run([*pip, "-c", "constraints.txt", "-e", ".[dev]"], log):
        return "failed"
    for pin in PINS:
        shutil.copy(ROOT / pin, folder)
    return "made"


def same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def smoke(folder: Path) -> str:
    """ "passed", or what failed."""
    python, log = str(folder / "bin/python"), folder.with_suffix(folder.suffix + ".smoke.log")
    log.unlink(missing_ok=True)
    failed = []
    for job in sorted(path.stem for path in ROOT.glob("stages/[!_]*.py")):
        if not run([python, "-m", f"stages.{job}", "--help"], log):
            failed.append(f"stages.{job}")
    for name in FILES:
        if not run([python, "-m", "pytest", "-q", f"tests/test_{name}.py"], log):
            failed.append(f"test_{name}")
    return "failed: " + ", ".join(failed) if failed else "passed"


def main() -> int:
    asked = os.environ.get("PYTHONS", "").split()
    OUT.mkdir(parents=True, exist_ok=True)
    rows, ran, good = [], False, True
    for command in asked or FOUND_BY_NAME:
        found = version(command)
        if not found:
            rows.append((Path(command).name, "not found" if not asked else "does not run", "", ""))
            good = good and not asked
            continue
        if not SpecifierSet(PROJECT["requires-python"]).contains(found):
            rows.append((found, f"refused: {PROJECT['requires-python']}", "", ""))
            good = False
            continue
        print(f"python {found}", flush=True)
        folder = OUT / ".".join(found.split(".")[:2])
        began = time.monotonic()
        made = set_up(command, folder)
        between = time.monotonic()
        result = "" if made == "failed" else smoke(folder)
        seconds = f"{between - began:.0f} + {time.monotonic() - between:.0f}"
        rows.append((found, made, result, seconds))
        ran, good = True, good and result == "passed"
    print("\n| python | set-up | smoke | seconds |\n|---|---|---|---|")
    for row in rows:
        print("|", " | ".join(row), "|")
    if not ran:
        print("error: no Python that is allowed was found; name them in PYTHONS", file=sys.stderr)
    return 0 if good and ran else 1


if __name__ == "__main__":
    sys.exit(main())
