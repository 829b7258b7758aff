"""Talk to the trained demo in a real browser.

    just prove talk     (after `just demo`; needs Chromium, and npm for axe; 3 minutes are one clip)

A headless Chromium, whose microphone plays "what is three plus four" in a voice of no training,
opens the page of a server of its own: press, speak, let go, and the page shows "seven", and again
when it is asked once more. Then what goes wrong: silence, a text file named .wav, three minutes
held, a server that is killed in mid-answer and started again, a denied microphone. axe-core looks
for serious and critical faults, in light and dark. Last, SIGTERM while a checkpoint is being
loaded, and while an upload never ends. A picture of each lies in out/prove_talk.
"""

import atexit
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import soundfile

from speechfuse.audio import decoding
from tests.browser import Browser
from tests.test_talk import ANSWERED, MICROPHONE, press

ROOT, PICTURES = Path(__file__).parent.parent, Path("out/prove_talk")
FAULTS = "axe.run().then(found => found.violations.filter(v => /serious|critical/.test(v.impact))"
FAULTS += ".map(v => v.help + ': ' + v.nodes.map(n => n.html).join()))"
FIRST_EVENT = """new Promise(begun => {
  const codes = () => document.querySelector('.turn:last-child .codes:not([hidden])');
  new MutationObserver(() => codes() && begun(true))
    .observe(at('said'), {subtree: true, childList: true, attributes: true});
  send();
})"""


class Server:
    def __init__(self, *options: str) -> None:
        self.options = options
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self, until: str = "/health") -> None:
        command = [sys.executable, "-m", "stages.serve", "recipes/demo/serve.yaml"]
        command += [f"port={self.port}", *self.options]
        self.process = subprocess.Popen(command, cwd=ROOT)
        atexit.register(self.process.kill)
        began = time.monotonic()
        while time.monotonic() < began + 600 and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.url + until, timeout=60).close()
                return
            except OSError:
                time.sleep(0.1)
        sys.exit("the server does not start")

    def end(self) -> float:
        """Return the seconds that SIGTERM took."""
        began = time.monotonic()
        self.process.terminate()
        assert self.process.wait(60) == 0
        return time.monotonic() - began


def visit(page: Browser, server: Server) -> None:
    page.open(server.url)
    page.until("at('example').options.length > 1 && at('model').options.length")


def hold(page: Browser, seconds: float) -> None:
    press(page, "keydown")
    page.until(f"talk?.blocks?.length * 128 > {seconds} * RATE", seconds + 60)
    press(page, "keyup")


def last(page: Browser, name: str, holds: str = "") -> str:
    """Return the text of the last turn's part `name`, once it holds what it is to."""
    text = f"document.querySelector('.turn:last-child .{name}')?.textContent"
    return page.until(f"({text} ?? '').includes({holds!r}) && !busy && {text}")


def shown(page: Browser, name: str, *said: str) -> None:
    page.picture(PICTURES / f"{name}.png")
    print(f"{name}:", *said, flush=True)


