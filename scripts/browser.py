"""A headless Chromium, driven over WebDriver with the standard library alone: enough to look at a report."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def is_installed() -> bool:
    return all(shutil.which(name) for name in ("chromium", "chromedriver"))


class Browser:
    """A browser window without a screen; a context manager.

    Parameters
    ----------
    width, height : int
        Of the window, in CSS pixels, as a phone would report them.
    is_dark : bool
        What the page is told about the preferred colours.
    """

    def __init__(self, width: int, height: int = 900, *, is_dark: bool = False) -> None:
        self._width, self._height, self._is_dark = width, height, is_dark

    def __enter__(self) -> Browser:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        log = Path(self._folder.name) / "driver.log"
        with log.open("w") as stream:
            command = [shutil.which("chromedriver") or "chromedriver", "--port=0"]
            self._driver = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            self._root = f"http://127.0.0.1:{_port(log)}"
            self._session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": self._wishes()}})[
                "sessionId"
            ]
            self.show_as(self._width, is_dark=self._is_dark)
        except BaseException:
            self._driver.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._call("DELETE", f"/session/{self._session}")
        finally:
            self._driver.terminate()
            self._driver.wait(10)
            self._folder.cleanup()

    def open(self, path: Path) -> None:
        self.visit(path.resolve().as_uri())

    def visit(self, address: str) -> None:
        self._command("url", {"url": "about:blank"})
        self.console(), self.requests()  # of the page before
        self._command("url", {"url": address})

    def show_as(self, width: int, *, is_dark: bool = False) -> None:
        """Make the window another one: a phone, a desk, by night."""
        self._width = width
        self.devtools("Emulation.setDeviceMetricsOverride", **self._metrics(self._height))
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", media="", features=[scheme])

    def run(self, script: str) -> Any:
        """Return what the body of a function returns inside the page."""
        return self._command("execute/sync", {"script": script, "args": []})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self._command("goog/cdp/execute", {"cmd": command, "params": parameters})

    def console(self) -> list[str]:
        """Return the messages of the console since the last call: errors of scripts, refused requests."""
        return [entry["message"] for entry in self._command("se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Return the addresses that were asked for since the last call."""
        messages = [
            json.loads(entry["message"])["message"] for entry in self._command("se/log", {"type": "performance"})
        ]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def screenshot(self, height: int | None = None, scale: float = 1.0) -> bytes:
        """Return the page from its top as PNG; all of it, or `height` pixels."""
        tall = height or int(self.run("return document.documentElement.scrollHeight"))
        self.devtools("Emulation.setDeviceMetricsOverride", **self._metrics(tall, scale))
        return base64.b64decode(self.devtools("Page.captureScreenshot", format="png")["data"])

    def _metrics(self, height: int, scale: float = 1.0) -> dict[str, Any]:
        return {"width": self._width, "height": height, "deviceScaleFactor": scale, "mobile": self._width < 640}

    def _wishes(self) -> dict[str, Any]:
        flags = [*_FLAGS, f"--user-data-dir={self._folder.name}/profile"]
        return {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": shutil.which("chromium"), "args": flags},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }

    def _command(self, name: str, body: dict[str, Any]) -> Any:
        return self._call("POST", f"/session/{self._session}/{name}", body)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"}, method=method)
        # Whatever proxy the environment names, the driver is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]


def _port(log: Path, patience: float = 20.0) -> int:
    """Return the port that the driver chose, from what it says at its start."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        for line in log.read_text().splitlines():
            if "started successfully on port" in line:
                return int(line.rsplit(" ", 1)[1].rstrip("."))
        time.sleep(0.05)
    raise RuntimeError(f"chromedriver did not start: {log.read_text()}")
