"""Check that a finished artifact is what its manifest says.

In: the folder of an artifact. Out: for each group of checks its name, what was checked, and the
faults, each a sentence. That a job counted rightly is for the tests of that job: here the sha256 of
every file proves that it is the one the job wrote, and of a dataset every row is read once more.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
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
Check = tuple[str, str, list[str]]  # name of the group, what was checked, faults


def checks(folder: Path) -> Iterator[Check]:
    """Check the artifact in `folder` group by group, from its manifest to the rows of its shards.

    Raises ValueError for a folder without a complete manifest.
    """
    manifest = artifact.manifest_of(folder)
    yield check_manifest(folder, manifest)
    outputs = manifest["outputs"]
    present = {name for name in outputs if not outside(folder, name) and (folder / name).is_file()}
    yield check_files(folder, outputs, present)
    names = sorted(name for name in outputs if Path(name).match("shard-*.parquet"))
    if names:
        dataset = DatasetCheck([folder / name for name in names if name in present])
        yield dataset.check_shards()
        yield dataset.check_rows()


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


def check_files(folder: Path, outputs: dict[str, str], present: set[str]) -> Check:
    """Check that every output is a file in the folder with its sha256, and that there is no shard
    which is no output."""
    sizes, faults = {name: (folder / name).stat().st_size for name in present}, []
    with tqdm(total=sum(sizes.values()), desc="files", unit="B", unit_scale=True, delay=2) as bar:
        for name, sha256 in outputs.items():
            if outside(folder, name):
                faults.append(f"{name}: it leads out of the folder, so it was not read")
            elif name not in present:
                lacking = "it is no file" if (folder / name).exists() else "it is missing"
                faults.append(f"{name}: {lacking}")
            else:
                try:
                    if artifact.sha256_of(folder / name) != sha256:
                        faults.append(f"{name}: its bytes do not have the sha256 of the manifest")
                except OSError as error:
                    faults.append(f"{name}: it cannot be read: {error.strerror}")
                bar.update(sizes[name])
    strays = sorted(path.name for path in folder.glob("shard-*") if path.name not in outputs)
    faults += [f"{name}: the manifest does not list this shard file" for name in strays]
    size = sum(sizes.values())
    return "files", f"{len(present):,} of {len(outputs):,} present, {size:,} bytes hashed", faults


def outside(folder: Path, name: str) -> bool:
    """Return whether a path of the manifest leads elsewhere: absolute, by `..`, or through a link.
    A snapshot in the Hub's cache may link into `blobs` beside it."""
    place = folder.absolute()
    target = (place / name).resolve()
    inside = target.is_relative_to(place.resolve())
    if place.parent.name == "snapshots":
        inside |= target.parent == (place.parents[1] / "blobs").resolve()
    return not inside or Path(name).is_absolute() or ".." in Path(name).parts


