"""The little of the WebDriver protocol that tests of pages need, spoken to chromedriver."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
# the key under which WebDriver names an element
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ESCAPE, CONTROL, ENTER, TAB = "\ue00c", "\ue009", "\ue007", "\ue004"


class Browser:
    """Headless Chromium with a profile of its own, gone at exit."""

    def __init__(self, *arguments: str) -> None:
        assert CHROMIUM and CHROMEDRIVER
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.driver = subprocess.Popen(
            [CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        port = ""
        while not port:
            line = self.driver.stdout.readline()
            assert line, "chromedriver ended"
            if "successfully on port " in line:
                port = line.rpartition("on port ")[2].strip(" .\n")
        self.base = f"http://127.0.0.1:{port}"
        options = {
            "binary": CHROMIUM,
            "args": [
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={self.profile.name}",
                *arguments,
            ],
        }
        capabilities = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        wanted = {"capabilities": {"alwaysMatch": capabilities}}
        self.session = ""
        try:
            self.session = f"/session/{self.call('POST', '/session', wanted)['sessionId']}"
        except BaseException:
            self._end()
            raise

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, url: str) -> None:
        self.call("POST", f"{self.session}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        body = {"script": script, "args": list(arguments)}
        return self.call("POST", f"{self.session}/execute/sync", body)

    def find(self, css: str) -> str:
        body = {"using": "css selector", "value": css}
        return self.call("POST", f"{self.session}/element", body)[ELEMENT]

    def click(self, css: str) -> None:
        self.call("POST", f"{self.session}/element/{self.find(css)}/click", {})

    def type(self, css: str, text: str) -> None:
        self.call("POST", f"{self.session}/element/{self.find(css)}/value", {"text": text})

    def text(self, css: str) -> str:
        """As it is shown; "" where there is no such element."""
        return self.run("return document.querySelector(arguments[0])?.innerText || ''", css)

    def role(self, css: str) -> tuple[str, str]:
        """What a screen reader is told: role and name."""
        element = f"{self.session}/element/{self.find(css)}"
        return self.call("GET", element + "/computedrole"), self.call(
            "GET", element + "/computedlabel"
        )

    def log(self, kind: str) -> list[dict[str, Any]]:
        return self.call("POST", f"{self.session}/se/log", {"type": kind})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", f"{self.session}/screenshot")))

    def wait(self, holds: Callable[[], Any], what: str, seconds: float = 15) -> Any:
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            found = holds()
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s: {what}")

    def close(self) -> None:
        try:
            self.call("DELETE", self.session)
        finally:
            self._end()

    def _end(self) -> None:
        self.driver.terminate()
        self.driver.wait(10)
        self.driver.stdout.close()
        self.profile.cleanup()
