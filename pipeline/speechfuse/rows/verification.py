"""Check that a finished artifact is what its manifest says.

In: the folder of an artifact. Out: for each group of checks its name, what was checked, and the
faults, each a sentence. That a job counted rightly is for the tests of that job: here the sha256 of
every file proves that it is the one the job wrote, and of a dataset every row is read once more.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from speechfuse import artifact
from speechfuse.rows import shards, statistics

STREAM = {"codebook_size": int, "codebooks": int, "quantizer": str, "token_rate": float}
KINDS = {"speech": shards.SPEECH, "conversations": shards.CONVERSATIONS}
UNREADABLE = (pa.ArrowException, OSError, ValueError)
Check = tuple[str, str, list[str]]  # name of the group, what was checked, faults


def checks(folder: Path) -> Iterator[Check]:
    """Check the artifact in `folder` group by group, from its manifest to the rows of its shards.

    Raises ValueError for a folder without a complete manifest.
    """
    manifest = artifact.manifest_of(folder)
    yield check_manifest(folder, manifest)
    outputs = manifest["outputs"]
    yield check_files(folder, outputs)
    names = sorted(name for name in outputs if fnmatch(name, "shard-*.parquet") and "/" not in name)
    if names:
        paths = [folder / name for name in names if not outside(folder, name)]
        check, opened, stream = check_shards([path for path in paths if path.is_file()])
        yield check
        yield check_rows(opened, stream, manifest["totals"] if len(opened) == len(names) else {})


def check_manifest(folder: Path, manifest: dict[str, Any]) -> Check:
    for key in ("config", "inputs", "outputs", "totals"):
        if not isinstance(manifest.get(key), dict):
            raise ValueError(
                f"{folder}/manifest.json states no {key}, so there is nothing to verify; of a "
                "training verify the folder of the run, not of an epoch"
            )
    job, version = manifest.get("job", ""), manifest.get("version", 0)
    stated = artifact.Artifact(folder, job, version, manifest["config"], manifest["inputs"])
    fault = "manifest.json: its fingerprint is not that of its job, config and inputs"
    faults = [] if stated.fingerprint == manifest.get("fingerprint") else [fault]
    return "manifest", f"{job}, version {version}, fingerprint {stated.fingerprint[:12]}", faults


def check_files(folder: Path, outputs: dict[str, str]) -> Check:
    """Check that every output is a file in the folder with its sha256, and that there is no shard
    which is no output."""
    bar = tqdm(outputs.items(), "files", unit="file", delay=2)
    fault_by_name = {name: fault_of_file(folder, name, sha256) for name, sha256 in bar}
    faults = [f"{name}: {fault}" for name, fault in fault_by_name.items() if fault]
    strays = sorted(path.name for path in folder.glob("shard-*") if path.name not in outputs)
    faults += [f"{name}: the manifest does not list this shard file" for name in strays]
    return "files", f"{len(outputs):,} files of the manifest", faults


def fault_of_file(folder: Path, name: str, sha256: str) -> str | None:
    if outside(folder, name):
        return "it leads out of the folder, so it was not read"
    if not (folder / name).is_file():
        return "it is no file" if (folder / name).exists() else "it is missing"
    try:
        same = artifact.sha256_of(folder / name) == sha256
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None if same else "its bytes do not have the sha256 of the manifest"


def outside(folder: Path, name: str) -> bool:
    """Return whether a path of the manifest leads elsewhere: absolute, by `..`, or through a link.
    A snapshot in the Hub's cache may link into `blobs` beside it."""
    place = folder.absolute()
    target = (place / name).resolve()
    inside = target.is_relative_to(place.resolve())
    if place.parent.name == "snapshots":
        inside |= target.parent == (place.parents[1] / "blobs").resolve()
    return not inside or Path(name).is_absolute() or ".." in Path(name).parts


def check_shards(paths: list[Path]) -> tuple[Check, list[Path], dict[str, Any]]:
    """Check that all shards have one kind of rows and one stream. Returns also those that open, and
    the stream ({} without codes)."""
    faults, streams = [], dict[Path, tuple[str, dict[str, Any]]]()
    for path in paths:
        try:
            streams[path] = kind_and_stream(pq.read_schema(path))
        except UNREADABLE as error:
            faults.append(f"{path.name}: it does not open: {_first_line(error)}")
    first_kind, first_stream = next(iter(streams.values()), ("", {}))
    for path, (kind, stream) in streams.items():
        if kind != first_kind:
            faults.append(f"{path.name}: it holds {kind} among shards of {first_kind}")
        if stream != first_stream:
            faults.append(f"{path.name}: its stream {stream} is not {first_stream} of the others")
    codes = first_stream.get("codebook_size", "no")
    checked = f"{len(streams):,} of {len(paths):,} open: {first_kind}, {codes} codes"
    return ("shards", checked, faults), list(streams), first_stream


