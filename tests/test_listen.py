"""just listen: the page has samples of every kind, and their audio is that of the codes and plays
in a real browser."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speechfuse import artifact, config
from speechfuse.audio import decoding
from speechfuse.quantizer.model import Quantizer
from speechfuse.rows import shards
from speechfuse.synthesis.plan import EXAMPLES
from stages import listen, verify
from tests.test_synthesize_job import (
    BEEPS,
    KINDS,
    PLAIN,
    QUANTIZER,
    called,
    speech_in,
    stored,
    written,
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


PROBE = """<p id="playable"></p><script>
const all = [...document.querySelectorAll('audio')], p = document.getElementById('playable');
const count = () => p.textContent =
  `${all.filter(a => a.duration > 0).length} of ${all.length} recordings can be played here`;
all.forEach(a => ['loadedmetadata', 'error'].forEach(event => a.addEventListener(event, count)));
all.forEach(a => { a.preload = 'metadata'; a.load(); });
count();
</script>"""


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """Folder of a dataset `data` with two samples or more of every kind."""
    folder = tmp_path_factory.mktemp("listen")
    stored(folder / "texts")
    steps = [{"_component_": "speechfuse.audio.Noise", "snr": [5, 20], "probability": 0.5}]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert called(monkeypatch, written(folder, samples=20, augmentation=steps)) == 0
    return folder


@pytest.fixture(scope="module")
def page(spoken) -> Path:
    listen.main(listen.Listen(str(spoken / "data")))
    return spoken / "data.listen.html"


def kept(folder: Path) -> dict[str, dict[str, Any]]:
    """{name of an audio file: its row's piece of speech}."""
    audio = {}
    for path in shards.shard_paths(folder):
        rows = list(shards.read_shard(path))
        for file in folder.glob(f"{path.stem}.*.flac"):
            row, piece = map(int, file.name.split(".")[1].split("-"))
            audio[file.name] = speech_in(rows[row])[piece]
    return audio


def copied(spoken: Path, name: str) -> Path:
    return Path(shutil.copytree(spoken / "data", spoken / name))


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    stream = shards.read_stream(folder)
    for path in shards.shard_paths(folder):
        rows = list(shards.read_shard(path))
        for row in rows:
            change(row)
        shards.write_shard(path, rows, shards.CONVERSATIONS, stream)


def test_the_page_shows_every_kind_and_needs_no_other_file(page, spoken):
    text = page.read_text("utf-8")
    assert re.findall(r"<h2[^>]*>(\w+)</h2>", text) == sorted(KINDS)
    assert set(re.findall(r'src="([^;"]+)', text)) == {"data:audio/flac"} and "http:" not in text
    assert text.count("<table>") == 1 + sum(
        min(EXAMPLES, of["made"])
        for of in artifact.manifest_of(spoken / "data")["totals"]["kinds"].values()
    )
    assert "snr" in text and "espeak/en-us+" in text
    shown = re.findall(r"codes</summary>([\d ]+)</details>", text)
    assert len(shown) == text.count("<audio") == len(kept(spoken / "data")) >= 10
    codes = [" ".join(map(str, s["codes"])) for s in kept(spoken / "data").values()]
    assert sorted(shown) == sorted(codes)


def test_the_audio_is_that_of_the_codes_in_the_row(spoken):
    quantizer = Quantizer.load(Path(__file__).parent.parent / QUANTIZER)
    equal, total = 0, 0
    for name, speech in kept(spoken / "data").items():
        waveform = decoding.load(spoken / "data" / name)
        assert len(waveform) / 16_000 == pytest.approx(speech["seconds"], abs=1e-3)
        (codes,) = quantizer.encode([waveform])
        if "shuffled" in (extra := json.loads(speech["extra"])):
            codes = np.random.default_rng(extra["seed"]).permutation(codes)
        equal, total = equal + np.sum(codes == speech["codes"]), total + len(codes)
    assert equal / total > 0.95  # 16 bits, and other neighbours in the batch: near-ties


def test_the_audio_is_an_output_like_the_rows_and_a_few_megabytes_at_most(spoken):
    folder = spoken / "data"
    files = {p.name for p in folder.glob("shard-*")}
    assert artifact.manifest_of(folder)["outputs"].keys() == files > kept(folder).keys()
    assert sum(p.stat().st_size for p in folder.glob("*.flac")) < 3e6
    verify.main(verify.Verify(str(folder)))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")
def test_a_browser_can_play_all_of_it(page, tmp_path):
    probe = tmp_path / "probe.html"
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        probe.as_uri(),
    ]
    text = page.read_text("utf-8")
    probe.write_text(re.sub("<meta http-equiv.*?>", "", text, count=1) + PROBE)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r"(\d+) of (\d+) recordings can be played here", done.stdout)
    assert found, done.stderr[-500:]
    playable, all_of_them = map(int, found.groups())
    assert playable == all_of_them == text.count("<audio") >= 10


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"out": "data/page.html"}, "inside the dataset"),
        ({"path": "texts"}, "was made by curate_texts"),
        ({"path": "absent"}, "does not exist"),
    ],
)
def test_mistakes_are_one_sentence(spoken, change, says):
    places = {k: str(spoken / v) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=says):
        listen.main(listen.Listen(**{"path": str(spoken / "data"), **places}))


