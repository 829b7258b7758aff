"""A headless Chromium that a test drives, by its DevTools protocol.

with Browser(folder, "--use-fake-ui-for-media-stream") as browser:
    browser.open(url)
    browser.run("document.title")
"""

import asyncio
import base64
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Browser:
    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options, self._number = folder, options, 0
        self.console: list[str] = []

    def __enter__(self) -> "Browser":
        command = [CHROMIUM or "", "--headless", "--no-sandbox", "--disable-gpu"]
        command += [f"--user-data-dir={self.folder}", "--remote-debugging-port=0"]
        command += ["--window-size=390,1100", *self.options, "about:blank"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        port = self.folder / "DevToolsActivePort"
        for _ in range(600):
            if port.exists() and "\n" in (text := port.read_text()):
                break
            time.sleep(0.1)
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self._connect(int(text.split("\n")[0])))
        for name in ("Page", "Runtime", "Log"):
            self.call(f"{name}.enable")
        return self

    async def _connect(self, port: int) -> None:
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port}/json/list") as response:
            (page,) = [each for each in await response.json() if each["type"] == "page"]
        self.socket = await self.session.ws_connect(
            page["webSocketDebuggerUrl"], max_msg_size=1 << 26
        )

    def __exit__(self, *_: object) -> None:
        self.loop.run_until_complete(self.session.close())
        self.process.kill()
        self.process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), 60))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        number = self._number
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while (said := await self.socket.receive_json()).get("id") != number:
            if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                if said["params"].get("entry", {}).get("level") != "verbose":  # advice
                    self.console.append(str(said["params"]))
        assert "error" not in said, said
        return said["result"]

    def run(self, code: str) -> Any:
        """What JavaScript gives, or what its promise does."""
        asked = {"expression": code, "awaitPromise": True, "returnByValue": True}
        result = self.call("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def until(self, code: str, seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while not (found := self.run(code)):
            assert time.monotonic() < end, (code, self.run("document.body.innerText"), self.console)
            time.sleep(0.1)
        return found

    def picture(self, path: Path) -> None:
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
