"""A headless Chromium that a test can lead: over a pipe, in the DevTools protocol, with nothing to install beside it."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

from patience import HANG_SECONDS

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUIET = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--mute-audio")  # fmt: skip

# the browser reads from its file 3 and writes to its file 4; copies first, as these numbers may be taken by one another
BEGIN = """import os, sys
copies = [os.dup(int(word)) for word in sys.argv[1:3]]
for number in (3, 4):
    os.dup2(copies[number - 3], number) if copies[number - 3] != number else os.set_inheritable(number, True)
os.execv(sys.argv[3], sys.argv[3:])"""


class Tab:
    """A tab.

    Attributes:
        errors: What the page's scripts threw and what it was refused, in words.
    """

    def __init__(self, read, write):
        self._read, self._write, self._buffer, self._session = read, write, b"", None
        self._numbers = itertools.count(1)
        self.errors = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        """Ask the browser for something, and wait for its answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _next(self):
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], HANG_SECONDS)[0], "the browser says nothing"
            part = os.read(self._read, 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"] + " " + params["entry"].get("url", ""))

    def js(self, expression):
        """The value of ``expression`` in the page; of a promise that which it brings."""
        result = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression):
        """Wait until ``expression`` is true in the page; its value."""
        limit = time.monotonic() + HANG_SECONDS
        while not (value := self.js(expression)):
            assert time.monotonic() < limit, f"never: {expression}\n{self.js('document.body.innerText')}"
            time.sleep(0.02)
        return value

    def open(self, url, until="document.readyState == 'complete'"):
        """Go to ``url`` and wait for ``until``."""
        assert "errorText" not in self.send("Page.navigate", url=url)
        self.wait(f"location.href != 'about:blank' && ({until})")

    def screen(self, width, dark=False, height=900):
        """A screen so wide, light or dark."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def click(self, selector):
        """Press the mouse in the middle of an element."""
        self.wait(f"document.querySelector({json.dumps(selector)}) != null")
        box = self.js(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] }})(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def type(self, selector, text):
        """Put ``text`` in the place of what a field holds."""
        self.click(selector)
        self.js(f"document.querySelector({json.dumps(selector)}).select?.()")
        self.send("Input.insertText", text=text)

    def picture(self, path, whole=True):
        """A picture of the page, for people."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(folder):
    """A browser whose files go into ``folder``; a ``Tab`` of it."""
    reads, told = os.pipe()
    answers, writes = os.pipe()
    words = [BROWSER, *QUIET, "--remote-debugging-pipe", f"--user-data-dir={folder}"]
    process = subprocess.Popen(
        [sys.executable, "-ISc", BEGIN, str(reads), str(writes), *words],
        pass_fds=(reads, writes),
        stderr=subprocess.DEVNULL,
    )
    os.close(reads)
    os.close(writes)
    try:
        yield Tab(answers, told)
    finally:
        process.kill()
        process.wait()
        os.close(told)
        os.close(answers)


# what a reader would notice: a page wider than the screen, text that can hardly be told from what is behind it, errors
LOOK = """(() => {
function parts(colour) { return colour.match(/[\\d.]+/g).map(Number) }
function brightness(c) {
  const [r, g, b] = c.map(x => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
  return .2126 * r + .7152 * g + .0722 * b
}
function behind(element) {
  for (let e = element; e; e = e.parentElement) {
    const c = parts(getComputedStyle(e).backgroundColor)
    if (c.length < 4 || c[3] > .5) return c
  }
  return matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18] : [255, 255, 255]
}
function shapeBehind(text) { // a figure's text stands on what was drawn before it, which is no parent of it
  const box = text.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2
  const shapes = [...text.closest('svg').querySelectorAll('path, use')].filter(shape => {
    const b = shape.getBoundingClientRect(), fill = getComputedStyle(shape).fill
    const before = shape.compareDocumentPosition(text) & Node.DOCUMENT_POSITION_FOLLOWING
    return before && fill != 'none' && b.left <= x && x <= b.right && b.top <= y && y <= b.bottom
  })
  return shapes.length ? parts(getComputedStyle(shapes.at(-1)).fill) : behind(text)
}
function contrast(element) {
  const style = getComputedStyle(element), svg = element instanceof SVGElement
  const [a, b] = [parts(svg ? style.fill : style.color), svg ? shapeBehind(element) : behind(element)].map(brightness)
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
}
const texts = [...document.querySelectorAll('h1, h2, p, li, td, th, dt, dd, button, label, summary, pre, span, svg text')].filter(e => e.checkVisibility())
const faint = texts.filter(e => e.textContent.trim() && contrast(e) < 4.5)
return {
  dark: matchMedia('(prefers-color-scheme: dark)').matches,
  width: innerWidth, page: document.documentElement.scrollWidth, texts: texts.length,
  faint: faint.map(e => e.textContent.trim().slice(0, 40)),
  images: [...document.images].filter(i => !i.naturalWidth).length,
  outside: performance.getEntriesByType('resource').map(e => e.name).filter(name => !name.startsWith(location.origin + '/')),
}
})()"""


def look(tab, width, dark):
    """What a reader of the page notices on a screen so wide."""
    tab.screen(width, dark)
    seen = tab.js(LOOK)
    assert (seen.pop("width"), seen.pop("dark")) == (width, dark)
    return seen
