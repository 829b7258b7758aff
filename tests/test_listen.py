"""just listen: the page holds samples of every kind, their audio plays in a real browser, and a
dataset whose speech is not what it says is seen."""

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speechfuse import artifact
from speechfuse.audio import decoding
from speechfuse.rows import shards
from stages import listen
from tests.speech_server import SpeechServer
from tests.test_synthesize_job import ESPEAK, KINDS, called, stored, written

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


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
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(Path(__file__).parent.parent)
        listen.main(listen.Listen(str(spoken / "data"), rows=2))
    return spoken / "data.listen.html"


def speech_of(folder: Path) -> dict[str, dict]:
    rows = shards.read_rows(folder / "data")
    found = [s["speech"] for row in rows for t in row["turns"] for s in t["segments"]]
    return {speech["id"]: speech for speech in found if speech}


def copied(spoken: Path, name: str, config: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Another dataset, whose manifest and whose speech that has words say something else."""
    folder = Path(shutil.copytree(spoken / "data", spoken / name))
    manifest = artifact.manifest_of(folder)
    manifest["config"] |= config or {}
    (folder / "manifest.json").write_text(json.dumps(manifest))

    def change(row: dict[str, Any]) -> None:
        for speech in (s["speech"] for t in row["turns"] for s in t["segments"]):
            if speech and speech["text"]:
                speech |= changes

    rewritten(folder, change)
    return folder


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    stream = shards.read_stream(folder)
    for path in shards.shard_paths(folder):
        rows = list(shards.read_shard(path))
        for row in rows:
            change(row)
        shards.write_shard(path, rows, shards.CONVERSATIONS, stream)


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
        waveform = decoding.decode(base64.b64decode(data)).waveform
        assert len(waveform) / 16_000 == pytest.approx(known[codes]["seconds"], abs=1e-3)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")
def test_a_browser_can_play_all_of_it(page, tmp_path):
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r"(\d+) of (\d+) recordings can be played here", done.stdout)
    assert found, done.stderr[-500:]
    playable, all_of_them = map(int, found.groups())
    assert playable == all_of_them == page.read_text("utf-8").count("<audio") >= 10


def test_speech_that_is_not_what_the_row_says_is_marked(spoken, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parent.parent)
    folder = copied(spoken, "other", text="some other words")
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
    folder = copied(spoken, "unknown", {"voices": {"renamed": ESPEAK}})
    listen.main(listen.Listen(str(folder), rows=1))
    assert "no audio: " in (spoken / "unknown.listen.html").read_text()


RUN: list[Any] = []


class Spy:
    """A component of a dataset that runs here."""

    parallel = 1

    def __init__(self, **given: Any) -> None:
        RUN.append(given)

    def speak(self, text: str, voice: str, seed: int) -> None:
        raise ValueError("it spoke")

    def __enter__(self) -> "Spy":
        return self

    def __exit__(self, *_: object) -> None: ...


SPY = {"_component_": f"{__name__}.Spy"}
STEPS = "speechfuse.audio.augmentation"


@pytest.mark.parametrize(
    "config",
    [
        {"voices": {"espeak": SPY}},
        {"augmentation": [SPY]},
        # what a module of ours has imported, and a function that makes other components
        {"augmentation": [{"_component_": f"{STEPS}.config.instantiate", "spec": SPY}]},
        {"augmentation": [{"_component_": f"{STEPS}.check", "specs": [SPY]}]},
        {"augmentation": [{"_component_": f"{STEPS}.Noise", "folder": "/", "snr": [0, 1]}]},
    ],
)
def test_what_a_dataset_names_does_not_run(spoken, monkeypatch, config, request):
    monkeypatch.chdir(Path(__file__).parent.parent)
    RUN.clear()
    folder = copied(spoken, f"foreign-{abs(hash(request.node.name))}", config)
    listen.main(listen.Listen(str(folder), rows=1))
    assert RUN == []
    page = folder.with_name(f"{folder.name}.listen.html").read_text()
    assert "which the dataset names" in page and "trust=true" in page
    if "voices" in config:
        listen.main(listen.Listen(str(folder), rows=1, trust=True))
        assert RUN and "it spoke" in folder.with_name(f"{folder.name}.listen.html").read_text()


def test_a_sound_that_a_row_names_does_not_run(spoken, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    RUN.clear()
    extra = {"sound": SPY["_component_"], "level": 0, "seconds": 1, "seed": 1}
    folder = copied(spoken, "sound", extra=json.dumps(extra))
    listen.main(listen.Listen(str(folder), rows=1))
    assert RUN == []


def test_no_key_is_sent_to_a_server_that_a_dataset_names(spoken, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setenv("SECRET", "of mine")
    with SpeechServer() as server:
        voice = {
            "_component_": "speechfuse.synthesis.Endpoint",
            "url": server.url,
            "model": "m",
            "names": ["alloy"],
            "key_variable": "SECRET",
            "tries": 1,
        }
        folder = copied(spoken, "server", {"voices": {"espeak": voice}})
        listen.main(listen.Listen(str(folder), rows=1))
        assert server.log == []
        listen.main(listen.Listen(str(folder), rows=1, trust=True))
        assert server.log


def test_whatever_rows_hold_is_shown_as_text(spoken, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    folder = copied(spoken, "markup", text="<b>spoken", language="<b>en")

    def change(row: dict[str, Any]) -> None:
        row["id"], row["extra"] = "<b>id", json.dumps({**json.loads(row["extra"]), "note": "<b>x"})
        for turn in row["turns"]:
            turn["role"] = "<b>role"
            for segment in turn["segments"]:
                if segment["speech"] is None:
                    segment["text"] = "<b>written"

    rewritten(folder, change)
    listen.main(listen.Listen(str(folder), rows=1))
    page = (spoken / "markup.listen.html").read_text()
    for what in ("spoken", "en", "id", "x", "role", "written"):
        assert f"&lt;b&gt;{what}" in page and f"<b>{what}" not in page, what
