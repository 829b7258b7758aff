"""Artifacts: folders that a job writes once, resumes after a stop, and never overwrites.

In: the folder, the job's name and version, its resolved config, and the fingerprints of its inputs.
Out: plan.json when work starts (then frozen) and manifest.json when it is complete: the manifest is
written last, by rename, and its existence is the only meaning of "complete". A job reads

    artifact = Artifact(out, "tokenize_speech", 1, dataclasses.asdict(config), {"corpus": "..."})
    if artifact.begin(plan, config.fresh):
        ...                                    # skip what artifact.plan says and disk already holds
        artifact.finish({"rows": 10}, outputs)
"""

import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

# where and how a job runs; none of these may change the bytes it writes
_NOT_IDENTITY = ("out", "fresh", "runtime")
_LIBRARIES = (
    "speechfuse",
    "torch",
    "torchtune",
    "torchao",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "pyarrow",
    "numpy",
    "soundfile",
    "soxr",
    "openai-whisper",
    "vector-quantize-pytorch",
    "lm_eval",
    "peft",
    "huggingface_hub",
    "datasketch",
    "py3langid",
    "num2words",
)


class Artifact:
    """One folder written by one job. `plan` is the frozen plan once `begin` has returned True."""

    plan: Any

    def __init__(
        self, out: Path, job: str, version: int, config: dict[str, Any], inputs: dict[str, str]
    ):
        self.out = Path(out)
        self.plan = None
        self._identity = {
            "job": job,
            "version": version,
            "config": {key: _portable(config[key]) for key in config if key not in _NOT_IDENTITY},
            "inputs": dict(inputs),
        }
        self._config = _portable(config)
        text = json.dumps(self._identity, sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def begin(self, plan: Any = None, fresh: bool = False) -> bool:
        """Say whether there is work to do: False when this very artifact is already complete.

        Absent: `plan` (JSON-able, or a function that makes it) is frozen in plan.json. Incomplete:
        its frozen plan is read back, and none is made.
        `fresh` first moves whatever is there aside, to <out>.old-1, -2, ... Raises ValueError when
        the folder was written from another job, config or inputs, or by no job at all, and when
        files that its manifest lists are gone.
        """
        if fresh and self.out.exists():
            self._lock()  # what is at work there would go on by path, in the new folder
            self._move_aside()
        frozen = self.out / "plan.json"
        if self.complete():
            print(f"{self.out}: complete, nothing to do")
            return False
        if not frozen.exists():
            made = plan() if callable(plan) else plan
            record = {**self._record(), "plan": made, "started": _now()}
            write_json(frozen, record)
        self._lock()
        self.plan = _read(frozen)["plan"]
        return True

    def complete(self) -> bool:
        """Whether this very artifact is complete. Refuses what `begin` would refuse, also a folder
        where another process is at work, and writes nothing."""
        frozen, manifest = self.out / "plan.json", self.out / "manifest.json"
        for path in (manifest, frozen):
            if path.exists():
                self._refuse_other(path)
        if manifest.exists():
            self._refuse_missing()
            return True
        if frozen.exists():
            if (self.out / ".lock").exists():
                self._lock()
                self._held.close()
        elif self.out.is_dir() and any(p.name[0] != "." for p in self.out.iterdir()):
            raise ValueError(
                f"out={self.out} is not empty and no job made it (it holds no plan.json and no "
                "manifest.json): choose another out=..., or fresh=true to move it aside"
            )
        return False

    def started(self) -> bool:
        """Whether work has begun: what it was begun with is frozen."""
        return bool(self.record())

    def record(self) -> dict[str, Any]:
        """What was frozen when work began; see record_of."""
        return record_of(self.out)

    def _lock(self) -> None:
        """Keep other processes out until this one ends: two runs in one folder would mix their
        files."""
        self._held = open(self.out / ".lock", "w")
        try:
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out={self.out}: another process is at work there; wait for it, or "
                "choose another out=..."
            ) from None

    def finish(self, totals: dict[str, Any], outputs: list[Path]) -> None:
        """Write manifest.json, which completes the artifact.

        `totals` is JSON (hours, rows, rejected by reason...); `outputs` are files under `out`,
        listed by relative path with their sha256. Raises ValueError for one outside of it, and
        FileNotFoundError.
        """
        hashes = {}
        for path in outputs:
            if not path.absolute().is_relative_to(self.out.absolute()):
                raise ValueError(f"output {path} is outside the artifact's folder {self.out}")
            relative = path.absolute().relative_to(self.out.absolute())
            hashes[relative.as_posix()] = sha256_of(path)
        record = {
            **self._record(),
            "libraries": _libraries(),
            "git": _commit(),
            "outputs": hashes,
            "totals": totals,
            "started": _read(self.out / "plan.json")["started"],
            "finished": _now(),
        }
        write_json(self.out / "manifest.json", record)
        (self.out / ".lock").unlink()
        self._held.close()

    def _record(self) -> dict[str, Any]:
        return {**self._identity, "config": self._config, "fingerprint": self.fingerprint}

    def _refuse_missing(self) -> None:
        listed = _read(self.out / "manifest.json").get("outputs", {})
        if lost := [name for name in sorted(listed) if not (self.out / name).exists()]:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise ValueError(
                f"out={self.out} was complete, but {lost[0]}{more} of its manifest is gone: put it "
                "back, or fresh=true, which moves the folder aside and makes all of it again"
            )

    def _refuse_other(self, path: Path) -> None:
        there = _read(path)
        if there.get("fingerprint") == self.fingerprint:
            return
        old, new = _flat(there), _flat(self._identity)
        differ = [
            f"{key.removeprefix('config.')}: {_shown(old, key)} there, {_shown(new, key)} now"
            for key in sorted(old.keys() | new.keys())
            if _shown(old, key) != _shown(new, key)
        ]
        raise ValueError(
            f"out={self.out} was made from something else; what differs: "
            f"{'; '.join(differ) or 'the fingerprint alone'}. "
            "Choose another out=..., or fresh=true, which moves the old folder aside "
            f"(to {self._aside().name}) and starts anew"
        )

    def _aside(self) -> Path:
        number = 1
        while (aside := self.out.with_name(f"{self.out.name}.old-{number}")).exists():
            number += 1
        return aside

    def _move_aside(self) -> None:
        aside = self._aside()
        os.rename(self.out, aside)
        (aside / ".lock").unlink()
        print(f"{self.out}: moved aside to {aside}")


