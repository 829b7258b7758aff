"""just listen: the page holds samples of every kind, their audio plays in a real browser, and a
dataset whose speech is not what it says is seen."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from speechfuse import artifact, audio, shards
from stages import listen
from tests.test_synthesize_job import KINDS, called, stored, written

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """Folder of a dataset `data` with two samples or more of every kind."""
    folder = tmp_path_factory.mktemp("listen")
    stored(folder / "texts")
    steps = [{"_component_": "speechfuse.augmentation.Noise", "snr": [5, 20], "probability": 0.5}]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert called(monkeypatch, written(folder, samples=20, augmentation=steps)) == 0
    return folder


@pytest.fixture(scope="module")
def page(spoken) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(Path(__file__).parent.parent)
        listen.main(listen.Listen(str(spoken / "data"), rows=2))
    return spoken / "data.listen.html"


def speech_of(folder: Path) -> dict[str, dict]:
    rows = shards.read_rows(folder / "data")
    found = [s["speech"] for row in rows for t in row["turns"] for s in t["segments"]]
    return {speech["id"]: speech for speech in found if speech}


def test_the_page_shows_every_kind_and_needs_no_other_file(page, spoken):
    text = page.read_text("utf-8")
    assert re.findall(r'<h2 id="(\w+)"', text) == sorted(KINDS)
    assert text.count("<article>") == 2 * len(KINDS)
    assert set(re.findall(r'src="([^;"]+)', text)) == {"data:audio/flac"} and "http" not in text
    right, pieces = re.search(
        r"(\d+) of (\d+) pieces of speech are as their rows say", text
    ).groups()
    assert right == pieces and int(pieces) >= 10
    assert text.count('class="wrong"') == 0 and "snr" in text and "espeak/en-us+" in text
    known = {" ".join(map(str, s["codes"])): s for s in speech_of(spoken).values()}
    shown = re.findall(r"<code>([\d ]+)</code>", text)
    assert len(shown) == int(pieces) and set(shown) <= known.keys()


def test_the_audio_is_as_long_as_the_row_says(page, spoken):
    text = page.read_text("utf-8")
    known = {" ".join(map(str, s["codes"])): s for s in speech_of(spoken).values()}
    found = re.findall(r'audio/flac;base64,([^"]+)".*?<code>([\d ]+)</code>', text, re.DOTALL)
    assert len(found) >= 10
    for data, codes in found:
        waveform = audio.decode(base64.b64decode(data)).waveform
        assert len(waveform) / 16_000 == pytest.approx(known[codes]["seconds"], abs=1e-3)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")
def test_a_browser_can_play_all_of_it(page, tmp_path):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r"(\d+) of (\d+) recordings can be played here", done.stdout)
    assert found, done.stderr[-500:]
    playable, all_of_them = map(int, found.groups())
    assert playable == all_of_them == page.read_text("utf-8").count("<audio") >= 10


def test_speech_that_is_not_what_the_row_says_is_marked(spoken, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parent.parent)
    folder = Path(shutil.copytree(spoken / "data", spoken / "other"))
    stream = shards.read_stream(folder)
    for path in shards.shard_paths(folder):
        rows = list(shards.read_shard(path))
        for row in rows:
            for speech in (s["speech"] for t in row["turns"] for s in t["segments"]):
                if speech and speech["text"]:
                    speech["text"] = "some other words"
        shards.write_shard(path, rows, shards.CONVERSATIONS, stream)
    listen.main(listen.Listen(str(folder), rows=1, out=str(spoken / "page.html")))
    right, pieces = re.search(r"(\d+) of (\d+) pieces", capsys.readouterr().out).groups()
    assert int(right) < int(pieces) and 'class="wrong">✗' in (spoken / "page.html").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": 0}, "rows=0: at least 1"),
        ({"out": "data/page.html"}, "inside the dataset"),
        ({"path": "texts"}, "was made by curate_texts"),
        ({"path": "absent"}, "does not exist"),
    ],
)
def test_mistakes_are_one_sentence(spoken, change, says):
    places = {k: str(spoken / v) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=says):
        listen.main(listen.Listen(**{"path": str(spoken / "data"), **places}))


def test_a_voice_of_no_engine_is_said_and_does_not_end_the_page(spoken, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    folder = Path(shutil.copytree(spoken / "data", spoken / "unknown"))
    manifest = artifact.manifest_of(folder)
    manifest["config"]["voices"] = {"renamed": manifest["config"]["voices"]["espeak"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    listen.main(listen.Listen(str(folder), rows=1))
    assert "no audio: " in (spoken / "unknown.listen.html").read_text()
