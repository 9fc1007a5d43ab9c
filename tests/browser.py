"""A real Chromium for the tests, driven by the DevTools protocol over its pipe: needs no driver and no library."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path

FLAGS = ["--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--no-first-run", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"]  # fmt: skip


def find_chromium() -> str | None:
    """Its command; where it is missing and the tests are root, apt installs it first. None where it cannot be had."""
    names = ("chromium", "chromium-browser", "google-chrome")
    with open("/tmp/dsam-chromium-install.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two tests at once: apt takes one
        if not any(map(shutil.which, names)) and os.geteuid() == 0 and shutil.which("apt-get"):
            install = "apt-get update && apt-get install -y --no-install-recommends chromium"
            silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run(install, shell=True, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, **silent)
    return next(filter(None, map(shutil.which, names)), None)


class Page:
    """One page in a Chromium of its own; `errors` are its console's, `requests` the addresses that it asked for.

    https://chromedevtools.github.io/devtools-protocol: JSON messages ending in a zero byte, to Chromium's descriptor 3
    and from its descriptor 4.
    """

    def __init__(self, chromium: str, profile: Path, width: int = 1280, height: int = 900):
        ends = [*os.pipe(), *os.pipe()]
        theirs_in, self._out, self._in, theirs_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
        for end in ends:
            os.close(end)
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", chromium, *FLAGS,
             f"--user-data-dir={profile}", f"--window-size={width},{height}"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number, self._session, self._loaded = b"", 0, None, False
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._in)
        os.close(self._out)

    def send(self, method: str, **parameters) -> dict:
        """What the method answers; what happens meanwhile is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            read = os.read(self._in, 1 << 16)
            assert read, f"Chromium ended with {self._process.wait()}"
            self._buffer += read
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        match message.get("method"), message.get("params"):
            case "Page.loadEventFired", _:
                self._loaded = True
            case "Network.requestWillBeSent", parameters:
                self.requests.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown", parameters:
                self.errors.append(json.dumps(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled", parameters if parameters["type"] in ("error", "warning", "assert"):
                self.errors.append(json.dumps(parameters["args"]))
            case "Log.entryAdded", parameters:
                self.errors.append(parameters["entry"]["text"])
        return message

    def open(self, path: Path) -> None:
        """Shows the file, and waits until it is there."""
        self._loaded = False
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._receive()

    def run(self, script: str):
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        """A key of the keyboard, as the user's: `text` is what it types."""
        codes = {"Enter": 13, "Tab": 9, " ": 32}
        event = {"key": key, "windowsVirtualKeyCode": codes.get(key, 0)} | ({"text": text} if text else {})
        self.send("Input.dispatchKeyEvent", type="keyDown", **event)
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """The left button at the middle of the element."""
        x, y = self.run(f"""(() => {{ const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "center"}}); const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def screenshot(self, path: Path, whole: bool = True) -> Path:
        """A PNG of the page, all of it or what the window shows."""
        picture = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(picture["data"]))
        return path

    def _clip(self, whole: bool) -> dict:
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}} if whole else {}
