"""A headless Chromium for the browser tests, spoken to in its own protocol (DevTools) through a local socket."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --hide-scrollbars --remote-debugging-port=0"
)


def find_chromium() -> str | None:
    """The program: CHROMIUM if that is set, or the first of the usual names on PATH."""
    return os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. `requests` has the address of everything that was asked for since it opened."""

    def __init__(self, width: int = 1280, height: int = 900):
        import websocket  # websocket-client, which JupyterLab brings

        self.folder = tempfile.mkdtemp(prefix="chromium-")
        command = [find_chromium(), *FLAGS.split(), f"--user-data-dir={self.folder}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file = Path(self.folder, "DevToolsActivePort")
        port = wait_for(lambda: port_file.exists() and port_file.read_text().count("\n") and port_file.read_text(), 60)
        number, path = port.split("\n")[:2]
        self.socket = websocket.create_connection(
            f"ws://127.0.0.1:{number}{path}", suppress_origin=True, timeout=60, http_no_proxy=["127.0.0.1"]
        )
        self.last_id, self.session = 0, None
        self.events: list[dict] = []
        target = self.call("Target.getTargets")["targetInfos"]
        page = next(info["targetId"] for info in target if info["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def call(self, method: str, **parameters):
        """A command of the protocol and its answer; events that arrive meanwhile are kept."""
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.last_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    @property
    def requests(self) -> list[str]:
        self.run("0")  # reads what has arrived
        sent = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["request"]["url"] for event in sent]

    @property
    def errors(self) -> list[str]:
        """Exceptions of the pages' scripts, and what the console calls an error."""
        found = []
        for event in self.events:
            if event.get("method") == "Runtime.exceptionThrown":
                details = event["params"]["exceptionDetails"]
                found.append(details.get("exception", {}).get("description") or details["text"])
            if event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                found.append(event["params"]["entry"]["text"])
        return found

    def run(self, script: str):
        """The value of a piece of JavaScript; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']['exception'].get('description')}")
        return answer["result"].get("value")

    def open(self, uri: str) -> None:
        """Opens a page and waits until it is loaded and its formulas are drawn."""
        self.run("window.leaving = true")
        self.call("Page.navigate", url=uri)
        wait_for(lambda: self.settled("document.readyState === 'complete' && !window.leaving"), 60)
        drawn = "window.MathJax?.startup?.promise ? MathJax.startup.promise.then(() => true) : !window.MathJax"
        wait_for(lambda: self.settled(drawn), 60)

    def settled(self, script: str):
        """The script's value, or None while one page makes way for another."""
        try:
            return self.run(script)
        except RuntimeError:
            return None

    def resize(self, width: int, height: int, mobile: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def screenshot(self, path: Path, top: int = 0, height: int | None = None) -> None:
        """A picture of the page from `top` on, as wide as the window."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        width = self.run("innerWidth")
        height = min(height or size["height"], max(1, size["height"] - top))
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)


def wait_for(condition, seconds: float):
    """The first true value of `condition()`.

    Raises: TimeoutError after so many seconds.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise TimeoutError(f"waited {seconds} s for {condition}")