def record_of(folder: Path) -> dict[str, Any]:
    """What a job froze when it began to write `folder`: job, version, config, inputs, fingerprint,
    plan and time; {} where none has."""
    path = folder / "plan.json"
    return _read(path) if path.exists() else {}


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a complete artifact; else ValueError with what is missing and the cure."""
    if (folder / "manifest.json").exists():
        return _read(folder / "manifest.json")
    if (folder / "plan.json").exists():
        job = _read(folder / "plan.json").get("job")
        raise ValueError(
            f"{folder} is incomplete (no manifest.json): the job '{job}' was started "
            f"but did not finish; run it again with out={folder} to resume"
        )
    what = "holds no manifest.json" if folder.exists() else "does not exist"
    raise ValueError(
        f"{folder} {what}: it is not a finished artifact; check the path, or first "
        "run the job that writes it"
    )


def fingerprint_of(folder: Path) -> str:
    """The fingerprint of a complete artifact, 64 hex digits; else ValueError as `manifest_of`."""
    return manifest_of(folder)["fingerprint"]


def fingerprint_of_files(folder: Path) -> str:
    """A fingerprint of raw data: sha256 of the sorted relative paths and sizes of all files below.

    File contents are not read. Raises ValueError when the folder is missing or holds no file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; check the path of the data")
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not files:
        raise ValueError(f"{folder} holds no files; check the path of the data")
    sizes = sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in files)
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_digest(modules: Iterable[str]) -> str:
    """A hash of the source files of imported `modules`; an edit of any changes it."""
    files = sorted({str(sys.modules[module].__file__) for module in modules})
    return hashlib.sha256("".join(sha256_of(Path(file)) for file in files).encode()).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; when the block succeeds, rename it to `path`.

    The bytes reach the disk before the name does, so `path` is whole or as it was. When the block
    raises, the temporary file is removed. Creates the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file that is whole or absent, never half; text is UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with sorted keys, one-space indent and a final newline."""
    write_atomic(path, json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); move the folder aside") from error


def _portable(value: Any) -> Any:
    """Config as JSON without absolute paths: relative to the current directory, else .../name."""
    if isinstance(value, dict):
        return {str(key): _portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and os.path.isabs(value) and "\n" not in value:
        path = Path(value)
        inside = path.is_relative_to(Path.cwd())
        return path.relative_to(Path.cwd()).as_posix() if inside else f".../{path.name}"
    return value


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of what makes the identity, from an identity, a plan or a manifest."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if not prefix and key not in ("job", "version", "config", "inputs"):
            continue
        if prefix == "config." and key in _NOT_IDENTITY:
            continue
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False) if key in flat else "absent"


def _libraries() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """Commit of the checkout that holds this file, -dirty if it was changed; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def id_digest(id: str) -> int:
    """64 bits of an id: eight bytes an item are kept where all ids would fill the memory. Two ids
    of ten million share one with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest())
