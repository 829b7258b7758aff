"""Write dist/gpu: this code and the packages that a bare machine with a GPU lacks.

    just gpu-bundle

There: torch with CUDA and transformers, with what these need, in Python 3.12 on Linux x86-64; no
network. bench_gpu.py becomes run.py. Wheels have the versions of constraints.txt; so that all is at
most 55 MB they are packed anew, without the parts of LEFT_OUT.
"""

import fnmatch
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from speechfuse import provenance
from tests.bench_gpu import MODULES

ROOT = Path(__file__).parent.parent
MOST = 55_000_000  # bytes
CODE = ("pipeline", "stages", "recipes", "tests")
NOT_CODE = shutil.ignore_patterns("__pycache__", "*.egg-info", "models", "golden", "*.jsonl")
LEFT_OUT = [  # of pyarrow what neither Parquet nor its tables need; and what is for compilers
    "pyarrow/*flight*",
    "pyarrow/*s3*",
    "pyarrow/libarrow_python.so",
    "pyarrow/libarrow_python.so.*.*",
    "pyarrow/include/*",
    "pyarrow/tests/*",
    "pyarrow/src/*",
    "*.pyx",
    "*.pxd",
    "tensorboard/*.zip",
]
# what pip is to take wheels for: it does not see that a newer manylinux runs an older one's
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 26, 24, 17)] + ["manylinux2014_x86_64"]


def download(folder: Path) -> None:
    """The wheels for Python 3.12, without what they depend on."""
    pins = dict(
        line.split(";")[0].strip().lower().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    pinned = [f"{package}=={pins[package]}" for package in MODULES]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # the one that is published as source alone
    source = [each for each in pinned if each.startswith("openai-whisper")]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", folder, *source], check=True)
    wanted = ["--python-version=3.12", "--implementation=cp", "--only-binary=:all:"]
    wanted += [f"--abi={abi}" for abi in ("cp312", "abi3", "none")]
    wanted += [f"--platform={name}" for name in PLATFORMS]
    binary = [each for each in pinned if each not in source]
    subprocess.run(
        [*pip, "download", "-q", "--no-deps", "-d", folder, *wanted, *binary], check=True
    )


def pack(wheel: Path, out: Path) -> None:
    """Write a wheel anew in LZMA, without LEFT_OUT."""

    def left_out(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in LEFT_OUT)

    with (
        zipfile.ZipFile(wheel) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as new,
    ):
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(x for x in lines if not left_out(x.split(",")[0])).encode()
            if not left_out(info.filename):
                new.writestr(info.filename, content)


def copy_code(out: Path) -> None:
    for folder in CODE:
        shutil.copytree(ROOT / folder, out / folder, ignore=NOT_CODE)
    shutil.copyfile(ROOT / "tests/bench_gpu.py", out / "run.py")
    (out / "commit.txt").write_text(provenance.commit() or "no git checkout")


def main(out: Path = ROOT / "dist/gpu") -> None:
    shutil.rmtree(out, ignore_errors=True)
    copy_code(out)
    (out / "wheels").mkdir()
    with tempfile.TemporaryDirectory() as temporary:
        download(Path(temporary))
        for wheel in sorted(Path(temporary).iterdir()):
            pack(wheel, out / "wheels" / wheel.name)
            print(f"{wheel.name}: {(out / 'wheels' / wheel.name).stat().st_size / 1e6:.1f} MB")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if size > MOST:
        sys.exit(f"error: {out} has {size / 1e6:.1f} MB, more than {MOST / 1e6:g}: leave out more")
    print(f"{out}: {size / 1e6:.1f} MB; copy it to the machine and run there: python3 run.py")


if __name__ == "__main__":
    main()
