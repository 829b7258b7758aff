"""The page of a report: whole in one file, readable, and true to the results it was made from."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
import wave
from pathlib import Path

import pytest
import yaml

from speechfuse import config
from speechfuse.report import media as report_media
from speechfuse.report import sections as report_sections
from stages import report
from tests.eval_results import score, scored, worded, write, write_failure

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
EVIL = "<script>alert(1)</script> | <img src=http://example.org/x.png>"


def tone(seconds: float = 0.2) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        count = int(16000 * seconds)
        out.writeframes(
            b"".join(
                int(9000 * math.sin(i / 6)).to_bytes(2, "little", signed=True) for i in range(count)
            )
        )
    return file.getvalue()


def replies(split: str, right: int, of: int = 120) -> tuple[dict, list[dict]]:
    qa, items = scored("spoken_qa", split, [i < right for i in range(of)])
    for i, item in enumerate(items):
        item |= {"question": f"question {i}", "heard": EVIL, "answer": f"a{i}", "expected": "b"}
        item["audio"] = ["", "clips/0.wav", "clips/letter.wav", "../no.wav"][i // 12 % 4]
    return qa, items


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run of three epochs with everything that a result file may hold, and its report."""
    folder = tmp_path_factory.mktemp("out") / "run"
    evals = folder / "evals"
    (folder / "clips").mkdir(parents=True)
    (folder / "clips" / "0.wav").write_bytes(tone())
    (folder / "clips" / "letter.wav").write_text("no audio")
    (folder.parent / "no.wav").write_bytes(tone())
    write(evals, "base", "mmlu", [score("mmlu", "all", 0.6)])
    for epoch in range(3):
        name = f"stage2/epoch_{epoch}"
        write(evals, name, "mmlu", [score("mmlu", "all", 0.5 + epoch / 100)])
        chose, first = replies("validation", 50 + 20 * epoch)
        shown, items = replies("test", 40 + 25 * epoch)
        counts = {"coverage": 0.975, "empty": 3, "loops": 7, "refusals": 1, "mean_words": 4.25}
        write(evals, name, "spoken_qa", [chose, shown], first + items, details=counts)
        rate, utterances = worded("asr", "clean", [3 - epoch, 4, 2] * 20)
        about = {
            "substitutions": 90,
            "deletions": 30,
            "insertions": 60,
            "words": 600,
            "above_one": 0.05,
            "by_duration": [["0-5 s", 0.2, 50], ["over 30 s", 0.9, 10]],
        }
        hits = [
            {"id": f"clean-{i}", "kind": "exact", "training_id": f"t{i}", "shared": EVIL}
            for i in range(5)
        ]
        seen = {"exact": 2, "ngram": 0, "codes": 0, "without_hits": 0.31, "hits": hits}
        write(
            evals,
            name,
            "asr",
            [rate],
            utterances,
            details={
                "by_split": {"clean": about},
                "contamination": seen,
                "partial": True,
            },
        )
        write(evals, name, "asr_blog", [score("asr", "clean", 0.9, "wer")], protocol="blog")
    write_failure(evals, "stage2/epoch_3", "spoken_qa", f"no weights {EVIL}")
    steps = [
        {"step": i, "epoch": i // 50, "loss": 3 / i, "tokens": 9, "seconds": 0.1}
        for i in range(1, 101)
    ]
    (folder / "stage2").mkdir()
    (folder / "stage2" / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    spec = {
        "out": str(folder),
        "evals": str(evals),
        "base": "base",
        "text": "mmlu",
        "runs": [{"name": "stage2", "path": str(folder / "stage2")}],
        "rule": {
            "choose_from": "stage2",
            "task": "spoken_qa",
            "split": "validation",
            "metric": "acc",
            "then": [{"task": "asr", "split": "clean", "metric": "wer"}],
        },
        "table": [
            {"task": "mmlu", "split": "all", "metric": "acc", "degradation": True},
            {"task": "spoken_qa", "split": "test", "metric": "acc"},
            {"task": "asr", "split": "clean", "metric": "wer"},
        ],
        "samples": "test",
        "command": "just recipe=run sweep report",
    }
    (folder / "report.yaml").write_text(yaml.safe_dump(spec))
    report.main(config.load(report.Report, folder / "report.yaml", []))
    return folder


@pytest.fixture(scope="module")
def sections(made: Path) -> dict[str, str]:
    """Markdown by heading."""
    parts = re.split(r"^## ", (made / "report.md").read_text(), flags=re.M)
    return {part.partition("\n")[0]: part for part in parts}


def row(section: str, name: str) -> list[str]:
    [line] = [line for line in section.splitlines() if line.strip("| *").startswith(name)]
    return [cell.strip(" *") for cell in line.split("|")[1:-1]]


def test_numbers_stand_with_what_makes_them_less(sections):
    results = sections["Results"]
    last = row(results, "stage2/epoch_2")
    assert last[1:3] == ["0.520 \u00b1 0.050", "13.33"]
    assert last[3] == "0.750 \u00b1 0.050<br>coverage 97.5%<br>best"
    assert last[4].endswith("partial<br>5 hits in training, without them 0.310<br>best")
    assert "n = 120" in results
    assert row(results, "stage2/epoch_1")[4].startswith("0.267")


def test_what_is_partial_is_said_in_a_sentence_on_top(made, sections):
    top = next(iter(sections.values()))
    assert "**Partial**: 3 of 10 results are of a part" in top and "limited by" not in top
    spec = yaml.safe_load((made / "report.yaml").read_text()) | {"partial": "limit=60"}
    spec["table"].append({"task": "spoken_qa", "split": "of no item", "metric": "acc"})
    (made / "limited.yaml").write_text(yaml.safe_dump(spec | {"out": str(made / "limited")}))
    report.main(config.load(report.Report, made / "limited.yaml", []))
    assert "limited by `limit=60`" in (made / "limited/report.md").read_text()


def test_differences_are_paired_adjusted_and_marked(sections):
    rows = [
        line for line in sections["Differences between epochs"].splitlines() if line[0:1] == "|"
    ]
    cells = {
        (a.strip(" *"), b.strip(" *")): line for line in rows for a, b in [line.split("|")[1:3]]
    }
    middle = cells["spoken_qa test acc", "stage2/epoch_1"]
    assert "+0.208 [+0.1" in middle and "p &lt; 0.001" in middle and "tie" not in middle
    assert ", tie" not in cells["spoken_qa validation acc", "stage2/epoch_0"]
    assert (
        "Without numbers of single items: mmlu all acc." in sections["Differences between epochs"]
    )
    assert not any(score == "mmlu all acc" for score, _ in cells)


def test_what_is_behind_the_numbers_is_told(sections, made):
    errors = sections["Word errors"]
    assert row(errors, "stage2/epoch_0 | asr clean | 90")[2:] == [
        "90<br>15.0%",
        "30<br>5.0%",
        "60<br>10.0%",
        "600",
        "5.0%",
    ]
    assert "| checkpoint | task | 0-5 s | over 30 s |" in errors and "0.900<br>n = 10" in errors
    assert row(sections["Diagnostics"], "stage2/epoch_0")[2:] == [
        "240",
        "3",
        "7",
        "1",
        "4.2",
        "97.5%",
    ]
    hits = sections["Contamination"].splitlines()
    assert sum(line.startswith("| asr | clean-") for line in hits) == 3  # once, not for each epoch
    assert "or codes: 5 of asr. The first 3 of each" in sections["Contamination"]
    html = (made / "report.html").read_text()
    folded = html.partition("<details><summary>2 more</summary>")[2].partition("</details>")[0]
    assert folded.count("clean-") == folded.count("asr</td>") == 2
    prints = row(sections["Provenance"], "stage2/epoch_0 | spoken_qa")
    assert "are made by `just recipe=run sweep report`" in sections["Provenance"]
    assert "c0c0c0c0c0c0" in prints and "torch 2.13.0" in prints and "clean" in prints


def test_protocols_never_share_a_table(sections, made):
    assert "0.900 \u00b1 0.050" in sections["Protocol blog"]
    for name, section in sections.items():
        assert ("blog" in section) == name.endswith("blog")
    rows = json.loads((made / "report.json").read_text())
    assert [r["value"] for r in rows if r["task"] == "asr" and r["checkpoint"].endswith("0")] == [
        0.3
    ]


def test_failed_cells_are_named_at_the_top(made):
    text, html = (made / name for name in ("report.md", "report.html"))
    top = text.read_text().partition("\n## ")[0]
    assert "failed: stage2/epoch_3 spoken_qa: no weights" in top
    assert html.read_text().index('role="alert"') < html.read_text().index("<h2")


def test_what_a_model_says_is_text(made):
    text, html = ((made / name).read_text() for name in ("report.md", "report.html"))
    assert "<script" not in html + text and "<img" not in text
    assert html.count("<img") == html.count('src="data:image/svg+xml;base64,') == 3
    assert html.count("&lt;script&gt;") > 10


def test_the_page_holds_all_it_needs(made):
    html = (made / "report.html").read_text()
    found = re.findall(r'(?:src|href)="([^"]*)"', html)
    ours = ("#", "data:audio/wav;base64,", "data:image/svg+xml;base64,")
    assert found and all(link.startswith(ours) for link in found)
    assert not re.findall(r"url\((?!#)", html) and "@import" not in html
    assert html.count("<img alt=") == 3 and html.count("<audio") == 3
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) and {link[1:] for link in found if link[0] == "#"} <= set(ids)
    data = [base64.b64decode(link.partition(",")[2]) for link in found if link[0] == "d"]
    sounds = [sound for sound in data if not sound.startswith(b"<?xml")]
    assert len(sounds) == 3
    drawn = b"".join(picture for picture in data if picture.startswith(b"<?xml"))
    assert not re.findall(rb'(?:href|src)="(?!#)|url\((?!#)|@import', drawn)
    assert all(sound == tone() for sound in sounds)  # nothing of ../no.wav, which is another's
    assert '<meta name="viewport"' in html and "prefers-color-scheme: dark" in html
    assert "[audio](clips/0.wav)" in (made / "report.md").read_text()


def test_recordings_beyond_the_budget_are_left_out_and_counted(tmp_path, monkeypatch):
    items = [
        {
            "id": str(i),
            "split": "test",
            "question": "q",
            "answer": "a",
            "correct": True,
            "audio": "0.wav",
        }
        for i in range(5)
    ]
    (tmp_path / "0.wav").write_bytes(tone())
    size = len(f"data:audio/wav;base64,{base64.b64encode(tone()).decode()}")
    monkeypatch.setattr(report_media, "BUDGET", 3 * size)
    made = report_media.Media(tmp_path)
    text = report_sections.excerpts(items, "test", made)
    html = made.page("t", text)
    cells = [row.split("</td>")[2] for row in html.partition("<tbody>")[2].split("<tr>")[1:]]
    assert ["<audio" in cell for cell in cells] == [True] * 3 + [False] * 2
    assert made.left_out == 2


@pytest.mark.parametrize("many", [1, 3, 10, 25])
def test_as_many_items_are_shown_as_there_are_each_once(tmp_path, many):
    items = [{"id": str(i), "question": f"q{i}.", "answer": "a"} for i in range(many)]
    text = report_sections.excerpts(items, None, report_media.Media(tmp_path))
    shown = [i for i in range(many) if f"| q{i}. |" in text]
    assert len(shown) == text.count("| q") - 1 == min(many, 10)


@pytest.mark.parametrize("name", ["", "\0", "\u00e9" * 200, "a" * 300, ".", "../other.wav"])
def test_what_is_no_recording_below_the_folder_is_no_link(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "other.wav").write_bytes(tone())
    made = report_media.Media(tmp_path / "run")
    assert made.recording(name) == "" and not made.inline and not made.left_out


def browse(html: Path, profile: Path, *more: str) -> tuple[str, str, dict]:
    """(DOM, what the console said, log of the network) of a page in a browser without a network."""
    log = profile / "net.json"
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}",
        f"--log-net-log={log}",
        "--enable-logging=stderr",
        "--window-size=390,2000",
        *more,
        "--dump-dom",
        html.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, said, json.loads(log.read_text())


def requests(log: dict) -> set[str]:
    """Addresses that the page asked for, as the log of the network has them; what the browser asks
    for itself (its updates) has no origin."""
    asked = [event["params"] for event in log["events"] if "params" in event]
    asked = [told for told in asked if told.get("initiator", "not an origin") != "not an origin"]
    return {told["url"] for told in asked if not told["url"].startswith(("data:", "file:"))}


@pytest.mark.skipif(not BROWSER, reason="no chromium on this machine")
def test_a_browser_shows_it_without_error_and_asks_for_nothing(made, tmp_path):
    dom, said, log = browse(made / "report.html", tmp_path / "good")
    assert said == "" and requests(log) == set()
    assert dom.count("<tr") > 40 and "Provenance" in dom
    bad = tmp_path / "bad.html"  # the same instruments do see an error and a request
    bad.write_text("<script>oops()</script><img src=http://example.org/x.png>")
    _, said, log = browse(bad, tmp_path / "other")
    assert "oops is not defined" in said and requests(log) == {"http://example.org/x.png"}
