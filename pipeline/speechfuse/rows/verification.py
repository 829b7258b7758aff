"""Check that a finished artifact is what its manifest says.

In: the folder of an artifact. Out: faults, each a sentence.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from speechfuse import artifact
from speechfuse.rows import rejects as reject_lists
from speechfuse.rows import shards, statistics
from speechfuse.rows.rejects import FILTERED

STREAM = {"codebook_size": int, "codebooks": int, "quantizer": str, "token_rate": float}


KINDS = {"speech": shards.SPEECH, "conversations": shards.CONVERSATIONS}


ROUNDED = {"hours": 4, "bits_per_code": 3}  # decimals of the manifest


JOINT = 1e-3  # seconds; `seconds` is a float32


class Findings:
    """The faults, and a printed line for each group of checks."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[Any]] = {}
        self._told = 0

    def fault(self, where: str, what: str) -> None:
        self._found[where, what] = []

    def rows(self, shard: str, what: str, ids: list[Any]) -> None:
        """The rows `ids` of a shard have a fault; each shard has one sentence for each `what`."""
        if ids:
            entry = self._found.setdefault((shard, what), [0, ids[0]])
            entry[0] += len(ids)

    def group(self, name: str, said: str) -> None:
        new = len(self._found) - self._told
        self._told += new
        print(f"{name:9} {said}{f'; faults: {new}' if new else ''}", flush=True)

    def faults(self) -> list[str]:
        sentences = []
        for (where, what), rows in self._found.items():
            n, first = rows or (0, None)
            among = f" in {n:,} row{'s' if n > 1 else ''}, first {first!r}" if n else ""
            sentences.append(f"{where}: {what}{among}")
        return sentences


@dataclass
class Counted:
    """A dataset, counted from its rows and rejects."""

    kind: str = ""
    stream: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    codes: int = 0
    mask: int = 0
    seconds: float = 0.0
    size: int = 0  # bytes of the codes on disk
    split: int = 0
    pieces: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)
    clips: dict[str, int] = field(default_factory=dict)  # of each shard
    ids: list[np.ndarray] = field(default_factory=list)

    def totals(self) -> dict[str, Any]:
        """By the names that they have in the manifest."""
        filtered = {k: n for k, n in self.rejects.items() if k.startswith(FILTERED)}
        rejected = {k: n for k, n in self.rejects.items() if k not in filtered}
        return {
            "rows": self.rows,
            "codes": self.codes,
            "hours": self.seconds / 3600,
            "bits_per_code": 8 * self.size / max(1, self.codes),
            "clips": sum(self.clips.values()),
            "split": self.split,
            "pieces": self.pieces,
            **{name: self.counts[name] for name in ("resampled", "mixed_down", "without_text")},
            "rejected": rejected,
            "filtered": filtered,
            "quantizer": self.stream.get("quantizer"),
            "token_rate": self.stream.get("token_rate"),
        }


def check_manifest(folder: Path, manifest: dict[str, Any], report: Findings) -> None:
    for key in ("config", "inputs", "outputs", "totals"):
        if not isinstance(manifest.get(key), dict):
            raise ValueError(
                f"{folder}/manifest.json states no {key}, so there is nothing to verify; of a "
                "training verify the folder of the run, not of an epoch"
            )
    job, version = manifest.get("job", ""), manifest.get("version", 0)
    again = artifact.Artifact(folder, job, version, manifest["config"], manifest["inputs"])
    if again.fingerprint != manifest.get("fingerprint"):
        report.fault("manifest.json", "its fingerprint is not that of its job, config and inputs")
    report.group("manifest", f"{job}, version {version}, fingerprint {again.fingerprint[:12]}")


