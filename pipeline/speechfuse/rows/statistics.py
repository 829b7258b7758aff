"""What a dataset of codes looks like, counted in one pass.

In: the shards of speech or of conversations, a batch of rows at a time. Out: Statistics: how codes
are distributed, how long rows are, how fast people speak, and warnings where that is implausible. A
batch of rows is in memory at a time, and 8 bytes for each row and each speaker.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

BATCH_ROWS = 8192

# Thresholds of the warnings. Silence alone may be a fifth of a corpus, so one code may have that
# much; 10 codes for each entry of the codebook are enough to meet nearly all that are in use.
DOMINANT, LEAST_ENTROPY, LEAST_USE, JUDGED_FROM = 0.3, 0.6, 0.25, 10
MOST_REPEATED, MOST_COPIES = 0.9, 0.5


class Histogram:
    """Counts of values from 0 on, in bins of `width`; NaN and negative values are left out."""

    MOST_BINS = 100_000  # what is beyond is counted in the last one

    def __init__(self, width: float) -> None:
        self.width, self.bins = width, np.zeros(0, np.int64)
        self.sum, self.most = 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        values = values[np.isfinite(values) & (values >= 0)]
        if not len(values):
            return
        self.sum, self.most = self.sum + float(values.sum()), max(self.most, float(values.max()))
        places = np.minimum(values / self.width, self.MOST_BINS).astype(np.int64)
        counts = np.bincount(places, minlength=len(self.bins))
        counts[: len(self.bins)] += self.bins
        self.bins = counts

    @property
    def count(self) -> int:
        return int(self.bins.sum())

    @property
    def mean(self) -> float:
        return self.sum / max(1, self.count)

    def quantile(self, share: float) -> float:
        """Return the lower edge of the bin in which `share` of the values is reached."""
        return float(np.searchsorted(np.cumsum(self.bins), share * self.count)) * self.width

    def summary(self) -> str:
        low, middle, high = (self.quantile(share) for share in (0.05, 0.5, 0.95))
        return f"mean {self.mean:.2f}, median {middle:.1f}, 90 % are {low:.1f} to {high:.1f}"


class Statistics:
    """Figures of a dataset. `stream` is its description, {} where no row has codes.

    rows           rows of the dataset
    utterances     pieces of speech in them (speech rows, or segments of conversations)
    frequency      (65536,) how often each code occurs
    runs           lengths of runs of one code; a run ends with its row
    seconds, pace  of utterances; pace is characters a second, where there is a text
    """

    def __init__(self, stream: dict[str, Any]) -> None:
        self.size: int = stream.get("codebook_size", 0)
        self.token_rate: float = stream.get("token_rate", 0.0)
        self.rows = self.utterances = self.with_text = self.pieces = self.split = 0
        self.coded_seconds = 0.0
        self.frequency = np.zeros(1 << 16, np.int64)
        self.runs, self.seconds, self.pace = Histogram(1), Histogram(0.1), Histogram(0.5)
        self.languages: Counter[str] = Counter()
        self._speakers = np.zeros(0, np.int64)
        self._rows_of_codes: list[np.ndarray] = []

    def add(self, batch: pa.RecordBatch) -> None:
        """Count a batch of rows of either schema."""
        self.rows += len(batch)
        speech = speech_of(batch)
        self.utterances += len(speech)
        seconds = _floats(speech["seconds"])
        self.seconds.add(seconds)
        self._add_codes(speech["codes"], seconds)
        characters = _floats(pc.utf8_length(speech["text"]))
        with np.errstate(divide="ignore", invalid="ignore"):
            self.pace.add(characters / seconds)
        self.with_text += int(np.sum(characters > 0))
        self.pieces += len(speech) - speech["parent"].null_count
        self.split += pc.sum(pc.equal(speech["part"], 0)).as_py() or 0
        for each in pc.value_counts(speech["language"].drop_null()).to_pylist():
            self.languages[each["values"]] += each["counts"]
        speakers = pc.unique(speech["speaker"].drop_null()).to_pylist()
        self._speakers = np.union1d(self._speakers, hashes(speakers))

    def _add_codes(self, codes: pa.Array, seconds: np.ndarray) -> None:
        values = pc.list_flatten(codes).to_numpy(zero_copy_only=False)
        lengths = pc.fill_null(pc.list_value_length(codes), 0).to_numpy()
        self.coded_seconds += float(np.nansum(seconds[lengths > 0]))
        if not len(values):
            return
        self.frequency += np.bincount(values, minlength=1 << 16)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        begins = np.append(True, values[1:] != values[:-1])
        begins[starts[lengths > 0]] = True
        self.runs.add(np.diff(np.append(np.flatnonzero(begins), len(values))))
        rows = zip(starts.tolist(), ends.tolist(), strict=True)
        self._rows_of_codes.append(
            hashes(values[start:end].tobytes() for start, end in rows if end > start)
        )

    @property
    def codes(self) -> int:
        return int(self.frequency.sum())

    @property
    def rate(self) -> float:
        """Codes a second; a little under the quantizer's rate, as an incomplete last one is cut."""
        return self.codes / self.coded_seconds if self.coded_seconds else 0.0

    @property
    def used(self) -> int:
        """How many entries of the codebook occur; the mask code is none of them."""
        return int(np.count_nonzero(self.frequency[: self.size]))

    @property
    def mask(self) -> int:
        """How often the mask code occurs: the code after the last entry of the codebook."""
        return int(self.frequency[self.size]) if self.size else 0

    @property
    def entropy(self) -> float:
        """Entropy of the distribution of codes in bits; its perplexity is 2 ** entropy."""
        shares = self.frequency[self.frequency > 0] / max(1, self.codes)
        return float(np.sum(shares * -np.log2(shares))) + 0.0  # never -0.0

    @property
    def possible_entropy(self) -> float:
        """Entropy in bits if all entries, or all codes where there are fewer, were used equally."""
        return math.log2(max(1, min(self.size, self.codes)))

    @property
    def repeated(self) -> float:
        """Share of codes that equal the one before in their row."""
        return 1 - self.runs.count / max(1, self.codes)

    @property
    def speakers(self) -> int:
        return len(self._speakers)

    @property
    def copies(self) -> int:
        """How many utterances have exactly the codes of an earlier one."""
        every = np.concatenate([np.zeros(0, np.int64), *self._rows_of_codes])
        return len(every) - len(np.unique(every))

    def top(self, many: int) -> list[tuple[int, float]]:
        """Return (code, share of all codes) of the `many` most frequent."""
        order = np.argsort(-self.frequency, kind="stable")[:many]
        return [(int(i), self.frequency[i] / self.codes) for i in order if self.frequency[i]]

    def warnings(self) -> list[str]:
        """Return a sentence for each sign that the codes hardly depend on the sound."""
        if not self.codes:
            return []
        code, share = self.top(1)[0]
        signs = [
            share > DOMINANT,
            self.entropy < LEAST_ENTROPY * self.possible_entropy or self.entropy == 0,
            self.used < LEAST_USE * self.size and self.codes >= JUDGED_FROM * self.size,
            self.repeated > MOST_REPEATED,
            self.copies > MOST_COPIES * self.utterances,
            abs(self.codes - self.token_rate * self.coded_seconds) > self.utterances,
        ]
        sentences = [
            f"code {code} is {share:.0%} of all codes: one sound, or silence, alone",
            f"the codes have {self.entropy:.2f} bits of entropy where {self.possible_entropy:.2f} "
            "are possible: they say little about the sound",
            f"{self.used} of {self.size} codes are in use: the quantizer does not fit this audio, "
            "or its codebook has collapsed",
            f"{self.repeated:.0%} of codes repeat the one before: they hardly follow the sound",
            f"{self.copies:,} of {self.utterances:,} rows have the very codes of an earlier row",
            f"there are {self.rate:.2f} codes a second where the quantizer makes "
            f"{self.token_rate:g}: seconds or codes are wrong",
        ]
        return list(compress(sentences, signs))


