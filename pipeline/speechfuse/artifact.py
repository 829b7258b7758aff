"""Artifacts: folders that a job writes once, resumes after a stop, and never overwrites. A second
start of a complete artifact does nothing; one that was made from another config or from other
inputs is refused.

In: the folder, the job's name and version, its resolved config, and the fingerprints of its inputs.
Out: plan.json, which is written when work starts and then never changes, and manifest.json, which
is written last, by rename. An artifact is complete if and only if its manifest.json exists. A job
has this form:

    artifact = Artifact(out, "tokenize_speech", 1, dataclasses.asdict(config), {"corpus": "..."})
    if artifact.begin(plan, config.fresh):
        ...                                    # make what artifact.plan lists and the folder lacks
        artifact.finish({"rows": 10}, outputs)

A job that resumes takes every file that it finds in the folder for whole, because a file gets its
name only when all of it is on disk (see `replacing`). A job that reads a complete artifact trusts
its manifest. Only stages.verify and a push to the Hub read all files again and compare their
sha256.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from speechfuse import failures, provenance
from speechfuse.locks import exclusive_lock
from speechfuse.provenance import NOT_IDENTITY

T = TypeVar("T")


class Artifact:
    """One folder written by one job. `plan` is the frozen plan once `begin` has returned True."""

    def __init__(
        self, out: Path, job: str, version: int, config: dict[str, Any], inputs: dict[str, str]
    ):
        self.out = Path(out)
        self.plan: Any = None
        self._locks, self._alone = ExitStack(), False
        self._config = provenance.portable(config)
        own = {key: v for key, v in self._config.items() if key not in NOT_IDENTITY}
        self._identity = {"job": job, "version": version, "config": own, "inputs": dict(inputs)}
        text = json.dumps(self._identity, sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def begin(self, plan: Any = None, fresh: bool = False) -> bool:
        """Return whether there is work to do: False when this very artifact is already complete.

        If the folder is absent, `plan` (JSON, or a function that returns it) is frozen in
        plan.json; if it is incomplete, the frozen plan is read back. `fresh` first moves whatever
        is there aside, to <out>.old-1, -2, ... Raises ValueError when the folder was written by
        another job, from another config or other inputs, or by no job at all, when files that its
        manifest lists are gone, and when another process is at work in it.
        """
        if fresh and self.out.exists():
            self._lock()  # or a job at work there would go on writing, into the new folder
            aside = move_aside(self.out)
            self._release(aside)
            print(f"{self.out}: moved aside to {aside}")
        begun = False
        if not self.complete():
            self._lock()
            try:  # look again, now that no other process can begin or finish it
                begun = not self.complete() and self._freeze(plan)
            finally:
                if not begun:
                    self._release(self.out)
        if not begun:
            print(f"{self.out}: complete, nothing to do")
        return begun

    def complete(self) -> bool:
        """Return whether this very artifact is complete, without writing anything. Raises
        ValueError as `begin` does."""
        frozen, manifest = self.out / "plan.json", self.out / "manifest.json"
        for path in (manifest, frozen):
            if path.exists():
                self._refuse_other(path)
        if manifest.exists():
            self._refuse_missing()
            return True
        if frozen.exists():
            if not self._alone and (self.out / ".lock").exists():
                self._lock()
                self._unlock()
        elif self.out.is_dir() and any(p.name[0] != "." for p in self.out.iterdir()):
            raise ValueError(
                f"out={self.out} is not empty and no job made it (it holds no plan.json and no "
                "manifest.json): choose another out=..., or fresh=true to move it aside"
            )
        return False

    def started(self) -> bool:
        """Return whether a job has begun to write the folder: whether it holds plan.json."""
        return bool(self.record())

    def record(self) -> dict[str, Any]:
        """Return what was frozen in plan.json when work began, see record_of."""
        return record_of(self.out)

    def _freeze(self, plan: Any) -> bool:
        """Write plan.json unless it is there, and take the plan in it. Returns True."""
        path = self.out / "plan.json"
        if not path.exists():
            record = {**self._record(), "plan": plan() if callable(plan) else plan}
            record |= {"git": provenance.commit(), "libraries": provenance.libraries()}
            write_json(path, record | {"started": provenance.now()})
        self.plan = _read(path)["plan"]
        return True

    def _lock(self) -> None:
        """Keep other processes out until `_release`, or until this one ends: two runs in one folder
        would mix their files. Raises ValueError when another process is at work there."""
        self._alone = self._locks.enter_context(exclusive_lock(self.out, wait=False))
        if not self._alone:
            raise ValueError(
                f"out={self.out}: another process is at work there; wait for it, or "
                "choose another out=..."
            )

    def _unlock(self) -> None:
        self._locks.close()
        self._alone = False

    def _release(self, folder: Path) -> None:
        """Let other processes in. A `folder` in which nothing was begun goes."""
        (folder / ".lock").unlink()
        self._unlock()
        with suppress(OSError):  # it is not empty
            folder.rmdir()

    def finish(self, totals: dict[str, Any], outputs: list[Path]) -> None:
        """Write manifest.json, which completes the artifact.

        `totals` is JSON (hours, rows, rejected by reason...); `outputs` are files under `out`,
        listed by relative path with their sha256. Raises ValueError for an output outside of `out`,
        and FileNotFoundError for one that does not exist.
        """
        hashes, frozen = {}, self.record()
        for path in outputs:
            if not path.absolute().is_relative_to(self.out.absolute()):
                raise ValueError(f"output {path} is outside the artifact's folder {self.out}")
            relative = path.absolute().relative_to(self.out.absolute())
            hashes[relative.as_posix()] = sha256_of(path)
            flush(path)
        made_by = {"git": provenance.commit(), "libraries": provenance.libraries()}
        planned = {name: frozen.get(name) for name in made_by}
        times = {"started": frozen["started"], "finished": provenance.now()}
        content = {"outputs": hashes, "totals": totals, "planned": planned}
        write_json(self.out / "manifest.json", {**self._record(), **made_by, **content, **times})
        self._release(self.out)

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
        differ = provenance.differences(there, self._identity)
        raise ValueError(
            f"out={self.out} was made from something else; what differs: "
            f"{'; '.join(differ) or 'the fingerprint alone'}. "
            "Choose another out=..., or fresh=true, which moves the old folder aside "
            f"(to {_aside(self.out).name}) and starts anew"
        )


def record_of(folder: Path) -> dict[str, Any]:
    """Return what a job froze in plan.json when it began to write `folder`: job, version, config,
    inputs, fingerprint, plan and time. Returns {} when no job has begun."""
    path = folder / "plan.json"
    return _read(path) if path.exists() else {}


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return the manifest of a complete artifact. Raises ValueError for any other folder; the
    message says what is missing and what to do."""
    if (folder / "manifest.json").exists():
        return _read(folder / "manifest.json")
    if (folder / "plan.json").exists():
        job = _read(folder / "plan.json").get("job")
        raise ValueError(
            f"{folder} is incomplete (no manifest.json): the job '{job}' was started "
            f"but did not finish; run it again with out={folder} to resume"
        )
    if not folder.exists():
        raise ValueError(f"{folder} does not exist: {provenance.maker(str(folder))}")
    raise ValueError(
        f"{folder} holds no manifest.json: it is not a finished artifact; check the path, or first "
        "run the job that writes it"
    )