def faults(page: Browser, folder: str) -> None:
    if not shutil.which("npm"):
        return print("axe-core was left out: npm is not here")
    subprocess.run(
        ["npm", "pack", "--silent", "axe-core@4"], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    shutil.unpack_archive(next(Path(folder).glob("axe-core-*.tgz")), folder)
    page.run((Path(folder) / "package/axe.min.js").read_text("utf-8") + "; 0")
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.call("Emulation.setEmulatedMedia", features=[feature])
        assert page.run("axe.run().then(found => found.passes.length)") > 10
        found = page.run(FAULTS)
        shown(page, f"axe {scheme}", *found or ["no serious or critical fault"])
        assert not found


def upload(page: Browser, file: Path) -> None:
    field = page.call("Runtime.evaluate", expression="at('file')")["result"]["objectId"]
    page.call("DOM.setFileInputFiles", files=[str(file)], objectId=field)
    page.until("raw")
    page.run("send()")


def main(folder: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    say, said, silent = (Path(folder) / f"{name}.wav" for name in ("say", "said", "silent"))
    words = [sys.executable, "recipes/demo/say.py", "recipes/demo/say.yaml"]
    subprocess.run(
        [*words, "what is three plus four", str(say)], check=True, stdout=subprocess.DEVNULL
    )
    spoken = np.pad(decoding.load(say), (decoding.SAMPLE_RATE // 3, decoding.SAMPLE_RATE))
    soundfile.write(said, spoken, decoding.SAMPLE_RATE)
    soundfile.write(silent, 0 * spoken, decoding.SAMPLE_RATE)
    server = Server()
    server.start()
    capture = "--use-file-for-fake-audio-capture="
    with Browser(Path(tempfile.mkdtemp(dir=folder)), *MICROPHONE, capture + str(said)) as page:
        visit(page, server)
        hold(page, 2.2)
        shown(page, "spoken", last(page, "heard"), "|", last(page, "answer"), last(page, "parts"))
        assert last(page, "answer") == "seven"
        hold(page, 2.2)
        shown(page, "second question", last(page, "heard"), "|", last(page, "answer"))
        assert last(page, "answer") == "seven"
        (Path(folder) / "text.wav").write_text("what is three plus four\n")
        upload(page, Path(folder) / "text.wav")
        shown(page, "text file", last(page, "failed", "the audio cannot be used"))
        faults(page, folder)
        page.run("at('new').click(); at('other').value = 'stage2/epoch_0'")
        page.run("at('example').value = 'what is the capital of france'")
        page.run("at('example').dispatchEvent(new Event('change'))")
        page.until("samples && samples.length > RATE / 2")
        page.run("send()")
        page.until(f"{ANSWERED} === 2")
        shown(page, "two models", page.run("at('said').innerText.replace(/\\n/g, ' ')"))
        page.run("at('new').click(); at('other').value = ''")
        hold(page, 180)
        shown(page, "three minutes", last(page, "failed", "too long"))
        page.run("at('new').click()")
        hold(page, 2.2)
        last(page, "answer", "seven")
        for _ in range(20):  # until one is stopped before it ended
            page.run(FIRST_EVENT)
            server.process.send_signal(signal.SIGSTOP)
            time.sleep(0.5)
            if page.run("busy"):
                break
            server.process.send_signal(signal.SIGCONT)
        server.process.kill()
        server.process.wait()
        shown(page, "killed", last(page, "failed", "ended in mid-answer"))
        server.start()
        hold(page, 2.2)
        shown(page, "started again", last(page, "heard"), "|", last(page, "answer"))
        assert last(page, "answer") == "seven"
        own = [each for each in page.console if "'source': 'network'" not in each]  # not refusals
        assert own == [], own
    with Browser(Path(tempfile.mkdtemp(dir=folder)), *MICROPHONE, capture + str(silent)) as page:
        visit(page, server)
        hold(page, 1)
        said_of_it = page.until("at('problem').textContent")
        shown(page, "silence", said_of_it, "| the model:", last(page, "answer"))
        assert "silent" in said_of_it
    with Browser(
        Path(tempfile.mkdtemp(dir=folder)), MICROPHONE[0], "--deny-permission-prompts"
    ) as page:
        visit(page, server)
        press(page, "keydown")
        page.until("at('problem').textContent")
        shown(page, "denied", denied := page.run("at('problem').textContent"))
        assert "denies" in denied
    with socket.create_connection(("127.0.0.1", server.port)) as stuck:
        stuck.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        stuck.sendall(b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n{")
        time.sleep(1)
        print(f"SIGTERM, with an upload that never ends: {(stuck_for := server.end()):.1f} s")
    server.start("/v1/models")
    print(f"SIGTERM, while the checkpoint is loaded: {(loading := server.end()):.1f} s")
    assert stuck_for < 35 and loading < 5


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
