"""The one writer of HTML: what others wrote stays text, and a page needs no other file."""

import html
import re

import pytest
from matplotlib.figure import Figure

from speechfuse.report import page

OTHERS = [
    "<script>alert(1)</script>",
    "a | b ** c ** `d` ~~e~~ \\ &amp; *f*",
    "![x](http://example.org/x.png) [y](http://example.org) <http://example.org>",
    "__init__ _a_ some_name _b",
    "[a]: http://example.org",
]


@pytest.mark.parametrize("text", OTHERS)
def test_what_others_wrote_is_shown_as_it_is(text):
    shown = page.html("t", f"said: {page.escape(text)}")
    [paragraph] = re.findall("<p>said: (.*)</p>", shown)
    assert paragraph == html.escape(text)
    [cell, _] = re.findall(
        "<td[^>]*>(.*)</td>", page.html("t", page.table(["a", "b"], [[text, ""]]))
    )
    assert cell == paragraph


def test_what_needs_no_escape_has_none():
    assert page.escape("stage2/epoch_1 +0.2 [+0.1, +0.3]\n (n = 3)") == (
        "stage2/epoch_1 +0.2 [+0.1, +0.3] (n = 3)"
    )


def test_a_table_has_lines_bold_rows_and_our_own_html():
    sound = page.audio("data:audio/wav;base64,AAAA")
    text = page.table(["a_b", "c"], [["x\ny", sound], ["-1", ""]], {1}, "Two rows.")
    assert text.splitlines()[0] == "Two rows." and text.splitlines()[-1] == "| **-1** |  |"
    shown = page.html("t", text)
    assert "<th>a_<wbr>b</th>" in shown and "x<br>y</td>" in shown and f"{sound}</td>" in shown
    assert "<strong>-1</strong>" in shown and shown.count("<table>") == 1


def test_sections_are_linked_and_block_quotes_are_warnings():
    shown = page.html(
        "<t>", "# t\n\n> careful\n\n## One_ & two\n\n### Three\n\n## Four\n\n<div>\n\n*x*\n\n</div>"
    )
    links = re.findall('<a href="#(.*?)">(.*?)</a>', shown)
    assert links == [("section-0", "One_ &amp; two"), ("section-1", "Four")]
    assert all(f'<h2 id="{id}">{text}</h2>' in shown for id, text in links)
    assert shown.index("</h1>") < shown.index("<nav") < shown.index('role="alert"')
    assert "<title>&lt;t&gt;</title>" in shown and "<div>\n<p><em>x</em></p>\n</div>" in shown
    assert "<nav" in page.html("t", "## One")


def test_a_figure_is_an_image_without_a_file():
    figure = Figure()
    figure.subplots().plot([1, 2])
    shown = page.html("t", page.image(figure, 'a "plot"'))
    assert '<img alt="a &quot;plot&quot;" src="data:image/svg+xml;base64,' in shown
    assert re.findall('src="(?!data:)', shown) == []
    assert page.image(figure, "x") == page.image(figure, "x")
