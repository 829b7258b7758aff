"""The GPU hour: what only a GPU can show, in 8 minutes, on a machine with nothing but a GPU.

    python3 run.py                (in dist/gpu, which `just gpu-bundle` writes; one 141 GB GPU)
    python3 run.py --rehearse     (all of it with tiny shapes on the CPU)

Needs Python 3.12, torch with CUDA and transformers; neither a network nor just nor pip. Packages
that are lacking are unpacked from wheels/ into packages/. Parts run one after the other, the most
valuable first, in processes that are stopped when their time is over; what failed, was stopped or
was not begun is said. Rows are added to recipes/measurements.jsonl as they come: bring that file
back to the clone, where preflight reads it. At the end one table; what the parts printed is in
log.txt. In a clone with a GPU: just bench gpu.
"""

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

START = time.monotonic()
ROOT = next(p for p in Path(__file__).absolute().parents if (p / "pipeline").is_dir())
LIMIT = 475.0  # seconds in all
LEAST = 15.0  # seconds in which a part can achieve something
MODULES = {  # package in wheels/: a module by which one knows that it is there
    "torchtune": "torchtune",
    "torchao": "torchao",
    "torchdata": "torchdata",
    "omegaconf": "omegaconf",
    "pyarrow": "pyarrow",
    "sentencepiece": "sentencepiece",
    "tiktoken": "tiktoken",
    "pillow": "PIL",
    "psutil": "psutil",
    "tensorboard": "tensorboard",
    "protobuf": "google.protobuf",
    "absl-py": "absl",
    "openai-whisper": "whisper",
    "espeakng-loader": "espeakng_loader",
    "soundfile": "soundfile",
    "cffi": "cffi",
    "soxr": "soxr",
}
STAND_INS = {  # torchtune and whisper import them; nothing that is run here calls them
    "datasets/__init__.py": "load_dataset = None\n",
    "datasets/distributed.py": "split_dataset_by_node = None\n",
    "numba/__init__.py": "def jit(*_, **__):\n    return lambda function: function\n",
}
CHECKS = {  # seconds
    "flex = dense": 60,
    "compile = eager": 60,
    "packed = unpacked": 40,
    "fused = plain cross-entropy": 20,
    "1B on the GPU = CPU": 60,
}
TRAININGS = [("8b", "bf16"), ("8b", "bf16, transformers' builder"), ("8b", "fp32 master")]
TRAININGS += [("8b", "seed, stage 1"), ("8b", "seed, stage 2")]
MORE_TRAININGS = [
    ("8b", "fp32 master, 8-bit moments"),
    ("8b", "bf16, half recomputed"),
    ("8b", "bf16, all recomputed"),
    ("1b", "bf16"),
    ("1b", "fp32 master"),
    ("8b", "bf16, stage 2"),
    ("8b", "bf16, dense"),
    ("8b", "bf16, not compiled"),
]
Unit = dict[str, Any]


def units() -> list[Unit]:
    """All that is measured, the most valuable first; `limit` in seconds."""

    def trainings(cases: list[tuple[str, str]]) -> list[Unit]:
        return [
            {"part": "train", "unit": f"{s}: {n}", "size": s, "name": n, "limit": 110}
            for s, n in cases
        ]

    def tokenizing(only: str, batch: int, clips: int) -> Unit:
        name = f"Whisper medium, batch {batch}: {only}"
        sizes = {"only": only, "batch": batch, "clips": clips, "limit": 60}
        return {"part": "tokenize", "unit": name} | sizes

    return [
        *({"part": name, "unit": name, "limit": limit} for name, limit in CHECKS.items()),
        *trainings(TRAININGS),
        {"part": "kill and resume", "unit": "kill and resume", "limit": 90},
        tokenizing("pipeline", 64, 512),
        *(tokenizing("encode", batch, 32) for batch in (1, 8, 32, 64, 128)),
        {"part": "latency", "unit": "8b: first token", "limit": 60},
        *trainings(MORE_TRAININGS),
    ]


