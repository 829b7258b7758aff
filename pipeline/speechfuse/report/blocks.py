"""A report as Markdown and as one HTML page, from the same blocks, so that both say the same.

In: blocks in order. Out: report.md with its plots as .png files beside it, and report.html, which
holds plots and audio itself and asks for no other file. Cells and texts are plain text: whatever a
model said cannot break a table or become a tag. In a text, **x** is bold and `x` is code.
"""

import base64
import html
import re
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from typing import Protocol

from matplotlib import rc_context
from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --line: #d5d8dc; --mark: #eef4ff;
  --bad: #fff0ee }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --paper: #16181b; --line: #3a3f45; --mark: #1d2b45; --bad: #46211d } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 0 auto; padding: 1rem }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
nav a { margin-right: 1rem; display: inline-block }
a { color: inherit }
.scroll { overflow-x: auto; margin: .75rem 0 1.5rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .9rem .3rem 0; text-align: left;
  vertical-align: top }
thead th { vertical-align: bottom }
caption { text-align: left; padding-bottom: .25rem }
caption span { display: block; max-width: min(60rem, 88vw) }
tr.chosen { background: var(--mark) }
.short td { white-space: nowrap }
td { overflow-wrap: break-word; max-width: 28rem }
.failed { background: var(--bad); border-left: 4px solid #c0392b; padding: .25rem 1rem }
pre { overflow-x: auto; font-size: .85rem }
svg { max-width: 100%; height: auto; min-width: 34rem }
svg text { fill: currentColor }
audio { width: 13rem; height: 2rem; display: block }
@media (max-width: 40rem) { body { font-size: 15px; padding: .75rem } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
SHORT = 36  # characters of a line that is not to be broken


@dataclass(frozen=True)
class Audio:
    """A recording in a cell: a data: URI for the page, and a path beside the Markdown."""

    uri: str
    path: str = ""


TableCell = str | Audio


class Block(Protocol):
    def markdown(self) -> str: ...
    def html(self, number: int) -> str: ...


@dataclass
class Heading:
    text: str
    level: int = 2

    def markdown(self) -> str:
        return f"{'#' * self.level} {self.text}"

    def html(self, number: int) -> str:
        return f'<h{self.level} id="b{number}">{html.escape(self.text)}</h{self.level}>'


@dataclass
class Markdown:
    text: str

    def markdown(self) -> str:
        return self.text

    def html(self, number: int) -> str:
        return f"<p>{inline(self.text)}</p>"


@dataclass
class Failed:
    """What went wrong, at the top of the page."""

    lines: list[str]

    def markdown(self) -> str:
        return "\n".join(f"> {escaped(line)}  " for line in self.lines)

    def html(self, number: int) -> str:
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in self.lines)
        return f'<div class="failed" role="alert">{lines}</div>'


@dataclass
class Code:
    lines: list[str]

    def markdown(self) -> str:
        return "\n".join(["```", *self.lines, "```"])

    def html(self, number: int) -> str:
        return f'<pre tabindex="0">{html.escape(chr(10).join(self.lines))}</pre>'


@dataclass
class Table:
    """A head and rows of cells, of which the first names the row; a line break divides a cell.
    `chosen` are the rows in bold; `folded` are further rows, on the page alone."""

    head: list[str]
    rows: list[list[TableCell]]
    chosen: set[int] = field(default_factory=set)
    caption: str = ""
    folded: list[list[TableCell]] = field(default_factory=list)

    def markdown(self) -> str:
        rows = [list(map(_in_markdown, row)) for row in self.rows]
        for i in self.chosen:
            rows[i] = [f"**{text}**" if text else "" for text in rows[i]]
        rows = [list(map(_in_markdown, self.head)), ["---"] * len(self.head), *rows]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([self.caption, "", *lines] if self.caption else lines)

    def html(self, number: int) -> str:
        caption = f"<caption><span>{inline(self.caption)}</span></caption>" if self.caption else ""
        names = [_in_html(cell).replace("_", "_<wbr>") for cell in self.head]  # may break there
        head = "".join(f'<th scope="col">{name}</th>' for name in names)
        texts = [cell for row in self.rows for cell in row[1:] if isinstance(cell, str)]
        short = all(len(line) <= SHORT for text in texts for line in text.split("\n"))
        body = []
        for i, (first, *rest) in enumerate(self.rows):
            cells = "".join(f"<td>{_in_html(cell)}</td>" for cell in rest)
            mark = ' class="chosen"' if i in self.chosen else ""
            body.append(f'<tr{mark}><th scope="row">{_in_html(first)}</th>{cells}</tr>')
        more = Table(self.head, self.folded).html(number) if self.folded else ""
        if more:
            more = f"\n<details><summary>{len(self.folded):,} more</summary>{more}</details>"
        return (
            f'<div class="scroll" tabindex="0"><table{" class=short" if short else ""}>{caption}'
            f"<thead><tr>{head}</tr></thead>\n"
            f"<tbody>{chr(10).join(body)}</tbody></table></div>{more}"
        )


@dataclass
class Plot:
    """`name` is that of the .png beside the Markdown; `alt` says what the plot shows."""

    name: str
    figure: Figure
    alt: str

    def __post_init__(self) -> None:
        self.figure.draw_without_rendering()  # laid out once, not again for each format
        self.figure.set_layout_engine("none")

    def markdown(self) -> str:
        return f"![{self.alt}]({self.name}.png)"

    def html(self, number: int) -> str:
        label = f'<svg role="img" aria-label="{html.escape(self.alt)}"'
        drawn = svg(self.figure, f"b{number}-").replace("<svg", label, 1)
        return f'<div class="scroll" tabindex="0">{drawn}</div>'

    def png(self) -> bytes:
        file = BytesIO()
        self.figure.savefig(file, format="png", dpi=120)
        return file.getvalue()


def svg(figure: Figure, prefix: str) -> str:
    """The figure as an <svg> in the colours of the page; `prefix` keeps its ids its own."""
    file = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "speechfuse"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = file.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.S)
    drawn = re.sub(r'\bid="', f'id="{prefix}', drawn)
    drawn = re.sub(r'(href="|url\()#', rf"\1#{prefix}", drawn)
    return drawn.replace("#000000", "currentColor").replace("#ffffff", "var(--paper)")