class DatasetCheck:
    """Check of the shards `paths`: one kind of rows and one stream in all of them, every id once,
    and codes of the codebook. The rows are read in batches; of each 8 bytes stay in memory."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths, self.opened = paths, list[Path]()
        self.stream: dict[str, Any] = {}

    def check_shards(self) -> Check:
        kind, faults = "", []
        for path in self.paths:
            try:
                its_kind, stream = kind_and_stream(pq.read_schema(path))
            except (pa.ArrowException, OSError, ValueError, AttributeError) as error:
                faults.append(f"{path.name}: it does not open: {_first_line(error)}")
                continue
            if not self.opened:
                kind, self.stream = its_kind, stream
            if its_kind != kind:
                faults.append(f"{path.name}: it holds {its_kind} among shards of {kind}")
            if stream != self.stream:
                faults.append(
                    f"{path.name}: its stream {stream} is not {self.stream} of the others"
                )
            self.opened.append(path)
        codes = self.stream.get("codebook_size", "no")
        opened = f"{len(self.opened):,} of {len(self.paths):,} open"
        return "shards", f"{opened}: {kind}, {codes} codes", faults

    def check_rows(self) -> Check:
        rows, codes, seconds, faults = 0, 0, 0.0, []
        ids_of_shards, readable = list[np.ndarray](), list[Path]()
        total = sum(pq.read_metadata(path).num_rows for path in self.opened)
        with tqdm(total=total, desc="rows", unit="row", unit_scale=True, delay=2) as bar:
            for path in self.opened:
                wrong: dict[str, list[Any]] = defaultdict(list)  # fault: ids of its rows
                try:
                    for batch in statistics.batches(path):
                        ids = batch["id"].to_pylist()
                        wrong["no id"] += [id for id in ids if not id]
                        ids_of_shards.append(statistics.hashes(id for id in ids if id))
                        speech = statistics.speech_of(batch)
                        self.check_codes(speech, wrong)
                        rows += len(batch)
                        codes += len(pc.list_flatten(speech["codes"]))
                        seconds += pc.sum(speech["seconds"].cast(pa.float64())).as_py() or 0.0
                        bar.update(len(batch))
                    readable.append(path)
                except (pa.ArrowException, OSError, ValueError) as error:
                    faults.append(f"{path.name}: its rows cannot be read: {_first_line(error)}")
                for fault, ids in wrong.items():
                    if ids:
                        among = f"{len(ids):,} row{'s' if len(ids) > 1 else ''}, first {ids[0]!r}"
                        faults.append(f"{path.name}: {fault} in {among}")
        faults += duplicates(readable, ids_of_shards)
        speech_hours = f"{seconds / 3600:.2f} h of speech"
        return "rows", f"{rows:,} rows, {codes:,} codes, {speech_hours}", faults

    def check_codes(self, speech: pa.RecordBatch, wrong: dict[str, list[Any]]) -> None:
        """Add ids of rows whose codes are over the mask code, which follows the last of the
        codebook and which published quantizers occasionally emit."""
        lengths = pc.list_value_length(speech["codes"]).fill_null(0).to_numpy()
        highest, fault = -1, "codes of no stated quantizer"
        if self.stream:
            highest = self.stream["codebook_size"]
            fault = f"codes over {highest}"
        values = pc.list_flatten(speech["codes"]).fill_null(0xFFFF).to_numpy()
        rows = np.unique(np.repeat(np.arange(len(lengths)), lengths)[values > highest])
        wrong[fault] += speech["id"].take(rows).to_pylist()


def duplicates(paths: list[Path], ids_of_shards: list[np.ndarray]) -> list[str]:
    """Return the fault of ids that occur more than once. `ids_of_shards` are the hashes of those
    in `paths`: where two are equal, the ids are read again and compared."""
    hashes, counts = np.unique(
        np.concatenate([np.zeros(0, np.int64), *ids_of_shards]), return_counts=True
    )
    repeated = set(hashes[counts > 1].tolist())
    places: dict[str, list[str]] = defaultdict(list)
    for path in paths if repeated else []:
        for batch in statistics.batches(path, ["id"]):
            for id in batch["id"].to_pylist():
                if id and hash(id) in repeated:
                    places[id].append(path.name)
    twice = {id: names for id, names in places.items() if len(names) > 1}
    return [
        f"ids: {len(twice):,} stand more than once, first {id!r} in {' and '.join(names[:3])}"
        for id, names in [*twice.items()][:1]
    ]


def kind_and_stream(schema: pa.Schema) -> tuple[str, dict[str, Any]]:
    """Return the kind of a shard's rows and what it states of its codes ({} where it has none).

    Raises ValueError for other columns than ours and for a stream that describes no quantizer.
    """
    kind = next((name for name, columns in KINDS.items() if schema.equals(columns)), None)
    if kind is None:
        raise ValueError("its columns are those of neither speech nor conversations")
    stream = json.loads((schema.metadata or {}).get(b"speechfuse.stream", b"{}"))
    types = {key: type(value) for key, value in stream.items()}
    if stream and (types != STREAM or stream["codebook_size"] < 1 or stream["token_rate"] <= 0):
        raise ValueError(f"its stream is {stream}")
    return kind, stream


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
