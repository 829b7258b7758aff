"""The page of `just talk` in a headless Chromium, whose microphone plays a file."""

import base64
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import soundfile

from speechfuse.serve.config import Serve
from tests.browser import CHROMIUM, Browser
from tests.test_serve import QUANTIZER, Served, clip, expanded, wav

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")
__all__ = ["expanded"]  # a fixture
ANSWERED = "[...document.querySelectorAll('.parts')].filter(p => /whole/.test(p.innerText)).length"
MICROPHONE = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


@pytest.fixture(scope="module")
def talked(expanded) -> Iterator[Served]:
    job = Serve(str(expanded.parent.parent / "report.json"), QUANTIZER, checkpoint=str(expanded))
    job.max_new_tokens, job.examples, job.seconds = 8, ["what is two plus two"], 20
    server = Served(job)
    yield server
    server.close()


@pytest.fixture(scope="module")
def page(talked, tmp_path_factory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    soundfile.write(folder / "said.wav", clip(0, 3), 16_000)
    heard = f"--use-file-for-fake-audio-capture={folder / 'said.wav'}"
    with Browser(folder / "profile", *MICROPHONE, heard) as browser:
        browser.open(f"http://127.0.0.1:{talked.port}/")
        browser.until("at('example').options.length > 1 && at('model').options.length")
        yield browser


def press(page: Browser, kind: str) -> None:
    page.run(
        "at('record').dispatchEvent(new KeyboardEvent('" + kind + "', {key: ' ', bubbles: true}))"
    )


def test_what_is_said_while_the_button_is_held_is_answered(page, tmp_path):
    press(page, "keydown")
    page.until("talk.blocks?.length > 100")  # 0.8 s
    press(page, "keyup")
    page.until(ANSWERED)
    shown = page.run("document.querySelector('.answer').textContent")
    assert shown and shown == page.run("Object.values(histories)[0][1].content")
    codes = page.run("document.querySelector('canvas.codes').width")
    assert codes >= 18 and abs(codes - 25 * page.run("samples.length / RATE")) < 4
    assert page.run("Math.max(...samples)") > 0.05  # the microphone was heard
    assert "first token" in page.run("document.querySelector('.parts').textContent")
    assert page.console == []  # the policy forbids nothing that the page does
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.call("Emulation.setEmulatedMedia", features=[feature])
        page.picture(tmp_path / f"{scheme}.png")


def test_an_example_a_second_turn_and_two_models_beside_each_other(page, talked):
    page.run("at('new').click()")
    page.run("at('other').value = 'run/epoch_0'")
    page.run("at('example').value = 'what is two plus two'")
    page.run("at('example').dispatchEvent(new Event('change'))")
    page.until("samples && samples.length > RATE / 2")
    page.run("at('noise').value = 8; at('noise').dispatchEvent(new Event('input'))")
    assert page.run("at('noise-shown').textContent") == "minus 10 dB below the speech"
    for turn in (1, 2):
        page.run("send()")
        page.until(f"{ANSWERED} === {2 * turn}")
    assert page.run("Object.values(histories).map(each => each.length)") == [4, 4]
    page.run("at('noise').value = 0; at('other').value = ''")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"this is no audio", "the audio cannot be used: not audio"),
        (wav(0, 25), "too long: at most 20 s are taken"),
        (bytes(16_044), "the audio cannot be used"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(content, said, page):
    page.run("at('new').click()")
    data = base64.b64encode(content).decode()
    page.run(
        f"read(Uint8Array.from(atob({json.dumps(data)}), c => c.charCodeAt(0)).buffer, 'a.wav')"
    )
    page.run("send()")
    assert said in page.until("document.querySelector('.failed')?.textContent")
    page.console.clear()


def test_silence_is_said(page):
    page.run("take(new Float32Array(RATE))")
    assert "silent" in page.run("at('problem').textContent")


def test_every_control_has_a_name(page):
    page.run("samples = null; show()")  # the browser's own player is not ours to name
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = ("button", "combobox", "slider", "textbox", "image")
    named = [
        (node["role"]["value"], node.get("name", {}).get("value"))
        for node in tree
        if not node["ignored"] and node["role"]["value"] in controls
    ]
    without = [each for each in named if not each[1]]
    assert len(named) >= 8 and without == []
    assert page.run("document.documentElement.scrollWidth <= innerWidth")  # of a phone


def test_a_page_of_another_origin_is_refused(talked, tmp_path):
    (tmp_path / "index.html").write_text("<p>other</p>")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as site,
        Browser(tmp_path / "other") as other,
    ):
        threading.Thread(target=site.serve_forever, daemon=True).start()
        other.open(f"http://127.0.0.1:{site.server_port}/")
        url = f"http://127.0.0.1:{talked.port}/v1/chat/completions"
        asked = "{method: 'POST', body: '{}', headers: {'Content-Type': '%s'}, mode: '%s'}"
        for kind, mode in (("application/json", "cors"), ("text/plain", "no-cors")):
            said = f"fetch('{url}', {asked % (kind, mode)}).then(r => r.type, e => e.name)"
            assert other.run(said) == "TypeError"
        site.shutdown()
    assert 'requests_total{status="403"} 2' in talked.send("/metrics", method="GET")[2].decode()


def test_a_denied_microphone_and_a_server_that_ends(expanded, tmp_path):
    server = Served(
        Serve(str(expanded.parent.parent / "report.json"), QUANTIZER, checkpoint=str(expanded))
    )
    with Browser(tmp_path / "profile", "--deny-permission-prompts") as page:
        page.open(f"http://127.0.0.1:{server.port}/")
        page.until("at('model').options.length")
        press(page, "keydown")
        page.until("at('problem').textContent.includes('microphone')")
        press(page, "keyup")
        server.close()
        page.run("at('text').value = 'what is two plus two'")
        page.run("send()")
        answer = page.until("document.querySelector('.failed')?.textContent")
        assert answer == "The server does not answer: see that it runs, then ask again."