def inline(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text, quote=False))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, also inside a table."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")


def _in_markdown(cell: TableCell) -> str:
    if isinstance(cell, Audio):
        return f"[audio]({cell.path})" if cell.path else ""
    return "<br>".join(escaped(line) for line in cell.split("\n"))


def _in_html(cell: TableCell) -> str:
    if isinstance(cell, Audio):
        return f'<audio controls preload="none" src="{html.escape(cell.uri)}"></audio>'
    return "<br>".join(html.escape(line, quote=False) for line in cell.split("\n"))


def markdown(blocks: list[Block]) -> str:
    return "\n\n".join(block.markdown() for block in blocks) + "\n"


def document(title: str, blocks: list[Block]) -> str:
    """One HTML file; its policy forbids it to ask for any other."""
    parts = [block.html(number) for number, block in enumerate(blocks)]
    links = [
        f'<a href="#b{number}">{html.escape(block.text)}</a>'
        for number, block in enumerate(blocks)
        if isinstance(block, Heading) and block.level == 2
    ]
    first = next((i for i, b in enumerate(blocks) if isinstance(b, Heading)), -1) + 1
    parts.insert(first, f'<nav aria-label="Sections">{chr(10).join(links)}</nav>')
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>",
            *parts,
            "</main></body></html>\n",
        ]
    )


def pictures(blocks: list[Block]) -> dict[str, bytes]:
    """The .png files that the Markdown needs, by name."""
    return {f"{block.name}.png": block.png() for block in blocks if isinstance(block, Plot)}


def recording(told: str, folder: Path) -> Audio | None:
    """The audio that an item names: a data: URI, base64 of a wav or flac, or a path below `folder`.
    None where there is none of these."""
    if told.startswith("data:audio/"):
        return Audio(told)
    path = folder / told
    named = 0 < len(told) < 256  # no path is longer, base64 of audio is
    if named and path.is_file() and path.resolve().is_relative_to(folder.resolve()):
        return _audio(path.read_bytes(), told)
    try:
        return _audio(base64.b64decode(told, validate=True), "")
    except ValueError:
        return None


def _audio(data: bytes, path: str) -> Audio | None:
    kind = {b"RIFF": "wav", b"fLaC": "flac"}.get(data[:4])
    uri = f"data:audio/{kind};base64,{base64.b64encode(data).decode()}"
    return Audio(uri, path) if kind else None
