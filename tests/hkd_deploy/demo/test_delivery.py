"""Tests of the webhook, the selection of events, and the metrics."""

import json
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from hkd_deploy.backends.base import StageTimes
from hkd_deploy.demo.base import REMOVED_STATUS, CountEvent, FrameResult
from hkd_deploy.demo.delivery import EventSelector
from hkd_deploy.demo.metrics import DemoMetrics, parse_listen_address
from hkd_deploy.demo.webhook import WebhookPublisher
from hkd_det.errors import UsageError
from hkd_det.structures import Detections

FAILURES = ("503 with Retry-After", "401", "hang", "refuse", "redirect")


def make_frame(index: int, num_persons: int = 1, camera: str = "door") -> dict[str, Any]:
    return {"version": 1, "event": "frame", "camera": camera, "frame": index, "num_persons": num_persons}


def wait_for(condition: Callable[[], Any], timeout_s: float = 15.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "the condition did not become true"
        time.sleep(0.02)


class Receiver:
    """A web server that records what is posted, and fails as the test says."""

    def __init__(self, port: int = 0) -> None:
        self.requests: list[tuple[float, dict[str, str], Any]] = []
        self.status = 200
        self.headers: dict[str, str] = {}
        self.hang = Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if receiver.hang.is_set():
                    time.sleep(2)
                    self.close_connection = True
                    return
                headers = dict(self.headers.items())
                receiver.requests.append((time.monotonic(), headers, json.loads(body) if receiver.status < 300 else {}))
                self.send_response(receiver.status)
                for key, value in receiver.headers.items():
                    self.send_header(key, value)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def list_frames(self) -> list[int]:
        return [event["frame"] for _, _, body in self.requests if body for event in body["events"]]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def test_webhook_posts_batches_at_limited_rate(receiver: Receiver) -> None:
    reports: list[str] = []
    url = f"http://user:p%40ss@127.0.0.1:{receiver.port}/api/webhook/SECRET?x=1"
    publisher = WebhookPublisher(url, lambda text, *_, **__: reports.append(text), every_s=0, interval_s=0.3)
    for index in range(250):
        publisher.publish(make_frame(index))
    wait_for(lambda: publisher.num_waiting == 0)
    publisher.close()
    assert receiver.list_frames() == list(range(250))
    times = [time_s for time_s, _, _ in receiver.requests]
    assert len(times) <= 5
    assert all(later - earlier >= 0.28 for earlier, later in pairwise(times))
    _, headers, body = receiver.requests[0]
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == "Basic dXNlcjpwQHNz"  # base64 of user:p@ss
    assert body["version"] == 1
    assert publisher.num_delivered == 250
    assert reports == [f"webhook http://127.0.0.1:{receiver.port}: connected."]


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["500", *FAILURES])
def test_webhook_delivers_after_failure(failure: str, receiver: Receiver) -> None:
    reports: list[str] = []
    url = f"http://127.0.0.1:{receiver.port}/hook/SECRET"
    publisher = WebhookPublisher(
        url, lambda text, *_, **__: reports.append(text), every_s=0, interval_s=0.05, timeout_s=0.5
    )
    publisher.publish(make_frame(0))
    wait_for(lambda: publisher.num_delivered == 1)
    texts = {"hang": "no answer within", "refuse": "nothing listens", "redirect": "the server redirects (status 302)"}
    if failure == "hang":
        receiver.hang.set()
    elif failure == "refuse":
        receiver.close()
    elif failure == "redirect":
        receiver.status, receiver.headers = 302, {"Location": f"http://127.0.0.1:{receiver.port}/other"}
    else:
        receiver.status = int(failure[:3])
        receiver.headers = {"Retry-After": "1"} if "Retry-After" in failure else {}
    start_s = time.perf_counter()
    for index in range(1, 300):
        publisher.publish(make_frame(index))
    assert time.perf_counter() - start_s < 0.5  # the caller does not wait
    wait_for(lambda: len(reports) == 2)
    time.sleep(1.5)  # another attempt
    assert publisher.num_delivered == 1
    if failure == "refuse":
        receiver = Receiver(receiver.port)
    receiver.hang.clear()
    receiver.status, receiver.headers = 200, {}
    wait_for(lambda: publisher.num_waiting == 0)
    publisher.close()
    frames = list(dict.fromkeys(receiver.list_frames()))
    assert frames[-299:] == list(range(1, 300))
    assert len(reports) == 3
    assert texts.get(failure, f"(status {failure[:3]})") in reports[1]
    assert reports[2].endswith(": connected.")
    assert "SECRET" not in "".join(reports)
    if failure == "refuse":
        receiver.close()


