"""Render Markdown as one self-contained HTML page. The only writer of HTML in the project.

In: a title and Markdown, made with `escape`, `table`, `image` and `audio`. Out: one HTML file with
one style for report, inspect and listen. It requests no other file: its policy forbids that.

HTML in the Markdown passes unchanged, so text that others wrote (a dataset, a model, a config) must
have passed `escape`, which `table` does for every cell that is not `Trusted`.
"""

import base64
import re
from collections.abc import Collection, Iterable, Sequence
from html import escape as escape_html
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --line: #d5d8dc; --mark: #eef4ff;
  --bad: #fff0ee }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --paper: #16181b; --line: #3a3f45; --mark: #1d2b45;
    --bad: #46211d } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 0 auto; padding: 1rem }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
nav a { margin-right: 1rem; display: inline-block }
a { color: inherit }
.scroll { overflow-x: auto; margin: .75rem 0 1.5rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .9rem .3rem 0; text-align: left;
  vertical-align: top; overflow-wrap: break-word; max-width: 28rem }
th { vertical-align: bottom }
tr:has(strong) { background: var(--mark) }
.short { white-space: nowrap }
blockquote { background: var(--bad); border-left: 4px solid #c0392b; margin: 1rem 0;
  padding: .25rem 1rem }
pre { white-space: pre-wrap; font-size: .85rem }
img { max-width: 100%; height: auto }
audio { width: 13rem; height: 2rem; display: block }
@media (max-width: 40rem) { body { font-size: 15px; padding: .75rem } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
SHORT = 36  # characters; a cell whose lines are all shorter is not wrapped
SVG_STYLE = "svg{color-scheme:light dark;color:CanvasText;fill:currentColor}"


class Trusted(str):
    """Markdown or HTML of our own, which `table` does not escape."""


def escape(text: str) -> str:
    """Return `text` on one line, as Markdown (also in a table cell) that renders as that text.

    Only characters that Markdown or HTML would read as markup become entities: `some_name [0.1]`
    stays readable in the Markdown file.
    """
    markup = r"[|*`~\\]|(?<![^\W_])_|_(?![^\W_])|(?<=\])[(:]"
    line = escape_html(" ".join(text.split()), quote=False)
    return re.sub(markup, lambda match: f"&#{ord(match[0])};", line)


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    bold: Collection[int] = (),
    caption: str = "",
) -> str:
    """Return a Markdown table under its caption. A line break in a cell stays one; `bold` are the
    numbers of the rows in bold."""
    lines = [list(map(_cell, head)), ["---"] * len(head)]
    for number, row in enumerate(rows):
        cells = list(map(_cell, row))
        lines.append([f"**{c}**" if c else "" for c in cells] if number in bold else cells)
    rendered = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([caption, "", *rendered] if caption else rendered)


def _cell(text: str) -> str:
    return text if isinstance(text, Trusted) else "<br>".join(map(escape, text.split("\n")))


def data_uri(kind: str, content: bytes) -> str:
    """Return the URI that holds a file of the media type `kind`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def audio(uri: str) -> Trusted:
    """Return an audio player for a data: URI."""
    return Trusted(f'<audio controls preload="none" src="{escape_html(uri)}"></audio>')


def image(figure: "Figure", alt: str) -> Trusted:
    """Return an <img> that holds the figure as SVG, in the colours of a light or dark page."""
    from matplotlib import rc_context

    file = StringIO()
    with rc_context({"svg.hashsalt": "speechfuse"}):  # same ids each time
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue().replace("#000000", "currentColor").replace("#ffffff", "Canvas")
    svg = svg.replace("<defs>", f"<style>{SVG_STYLE}</style><defs>", 1)
    uri = data_uri("image/svg+xml", svg.encode())
    return Trusted(f'<img alt="{escape_html(alt)}" src="{uri}">')


def place(path: str, folder: Path, out: str | None, kind: str) -> Path:
    """Return where the page of the dataset `path`, whose files are in `folder`, goes: `out`, or
    NAME.kind.html beside it; of one on the Hub, whose folder is a cache, into out/. Raises
    ValueError for a place inside of the dataset."""
    beside = folder.absolute().parent if folder == Path(path) else Path("out")
    page = Path(out) if out else beside / f"{Path(path).absolute().name}.{kind}.html"
    if page.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"out={page} is inside the dataset {folder}: choose another place")
    return page


def html(title: str, markdown: str) -> str:
    """Return the page. Links to its sections follow the first heading; a block quote is a
    warning."""
    parser, links = MarkdownIt("commonmark").enable("table"), list[str]()
    tokens = parser.parse(markdown)
    for token, content in pairwise(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            token.attrSet("id", f"section-{len(links)}")
            text = parser.renderer.render(content.children or [], parser.options, {})
            links.append(f'<a href="#section-{len(links)}">{text}</a>')
        elif token.type == "blockquote_open":
            token.attrSet("role", "alert")
        elif token.type == "td_open" and max(map(len, content.content.split("<br>"))) <= SHORT:
            token.attrSet("class", "short")
    body = parser.renderer.render(tokens, parser.options, {})
    body = re.sub("<th>.*?</th>", lambda head: head[0].replace("_", "_<wbr>"), body)
    body = body.replace("<table>", '<div class="scroll" tabindex="0"><table>')
    body = body.replace("</table>", "</table></div>")
    top, heading, rest = body.partition("</h1>") if "<h1>" in body else ("", "", body)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape_html(title)}</title><style>{STYLE}</style></head><body><main>
{top}{heading}
<nav aria-label="Sections">{" ".join(links)}</nav>
{rest}</main></body></html>
"""
