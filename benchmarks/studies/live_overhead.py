"""Overhead of `hkd-demo` over decoding and inference alone, and the ages of several cameras on this machine.

    python benchmarks/studies/live_overhead.py --model hkd-cpu --threads 2

First table: one video of 640x512. "alone" is a loop of OpenCV's decoder and the detector. Rounds of all alternate, so
that a change of the machine's speed affects all. The second row adds `--record` (extra `live`), the others `--web`
(extra `web`) with viewers, which are threads of a process on this machine with the lowest priority: they request images
as the page does, and the number that they get is printed. The percentiles are those of the time from one frame to the
next, of all rounds; their ratio is to `--events`. Second table: MJPEG cameras on this machine, which sends their
images itself; ages and rates are those of the events that `hkd-demo` writes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import cv2
import numpy as np

from hkd_deploy import open_detector
from hkd_deploy.backends.base import Detector
from hkd_deploy.demo.base import FrameResult, FrameSink
from hkd_deploy.demo.camera_recorder import RecordingConfig
from hkd_deploy.demo.cameras import CameraConfig
from hkd_deploy.demo.events import open_events
from hkd_deploy.demo.progress import print_message
from hkd_deploy.demo.recording import Recorder
from hkd_deploy.demo.run import CameraPipeline, run_cameras
from hkd_deploy.demo.web import WebSink
from hkd_deploy.streams import open_source
from hkd_det.console import format_table
from hkd_det.datasets.synthetic.writer import iterate_frames, write_video

VIDEO_HW, CAMERA_HW = (512, 640), (360, 640)
NUM_VIEWERS = (0, 1, 10)
# Threads that request frames as the page does. The number of images is printed when stdin is closed.
VIEWER = """
import json, os, struct, sys, time, threading, urllib.request
num_images = 0
def view():
    global num_images
    seq = 0
    while True:
        content = urllib.request.urlopen(f"{sys.argv[1]}frames?after=0:{seq}").read()
        for frame in json.loads(content[4 : 4 + struct.unpack(">I", content[:4])[0]]):
            seq = frame["seq"]
            num_images += 1
        time.sleep(0.08)
os.nice(19)
for _ in range(int(sys.argv[2])):
    threading.Thread(target=view, daemon=True).start()
