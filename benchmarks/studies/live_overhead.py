"""Overhead of `hkd-demo` over decoding and inference alone, and the ages of several cameras on this machine.

    python benchmarks/studies/live_overhead.py --model hkd-cpu --threads 2

First table: one video of 640x512. "alone" is a loop of OpenCV's decoder and the detector. Rounds of all alternate, so
that a change of the machine's speed affects all. The second row adds `--record` (extra `live`), the third `--web`
(extra `web`) with one viewer, which is a process on this machine. Second table: MJPEG
cameras on this machine, which sends their images itself; ages and rates are those of the events that `hkd-demo` writes.
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import cv2
import numpy as np

from hkd_deploy import open_detector
from hkd_deploy.backends.base import Detector
from hkd_deploy.demo.base import FrameSink
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
FLAGS = ("--events", "--events --record", "--events --web")
# Requests frames as the page does.
VIEWER = """
import json, struct, sys, time, urllib.request
seq = 0
while True:
    content = urllib.request.urlopen(f"{sys.argv[1]}frames?after=0:{seq}").read()
    for frame in json.loads(content[4 : 4 + struct.unpack(">I", content[:4])[0]]):
        seq = frame["seq"]
    time.sleep(0.08)
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


def print_overhead(detector: Detector, video: Path, rounds: int) -> None:
    """Print the time per frame of the loop of `hkd-demo` and of decoding and inference alone.

    Args:
        detector: The detector.
        video: The video.
        rounds: Rounds of both.
    """
    page = WebSink([CameraConfig("video", str(video))], [], 0)
    viewer = subprocess.Popen([sys.executable, "-c", VIEWER, page.url])
    runs = (run_alone, run_demo, run_recording, lambda *args: run_demo(*args, [page]))
    times_ms = np.array([[measure_ms(run, detector, video) for run in runs] for _ in range(rounds + 1)])
    times_ms = times_ms[1:]  # warmed up
    viewer.kill()
    viewer.wait()
    page.close()
    alone, *demos = np.median(times_ms, axis=0)
    rows = []
    for index, (name, demo) in enumerate(zip(FLAGS, demos, strict=True), 1):
        ratios = times_ms[:, index] / times_ms[:, 0]
        low, high = np.percentile(ratios, [10, 90])
        rows.append([name, f"{alone:.2f}", f"{demo:.2f}", f"{np.median(ratios):.3f}", f"{low:.3f} to {high:.3f}"])
    print(format_table(rows, ["flags", "decoding and inference alone, ms", "hkd-demo, ms", "ratio", "10 to 90 %"]))


def measure_ms(run: Callable[[Detector, Path], int], detector: Detector, video: Path) -> float:
    """Return the time per frame of one pass over a video, ms.

    Args:
        run: Processes the video and returns the number of frames.
        detector: The detector.
        video: The video.
    """
    start_s = time.perf_counter()
    return 1e3 / run(detector, video) * (time.perf_counter() - start_s)


def run_alone(detector: Detector, video: Path) -> int:
    """Decode a video with OpenCV and run the detector on each frame; return the number of frames.

    Args:
        detector: The detector.
        video: The video.
    """
    capture, num_frames = cv2.VideoCapture(str(video)), 0
    while True:
        is_read, frame_bgr = capture.read()
        if not is_read:
            return num_frames
        detector(cv2.cvtColor(frame_bgr, cv2.COLOR_BGR2RGB))
        num_frames += 1


def run_demo(detector: Detector, video: Path, sinks: Sequence[FrameSink] = ()) -> int:
    """Process a video as `hkd-demo --events` does; return the number of frames.

    Args:
        detector: The detector.
        video: The video.
        sinks: Further outputs.
    """
    with open_source(str(video)) as source, open_events(os.devnull) as events:
        pipeline = CameraPipeline("video", source, detector.default_conf, [events, *sinks])
        run_cameras([pipeline], detector)
    return pipeline.stats.num_frames


def run_recording(detector: Detector, video: Path) -> int:
    """Process a video as `hkd-demo --events --record` does; return the number of frames.

    Args:
        detector: The detector.
        video: The video. The recording is written next to it.
    """
    config = RecordingConfig(video.parent / "recording")
    with open_source(str(video)) as source, open_events(os.devnull) as events:
        recorder = Recorder(config, {"video": source.is_live}, print_message)
        pipeline = CameraPipeline("video", source, detector.default_conf, [events, recorder])
        run_cameras([pipeline], detector)
        recorder.close()
    return pipeline.stats.num_frames


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
