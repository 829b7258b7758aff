"""Plots, recordings and long tables of a report, each once for Markdown and once for the page.

In: figures, and the audio that items name. Out: Markdown that links to files beside it, and the
HTML that holds the same in its place.
"""

from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from speechfuse.report import page
from speechfuse.report.page import Trusted

BUDGET = 3_000_000  # characters of all recordings on a page


class Media:
    """`files` are the .png files beside the Markdown, by name; `inline` maps Markdown to the HTML
    in its place; `left_out` counts recordings over the budget. Paths of audio start at `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.budget, self.left_out = folder, BUDGET, 0
        self.files: dict[str, bytes] = {}
        self.inline: dict[str, str] = {}

    def plot(self, name: str, figure: Figure, alt: str) -> str:
        figure.draw_without_rendering()  # laid out once, not again for each format
        figure.set_layout_engine("none")
        png = BytesIO()
        figure.savefig(png, format="png", dpi=120)
        self.files[f"{name}.png"] = png.getvalue()
        link = f"![{alt}]({name}.png)"
        self.inline[link] = page.image(figure, alt)
        return link

    def folded(self, head: list[str], rows: list[list[str]]) -> str:
        """Return a remark, in whose place the page has a table to be unfolded."""
        remark = f"<!-- {len(rows):,} more in report.html, table {len(self.inline)} -->"
        summary = f"<details><summary>{len(rows):,} more</summary>"
        self.inline[remark] = f"{summary}\n\n{page.table(head, rows)}\n\n</details>"
        return remark

    def recording(self, name: str) -> Trusted:
        """Return a link to a wav or flac file at the path `name` below `folder`; empty where there
        is none, or the budget is spent."""
        path = self.folder / name
        there = len(name.encode()) < 256 and path.is_file()  # no path is longer
        inside = there and path.resolve().is_relative_to(self.folder.resolve())
        data = path.read_bytes() if inside else b""
        kind = {b"RIFF": "wav", b"fLaC": "flac"}.get(data[:4])
        uri = page.data_uri(f"audio/{kind}", data) if kind else ""
        if len(uri) > self.budget:
            self.left_out += 1
            return Trusted()
        self.budget -= len(uri)
        link = Trusted(f"[audio]({name})" if uri else "")
        self.inline |= {link: page.audio(uri)} if uri else {}
        return link

    def page(self, title: str, markdown: str) -> str:
        """Return the HTML page of the report."""
        for link, html in self.inline.items():
            markdown = markdown.replace(link, html)
        return page.html(title, markdown)
