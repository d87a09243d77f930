"""Tests of the page in a headless Chromium: live images, a lost camera, a drawn line that counts, the token."""

import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import connect

from hkd_deploy.backends.base import StageTimes
from hkd_deploy.demo.cameras import read_cameras
from hkd_deploy.demo.run import CameraPipeline
from hkd_deploy.demo.web import WebSink
from hkd_deploy.streams import Frame, FrameSource
from hkd_det.structures import Detections

CAMERA_FILE = "cameras:\n- {name: door, source: '0'}\n- {name: yard, source: 'rtsp://u:p@10.0.0.5/x'}\n"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0")


class Browser:
    """A headless Chromium, controlled by the DevTools protocol.

    Attributes:
        errors: Exceptions of scripts, and errors in the console.
    """

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file = folder / "DevToolsActivePort"
        wait_for(lambda: port_file.exists() and "\n" in port_file.read_text(), 60)
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port_file.read_text().split()[0]}/json", timeout=20
        ) as response:
            address = next(tab["webSocketDebuggerUrl"] for tab in json.load(response) if tab["type"] == "page")
        self._connection = connect(address, max_size=None)
        self._ids = itertools.count(1)
        self.errors: list[Any] = []
        for domain in ("Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        number = next(self._ids)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._connection.recv(timeout=60))
            if message.get("id") == number:
                return message["result"]
            level = message.get("params", {}).get("entry", {}).get("level")
            if message.get("method") == "Runtime.exceptionThrown" or level == "error":
                self.errors.append(message["params"])

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url: str, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Page.navigate", url=url)
        wait_for(lambda: self.evaluate("document.querySelectorAll('.camera').length === 2"))

    def click(self, selector: str) -> None:
        self.evaluate(f"document.querySelector('.camera {selector}').click()")

    def press(self, *points: tuple[float, float]) -> None:
        """Press the mouse at the first point of the first image, move it to the others, and release it."""
        box = self.evaluate(
            "(() => { const i = document.querySelector('.image'); i.scrollIntoView(); const b = "
            "i.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })()"
        )
        events = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
        for event, (x, y) in zip(events, [*points, points[-1]], strict=True):
            position = {"x": box[0] + x * box[2], "y": box[1] + y * box[3]}
            self.call("Input.dispatchMouseEvent", type=event, button="left", buttons=1, clickCount=1, **position)

    def close(self) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.wait(20)


def wait_for(condition: Callable[[], Any], timeout_s: float = 30) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "the condition did not become true"
        time.sleep(0.1)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    running = Browser(tmp_path / "profile")
    yield running
    running.close()


@pytest.fixture
def make_page(tmp_path: Path) -> Iterator[Callable[..., WebSink]]:
    """Function that starts a page with a camera that delivers images, and one that is lost."""
    path = tmp_path / "cameras.yaml"
    path.write_text(CAMERA_FILE)
    stop, pages, threads = Event(), list[WebSink](), list[Thread]()

    def make(**values: Any) -> WebSink:
        pipelines: list[CameraPipeline] = []
        page = WebSink(read_cameras(path), pipelines, 0, camera_file=path, **values)
        pages.append(page)
        pipelines += [CameraPipeline(name, IdleSource(), 0.3, [page]) for name in ("door", "yard")]
        page.write_status("yard", "camera lost: wrong user or password at 10.0.0.5.")
        threads.append(Thread(target=write_frames, args=(pipelines[0], stop)))
        threads[-1].start()
        return page

    yield make
    stop.set()
    for thread in threads:
        thread.join()
    for page in pages:
        page.close()


class IdleSource(FrameSource):
    """A camera whose frames the test writes."""

    def __init__(self) -> None:
        super().__init__("idle", is_live=True, fps=None, num_frames=None)

    def iterate_frames(self, *_: object) -> Iterator[Frame]:
        return iter(())

    def close(self) -> None:
        pass


def write_frames(pipeline: CameraPipeline, stop: Event) -> None:
    """Write ten frames per second. A person walks from the left to the right border in 4.5 s, again and again."""
    detector: Any = SimpleNamespace(metadata=SimpleNamespace(model="m", imgsz_hw=(9, 16)), backend="b", device="cpu")
    for index in itertools.count():
        image = np.full((90, 160, 3), 40 + index % 200, np.uint8)
        x = 3.0 * (index % 45)
        detections = Detections(np.array([[x, 9, x + 20, 63]], np.float32), np.array([0.8], np.float32))
        pipeline.write(detector, Frame(image, time.monotonic()), detections, StageTimes(1, 2, 3), 42.0)
        if stop.wait(0.1):
            return


def get_text(browser: Browser, selector: str, index: int = 0) -> str:
    return browser.evaluate(f"document.querySelectorAll('.camera')[{index}].querySelector('{selector}').textContent")


def read_pixel(browser: Browser) -> list[int]:
    """Return RGB of a pixel of the first image, below the boxes."""
    script = "[...document.querySelector('.image').getContext('2d').getImageData(150, 80, 1, 1).data].slice(0, 3)"
    return browser.evaluate(script)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(360, 800), (1280, 800)])