def check_files(folder: Path, outputs: dict[str, str], report: Findings) -> list[Path]:
    """Every output lies in the folder and has its sha256. Returns the shards among them."""
    sizes = {}
    for name in outputs:
        path = folder / name
        if _leaves(folder, name):
            report.fault(name, "it leads out of the folder, so it was not read")
        elif not path.is_file():
            report.fault(name, "it is no file" if path.exists() else "it is missing")
        else:
            sizes[name] = path.stat().st_size
    with tqdm(total=sum(sizes.values()), desc="files", unit="B", unit_scale=True, delay=2) as bar:
        for name, size in sizes.items():
            try:
                if artifact.sha256_of(folder / name) != outputs[name]:
                    report.fault(name, "its bytes do not have the sha256 of the manifest")
            except OSError as error:
                report.fault(name, f"it cannot be read: {error.strerror}")
            bar.update(size)
    for path in sorted(folder.glob("shard-*")):
        if path.name not in outputs:
            report.fault(path.name, "the manifest does not list this shard file")
    total = sum(sizes.values())
    report.group("files", f"{len(sizes):,} of {len(outputs):,} present, {total:,} bytes hashed")
    return [folder / name for name in sorted(sizes) if _is_shard(name)]


def _is_shard(name: str) -> bool:
    return Path(name).match("shard-*.parquet") and "/" not in name


def _leaves(folder: Path, name: str) -> bool:
    """Whether a path of the manifest leads elsewhere: absolute, by `..`, or through a link.
    Snapshots in the Hub's cache are links into `blobs` beside them, which is no elsewhere."""
    place = folder.absolute()
    target = (place / name).resolve()
    inside = target.is_relative_to(place.resolve())
    if place.parent.name == "snapshots":
        inside |= target.parent == (place.parents[1] / "blobs").resolve()
    return not inside or Path(name).is_absolute() or ".." in Path(name).parts


def open_shards(paths: list[Path], counted: Counted, report: Findings) -> list[Path]:
    """Those that open and have a known schema; all are of one kind and one stream."""
    opened: list[Path] = []
    for path in paths:
        try:
            schema = pq.read_schema(path)
            stream = _stream(schema)
        except (pa.ArrowException, OSError, ValueError, AttributeError) as error:
            report.fault(path.name, f"it does not open: {_line(error)}")
            continue
        kind = next((name for name, known in KINDS.items() if schema.equals(known)), "")
        if not kind:
            report.fault(path.name, "its columns are those of neither speech nor conversations")
            continue
        if not opened:
            counted.kind, counted.stream = kind, stream
        if kind != counted.kind:
            report.fault(path.name, f"it holds {kind} among shards of {counted.kind}")
        if stream != counted.stream:
            report.fault(path.name, f"its stream {stream} is not {counted.stream} of the others")
        opened.append(path)
    of = f"{counted.stream['codebook_size']} codes" if counted.stream else "no codes"
    report.group("shards", f"{len(opened):,} of {len(paths):,} open: {counted.kind}, {of}")
    return opened


def _stream(schema: pa.Schema) -> dict[str, Any]:
    """What shards.write_shard stated of the codes; {} where there are none."""
    stream = json.loads((schema.metadata or {}).get(b"speechfuse.stream", b"{}"))
    kinds = {key: type(value) for key, value in stream.items()}
    if stream and (kinds != STREAM or stream["codebook_size"] < 1 or stream["token_rate"] <= 0):
        raise ValueError(f"its stream is {stream}")
    return stream


class Pieces:
    """Pieces of recordings that were split, in the order of one shard: parts 0, 1, ... one after
    another, each beginning where the one before ends."""

    def __init__(self) -> None:
        self.whole = 0  # rows that are no piece
        self.of: Counter[str] = Counter()  # parent: pieces so far
        self._last: tuple[str | None, float] = (None, 0.0)  # parent and end of the row before

    def add(self, batch: pa.RecordBatch, shard: str, report: Findings) -> None:
        offsets = pc.struct_field(batch["source"], "offset")
        columns = [batch["id"], batch["parent"], batch["part"], offsets, batch["seconds"]]
        rows = zip(*map(pa.Array.to_pylist, columns), strict=True)
        for id, parent, part, offset, seconds in rows:
            if parent is None and part is None:
                self.whole += 1
                self._last = (None, 0.0)
                continue
            before, end = self._last
            number = self.of[parent]
            if part != number or id != f"{parent}#{part}":
                report.rows(shard, "not the next piece of its parent", [id])
            elif number and before != parent:
                report.rows(shard, "a piece apart from the one before it", [id])
            elif offset is None or (number and not abs(offset - end) <= JOINT):
                report.rows(shard, "a piece that does not begin where the one before ends", [id])
            self.of[parent] += 1
            self._last = (parent, (offset or 0.0) + (seconds or 0.0))


