"""Headless Chromium over the DevTools protocol, by a plain pipe: pages are laid out, looked at, and photographed.

Only what a page's own DOM says is checked: no script is put into it, for its policy allows none.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60.0
"""Seconds that an answer may take: a start on a busy machine."""

FAULTS = r"""
(() => {
  const faults = [], root = document.documentElement, name = e => `${e.tagName} ${e.textContent.slice(0, 60)}`;
  for (const d of document.querySelectorAll("details")) d.open = true;
  if (root.scrollWidth > root.clientWidth) faults.push(`the page is ${root.scrollWidth} wide in ${root.clientWidth}`);
  for (const e of document.querySelectorAll("body *")) {
    if (e.closest("svg") && e.tagName !== "svg") continue;
    const r = e.getBoundingClientRect();
    if (!r.width || e.closest(".scroll")) continue;
    if (r.right > root.clientWidth + 0.5 || r.left < -0.5) faults.push("beyond the page: " + name(e));
    if (getComputedStyle(e).display !== "inline" && e.tagName !== "svg" && e.scrollWidth > e.clientWidth + 1)
      faults.push("cut: " + name(e));
  }
  for (const svg of document.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect(), seen = [];
    for (const t of svg.querySelectorAll("text")) {
      const r = t.getBoundingClientRect(), words = t.lastChild.textContent;
      if (r.left < frame.left - 1 || r.right > frame.right + 1 || r.top < frame.top - 2 || r.bottom > frame.bottom + 2)
        faults.push(`outside its figure: ${words}`);
      for (const [o, other] of seen)
        if (Math.min(r.right, o.right) - Math.max(r.left, o.left) > 1 &&
            Math.min(r.bottom, o.bottom) - Math.max(r.top, o.top) > 3.5) faults.push(`${other} lies over ${words}`);
      seen.push([r, words]);
    }
    if (svg.getAttribute("aria-hidden") !== "true" && !(svg.getAttribute("role") === "img" &&
        svg.getAttribute("aria-label"))) faults.push("a figure without a name");
  }
  return faults.slice(0, 20);
})()
"""
"""Lists what is wrong with a page as it is laid out. Boxes of texts have empty space above and below, of 3.5 pixels."""


def executable() -> str | None:
    """Return the path of a Chromium, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A running browser with one page."""

    def __init__(self, process: subprocess.Popen[bytes], out: int, into: int) -> None:
        self.process, self._out, self._in = process, out, into
        self._number, self._rest = 0, b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    @classmethod
    @contextmanager
    def started(cls, home: Path) -> Iterator[Self]:
        """Start a browser whose files are in `home`, and end it."""
        found = executable()
        assert found
        to_browser, of_browser = os.pipe(), os.pipe()

        # It reads its file 3 and writes its file 4.
        command = [
            "bash", "-c", f'exec "$@" 3<&{to_browser[0]} 4>&{of_browser[1]}', "bash", found,
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--hide-scrollbars", "--disable-background-networking", "--remote-debugging-pipe",
            f"--user-data-dir={home}", "about:blank",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, pass_fds=(to_browser[0], of_browser[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": str(home), "XDG_CACHE_HOME": str(home)},  # else it writes into the user's
        )  # fmt: skip
        os.close(to_browser[0])
        os.close(of_browser[1])
        try:
            yield cls(process, of_browser[0], to_browser[1])
        finally:
            process.terminate()
            process.wait(30)
            os.close(of_browser[0])
            os.close(to_browser[1])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if method.split(".")[0] != "Target":
            message["sessionId"] = self.session
        os.write(self._in, json.dumps(message).encode() + b"\0")
        return self._until(lambda answer: answer.get("id") == self._number)["result"]  # type: ignore[no-any-return]

    def open(self, page: Path, width: int, scheme: str = "light", medium: str = "screen") -> None:
        """Open a page at a width, in a colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=medium, features=features)
        self.call("Page.navigate", url=page.resolve().as_uri())
        self._until(lambda event: event.get("method") == "Page.loadEventFired")

    def value(self, expression: str) -> Any:
        """Return what an expression is in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def shot(self, target: Path) -> None:
        """Write a picture of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        target.write_bytes(base64.b64decode(data))

    def _until(self, wanted: Any) -> dict[str, Any]:
        """Return the first message that is wanted."""
        last = time.monotonic() + PATIENCE
        while True:
            while b"\0" in self._rest:
                line, _, self._rest = self._rest.partition(b"\0")
                message: dict[str, Any] = json.loads(line)
                assert "error" not in message, message
                if wanted(message):
                    return message
            ready, _, _ = select.select([self._out], [], [], max(0.0, last - time.monotonic()))
            assert ready, f"Chromium does not answer; it ended with {self.process.poll()}"
            more = os.read(self._out, 1 << 20)
            assert more, f"Chromium is gone; it ended with {self.process.wait(30)}"
            self._rest += more
