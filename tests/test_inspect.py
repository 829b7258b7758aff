"""just inspect: figures are those of the rows, and a dataset that heard nothing is seen at once."""

import base64
import html
import json
import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from speechfuse import artifact, config
from speechfuse.quantizer.decoder import CodeTranscriber
from speechfuse.quantizer.model import Quantizer
from speechfuse.rows import shards, statistics
from speechfuse.rows.rejects import write_rejects
from stages import inspect_dataset

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
STREAM = {"quantizer": "ab" * 32, "token_rate": 25.0, "codebooks": 1, "codebook_size": 64}


def speech(number: int, codes: np.ndarray | list[int] | None, **more: object) -> dict[str, Any]:
    seconds = None if codes is None else len(codes) / 25
    return {"id": f"r{number}", "codes": codes, "seconds": seconds, **more}


def natural(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Codes of uneven frequency that stay for a while, as those of speech do."""
    rng = np.random.default_rng(seed)
    weights = 1 / (10 + np.arange(64))
    found = []
    for i in range(rows):
        codes = rng.choice(64, size=rng.integers(5, 60), p=weights / weights.sum())
        codes = np.repeat(codes, rng.integers(1, 3, len(codes)))
        text = "words " * int(rng.integers(1, 9)) if i % 3 else None
        language = "en" if i % 2 else "de"
        found.append(speech(i, codes, text=text, speaker=f"s{i % 7}", language=language))
    return found


def dataset(
    folder: Path,
    parts: list[list[dict[str, Any]]],
    rejects: list[dict[str, str]] | None = None,
    schema: Any = shards.SPEECH,
    stream: dict[str, Any] = STREAM,
    **totals: object,
) -> Path:
    work = artifact.Artifact(folder, "tokenize_speech", 2, {}, {})
    work.begin()
    paths = [folder / shards.shard_name(i) for i in range(len(parts))]
    for path, rows in zip(paths, parts, strict=True):
        shards.write_shard(path, rows, schema, stream)
        write_rejects(path, rejects or [])
    work.finish(totals, [*paths, *(p.with_suffix(".rejects.jsonl") for p in paths)])
    return folder


def counted(folder: Path) -> statistics.Statistics:
    return statistics.count(shards.shard_paths(folder), shards.read_stream(folder))


def test_figures_are_those_of_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "BATCH_ROWS", 13)  # batches cut the shards anywhere
    rows = [*natural(100), speech(100, None, text="only referenced"), speech(101, [])]
    rows[40] |= {"codes": [64, 64, 3], "seconds": 0.12}  # with the mask code
    rows[70]["codes"], rows[70]["seconds"] = rows[69]["codes"], rows[69]["seconds"]
    rows[71] |= {"parent": "long", "part": 0}
    rows[72] |= {"parent": "long", "part": 1}
    found = counted(dataset(tmp_path / "data", [rows[:60], [], rows[60:]]))
    codes = [list(map(int, row["codes"])) for row in rows if row["codes"] is not None]
    every = [code for row in codes for code in row]
    runs = [len(list(run)) for row in codes for _, run in groupby(row)]
    shares = np.array([every.count(code) / len(every) for code in set(every)])
    assert (found.rows, found.utterances, found.codes) == (102, 102, len(every))
    assert found.used == len(set(every) - {64}) and found.mask == 2
    assert found.entropy == pytest.approx(-np.sum(shares * np.log2(shares)))
    assert found.possible_entropy == 6
    assert found.runs.bins.tolist() == np.bincount(runs).tolist()  # no run goes on in the next row
    assert found.repeated == pytest.approx(1 - len(runs) / len(every))
    assert found.top(1) == [(max(set(every), key=every.count), pytest.approx(shares.max()))]
    seconds = np.array([row["seconds"] for row in rows if row["seconds"] is not None], np.float32)
    assert found.seconds.sum == pytest.approx(seconds.sum()) and found.seconds.count == 101
    assert found.rate == pytest.approx(25)
    texts = [row for row in rows if row.get("text")]
    assert found.with_text == len(texts)
    pace = [len(row["text"]) / row["seconds"] for row in texts if row["seconds"]]
    assert found.pace.mean == pytest.approx(np.mean(pace)) and found.pace.count == len(pace)
    assert found.languages == {"en": 50, "de": 50} and found.speakers == 7
    assert (found.split, found.pieces, found.copies) == (1, 2, 1)
    assert found.warnings() == []


def test_a_histogram_has_the_quantiles_of_its_values():
    values = np.random.default_rng(0).gamma(3, 2, 5000)
    found = statistics.Histogram(0.1)
    for part in np.array_split(values, 7):
        found.add(part)
    found.add(np.array([np.nan, np.inf, -1.0]))
    assert found.count == 5000 and found.mean == pytest.approx(values.mean())
    assert found.most == values.max()
    for share in (0.05, 0.5, 0.95):
        assert found.quantile(share) == pytest.approx(np.quantile(values, share), abs=0.11)
    found.add(np.array([1e12]))  # one broken length does not fill the memory
    assert len(found.bins) == statistics.Histogram.MOST_BINS + 1


def one_of(rng: np.random.Generator, codes: int, size: int = 50) -> np.ndarray:
    return rng.integers(0, codes, size)


RNG = np.random.default_rng(1)
DEAF = {  # what is wrong: (rows, part of its warning)
    "constant": ([speech(i, [7] * 50) for i in range(40)], "code 7 is 100% of all codes"),
    "silence": (
        [speech(i, np.where(RNG.random(50) < 0.4, 9, one_of(RNG, 64))) for i in range(40)],
        "code 9 is 4",
    ),
    "four codes": (
        [speech(i, one_of(RNG, 4)) for i in range(40)],
        "2.00 bits of entropy where 6.00 are possible",
    ),
    "collapsed": ([speech(i, one_of(RNG, 15)) for i in range(40)], "15 of 64 codes are in use"),
    "frozen": (
        [speech(i, [int(one_of(RNG, 64, 1)[0])] * 50) for i in range(40)],
        "98% of codes repeat",
    ),
    "the same": ([speech(i, list(range(30))) for i in range(40)], "39 of 40 rows have the very"),
    "rate": (
        [speech(i, one_of(RNG, 64)) | {"seconds": 4.0} for i in range(40)],
        "12.50 codes a second where the quantizer makes 25",
    ),
}


@pytest.mark.parametrize("what", DEAF)
def test_a_dataset_that_heard_nothing_is_warned_of(tmp_path, what):
    rows, warning = DEAF[what]
    warnings = counted(dataset(tmp_path / "data", [rows])).warnings()
    assert any(warning in line for line in warnings), warnings
    assert counted(dataset(tmp_path / "good", [natural(40)])).warnings() == []


def test_a_small_dataset_is_not_warned_of(tmp_path):
    """A few codes cannot use all of a codebook."""
    rng = np.random.default_rng(2)
    rows = [speech(i, one_of(rng, 64, 6)) for i in range(3)]
    found = counted(dataset(tmp_path / "data", [rows]))
    assert found.used < 20 and found.warnings() == []


def shown(job: inspect_dataset.InspectDataset, capsys) -> tuple[list[str], str]:
    """What is on the screen, and the page."""
    capsys.readouterr()
    inspect_dataset.main(job)
    lines = capsys.readouterr().out.splitlines()
    return lines, Path(lines[-1].removesuffix(": the page")).read_text()


def test_constant_codes_are_seen_at_once(tmp_path, capsys):
    folder = dataset(tmp_path / "deaf", [DEAF["constant"][0]])
    lines, page = shown(inspect_dataset.InspectDataset(str(folder), hear=0), capsys)
    entropy = next(line for line in lines if line.startswith("entropy"))
    assert entropy.split(maxsplit=1)[1] == "0.00 bits of 6.00 possible; perplexity 1"
    warnings = [line for line in lines if line.startswith("WARNING: ")]
    assert len(warnings) >= 4 and lines[-1 - len(warnings) : -1] == warnings
    alert = page.partition('role="alert">')[2].partition("</blockquote>")[0]
    for warning in warnings:
        assert f"<p>{warning.removeprefix('WARNING: ')}</p>" in alert
    assert len(pictures(page)) == 3 and ">Rows, at equal distances</h2>" not in page


def pictures(page: str) -> list[ElementTree.Element]:
    data = re.findall(r'<img alt="[^"]+" src="data:image/svg[+]xml;base64,([^"]+)">', page)
    return [ElementTree.fromstring(base64.b64decode(each)) for each in data]


REJECTS = [
    *({"id": f"c{i}", "reason": f"not audio: <b>{i}</b>"} for i in range(4)),
    {"id": "q", "reason": "filter level: -70 dBFS is under -60"},
]


def test_the_page_needs_no_other_file_and_the_dataset_stays_as_it_is(tmp_path, capsys):
    rows = natural(50)
    folder = dataset(
        tmp_path / "data",
        [rows[:20], rows[20:]],
        REJECTS,
        resampled=3,
        source="<Corpus>",
        licence="cc0-1.0",
    )
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    lines, page = shown(inspect_dataset.InspectDataset(str(folder)), capsys)
    assert lines[-1] == f"{tmp_path / 'data.inspect.html'}: the page"
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert "WARNING" not in "".join(lines) and 'role="alert"' not in page
    images = pictures(page)
    assert len(images) == 4 == page.count("<img")
    for image in images:
        assert float(image.attrib["width"].removesuffix("pt")) > 400
        assert len(image.findall(".//{http://www.w3.org/2000/svg}path")) > 5
    assert "http:" not in page and not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert ">Rows, at equal distances</h2>" in page and "what the codec heard" not in page
    for text in ("rejected", "8: not audio 8", "2: filter level 2", "&lt;Corpus&gt;", "cc0-1.0"):
        assert text in page
    assert "c0: not audio: &lt;b&gt;0&lt;/b&gt;; c1: " in page and "<b>" not in page
    assert [f">r{i}</td>" in page for i in (0, 10, 20, 30, 40)] == [True] * 5
    assert any(line.startswith("resampled") and line.endswith(" 3") for line in lines)
    assert shown(inspect_dataset.InspectDataset(str(folder)), capsys) == (lines, page)


def test_the_page_is_never_written_into_the_dataset(tmp_path):
    folder = dataset(tmp_path / "data", [natural(5)])
    for out in (folder / "page.html", tmp_path / "data/../data/page.html"):
        job = inspect_dataset.InspectDataset(str(folder), out=str(out))
        with pytest.raises(ValueError, match="inside the dataset"):
            inspect_dataset.main(job)
    with pytest.raises(ValueError, match=r"whisper=w\.pt is of use only to a decoder"):
        inspect_dataset.main(inspect_dataset.InspectDataset(str(folder), whisper="w.pt"))


def test_conversations_are_looked_at_by_the_speech_in_them(tmp_path, capsys):
    said = [{"text": None, "speech": row} for row in natural(40)]
    rows = [
        {
            "id": str(i),
            "turns": [
                {"role": "user", "segments": [{"text": "Listen: "}, said[i], said[i + 1]]},
                {"role": "assistant", "segments": [{"text": "yes"}]},
            ],
        }
        for i in range(0, 40, 2)
    ]
    folder = dataset(tmp_path / "talks", [[*rows, {"id": "t"}]], schema=shards.CONVERSATIONS)
    speech_only = counted(dataset(tmp_path / "speech", [natural(40)]))
    found = counted(folder)
    assert (found.rows, found.utterances) == (21, 40)
    assert np.array_equal(found.frequency, speech_only.frequency)
    assert np.array_equal(found.runs.bins, speech_only.runs.bins)
    lines, page = shown(inspect_dataset.InspectDataset(str(folder)), capsys)
    assert any(re.fullmatch(r"pieces of speech in them +40", line) for line in lines)
    assert ">r0</td>" in page
    rows = [{"id": "a", "turns": [{"role": "user", "segments": [{"text": "no speech"}]}]}]
    text_only = dataset(tmp_path / "text", [rows], schema=shards.CONVERSATIONS)
    lines, page = shown(inspect_dataset.InspectDataset(str(text_only)), capsys)
    assert lines[0].split() == ["rows", "1"] and pictures(page) == []


def test_rows_are_picked_at_equal_distances(tmp_path):
    rows = [speech(i, [i % 64]) for i in range(100)]
    rows[50]["codes"] = None
    paths = shards.shard_paths(dataset(tmp_path / "data", [rows[:33], [], rows[33:34], rows[34:]]))
    assert [row["id"] for row in statistics.sample_rows(paths, 4)] == ["r0", "r25", "r75"]
    assert (
        len(statistics.sample_rows(paths, 1000)) == 99
        and statistics.sample_rows(paths[1:2], 3) == []
    )


def test_what_the_codec_heard_stands_beside_the_text(tmp_path, capsys):
    """Texts are those that the genuine whisperspeech decodes of the same codes."""
    model, whisper = GOLDEN / "whispervq-decoding.model", GOLDEN / "whisper-decoding.pt"
    golden = json.loads((GOLDEN / "whisperspeech_decoding.json").read_text())["decoding"]
    known = [clip for clip in golden if clip["codes"]][:3]
    rows = [speech(i, clip["codes"]) for i, clip in enumerate(known)]
    rows[0]["text"] = "what was said"
    stream = Quantizer.load(model, whisper).stream
    folder = dataset(tmp_path / "data", [rows], stream=stream)
    job = inspect_dataset.InspectDataset(
        str(folder), hear=3, decoder=str(model), whisper=str(whisper)
    )
    lines, page = shown(job, capsys)
    assert "<th>what the codec heard</th>" in page and len(known) == 3
    for clip in known:
        assert len(clip["text"]) > 10 and f">{html.escape(clip['text'])}</td>" in page
        assert any(line.strip() == f"heard  {clip['text']}".strip() for line in lines)
    assert "r0: what was said" in lines and "r1: (no text)" in lines
    job.path = str(dataset(tmp_path / "other", [rows], stream=stream | {"quantizer": "ab" * 32}))
    with pytest.raises(ValueError, match=r"but .* was made by abababababab"):
        inspect_dataset.main(job)
    stream = Quantizer.load(model, whisper, 20.0).stream
    job.path = str(dataset(tmp_path / "cut", [rows[:2]], stream=stream))
    with pytest.raises(ValueError, match=r"but .* was made by"):
        inspect_dataset.main(job)
    job.window = 20.0
    heard = CodeTranscriber.load(model, whisper, window=20.0).transcribe(
        [np.array(row["codes"]) for row in rows[:2]]
    )
    lines, _ = shown(job, capsys)
    assert all(any(line.strip() == f"heard  {text}".strip() for line in lines) for text in heard)
    job.whisper = None
    with pytest.raises(ValueError, match="whisper"):
        inspect_dataset.main(job)


def test_as_a_command(tmp_path):
    folder = dataset(tmp_path / "data", [natural(20)])
    command = [sys.executable, "-m", "stages.inspect_dataset", f"path={folder}"]
    source = Path(config.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": f"{source}:{ROOT}", "OMP_NUM_THREADS": "1"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], cwd=ROOT, env=env, capture_output=True, text=True)

    done = run(f"out={tmp_path / 'page.html'}")
    assert done.returncode == 0 and done.stdout.startswith("rows ")
    assert (tmp_path / "page.html").is_file() and not (tmp_path / "data.inspect.html").exists()
    (folder / "manifest.json").unlink()
    done = run()
    assert done.returncode == 2 and "is incomplete" in done.stderr.splitlines()[-1]