sys.stdin.read()
print(num_images, flush=True)
os._exit(0)
"""
COMMAND = "import sys; from hkd_deploy.demo.cli import main; sys.exit(main())"


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hkd-cpu", help="as for hkd-demo (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the detector (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of 100 frames (default: %(default)s)")
    parser.add_argument("--cameras", type=int, default=8, help="number of cameras (default: %(default)s)")
    parser.add_argument("--fps", type=float, default=5, help="frames per second of a camera (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="duration of the cameras (default: %(default)s)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        video = Path(directory) / "street.mp4"
        write_video(video, num_frames=100, size_hw=VIDEO_HW)
        with open_detector(flags.model, threads=flags.threads) as detector:
            print_overhead(detector, video, flags.rounds)
        print_cameras(flags, Path(directory) / "events.jsonl")


class FrameClock:
    """Time of each frame of a run. It is a `FrameSink`.

    Attributes:
        ticks_s: Times by `time.perf_counter()`.
    """

    def __init__(self) -> None:
        self.ticks_s: list[float] = []

    def write(self, result: FrameResult) -> None:  # noqa: ARG002 - of FrameSink
        """Note the time."""
        self.ticks_s.append(time.perf_counter())

    def write_status(self, camera: str, status: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Viewers:
    """Viewers of a page.

    Args:
        page: The page.
        count: Number of viewers.
    """

    def __init__(self, page: WebSink, count: int) -> None:
        command = [sys.executable, "-c", VIEWER, page.url, str(count)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> int:
        """End them and return the number of images that all of them got."""
        return int(self._process.communicate()[0])


def print_overhead(detector: Detector, video: Path, rounds: int) -> None:
    """Print the time per frame of the loop of `hkd-demo` and of decoding and inference alone.

    Args:
        detector: The detector.
        video: The video.
        rounds: Rounds of all.
    """
    pages = [WebSink([CameraConfig("video", str(video))], [], 0) for _ in NUM_VIEWERS]
    viewers = [Viewers(page, count) for page, count in zip(pages, NUM_VIEWERS, strict=True)]
    runs: dict[str, Callable[[], list[float]]] = {
        "alone": partial(run_alone, detector, video),
        "--events": partial(run_demo, detector, video),
        "--events --record": partial(run_recording, detector, video),
    }
    for page, count in zip(pages, NUM_VIEWERS, strict=True):
        runs[f"--events --web, viewers: {count}"] = partial(run_demo, detector, video, [page])
    means_ms: dict[str, list[float]] = {name: [] for name in runs}
    frames_ms: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start_s = time.perf_counter()
            ticks_s = run()
            if number:  # warmed up
                means_ms[name].append(1e3 * (time.perf_counter() - start_s) / len(ticks_s))
                frames_ms[name] += (1e3 * np.diff(ticks_s)).tolist()
    num_images = [one.close() for one in viewers]
    for page in pages:
        page.close()
    print(format_overhead(means_ms, frames_ms))
    counts = ", ".join(f"{count} viewers: {images}" for count, images in zip(NUM_VIEWERS, num_images, strict=True))
    print(f"images of the viewers in {rounds + 1} rounds of {len(ticks_s)} frames: {counts}")


def format_overhead(means_ms: dict[str, list[float]], frames_ms: dict[str, list[float]]) -> str:
    """Format the first table.

    Args:
        means_ms: Time per frame of each round, ms.
        frames_ms: Time of each frame, ms.
    """
    alone_ms, (_, events_p99_ms) = np.array(means_ms["alone"]), np.percentile(frames_ms["--events"], [50, 99])
    rows = []
    for name, values_ms in means_ms.items():
        ratios = np.array(values_ms) / alone_ms
        low, high = np.percentile(ratios, [10, 90])
        p50_ms, p99_ms = np.percentile(frames_ms[name], [50, 99])
        rows.append([name, f"{np.median(values_ms):.2f}", f"{np.median(ratios):.3f}", f"{low:.3f} to {high:.3f}"])
        rows[-1] += [f"{p50_ms:.2f}", f"{p99_ms:.2f}", f"{p99_ms / events_p99_ms:.3f}"]
    header = ["flags", "ms per frame", "ratio", "10 to 90 %", "p50, ms", "p99, ms", "ratio of p99"]
    return format_table(rows, header)


def run_alone(detector: Detector, video: Path) -> list[float]:
    """Decode a video with OpenCV and run the detector on each frame; return the time of each frame, seconds.

    Args:
        detector: The detector.
        video: The video.
    """
    capture, ticks_s = cv2.VideoCapture(str(video)), list[float]()
    while True:
        is_read, frame_bgr = capture.read()
        if not is_read:
            return ticks_s
        detector(cv2.cvtColor(frame_bgr, cv2.COLOR_BGR2RGB))
        ticks_s.append(time.perf_counter())


def run_demo(detector: Detector, video: Path, sinks: Sequence[FrameSink] = ()) -> list[float]:
    """Process a video as `hkd-demo --events` does; return the time of each frame, seconds.

    Args:
        detector: The detector.
        video: The video.
        sinks: Further outputs.
    """
    clock = FrameClock()
    with open_source(str(video)) as source, open_events(os.devnull) as events:
        pipeline = CameraPipeline("video", source, detector.default_conf, [events, *sinks, clock])
        run_cameras([pipeline], detector)
    return clock.ticks_s


def run_recording(detector: Detector, video: Path) -> list[float]:
    """Process a video as `hkd-demo --events --record` does; return the time of each frame, seconds.

    Args:
        detector: The detector.
        video: The video. The recording is written next to it.
    """
    recorder = Recorder(RecordingConfig(video.parent / "recording"), {"video": False}, print_message)
    ticks_s = run_demo(detector, video, [recorder])
    recorder.close()
    return ticks_s


def print_cameras(flags: argparse.Namespace, events_path: Path) -> None:
    """Run `hkd-demo` on several cameras and print the rate and the ages of each.

    Args:
        flags: Flags of this study.
        events_path: File for the events.
    """
    address = start_camera_server(flags.fps)
    command = [
        sys.executable,
        "-c",
        COMMAND,
        flags.model,
        "--threads",
        str(flags.threads),
        "--events",
        str(events_path),
    ]
    command += [text for index in range(flags.cameras) for text in ("--source", f"{address}/{index}")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(flags.seconds)
    process.send_signal(signal.SIGTERM)
    process.wait()
    events = [json.loads(line) for line in events_path.read_text(encoding="utf-8").splitlines()]
    rows = []
    for camera in sorted({event["camera"] for event in events}):
        ages_ms = [event["age_ms"] for event in events if event["event"] == "frame" and event["camera"] == camera]
        # The first second is the start.
        p50, p99, longest = np.percentile(ages_ms[round(flags.fps) :], [50, 99, 100])
        rows.append([camera, len(ages_ms), f"{p50:.0f}", f"{p99:.0f}", f"{longest:.0f}"])
    print(f"\n{flags.cameras} cameras of 640x360 at {flags.fps:g} frames per second for {flags.seconds:g} s")
    print(format_table(rows, ["camera", "frames", "age p50, ms", "p99, ms", "max, ms"]))


def start_camera_server(fps: float) -> str:
    """Serve MJPEG streams at http://127.0.0.1:PORT/N in a thread; return the address without the number.

    Args:
        fps: Frames per second of a stream.
    """
    frames = [cv2.imencode(".jpg", frame[:, :, ::-1])[1].tobytes() for frame in iterate_frames(0, 20, fps, CAMERA_HW)]

    class CameraHandler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for index in range(10**6):
                data = frames[index % len(frames)]
                header = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                try:
                    self.wfile.write(header.encode() + data + b"\r\n")
                except OSError:  # the viewer left
                    return
                time.sleep(1 / fps)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - name of the interface
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), CameraHandler)
    Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


if __name__ == "__main__":
    main()
