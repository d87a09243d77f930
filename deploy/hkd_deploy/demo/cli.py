"""`hkd-demo`: watch a model at work on a film, a webcam or a network camera."""

import argparse
import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import cv2

from hkd_deploy.backends import BACKENDS
from hkd_deploy.demo.output import open_window
from hkd_deploy.demo.run import FrameStats, open_output, run_demo
from hkd_deploy.pipeline import open_detector
from hkd_deploy.streams import open_source
from hkd_det.errors import UsageError, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command("hkd-demo", _run_demo_command, argv)


def _run_demo_command(argv: Sequence[str] | None) -> int:
    flags = _parse_demo_arguments(argv)
    _silence_opencv()
    # A stopped service finishes its film as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    tally, dropped, stamp = FrameStats(), 0, _get_mtime_ns(flags.save)
    try:
        with ExitStack() as stack:
            window = stack.enter_context(open_window("hkd-demo (q closes)")) if flags.window else None
            detector = stack.enter_context(open_detector(flags.model, flags.device, flags.threads, flags.backend))
            source = stack.enter_context(open_source(flags.source))
            output = open_output(stack, flags.save, source) if flags.save else None
            tally = FrameStats()  # its clock starts when everything is open
            try:
                run_demo(detector, source, flags.conf, tally, output, window, flags.max_frames)
            finally:
                dropped = source.num_dropped
    finally:
        signal.signal(signal.SIGTERM, before)
        if tally.num_frames:
            print(tally.summary(dropped))
            if _get_mtime_ns(flags.save) != stamp:
                print(f"saved {flags.save}")
    return 0


def _parse_demo_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hkd-demo",
        description="Run an exported model on a film, pictures, a webcam or a network camera; show it or save it.",
        epilog="example: hkd-demo student.onnx --source street.mp4 --save seen.mp4",
    )
    parser.add_argument("model", type=Path, help="a file or folder written by hkd-export")
    parser.add_argument(
        "--source", required=True, help="film, picture, folder of pictures, webcam (0), rtsp:// or http://"
    )
    parser.add_argument("--conf", type=float, default=0.3, help="least score drawn, 0 to 1 (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 (default: %(default)s)")
    parser.add_argument("--backend", help=f"{', '.join(BACKENDS)} (default: the one of the file's kind)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: one a physical core)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write .mp4, .avi or .webm (.png, .jpg of a picture)")
    parser.add_argument("--window", action=argparse.BooleanOptionalAction, help="show it (default: unless --save)")
    parser.add_argument("--headless", dest="window", action="store_false", help="the same as --no-window")
    parser.add_argument("--max-frames", type=int, metavar="N", help="stop after N frames")
    flags = parser.parse_args(argv)
    if not 0 <= flags.conf <= 1:
        raise UsageError(f"--conf {flags.conf:g}: expected a score from 0 to 1")
    if flags.max_frames is not None and flags.max_frames < 1:
        raise UsageError(f"--max-frames {flags.max_frames}: at least 1")
    if flags.window is None:
        flags.window = flags.save is None
    return flags


def _get_mtime_ns(path: Path | None) -> int | None:
    """When a file was last written, None if there is none: tells whether this run has saved one."""
    return path.stat().st_mtime_ns if path and path.exists() else None


def _silence_opencv() -> None:
    """OpenCV and its FFmpeg print what they stumble over; what matters is raised, once, in our own words."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # the only way FFmpeg inside OpenCV listens to
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