def test_a_kind_without_audio_is_named(spoken, capsys):
    folder = copied(spoken, "partly")
    kind, *_ = listen.examples_by_kind(folder)
    for path, _, _ in listen.examples_by_kind(folder)[kind]:
        numbers = path.with_name(f"{path.stem}.examples.json")
        rows = list(shards.read_shard(path))
        left = [
            n
            for n in json.loads(numbers.read_text())
            if json.loads(rows[n]["extra"])["kind"] != kind
        ]
        numbers.write_text(json.dumps(left))
    listen.main(listen.Listen(str(folder)))
    assert f"no audio was kept of {kind}, whose examples" in capsys.readouterr().out


def test_a_dataset_without_audio_is_told_so_in_one_sentence(spoken):
    folder = copied(spoken, "earlier")
    manifest = artifact.manifest_of(folder)
    manifest["outputs"] = {n: h for n, h in manifest["outputs"].items() if "parquet" in n}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for path in [*folder.glob("*.flac"), *folder.glob("*.examples.json")]:
        path.unlink()
    with pytest.raises(ValueError, match=r"holds no audio to listen to: an earlier version"):
        listen.main(listen.Listen(str(folder)))


def test_rows_without_a_waveform_are_shown_and_said(tmp_path, monkeypatch):
    stored(tmp_path / "texts")
    codec = Quantizer.load(Path(__file__).parent.parent / QUANTIZER).identity
    voices = {"codes": {**BEEPS["beep"], "codec": codec}}
    job = written(tmp_path, kinds=PLAIN, voices=voices, samples=30)
    assert called(monkeypatch, job) == 0
    listen.main(listen.Listen(str(tmp_path / "data")))
    text = (tmp_path / "data.listen.html").read_text()
    assert text.count("no audio: the engine makes codes from text") >= EXAMPLES


def test_nothing_that_a_dataset_names_is_run(spoken, monkeypatch):
    folder = copied(spoken, "foreign")
    manifest = artifact.manifest_of(folder)
    spy = {"_component_": f"{__name__}.Absent"}
    manifest["config"] |= {"voices": {"espeak": spy}, "augmentation": [spy]}
    manifest["config"]["kinds"] = dict.fromkeys(KINDS, spy)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(config, "instantiate", None)
    monkeypatch.setattr(config, "resolve", None)
    listen.main(listen.Listen(str(folder)))
    assert "Absent" in (spoken / "foreign.listen.html").read_text()


def test_whatever_rows_hold_is_shown_as_text(spoken):
    folder = copied(spoken, "markup")

    def change(row: dict[str, Any]) -> None:
        extra = {**json.loads(row["extra"]), "note": "<b>x"}
        row["id"], row["extra"] = "<b>id", json.dumps(extra)
        for turn in row["turns"]:
            turn["role"] = "<b>role"
            for segment in turn["segments"]:
                if segment["speech"] is None:
                    segment["text"] = "<b>written"
                elif segment["speech"]["text"]:
                    segment["speech"] |= {"text": "<b>spoken", "language": "<b>en"}

    rewritten(folder, change)
    listen.main(listen.Listen(str(folder)))
    page = (spoken / "markup.listen.html").read_text()
    for what in ("spoken", "en", "id", "x", "role", "written"):
        assert f"&lt;b&gt;{what}" in page and f"<b>{what}" not in page, what
