"""Look at the codes of a finished dataset.

    python -m stages.inspect_dataset path=out/data/speech_train

In: a dataset of speech or conversations, or owner/name@revision on the Hub. Out: its figures on the
screen, with a warning where the quantizer seems to have heard nothing, and one HTML page with
plots, what was left out and why, and a few rows. With a `decoder` also what the codec heard in
them. Nothing is written into the dataset's folder.
"""

import base64
import html
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from tqdm import tqdm

from speechfuse import artifact, config
from speechfuse.hub import data as hub_data
from speechfuse.rows import shards, statistics
from speechfuse.rows.rejects import FILTERED, read_rejects
from speechfuse.rows.statistics import Histogram, Statistics

TOP, EXAMPLES, CODES_SHOWN = 16, 3, 40
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
td, th { border-bottom: 1px solid #ddd; padding: .25rem .75rem .25rem 0; text-align: left;
  vertical-align: top; overflow-wrap: anywhere }
.warning { background: #fff0ee; border-left: 4px solid #c0392b; padding: .5rem 1rem }
img { max-width: 100%; width: 34rem }
"""


@dataclass
class InspectDataset:
    path: str = field(metadata={"help": "folder of the dataset, or owner/name@revision"})
    out: str | None = field(
        default=None, metadata={"help": "the page; null: NAME.inspect.html beside the folder"}
    )
    hear: int = field(default=5, metadata={"help": "rows that are shown"})
    decoder: str | None = field(
        default=None, metadata={"help": "the quantizer, with its decoding half: says what it heard"}
    )
    whisper: str | None = field(default=None, metadata={"help": "the decoder's openai-whisper .pt"})
    language: str = field(default="en", metadata={"help": "that the decoder is to hear"})


def place_of(job: InspectDataset, folder: Path) -> Path:
    """Where the page goes; of a dataset on the Hub, whose folder is a cache, into out/."""
    name = Path(job.path).absolute().name
    beside = folder.absolute().parent if folder == Path(job.path) else Path("out")
    place = Path(job.out) if job.out else beside / f"{name}.inspect.html"
    if place.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"out={place} is inside the dataset {folder}: choose another place")
    return place


def count(paths: list[Path], stream: dict[str, Any]) -> Statistics:
    found = Statistics(stream)
    rows = sum(pq.read_metadata(path).num_rows for path in paths)
    with tqdm(total=rows, desc="rows", unit="row", unit_scale=True, delay=2) as bar:
        for path in paths:
            for batch in statistics.batches(path):
                found.add(batch)
                bar.update(len(batch))
    return found


def left_out(paths: list[Path]) -> tuple[Counter[str], dict[str, list[dict[str, str]]]]:
    """Rejects by kind, and the first few of each."""
    kinds: Counter[str] = Counter()
    examples: dict[str, list[dict[str, str]]] = {}
    for path in paths:
        try:
            rejects = read_rejects(path)
        except FileNotFoundError:  # a job that writes no such lists
            continue
        for reject in rejects:
            kind = reject["reason"].partition(":")[0]
            kinds[kind] += 1
            if kinds[kind] <= EXAMPLES:
                examples.setdefault(kind, []).append(reject)
    return kinds, examples


def quantiles_text(values: Histogram) -> str:
    low, middle, high = (values.quantile(share) for share in (0.05, 0.5, 0.95))
    return f"mean {values.mean:.2f}, median {middle:.1f}, 90 % are {low:.1f} to {high:.1f}"


def figures(
    found: Statistics, totals: dict[str, Any], kinds: Counter[str], size: int
) -> list[tuple[str, str]]:
    """(name, value) of all that is there to say; `size` is the bytes of the codes on disk."""
    lines = [("rows", f"{found.rows:,}")]
    if found.utterances != found.rows:
        lines.append(("pieces of speech in them", f"{found.utterances:,}"))
    if found.utterances:
        hours = f"{found.seconds.sum / 3600:,.3f} h"
        lines += [
            ("speech", hours),
            (
                "seconds of a row",
                f"{quantiles_text(found.seconds)}, longest {found.seconds.most:.1f}",
            ),
        ]
    if found.codes:
        top, share = found.top(1)[0]
        lines += [
            ("codes", f"{found.codes:,}, {found.rate:.2f} a second"),
            (
                "codebook",
                f"{found.used:,} of {found.size:,} codes are in use; "
                f"the mask code {found.mask:,} times",
            ),
            (
                "entropy",
                f"{found.entropy:.2f} bits of {found.possible_entropy:.2f} possible; "
                f"perplexity {2**found.entropy:.0f}",
            ),
            ("most frequent", f"code {top}, {share:.1%}"),
            (
                "runs of one code",
                f"mean {found.runs.mean:.2f}, longest {found.runs.most:.0f}; "
                f"{found.repeated:.1%} of codes repeat the one before",
            ),
            ("equal rows", f"{found.copies:,} have the very codes of an earlier one"),
            ("on disk", f"{8 * size / found.codes:.2f} bits a code"),
        ]
    if found.utterances:
        lines.append(("with a text", f"{found.with_text:,}"))
    if found.pace.count:
        lines.append(("characters a second", quantiles_text(found.pace)))
    if found.languages:
        lines.append(("languages", listed(found.languages)))
    if found.speakers:
        lines.append(("speakers", f"{found.speakers:,}"))
    if found.pieces:
        lines.append(("split", f"{found.split:,} recordings into {found.pieces:,} rows"))
    for name, words in (("resampled", "resampled"), ("mixed_down", "mixed down to mono")):
        if name in totals:
            lines.append((words, f"{totals[name]:,}"))
    for name, filtered in (("rejected", False), ("filtered out", True)):
        mine = (k for k in kinds if k.startswith(FILTERED) == filtered)
        of = Counter({kind: kinds[kind] for kind in mine})
        lines.append((name, f"{of.total():,}" + (f": {listed(of)}" if of else "")))
    return lines


def listed(counts: Counter[str], many: int = 10) -> str:
    shown = [f"{name} {n:,}" for name, n in counts.most_common(many)]
    return ", ".join([*shown, *(["..."] if len(counts) > many else [])])


def plots(found: Statistics) -> list[tuple[str, Figure]]:
    """(what it shows, plot): codes by rank, runs, seconds, and characters a second."""
    drawn = []
    if found.codes:
        shares = np.sort(found.frequency)[::-1][: found.size] / found.codes
        figure = bars(shares, np.arange(found.size + 1), "rank of the code", "codes")
        figure.axes[0].axhline(1 / found.size, color="0.3", linestyle="--", label="all used alike")
        drawn.append(("codes by frequency", logarithmic(figure, shares)))
        runs = found.runs.bins[1:] / found.runs.count
        figure = bars(runs, np.arange(len(runs) + 1) + 0.5, "codes in a run of one code", "runs")
        drawn.append(("run lengths", logarithmic(figure, runs)))
    for name, of in (("seconds of a row", found.seconds), ("characters a second", found.pace)):
        if of.count:
            edges = np.arange(len(of.bins) + 1) * of.width
            figure = bars(of.bins / of.count, edges, name, "rows")
            ax = figure.axes[0]
            ax.axvline(of.mean, color="0.3", linestyle="--", label=f"mean {of.mean:.2f}")
            ax.set_xlim(0, 1.2 * of.quantile(0.999) + of.width)  # outliers would squeeze the rest
            ax.legend()
            drawn.append((name, figure))
    return drawn


def bars(shares: np.ndarray, edges: np.ndarray, xlabel: str, of: str) -> Figure:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = figure.subplots()
    ax.stairs(shares, edges, fill=True, color="C0")
    ax.set(xlabel=xlabel, ylabel=f"share of all {of}", xlim=(edges[0], edges[-1]))
    return figure


def logarithmic(figure: Figure, shares: np.ndarray) -> Figure:
    ax = figure.axes[0]
    ax.set(yscale="log", ylim=(min(1e-3, 0.5 * shares[shares > 0].min()), 1.5))
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    return figure


def image(name: str, figure: Figure) -> str:
    """An <img> that holds its picture."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=130)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'


def table(rows: list[list[str]]) -> str:
    """HTML of a table, its head first; a cell may hold any text."""
    lines = []
    for tag, row in zip(["th", *["td"] * len(rows)], rows, strict=False):
        lines.append("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def decoder_of(job: InspectDataset, stream: dict[str, Any]) -> Any:
    """The decoder of the quantizer that made the dataset; ValueError for another's."""
    from speechfuse.quantizer.decoder import CodeTranscriber
    from speechfuse.quantizer.model import Quantizer

    path, whisper = Path(job.decoder or ""), Path(job.whisper) if job.whisper else None
    decoder = CodeTranscriber.load(path, whisper, job.language)
    identity = Quantizer.load(path, whisper).identity
    if identity != stream.get("quantizer"):
        raise ValueError(
            f"decoder={path} is the quantizer {identity[:12]}, but {job.path} was made by "
            f"{str(stream.get('quantizer'))[:12]}: codes mean nothing to another quantizer"
        )
    return decoder


def rows_shown(job: InspectDataset, paths: list[Path], decoder: Any) -> list[list[str]]:
    """A table, its head first: id, seconds, text, what the codec heard, and the first codes."""
    rows = statistics.sample_rows(paths, job.hear) if job.hear > 0 else []
    table_of = [["id", "seconds", "text", f"first {CODES_SHOWN} codes"]]
    for row in rows:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
        codes = " ".join(map(str, row["codes"][:CODES_SHOWN]))
        table_of.append([row["id"] or "", seconds, row["text"] or "", codes])
    if decoder:
        heard = decoder.transcribe([np.array(row["codes"], np.uint16) for row in rows])
        for line, words in zip(table_of, ["what the codec heard", *heard], strict=True):
            line.insert(3, words)
    return table_of if rows else []


def page(
    title: str, warnings: list[str], sections: list[tuple[str, list[list[str]]]], images: list[str]
) -> str:
    """One HTML file that needs no other; `sections` are (heading, table with its head first)."""
    warned = "".join(f"<p>{html.escape(line)}</p>" for line in warnings)
    tables = [f"<h2>{name}</h2>{table(rows)}" for name, rows in sections if len(rows) > 1]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            f"<title>{html.escape(title)}</title>",
            f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>",
            f'<div class="warning">{warned}</div>' if warnings else "",
            tables[0],
            *images,
            *tables[1:],
            "</html>\n",
        ]
    )