@pytest.mark.slow
def test_webhook_refused_content_does_not_block_the_next(receiver: Receiver) -> None:
    reports: list[str] = []
    receiver.status = 422
    publisher = WebhookPublisher(
        f"http://127.0.0.1:{receiver.port}/",
        lambda text, *_, **__: reports.append(text),
        every_s=0,
        interval_s=0.05,
        max_buffered=500,
    )
    for index in range(100):
        publisher.publish(make_frame(index))
    wait_for(lambda: publisher.num_dropped == 100 or publisher.num_waiting == 0)
    receiver.status = 200
    publisher.publish(make_frame(100))
    wait_for(lambda: publisher.num_delivered == 1)
    publisher.close()
    assert receiver.list_frames() == [100]
    assert "refuses the content (status 422)" in reports[0]
    assert reports[1].endswith("connected. 100 dropped.")


@pytest.mark.slow
def test_webhook_close_ends_while_receiver_hangs(receiver: Receiver) -> None:
    receiver.hang.set()
    reports: list[str] = []
    publisher = WebhookPublisher(
        f"http://127.0.0.1:{receiver.port}/", lambda text, *_, **__: reports.append(text), every_s=0
    )
    publisher.publish(make_frame(0))
    time.sleep(0.3)
    start_s = time.monotonic()
    publisher.close()
    assert time.monotonic() - start_s < 2
    assert reports[-1].endswith("events: 0 delivered, 1 not delivered, 0 dropped.")


@pytest.mark.parametrize("url", ["ftp://host/x", "http:///x", "http://host:x/secret=1", "http://ho st/"])
def test_webhook_with_invalid_url_is_usage_error(url: str) -> None:
    with pytest.raises(UsageError, match=r"--webhook .*\.") as error:
        WebhookPublisher(url, print)
    assert "secret" not in str(error.value)


def select_frames(selector: EventSelector, counts: list[int], fps: float, camera: str = "door") -> list[int]:
    """Return the indices of the selected frames of a camera with these numbers of persons."""
    return [
        index
        for index, count in enumerate(counts)
        if selector.select(make_frame(index, count, camera), 1000 + index / fps)
    ]


def test_selector_sends_changes_and_a_sign_of_life() -> None:
    assert select_frames(EventSelector(every_s=60), [0] * 50 + [2] * 50 + [0] * 50, fps=10) == [0, 50, 100]
    assert select_frames(EventSelector(every_s=5), [1] * 120, fps=10) == [0, 50, 100]
    assert select_frames(EventSelector(every_s=0), [1] * 5, fps=10) == [0, 1, 2, 3, 4]


def test_selector_limits_flicker_and_keeps_the_last_state() -> None:
    flicker = [index % 2 for index in range(100)]
    selected = select_frames(EventSelector(every_s=60), flicker + [5] * 20, fps=10)
    assert all(later - earlier >= 5 for earlier, later in pairwise(selected))
    assert selected[-1] in range(100, 106)  # the new number arrives within half a second


def test_selector_is_independent_per_camera_and_passes_other_events() -> None:
    selector = EventSelector(every_s=60)
    assert selector.select(make_frame(0, 1, "a"), 0)
    assert selector.select(make_frame(0, 1, "b"), 0)
    assert not selector.select(make_frame(1, 1, "a"), 1)
    for _ in range(3):
        assert selector.select({"event": "crossing", "camera": "a"}, 1)


