"""Look at the codes of a finished dataset.

    python -m stages.inspect_dataset path=out/data/speech_train

In: a dataset of speech or conversations, or owner/name@revision on the Hub. Out: its figures on the
screen, with a warning where the codes hardly depend on the sound, and one HTML page with plots,
rejects with their reasons, and a few rows; with a `decoder` also what it transcribes from their
codes. Nothing is written into the dataset's folder.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speechfuse import artifact, config
from speechfuse.config import key
from speechfuse.hub import data as hub_data
from speechfuse.report import page
from speechfuse.rows import shards, statistics
from speechfuse.rows.rejects import FILTERED, read_rejects
from speechfuse.rows.statistics import Statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP, EXAMPLES, CODES_SHOWN, MOST_LISTED = 16, 3, 40, 10
Table = list[list[str]]  # the head first


@dataclass
class InspectDataset:
    path: str = key("folder of the dataset, or owner/name@revision")
    out: str | None = key("the page; null: NAME.inspect.html beside the folder", None)
    hear: int = key("rows that are shown", 5, least=0)
    decoder: str | None = key("the quantizer, with its decoding half: says what it heard", None)
    whisper: str | None = key("the decoder's openai-whisper .pt", None)
    window: float | None = key("seconds that the decoder's .pt was cut to", None, above=0)
    language: str = key("that the decoder is to hear", "en")


def rejects_by_kind(paths: list[Path]) -> tuple[Counter[str], Table]:
    """Return how many rejects there are of each kind, and a table with the first few of each."""
    examples: dict[str, list[str]] = {}
    kinds: Counter[str] = Counter()
    for path in paths:
        try:
            rejects = read_rejects(path)
        except FileNotFoundError:  # a job that writes no such lists
            continue
        for reject in rejects:
            kind = reject["reason"].partition(":")[0]
            kinds[kind] += 1
            if kinds[kind] <= EXAMPLES:
                examples.setdefault(kind, []).append(f"{reject['id']}: {reject['reason']}")
    rows = [[kind, f"{n:,}", "; ".join(examples[kind])] for kind, n in kinds.most_common()]
    return kinds, [["kind", "clips", f"the first {EXAMPLES}"], *rows]


def figures(
    counts: Statistics, totals: dict[str, Any], rejects: Counter[str], size: int
) -> list[tuple[str, str]]:
    """Return (name, value) of all figures; `size` is the bytes of the codes on disk."""
    lines = [("rows", f"{counts.rows:,}")]
    if counts.utterances != counts.rows:
        lines.append(("pieces of speech in them", f"{counts.utterances:,}"))
    if counts.utterances:
        seconds = counts.seconds
        lines.append(("speech", f"{seconds.sum / 3600:,.3f} h"))
        lines.append(("seconds of a row", f"{seconds.summary()}, longest {seconds.most:.1f}"))
    if counts.codes:
        top, share = counts.top(1)[0]
        use = f"{counts.used:,} of {counts.size:,} codes are in use"
        bits = f"{counts.entropy:.2f} bits of {counts.possible_entropy:.2f} possible"
        runs = f"mean {counts.runs.mean:.2f}, longest {counts.runs.most:.0f}"
        lines += [
            ("codes", f"{counts.codes:,}, {counts.rate:.2f} a second"),
            ("codebook", f"{use}; the mask code {counts.mask:,} times"),
            ("entropy", f"{bits}; perplexity {2**counts.entropy:.0f}"),
            ("most frequent", f"code {top}, {share:.1%}"),
            ("runs of one code", f"{runs}; {counts.repeated:.1%} of codes repeat the one before"),
            ("equal rows", f"{counts.copies:,} have the very codes of an earlier one"),
            ("on disk", f"{8 * size / counts.codes:.2f} bits a code"),
        ]
    optional = [
        (counts.utterances, "with a text", f"{counts.with_text:,}"),
        (counts.pace.count, "characters a second", counts.pace.summary()),
        (counts.languages, "languages", listed(counts.languages)),
        (counts.speakers, "speakers", f"{counts.speakers:,}"),
        (counts.pieces, "split", f"{counts.split:,} recordings into {counts.pieces:,} rows"),
        ("resampled" in totals, "resampled", f"{totals.get('resampled', 0):,}"),
        ("mixed_down" in totals, "mixed down to mono", f"{totals.get('mixed_down', 0):,}"),
    ]
    lines += [(name, value) for present, name, value in optional if present]
    for name, filtered in (("rejected", False), ("filtered out", True)):
        of = Counter({k: n for k, n in rejects.items() if k.startswith(FILTERED) == filtered})
        lines.append((name, f"{of.total():,}" + (f": {listed(of)}" if of else "")))
    return lines


def listed(counts: Counter[str]) -> str:
    names = [f"{name} {n:,}" for name, n in counts.most_common(MOST_LISTED)]
    return ", ".join([*names, *(["..."] if len(counts) > MOST_LISTED else [])])


def plots(counts: Statistics) -> list[tuple[str, "Figure"]]:
    """Return (alt text, plot) of codes by rank, run lengths, seconds and characters a second."""
    drawn = []
    if counts.codes:
        shares = np.sort(counts.frequency)[::-1][: counts.size] / counts.codes
        figure = bars(shares, np.arange(counts.size + 1), "rank of the code", "codes", log=True)
        figure.axes[0].axhline(1 / counts.size, color="0.3", linestyle="--", label="all used alike")
        figure.axes[0].legend()
        drawn.append(("codes by frequency", figure))
        shares = counts.runs.bins[1:] / counts.runs.count
        edges = np.arange(len(shares) + 1) + 0.5
        figure = bars(shares, edges, "codes in a run of one code", "runs", log=True)
        drawn.append(("run lengths", figure))
    for name, of in (("seconds of a row", counts.seconds), ("characters a second", counts.pace)):
        if of.count:
            edges = np.arange(len(of.bins) + 1) * of.width
            figure = bars(of.bins / of.count, edges, name, "rows")
            ax = figure.axes[0]
            ax.axvline(of.mean, color="0.3", linestyle="--", label=f"mean {of.mean:.2f}")
            ax.set_xlim(0, 1.2 * of.quantile(0.999) + of.width)  # outliers would squeeze the rest
            ax.legend()
            drawn.append((name, figure))
    return drawn


def bars(shares: np.ndarray, edges: np.ndarray, label: str, of: str, log: bool = False) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = figure.subplots()
    ax.stairs(shares, edges, fill=True, color="C0")
    ax.set(xlabel=label, ylabel=f"share of all {of}", xlim=(edges[0], edges[-1]))
    if log:
        ax.set(yscale="log", ylim=(min(1e-3, 0.5 * shares[shares > 0].min()), 1.5))
    return figure


def decoder_of(job: InspectDataset, stream: dict[str, Any]) -> Any:
    """Return the decoder of the quantizer that made the dataset. Raises ValueError for another."""
    from speechfuse.quantizer.decoder import CodeTranscriber

    path = job.decoder or ""
    decoder = CodeTranscriber.load(path, job.whisper, job.language, job.window)
    if (identity := decoder.quantizer.identity) != stream.get("quantizer"):
        raise ValueError(
            f"decoder={path} is the quantizer {identity[:12]}, but {job.path} was made by "
            f"{str(stream.get('quantizer'))[:12]}: codes mean nothing to another quantizer"
        )
    return decoder


def sample_table(job: InspectDataset, paths: list[Path], decoder: Any) -> Table:
    """Return id, seconds, text, what the codec heard (with a decoder) and the first codes."""
    rows = statistics.sample_rows(paths, job.hear) if job.hear > 0 else []
    table = [["id", "seconds", "text", f"first {CODES_SHOWN} codes"]]
    for row in rows:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
        codes = " ".join(map(str, row["codes"][:CODES_SHOWN]))
        table.append([row["id"] or "", seconds, row["text"] or "", codes])
    if decoder:
        transcripts = decoder.transcribe([np.array(row["codes"], np.uint16) for row in rows])
        for line, words in zip(table, ["what the codec heard", *transcripts], strict=True):
            line.insert(3, words)
    return table


def main(job: InspectDataset) -> None:
    if job.whisper and not job.decoder:
        raise ValueError(f"whisper={job.whisper} is of use only to a decoder: give decoder=...")
    folder = hub_data.local(job.path)
    out = page.place(job.path, folder, job.out, "inspect")
    manifest, paths = artifact.manifest_of(folder), shards.shard_paths(folder)
    stream, totals = shards.read_stream(folder), manifest.get("totals", {})
    decoder = decoder_of(job, stream) if job.decoder else None
    counts = statistics.count(paths, stream)
    rejects, reject_table = rejects_by_kind(paths)
    samples = sample_table(job, paths, decoder)
    lines = figures(counts, totals, rejects, sum(map(statistics.bytes_of_codes, paths)))
    warnings = counts.warnings()
    provenance = {
        "source": totals.get("source"),
        "licence": totals.get("licence"),
        "made by": manifest.get("job"),
        "quantizer": stream.get("quantizer"),
    }
    about = [(name, value) for name, value in provenance.items() if value]
    top = [[str(code), f"{share:.2%}"] for code, share in counts.top(TOP)] if counts.codes else []
    title = Path(job.path).absolute().name
    blocks = [
        f"# {page.escape(title)}",
        *["\n>\n".join(f"> {page.escape(warning)}" for warning in warnings)],
        f"## Figures\n\n{page.table(['', ''], [*lines, *about])}",
        *(page.image(figure, name) for name, figure in plots(counts)),
    ]
    for heading, (head, *rows) in (
        ("Rows, at equal distances", samples),
        ("Left out", reject_table),
        ("Most frequent codes", [["code", "of all codes"], *top]),
    ):
        blocks += [f"## {heading}\n\n{page.table(head, rows)}"] if rows else []
    artifact.write_atomic(out, page.html(title, "\n\n".join(blocks)))
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:{width}}  {value}" for name, value in lines))
    for row in samples[1:] if decoder else []:
        print(f"{row[0]}: {row[2] or '(no text)'}\n{'heard':>{width}}  {row[3]}")
    for warning in warnings:
        print(f"WARNING: {warning}")
    print(f"{out}: the page")


if __name__ == "__main__":
    config.main(main, InspectDataset, __doc__, ("path",))
