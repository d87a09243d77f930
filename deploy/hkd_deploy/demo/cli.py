"""Command `hkd-demo`: run an exported model on a video, images, a webcam or a network camera."""

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
from hkd_det import __version__
from hkd_det.config import check_range
from hkd_det.errors import run_command
from hkd_det.shipped import DEFAULT_MODEL


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments. None for those of the process.

    Returns:
        The exit code.
    """
    return run_command("hkd-demo", _run_demo_command, argv)


def _run_demo_command(argv: Sequence[str] | None) -> int:
    flags = _parse_demo_arguments(argv)
    _silence_opencv()
    # SIGTERM, which stops a service, completes the saved video like Ctrl-C.
    previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    stats, num_dropped, mtime_ns = FrameStats(), 0, _get_mtime_ns(flags.save)
    try:
        with ExitStack() as stack:
            window = stack.enter_context(open_window("hkd-demo (q closes)")) if flags.show else None
            detector = stack.enter_context(
                open_detector(flags.model, flags.device, flags.threads, flags.backend, model_config=flags.model_config)
            )
            source = stack.enter_context(open_source(flags.source))
            output = open_output(stack, flags.save, source) if flags.save else None
            stats = FrameStats()  # starts its clock after everything is open
            try:
                run_demo(detector, source, flags.conf, stats, output, window, flags.max_frames)
            finally:
                num_dropped = source.num_dropped
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
        if stats.num_frames:
            print(stats.format_summary(num_dropped))
            if _get_mtime_ns(flags.save) != mtime_ns:
                print(f"saved {flags.save}")
    return 0


def _parse_demo_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hkd-demo",
        description="Run a detector on a video, images, a webcam or a network camera; show or save the result.",
        epilog="example: hkd-demo --source street.mp4 --save out.mp4",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "model",
        type=Path,
        nargs="?",
        help="file or directory written by hkd-export, an ONNX file of another tool, or the name of a shipped model "
        f"(default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--model-config",
        type=Path,
        metavar="YAML",
        help="configuration of an ONNX file that hkd-export did not write (default: MODEL.yaml next to MODEL.onnx)",
    )
    parser.add_argument(
        "--source", required=True, help="video, image, directory of images, webcam (0), rtsp:// or http:// URL"
    )
    parser.add_argument(
        "--conf", type=float, default=0.3, help="minimum score of drawn boxes, 0 to 1 (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 (default: %(default)s)")
    parser.add_argument("--backend", help=f"{', '.join(BACKENDS)} (default: by file type)")
    parser.add_argument("--threads", type=int, help="number of CPU threads (default: one per physical core)")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="output video .mp4, .avi or .webm; .png or .jpg for one image"
    )
    parser.add_argument(
        "--show", action=argparse.BooleanOptionalAction, help="show a window (default: unless --save is set)"
    )
    parser.add_argument("--headless", dest="show", action="store_false", help="alias of --no-show")
    parser.add_argument("--max-frames", type=int, metavar="N", help="stop after N frames (default: no limit)")
    flags = parser.parse_args(argv)
    check_range("--conf", flags.conf, 0, 1)
    if flags.max_frames is not None:
        check_range("--max-frames", flags.max_frames, 1)
    if flags.show is None:
        flags.show = flags.save is None
    return flags


def _get_mtime_ns(path: Path | None) -> int | None:
    """Return the modification time of a file, or None. It changes if this run writes the file."""
    return path.stat().st_mtime_ns if path and path.exists() else None


def _silence_opencv() -> None:
    """Turn off the logs of OpenCV and its FFmpeg. Errors are raised as exceptions."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # the only setting that FFmpeg inside OpenCV reads
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