def lacks(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:
        return True


def unpack() -> Path:
    """The folder of packages that this Python lacks. Exits where it has no torch or transformers,
    or needs a wheel that is not here or is for another Python."""
    for module in ("torch", "transformers"):
        if lacks(module):
            sys.exit(f"error: {sys.executable} has no {module}: take a Python that has it")
    packages = ROOT / "packages"
    packages.mkdir(exist_ok=True)
    for package, module in MODULES.items():
        if not lacks(module):
            continue
        (wheel, *_) = [*ROOT.glob(f"wheels/{package.replace('-', '_')}-*.whl"), None]
        if wheel is None:
            sys.exit(f"error: {module} is not installed and wheels/ has no {package}")
        if "-cp312-cp312-" in wheel.name and sys.version_info[:2] != (3, 12):
            sys.exit(f"error: {wheel.name} is for Python 3.12, this is {sys.version.split()[0]}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
    for name, text in STAND_INS.items():
        if lacks(name.split("/")[0]):
            (packages / name).parent.mkdir(exist_ok=True)
            (packages / name).write_text(text)
    return packages


def raise_loopback() -> None:
    """Put up the interface to this machine itself, which process groups need, where there is no
    network at all and it is down (unshare -n). Says so where that is not allowed."""
    get, put, up, layout = 0x8913, 0x8914, 1, "16sH14x"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            asked = fcntl.ioctl(any_socket, get, struct.pack(layout, b"lo", 0))
            flags = struct.unpack(layout, asked)[1]
            if not flags & up:
                fcntl.ioctl(any_socket, put, struct.pack(layout, b"lo", flags | up))
        except OSError as error:
            print(f"the loopback interface is down ({error}): parts will fail", file=sys.stderr)


def environment(packages: Path) -> dict[str, str]:
    code = [ROOT / "pipeline", ROOT, packages]
    path = os.pathsep.join([*map(str, code), *filter(None, [os.environ.get("PYTHONPATH")])])
    # as speechfuse.train.config.set_allocator, which would need packages to be imported
    allocator = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return (
        allocator
        | os.environ
        | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    )


class Process:
    """A process with units of its own, and the lines it has written of them."""

    def __init__(
        self, command: list[str], todo: list[Unit], env: dict[str, str], log: Path
    ) -> None:
        self.results, self.log, self.taken = Path(tempfile.mkstemp(suffix=".jsonl")[1]), log, 0
        arguments = [str(self.results), *map(json.dumps, todo)]
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                env=env,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def next(self, until: float) -> Unit | None:
        """Its next line; None when it has ended, or at the moment `until`."""
        while True:
            ended = self.process.poll() is not None
            lines = self.results.read_text().splitlines(keepends=True)
            if len(lines) > self.taken and lines[self.taken].endswith("\n"):
                self.taken += 1
                return json.loads(lines[self.taken - 1])
            if ended or time.monotonic() > until:
                return None
            time.sleep(0.05)

    def last_words(self) -> str:
        """How it ended, and the last line that it printed."""
        lines = self.log.read_text("utf-8", "replace").strip().splitlines() or [""]
        return f"exit status {self.process.wait()}, {lines[-1][:200]}"

    def kill(self) -> None:
        """End it and all that it has started, compilers too."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.results.unlink(missing_ok=True)


def run(
    todo: list[Unit], command: list[str], env: dict[str, str], log: Path, deadline: float
) -> Iterator[Unit]:
    """Yield the row of every unit: {unit, seconds, and either measured, or not: what happened}.

    One process takes unit after unit; after one that fails, or has to be stopped at its limit, the
    next gets another process. A unit that failed in a process that others had used is tried once
    more in a fresh one. Where a process ends before its first unit, none would do better.
    """
    todo, again = list(todo), False
    while todo:
        if deadline - time.monotonic() < LEAST:
            yield from ({**unit, "not": "not begun: the time was over"} for unit in todo)
            return
        # what was used before is not what a second try is to meet
        process, done = Process(command, todo[:1] if again else todo, env, log), 0
        try:
            while todo:
                began, unit = time.monotonic(), todo[0]
                until = min(deadline, began + unit["limit"])
                begun = line = process.next(until)
                if line:
                    line = process.next(until)
                seconds = round(time.monotonic() - began, 1)
                if line is None and process.process.poll() == 0 and done:
                    break  # it ended by itself between two units
                if line is None and process.process.poll() is None:
                    line = {"not": f"stopped after {seconds:.0f} s"}
                elif begun is None:
                    reason = f"not begun: no process starts: {process.last_words()}"
                    yield from ({**unit, "not": reason} for unit in todo)
                    return
                elif line is None or "failed" in line:
                    reason = line["failed"] if line else process.last_words()
                    if done and not again:
                        again = True
                        break
                    line = {"not": f"failed: {reason}"}
                todo.pop(0)
                done, again = done + 1, False
                yield {**unit, **line, "seconds": seconds}
                if "not" in line:
                    break
        finally:
            process.kill()


def table(rows: list[Unit]) -> str:
    lines = ["| part | measured | said or wanted | | s |", "|---|---|---|---|---|"]
    for row in rows:
        good = {True: "yes", False: "NO", None: ""}[row.get("ok")]
        text = row.get("not", row.get("measured"))
        seconds = row.get("seconds", "")
        lines.append(f"| {row['unit']} | {text} | {row.get('beside', '')} | {good} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    rehearse = sys.argv[1:] == ["--rehearse"]
    if sys.argv[1:] and not rehearse:
        sys.exit(f"error: {' '.join(sys.argv[1:])}: the one argument that there is is --rehearse")
    raise_loopback()
    env = environment(unpack())
    if not rehearse:
        asked = [
            sys.executable,
            "-c",
            "import torch; raise SystemExit(not torch.cuda.is_available())",
        ]
        if subprocess.run(asked, env=env).returncode:
            sys.exit("error: torch finds no GPU here; --rehearse tries all of it on the CPU")
    out, device = ROOT / "recipes/measurements.jsonl", "cpu" if rehearse else "cuda"
    rows: list[Unit] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    log = ROOT / "log.txt"
    log.unlink(missing_ok=True)
    try:
        with out.open("a", buffering=1) as file:
            command = [sys.executable, "-m", "tests.gpu_parts", device]
            # a CPU that others use too may be slow, and a rehearsal is to see every part
            todo = [unit | {"limit": unit["limit"] * (4 if rehearse else 1)} for unit in units()]
            for row in run(todo, command, env, log, START + LIMIT):
                rows.append(row)
                what = row.get("not", row.get("measured"))
                print(f"{row['unit']}: {what}", file=sys.stderr, flush=True)
                about = {"rehearsed": rehearse, "date": time.strftime("%Y-%m-%d")}
                print(json.dumps(row | about), file=file)
    finally:
        print(table(rows))
        lost = sum("not" in row for row in rows)
        wrong = sum(row.get("ok") is False for row in rows)
        tiny = (
            "A REHEARSAL: tiny shapes on the CPU, whose speeds mean nothing. " if rehearse else ""
        )
        print(
            f"\n{tiny}{len(rows)} parts in {time.monotonic() - START:.0f} s, {lost} of them "
            f"without a result, {wrong} not as wanted; rows in {out}, details in {log}"
        )
    sys.exit(bool(lost or wrong))


if __name__ == "__main__":
    main()
