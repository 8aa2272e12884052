"""A page opened in a real headless Chromium, over the DevTools protocol, with the standard library alone."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --disable-breakpad --hide-scrollbars "
    "--no-proxy-server --remote-debugging-pipe"
)
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND"  # a request to another machine is reported, and goes nowhere

# The browser reads commands from descriptor 3 and answers on 4. A shell puts the pipes there: a `preexec_fn` would run
# the fork handlers of this process, and JAX's warns.
SHELL = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null', "sh"]

# Lazy images are made eager, so that those far down or in a closed <details> load too. `complete` becomes true when an
# image has loaded or failed.
READ = """(async () => {
    for (const image of document.images) image.loading = "eager";
    while (![...document.images].every((image) => image.complete)) await new Promise((done) => setTimeout(done, 20));
    await document.fonts.ready;
    const images = [...document.images].map((image) => ({
        src: image.src.slice(0, 80), alt: image.alt, complete: image.complete, naturalWidth: image.naturalWidth}));
    return {images, width: document.documentElement.scrollWidth, text: document.body.innerText};
})()"""


class Page(NamedTuple):
    """What a browser made of a page."""

    images: list[dict[str, Any]]  # one for each <img>: the start of its src, alt, complete, naturalWidth
    messages: list[str]  # warnings, errors and uncaught exceptions
    requests: list[str]  # the addresses asked for, the page's own first; data: ones are left out
    width: int  # of the content; above `viewport`, the page must be scrolled sideways
    viewport: int  # the width asked for: a phone's innerWidth grows to hold wide content, so it can't show an overflow
    text: str  # as shown
    screenshot: bytes  # a PNG of the full page


def find() -> str | None:
    """The path of a Chromium: `$CHROMIUM`, or the first on the PATH; None where there is none."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class _Browser:
    """A running browser: commands to it, and the events it has sent."""

    def __init__(self, process: subprocess.Popen[bytes], timeout: float) -> None:
        self.process, self.deadline = process, time.monotonic() + timeout
        self.session: dict[str, str] = {}  # the page that commands go to
        self.events: list[dict[str, Any]] = []
        self.sent, self.unread, self.stderr = 0, b"", b""

    def drain(self, seconds: float) -> None:
        """Read stderr to its end, which comes when the browser's last process is gone."""
        err, end = self.process.stderr.fileno(), time.monotonic() + seconds
        while select.select([err], [], [], max(0, end - time.monotonic()))[0] and (part := os.read(err, 1 << 16)):
            self.stderr += part

    def fail(self, what: str) -> RuntimeError:
        self.drain(0.2)
        return RuntimeError(f"{what}; the end of the browser's stderr:\n{self.stderr[-2000:].decode(errors='replace')}")

    def receive(self) -> dict[str, Any]:
        """The next message: an answer, or an event, which is kept."""
        out, err = self.process.stdout.fileno(), self.process.stderr.fileno()
        while b"\0" not in self.unread:
            ready = select.select([out, err], [], [], max(0, self.deadline - time.monotonic()))[0]
            if not ready or time.monotonic() > self.deadline:
                raise self.fail("the browser took too long")
            if err in ready:
                self.stderr += os.read(err, 1 << 16)
            if out in ready:
                part = os.read(out, 1 << 16)
                if not part:
                    raise self.fail("the browser died")
                self.unread += part
        text, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        if message.get("method") == "Inspector.targetCrashed":
            raise self.fail("the page crashed")
        return message

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command."""
        self.sent += 1
        command = {"id": self.sent, "method": method, "params": params, **self.session}
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\0")
        except BrokenPipeError:
            raise self.fail("the browser died") from None
        while (answer := self.receive()).get("id") != self.sent:
            pass
        result = answer.get("result", {})
        if wrong := answer.get("error") or result.get("errorText") or result.get("exceptionDetails"):
            raise self.fail(f"{method}: {wrong}")
        return result

    def of(self, method: str) -> list[dict[str, Any]]:
        """What the events of this name say."""
        return [event["params"] for event in self.events if event["method"] == method]

    def messages(self) -> list[str]:
        found = []
        for call in self.of("Runtime.consoleAPICalled"):
            if call["type"] in ("warning", "error", "assert"):
                words = [str(word.get("value", word.get("description"))) for word in call["args"]]
                found.append(f"console {call['type']}: {' '.join(words)}")
        for thrown in self.of("Runtime.exceptionThrown"):
            details = thrown["exceptionDetails"]
            found.append(f"exception: {details.get('exception', {}).get('description', details['text'])}")
        for entry in (logged["entry"] for logged in self.of("Log.entryAdded")):
            if entry["level"] in ("warning", "error"):
                found.append(f"{entry['source']} {entry['level']}: {entry['text']} {entry.get('url', '')}".rstrip())
        return found

    def look(self, url: str, width: int, height: int) -> Page:
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        attached = self.do("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Runtime", "Log", "Network", "Page", "Inspector"):
            self.do(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.do("Emulation.setDeviceMetricsOverride", **size)
        self.do("Page.navigate", url=url)
        while not self.of("Page.loadEventFired"):
            self.receive()
        read = self.do("Runtime.evaluate", expression=READ, awaitPromise=True, returnByValue=True)["result"]["value"]
        clip = {**self.do("Page.getLayoutMetrics")["cssContentSize"], "scale": 1}
        screenshot = base64.b64decode(self.do("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])
        asked = [event["request"]["url"] for event in self.of("Network.requestWillBeSent")]
        requests = [address for address in asked if not address.startswith("data:")]
        return Page(messages=self.messages(), requests=requests, viewport=width, screenshot=screenshot, **read)


def look(path: Path, width: int = 1200, height: int = 900, timeout: float = 60) -> Page:
    """What a browser makes of the file in a window of this size: a phone's, where it is narrower than 600 pixels."""
    program = find()
    if program is None:
        raise RuntimeError("no Chromium on the PATH or in $CHROMIUM")
    with tempfile.TemporaryDirectory() as folder:
        own = dict.fromkeys(("HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"), folder)
        command = [*SHELL, program, *FLAGS.split(), OFFLINE, f"--user-data-dir={folder}/profile", "about:blank"]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen(command, bufsize=0, start_new_session=True, env=os.environ | own, **pipes) as process:
            browser = _Browser(process, timeout)
            try:
                return browser.look(path.resolve().as_uri(), width, height)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                browser.drain(5)  # until no process is left to write to the folder