def fingerprint_of(folder: Path) -> str:
    """Return the fingerprint of a complete artifact, 64 hex digits. Raises ValueError as
    `manifest_of`."""
    return manifest_of(folder)["fingerprint"]


def fingerprint_of_files(folder: Path) -> str:
    """Return a fingerprint of raw data: a hash of the sorted relative paths and sizes of its files.

    Does not read the files. Raises ValueError when the folder is missing or holds no file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; check the path of the data")
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not files:
        raise ValueError(f"{folder} holds no files; check the path of the data")
    sizes = sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in files)
    return json_digest(sizes)


def json_digest(value: Any) -> str:
    """Return sha256 of JSON, 64 hex digits; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return sha256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def move_aside(path: Path) -> Path:
    """Rename a file or folder to <name>.old-1, or the next number that is free; return that."""
    return path.rename(_aside(path))


def _aside(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.old-{number}") for number in count(1))
    return next(name for name in names if not name.exists())


def take_evenly(values: Sequence[T], limit: int) -> list[T]:
    """Return `limit` of the values at equal distances from the first on, or all if there are fewer.
    With 10 values and a limit of 4 they are those at the positions 0, 2, 5 and 7."""
    number = min(limit, len(values))
    return [values[i * len(values) // number] for i in range(number)]


def flush(path: Path) -> None:
    """Return when a file's bytes are on the disk, whoever wrote them."""
    with failures.writing(path), open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; when the block succeeds, rename it to `path`.

    The bytes reach the disk before the name does, so `path` holds either all of the new content or
    what it held before. When the block raises, the temporary file is removed. Creates the folder.
    Raises OSError of `path` where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")
    with failures.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            flush(temporary)
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


def id_digest(id: str) -> int:
    """Return a 64-bit hash of an id, for use where the ids themselves would fill the memory. The
    probability that two of ten million ids have the same hash is 3 in a million."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest())