def count(paths: list[Path], stream: dict[str, Any]) -> Statistics:
    """Count all rows of the shards `paths`, whose stream is `stream`."""
    statistics = Statistics(stream)
    rows = sum(pq.read_metadata(path).num_rows for path in paths)
    with tqdm(total=rows, desc="rows", unit="row", unit_scale=True, delay=2) as bar:
        for path in paths:
            for batch in batches(path):
                statistics.add(batch)
                bar.update(len(batch))
    return statistics


def batches(path: Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of one shard, at most `BATCH_ROWS` at a time."""
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(BATCH_ROWS, columns=columns)


def speech_of(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the speech in a batch of either schema, as speech rows."""
    if "turns" not in batch.schema.names:
        return batch
    segments = pc.struct_field(pc.list_flatten(batch["turns"]), "segments")
    speech = pc.struct_field(pc.list_flatten(segments), "speech")
    return pa.RecordBatch.from_struct_array(speech.drop_null())


def sample_rows(paths: list[Path], many: int) -> list[dict[str, Any]]:
    """Return at most `many` pieces of speech that have codes, from rows at equal distances."""
    rows = sum(pq.read_metadata(path).num_rows for path in paths)
    numbers = sorted({i * rows // many for i in range(many)}) if rows else []
    picked: list[dict[str, Any]] = []
    start = 0
    for path in paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                if inside := [number - start for number in numbers if start <= number < end]:
                    table = file.read_row_group(group).take(inside).combine_chunks()
                    picked += speech_of(table.to_batches()[0]).to_pylist()
                start = end
    return [row for row in picked if row["codes"]][:many]


def bytes_of_codes(path: Path) -> int:
    """Return how many bytes the codes of a shard take on disk."""
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(c.total_compressed_size for c in columns if "codes" in c.path_in_schema.split("."))


def hashes(values: Iterable[str | bytes]) -> np.ndarray:
    """Return int64 hashes (n,) of `values`, the same within this process only."""
    return np.fromiter(map(hash, values), np.int64)


def _floats(column: pa.Array) -> np.ndarray:
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)