def check_shard(path: Path, counted: Counted, report: Findings, bar: tqdm) -> None:
    """Count the rows and rejects of one shard into `counted`."""
    shard, pieces, conversations = path.name, Pieces(), 0
    for batch in statistics.batches(path):
        ids = batch["id"].to_pylist()
        report.rows(shard, "no id", [id for id in ids if not id])
        counted.ids.append(statistics.hashes(id for id in ids if id))
        counted.rows += len(batch)
        speech = statistics.speech_of(batch)
        check_codes(speech, shard, counted, report)
        pieces.add(speech, shard, report)
        conversations += 0 if speech is batch else len(batch)
        bar.update(len(batch))
    rejects = read_rejects(path, report)
    cut = [id.rpartition("#") for id, _ in rejects]
    short = Counter(parent for parent, _, part in cut if parent in pieces.of and part.isdigit())
    alone = [parent for parent, n in (pieces.of + short).items() if n == 1]
    report.rows(shard, "the only piece of its parent", alone)
    counted.split += len(pieces.of)
    counted.pieces += (pieces.of + short).total()
    whole = conversations or pieces.whole + len(pieces.of)
    counted.clips[shard] = whole + len(rejects) - short.total()
    counted.rejects.update(reason.partition(":")[0] for _, reason in rejects)
    counted.counts.update(shards.read_counts(path))
    counted.size += statistics.bytes_of_codes(path)


def check_codes(speech: pa.RecordBatch, shard: str, counted: Counted, report: Findings) -> None:
    """Codes are in the codebook, or the mask code after it, which published quantizers choose now
    and then; their number fits the seconds."""
    ids = np.array(speech["id"].to_pylist(), dtype=object)
    seconds = speech["seconds"].cast(pa.float64()).fill_null(np.nan).to_numpy()
    counted.seconds += float(np.nansum(seconds))
    lengths = pc.list_value_length(speech["codes"]).fill_null(-1).to_numpy()
    values = pc.list_flatten(speech["codes"]).fill_null(0xFFFF).to_numpy()
    counted.codes += len(values)
    if not len(values):
        return
    if not counted.stream:
        report.rows(shard, "codes of no stated quantizer", list(ids[lengths > 0]))
        return
    size, rate = counted.stream["codebook_size"], counted.stream["token_rate"]
    counted.mask += int(np.sum(values == size))
    row_of = np.repeat(np.arange(len(ids)), np.maximum(lengths, 0))
    report.rows(shard, f"codes over {size}", list(ids[np.unique(row_of[values > size])]))
    fits = np.abs(lengths - seconds * rate) <= 1 + JOINT
    what = f"a number of codes that is not {rate:g} times the seconds"
    report.rows(shard, what, list(ids[(lengths >= 0) & ~fits]))


def read_rejects(path: Path, report: Findings) -> list[tuple[str, str]]:
    """(id, reason) of a shard's rejects; none where the job wrote no list."""
    name = path.name.replace(".parquet", ".rejects.jsonl")
    try:
        rejects = reject_lists.read_rejects(path)
        return [(str(reject["id"]), str(reject["reason"])) for reject in rejects]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        report.fault(name, f"it is not lines of {{id, reason}}: {_line(error)}")
        return []