def test_page_is_live_and_saves_a_drawn_line(
    browser: Browser, make_page: Callable[..., WebSink], tmp_path: Path, width: int, height: int
) -> None:
    page = make_page()
    browser.open(page.url, width, height)
    wait_for(lambda: read_pixel(browser)[0] > 30)
    first = read_pixel(browser)
    wait_for(lambda: read_pixel(browser) != first)
    wait_for(lambda: get_text(browser, ".persons") == "1")
    assert get_text(browser, ".age") == "42 ms"
    assert get_text(browser, ".counts tbody") == ""
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert get_text(browser, ".state", 1) == "lost"
    assert get_text(browser, ".warning", 1) == "camera lost: wrong user or password at the camera."
    assert "10.0.0.5" not in browser.evaluate("document.documentElement.outerHTML")

    browser.click(".edit")
    browser.click(".add-line")
    browser.press((0.5, 0.9), (0.5, 0.5), (0.5, 0.2))
    browser.evaluate("document.querySelector('.naming input').value = 'exit'")
    browser.click(".accept")
    browser.click(".add-zone")
    for corner in ((0.1, 0.1), (0.9, 0.1), (0.5, 0.9)):
        browser.press(corner)
    browser.click(".finish")
    browser.click(".accept")
    browser.click(".save")
    wait_for(lambda: get_text(browser, ".message").startswith("Saved"))
    camera = read_cameras(tmp_path / "cameras.yaml")[0]
    assert [line.name for line in camera.lines] == ["exit"] and [zone.name for zone in camera.zones] == ["zone 1"]
    assert np.allclose(camera.lines[0].points, [(0.5, 0.9), (0.5, 0.2)], atol=0.01)
    assert np.allclose(camera.zones[0].points, [(0.1, 0.1), (0.9, 0.1), (0.5, 0.9)], atol=0.01)
    wait_for(lambda: get_text(browser, ".counts").startswith(("exitleft 0, right 1", "exitleft 0, right 2")))
    assert browser.errors == []


@pytest.mark.slow
def test_page_opens_with_the_token_only(browser: Browser, make_page: Callable[..., WebSink]) -> None:
    page = make_page(host="0.0.0.0")
    base = f"http://127.0.0.1:{page.port}/"
    browser.call("Page.navigate", url=base)
    wait_for(lambda: "?token=" in browser.evaluate("document.body.innerText"))
    browser.open(f"{base}?{page.url.partition('?')[2]}", 1280, 800)
    wait_for(lambda: read_pixel(browser)[0] > 30)
    assert browser.evaluate("location.href") == base  # the token is not in the address
    assert browser.evaluate("document.cookie") == ""  # scripts cannot read it