def scrape(port: int) -> dict[tuple[str, ...], float]:
    parser = pytest.importorskip("prometheus_client.parser")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        families = parser.text_string_to_metric_families(response.read().decode())
        return {
            (sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples
        }


def make_result(camera: str, index: int, num_persons: int) -> FrameResult:
    found = Detections(np.zeros((num_persons, 4), np.float32), np.full(num_persons, 0.9, np.float32))
    times = StageTimes(preprocess_ms=2, inference_ms=30, postprocess_ms=1)
    return FrameResult(camera, index, np.zeros((4, 6, 3), np.uint8), found, found, 0.3, 1.0, 150.0, times)


def test_metrics_of_two_cameras() -> None:
    pytest.importorskip("prometheus_client")
    metrics = DemoMetrics("0", ["door", 'yard "b"'])
    before = scrape(metrics.port)
    for index in range(4):
        metrics.write(make_result("door", index, num_persons=index))
    metrics.write(make_result('yard "b"', 0, num_persons=1))
    for status in ("camera lost: no data", "camera lost: nothing listens", "", "images are 3 s late"):
        metrics.write_status('yard "b"', status)
    metrics.add_counter("events_dropped", "Events.", "receiver", lambda: [("mqtt://host", 7)])
    samples = scrape(metrics.port)
    metrics.write_status("door", "camera lost: no data")
    lost = scrape(metrics.port)
    metrics.write_status("door", REMOVED_STATUS)
    removed = scrape(metrics.port)
    metrics.close()
    assert before["hkd_frames_total", "door"] == 0
    assert before["hkd_camera_up", "door"] == 0
    assert samples["hkd_camera_up", "door"] == 1
    assert samples["hkd_frames_total", "door"] == 4
    assert samples["hkd_persons", "door"] == 3
    assert samples["hkd_frame_age_seconds_count", "door"] == 4
    assert samples["hkd_frame_age_seconds_sum", "door"] == pytest.approx(0.6)
    assert samples["hkd_frame_age_seconds_bucket", "door", "0.1"] == 0
    assert samples["hkd_frame_age_seconds_bucket", "door", "0.2"] == 4
    assert samples["hkd_stage_seconds_sum", "door", "inference"] == pytest.approx(0.12)
    assert samples["hkd_camera_reconnects_total", 'yard "b"'] == 1
    assert samples["hkd_camera_up", 'yard "b"'] == 1
    assert samples["hkd_events_dropped_total", "mqtt://host"] == 7
    assert (lost["hkd_camera_up", "door"], lost["hkd_persons", "door"]) == (0, 0)
    assert ("hkd_camera_up", "door") not in removed and removed["hkd_frames_total", "door"] == 4


def test_metrics_of_lines_and_zones() -> None:
    pytest.importorskip("prometheus_client")
    metrics = DemoMetrics("0", ["yard"])
    counts = {"lines": {"door": {"left": 0, "right": 2}}, "zones": {"gate": {"persons": 4}}}
    crossing = CountEvent("crossing", "door", 7, 1.0, "right")
    enter = CountEvent("enter", "gate", 7, 1.0)
    for events in ((crossing, enter), (), (crossing,)):
        metrics.write(replace(make_result("yard", 0, 1), counts=counts, count_events=events))
    samples = scrape(metrics.port)
    metrics.close()
    assert samples["hkd_crossings_total", "yard", "right", "door"] == 2
    assert samples["hkd_crossings_total", "yard", "left", "door"] == 0
    assert samples["hkd_zone_persons", "yard", "gate"] == 4


def test_publisher_sends_first_status_and_changes(receiver: Receiver) -> None:
    publisher = WebhookPublisher(f"http://127.0.0.1:{receiver.port}/", lambda *_, **__: None, interval_s=0.05)
    publisher.write(make_result("door", 0, 2))
    publisher.write(make_result("door", 1, 2))  # no change
    publisher.write_status("door", "camera lost: no data")
    publisher.write_status("door", "")
    wait_for(lambda: publisher.num_delivered == 4)
    publisher.close()
    events = [event for _, _, body in receiver.requests for event in body["events"]]
    assert [event.get("status", event.get("num_persons")) for event in events] == [
        "ok",
        2,
        "camera lost: no data",
        "ok",
    ]
    assert events[1]["persons"][0]["score"] == pytest.approx(0.9)
    assert datetime.fromisoformat(events[0]["time"]).utcoffset() == timedelta(0)


def test_metrics_port_in_use_is_one_line() -> None:
    pytest.importorskip("prometheus_client")
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(UsageError) as error:
        DemoMetrics(str(server.getsockname()[1]), [])
    assert "in use" in str(error.value)


def test_metrics_address() -> None:
    assert parse_listen_address("9108") == ("127.0.0.1", 9108)
    assert parse_listen_address("0.0.0.0:1") == ("0.0.0.0", 1)
    assert parse_listen_address("[::]:9108") == ("::", 9108)
    for address in ("", "x", "host:", "host:70000", "host:-1"):
        with pytest.raises(UsageError, match="expected PORT or HOST:PORT"):
            parse_listen_address(address)