def check_ids(paths: list[Path], counted: Counted, report: Findings) -> None:
    """Ids are unique over all shards. Where hashes meet, the ids are read again and compared."""
    every = np.sort(np.concatenate([np.zeros(0, np.int64), *counted.ids]))
    twice = set(every[1:][every[1:] == every[:-1]].tolist())
    places: dict[str, list[str]] = {}
    for path in paths if twice else []:
        for batch in statistics.batches(path, ["id"]):
            for id in batch["id"].to_pylist():
                if id and hash(id) in twice:
                    places.setdefault(id, []).append(path.name)
    again = {id: names for id, names in places.items() if len(names) > 1}
    if again:
        id, names = next(iter(again.items()))
        report.fault(
            "ids", f"{len(again):,} stand more than once, first {id!r} in {' and '.join(names[:3])}"
        )


def check_totals(totals: dict[str, Any], counted: Counted, report: Findings) -> None:
    known = {name: now for name, now in counted.totals().items() if name in totals}
    for name, now in known.items():
        there = totals[name]
        if name in ROUNDED:
            now = round(now, ROUNDED[name])
            same = isinstance(there, int | float) and abs(there - now) < 1.5 * 10 ** -ROUNDED[name]
        else:
            same = there == now
        if not same:
            report.fault("manifest.json", f"totals.{name} is {there}, counted now: {now}")
    report.group("totals", f"{len(known)} of the manifest's counted anew: {', '.join(known)}")


def check_plan(folder: Path, manifest: dict[str, Any], counted: Counted, report: Findings) -> None:
    """Each shard has a row, pieces or a reject for each of its planned clips; where the job read
    others that it did not select, all shards together."""
    if not (folder / "plan.json").exists():
        report.group("plan", "not checked: plan.json is not here, it is no output")
        return
    try:
        frozen = json.loads((folder / "plan.json").read_text("utf-8"))
        plan = frozen["plan"] or {}
        made = plan if isinstance(plan, list) else plan.get("shards", [])
        planned = [shard["count"] for shard in made]
        if frozen["fingerprint"] != manifest["fingerprint"]:
            report.fault("plan.json", "its fingerprint is not that of the manifest")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        report.fault("plan.json", f"it is no plan of ours: {_line(error)}")
        planned = []
    unselected = manifest["totals"].get("not_selected", 0)
    if unselected and sum(planned) - unselected != sum(counted.clips.values()):
        found = f"{sum(counted.clips.values()):,} rows or rejects, {unselected:,} not selected"
        report.fault("plan.json", f"{found}, planned are {sum(planned):,}")
    for i, clips in enumerate(planned):
        name = shards.shard_name(i)
        if name not in counted.clips:
            report.fault("plan.json", f"its shard {name} is not an output that can be read")
        elif counted.clips[name] != clips and not unselected:
            found = f"{counted.clips[name]:,} clips are rows, pieces or rejects"
            report.fault(name, f"{found}, planned are {clips:,}")
    report.group("plan", f"{sum(planned):,} clips in {len(planned):,} shards")


def check_dataset(
    folder: Path, paths: list[Path], manifest: dict[str, Any], report: Findings
) -> Counted:
    counted = Counted()
    opened = open_shards(paths, counted, report)
    rows = sum(pq.read_metadata(path).num_rows for path in opened)
    with tqdm(total=rows, desc="rows", unit="row", unit_scale=True, delay=2) as bar:
        for path in opened:
            try:
                check_shard(path, counted, report, bar)
            except (pa.ArrowException, OSError, ValueError) as error:
                report.fault(path.name, f"its rows cannot be read: {_line(error)}")
    check_ids(opened, counted, report)
    mask = f"{counted.mask:,} of them the mask code"
    report.group("rows", f"{counted.rows:,} with {counted.codes:,} codes, {mask}")
    report.group("pieces", f"{counted.pieces:,} of {counted.split:,} split recordings")
    report.group("rejects", f"{counted.rejects.total():,}")
    if lost := sum(map(_is_shard, manifest["outputs"])) - len(counted.clips):
        report.group("totals", f"not checked: {lost:,} of the shards could not be counted")
    else:
        check_totals(manifest["totals"], counted, report)
    check_plan(folder, manifest, counted, report)
    return counted


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