def main(job: InspectDataset) -> None:
    if job.whisper and not job.decoder:
        raise ValueError(f"whisper={job.whisper} is of use only to a decoder: give decoder=...")
    folder = hub_data.local(job.path)
    place = place_of(job, folder)
    manifest, paths = artifact.manifest_of(folder), shards.shard_paths(folder)
    stream, totals = shards.read_stream(folder), manifest.get("totals", {})
    decoder = decoder_of(job, stream) if job.decoder else None
    found = count(paths, stream)
    kinds, examples = left_out(paths)
    size = sum(map(statistics.bytes_of_codes, paths))
    shown = rows_shown(job, paths, decoder)
    lines, warnings = figures(found, totals, kinds, size), found.warnings()
    about = {
        "source": totals.get("source"),
        "licence": totals.get("licence"),
        "made by": manifest.get("job"),
        "quantizer": stream.get("quantizer"),
    }
    top = [[str(code), f"{share:.2%}"] for code, share in found.top(TOP)] if found.codes else []
    out = [
        [kind, f"{n:,}", "; ".join(f"{r['id']}: {r['reason']}" for r in examples[kind])]
        for kind, n in kinds.most_common()
    ]
    sections = [
        ("Figures", [["", ""], *map(list, lines), *([k, v] for k, v in about.items() if v)]),
        ("Rows, at equal distances", shown),
        ("Left out", [["kind", "clips", f"the first {EXAMPLES}"], *out]),
        ("Most frequent codes", [["code", "of all codes"], *top]),
    ]
    images = [image(name, figure) for name, figure in plots(found)]
    artifact.write_atomic(place, page(Path(job.path).absolute().name, warnings, sections, images))
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:{width}}  {value}" for name, value in lines))
    for row in shown[1:] if decoder else []:
        print(f"{row[0]}: {row[2] or '(no text)'}\n{'heard':>{width}}  {row[3]}")
    for warning in warnings:
        print(f"WARNING: {warning}")
    print(f"{place}: the page")


if __name__ == "__main__":
    config.main(main, InspectDataset, __doc__, ("path",))
