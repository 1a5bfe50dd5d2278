"""A headless Chromium, spoken to by WebDriver (https://www.w3.org/TR/webdriver2/)."""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

needs_chromium = pytest.mark.skipif(
    shutil.which("chromedriver") is None or shutil.which("chromium") is None,
    reason="no Chromium is installed (apt-get install chromium chromium-driver)",
)


class Browser:
    """One window. Positions and sizes are in CSS pixels."""

    def __init__(self, address: str) -> None:
        self.address = address
        arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage"]
        arguments += ["--no-sandbox"] if os.getuid() == 0 else []
        options = {
            "goog:chromeOptions": {"binary": shutil.which("chromium"), "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        created = self.call("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self.address += f"/session/{created['sessionId']}"

    def call(self, method: str, path: str, body: dict | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def open(self, page: Path, width: int, height: int, scheme: str = "light") -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", features=features)
        self.call("POST", "/url", {"url": page.as_uri()})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse at one place and let go at another."""
        steps = [("pointerMove", start), ("pointerDown", start), ("pointerMove", end)]
        self.act("pointer", [
            {"type": kind, "button": 0, "x": round(x), "y": round(y)}
            for kind, (x, y) in [*steps, ("pointerUp", end)]
        ])  # fmt: skip

    def move(self, place: tuple[float, float]) -> None:
        x, y = map(round, place)
        self.act("pointer", [{"type": "pointerMove", "x": x, "y": y}])

    def press(self, *keys: str) -> None:
        downs_and_ups = [
            {"type": f"key{way}", "value": key} for key in keys for way in ("Down", "Up")
        ]
        self.act("key", downs_and_ups)

    def act(self, kind: str, actions: list[dict]) -> None:
        source = {"type": kind, "id": kind, "actions": actions}
        self.call("POST", "/actions", {"actions": [source]})

    def complaints(self) -> list[str]:
        """What the console has been told since it was last asked."""
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        """Of the whole page, however long."""
        found = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    with subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True
    ) as driver:
        try:
            assert driver.stdout is not None
            line = next(line for line in driver.stdout if "started successfully on port" in line)
            browser = Browser("http://127.0.0.1:" + re.findall(r"port (\d+)", line)[0])
            try:
                yield browser
            finally:
                browser.call("DELETE", "")
        finally:
            driver.terminate()