def check_rows(paths: list[Path], stream: dict[str, Any], totals: dict[str, Any]) -> Check:
    """Check that every id is there once, that codes are of the codebook of `stream`, and that rows,
    codes and hours are those of the manifest's `totals`. Rows are read in batches; of each 8 bytes
    stay in memory."""
    rows, codes, seconds, faults = 0, 0, 0.0, []
    readable = list[Path]()
    for path in tqdm(paths, "rows", unit="shard", delay=2):
        ids_of = defaultdict[str, list[Any]](list)  # fault: ids of its rows
        try:
            for batch in statistics.batches(path):
                ids, speech = batch["id"].to_pylist(), statistics.speech_of(batch)
                ids_of["no id"] += [id for id in ids if not id]
                fault, wrong_ids = wrong_codes(speech, stream)
                ids_of[fault] += wrong_ids
                rows += len(batch)
                codes += len(pc.list_flatten(speech["codes"]))
                seconds += pc.sum(speech["seconds"].cast(pa.float64())).as_py() or 0.0
            readable.append(path)
        except UNREADABLE as error:
            faults.append(f"{path.name}: its rows cannot be read: {_first_line(error)}")
        for fault, ids in ids_of.items():
            if ids:
                among = f"{len(ids):,} row{'s' if len(ids) > 1 else ''}, first {ids[0]!r}"
                faults.append(f"{path.name}: {fault} in {among}")
    if twice := repeated_ids(readable):
        faults.append(twice)
    counted = {"rows": rows, "codes": codes, "hours": round(seconds / 3600, 4)}
    faults += [
        f"totals: {name} is {totals[name]}, but the shards hold {value}"
        for name, value in counted.items()
        if not faults and name in totals and abs(totals[name] - value) > 2e-4  # hours are rounded
    ]
    hours = f"{seconds / 3600:.2f} h of speech"
    return "rows", f"{rows:,} rows, {codes:,} codes, {hours}", faults


def wrong_codes(speech: pa.RecordBatch, stream: dict[str, Any]) -> tuple[str, list[Any]]:
    """Return a fault and the ids of rows that have it: codes over the mask code, which follows the
    last of the codebook and which published quantizers occasionally emit."""
    highest = stream.get("codebook_size", -1)
    fault = f"codes over {highest}" if stream else "codes of no stated quantizer"
    lengths = pc.list_value_length(speech["codes"]).fill_null(0).to_numpy()
    values = pc.list_flatten(speech["codes"]).fill_null(0xFFFF).to_numpy()
    rows = np.unique(np.repeat(np.arange(len(lengths)), lengths)[values > highest])
    return fault, speech["id"].take(rows).to_pylist()


def repeated_ids(paths: list[Path]) -> str | None:
    """Return in words which ids of the shards at `paths` occur more than once; None if none does.
    Of each id 8 bytes stay in memory."""
    batches = (batch for path in paths for batch in statistics.batches(path, ["id"]))
    ids = (filter(None, batch["id"].to_pylist()) for batch in batches)
    hashes = np.concatenate([np.zeros(0, np.int64), *map(statistics.hashes, ids)])
    values, counts = np.unique(hashes, return_counts=True)
    repeated = set(values[counts > 1].tolist())
    shards_of = defaultdict[str, list[str]](list)
    for path in paths if repeated else []:
        for batch in statistics.batches(path, ["id"]):
            for id in batch["id"].to_pylist():
                if id and hash(id) in repeated:
                    shards_of[id].append(path.name)
    twice = [(id, names) for id, names in shards_of.items() if len(names) > 1]
    if not twice:
        return None
    id, names = twice[0]
    in_shards = " and ".join(names[:3])
    return f"ids: {len(twice):,} stand more than once, first {id!r} in {in_shards}"


def kind_and_stream(schema: pa.Schema) -> tuple[str, dict[str, Any]]:
    """Return the kind of a shard's rows and what it states of its codes ({} where it has none).

    Raises ValueError for other columns than ours and for a stream that describes no quantizer.
    """
    kind = next((name for name, columns in KINDS.items() if schema.equals(columns)), None)
    if kind is None:
        raise ValueError("its columns are those of neither speech nor conversations")
    stream = json.loads((schema.metadata or {}).get(b"speechfuse.stream", b"{}"))
    types = isinstance(stream, dict) and {key: type(value) for key, value in stream.items()}
    valid = types == STREAM and stream["codebook_size"] >= 1 and stream["token_rate"] > 0
    if stream != {} and not valid:
        raise ValueError(f"its stream is {stream}")
    return kind, stream


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
