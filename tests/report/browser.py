"""Headless Chromium through its DevTools pipe: what a page logs, asks for, and how wide it is."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def program() -> str | None:
    """The browser's path, or None where none is installed."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@dataclass
class Seen:
    """What a page did at one width of window, in CSS pixels; requests are those that leave the page."""

    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    inner_width: int = 0
    scroll_width: int = 0
    overflowing: list[str] = field(default_factory=list)


OVERFLOWING = """
[...document.querySelectorAll('body *')]
  .filter(e => e.matches('.scroll') || !e.closest('.scroll'))  // what lies in there can be scrolled to
  .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5 && e.getClientRects().length)
  .map(e => e.tagName + '.' + e.getAttribute('class') + ': ' + (e.textContent || '').trim().slice(0, 60))
"""


class Browser:
    """A headless Chromium; use as a context manager."""

    def __enter__(self) -> "Browser":
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read_end, self._to = os.pipe()
        self._from, write_end = os.pipe()
        chromium = program()
        assert chromium is not None
        # The browser reads commands from descriptor 3 and writes answers to 4.
        shell = f'exec "$0" "$@" 3<&{read_end} 4>&{write_end}'
        command = ["bash", "-c", shell, chromium, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(read_end, write_end), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read_end)
        os.close(write_end)
        self._buffer, self._events, self._number = b"", [], 0
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._to)
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._from)
        self._profile.cleanup()

    def see(
        self, page: Path, width: int, screenshot: Path | None = None, dark: bool = False, unfold: bool = True
    ) -> Seen:
        """Open a page at this width and report what it did."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = "dark" if dark else "light"
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._events.clear()
        self._call("Page.navigate", url=page.resolve().as_uri())
        self._wait_for("Page.loadEventFired")
        if unfold:
            self._value("document.querySelectorAll('details').forEach(d => d.open = true)")
        self._value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        seen = Seen(
            inner_width=self._value("innerWidth"),
            scroll_width=self._value("document.documentElement.scrollWidth"),
            overflowing=self._value(OVERFLOWING),
        )
        for event in self._events:
            if event["method"] == "Network.requestWillBeSent":
                address = event["params"]["request"]["url"]
                seen.requests += [] if address.startswith("data:") else [address]  # held in the page itself
            if event["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                seen.messages.append(json.dumps(event["params"])[:3000])
        if screenshot is not None:
            picture = self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            screenshot.write_bytes(base64.b64decode(picture))
        return seen

    def _value(self, expression: str) -> Any:
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            if "method" in answer:
                self._events.append(answer)

    def _wait_for(self, method: str) -> None:
        deadline = time.monotonic() + 30
        while not any(event["method"] == method for event in self._events):
            if time.monotonic() > deadline:
                raise TimeoutError(method)
            self._events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._from, 1 << 16)
            if not data:
                raise RuntimeError("the browser ended early")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
