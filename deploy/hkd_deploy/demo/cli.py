"""Command `hkd-demo`: run an exported model on videos, images, webcams or network cameras."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Event

import cv2

from hkd_deploy.backends import BACKENDS
from hkd_deploy.backends.base import DEFAULT_CONF
from hkd_deploy.demo.analytics import (
    HEATMAP_SUFFIX,
    HeatMapSink,
    add_analytics_flags,
    apply_analytics_flags,
    make_added_pipeline,
    make_pipeline,
)
from hkd_deploy.demo.base import FrameSink
from hkd_deploy.demo.camera_file import CameraReloader
from hkd_deploy.demo.cameras import CameraConfig, name_sources, read_cameras
from hkd_deploy.demo.delivery import Report
from hkd_deploy.demo.events import STDOUT, open_events
from hkd_deploy.demo.integrations import (
    add_integration_flags,
    check_integration_flags,
    has_integration,
    open_integrations,
)
from hkd_deploy.demo.output import FrameStats, open_window
from hkd_deploy.demo.progress import LOG_FORMATS, ProgressReport, format_totals, report_end
from hkd_deploy.demo.run import CameraPipeline, run_cameras
from hkd_deploy.demo.service import Heartbeat, ReloadSignal, StopSignals, SystemdNotifier
from hkd_deploy.demo.sinks import FileSink, WindowSink, make_file_paths
from hkd_deploy.demo.web import WebSink
from hkd_deploy.pipeline import open_detector
from hkd_deploy.streams import FrameSource, Hwaccel, LiveSource, is_live_address, open_source, resolve_hwaccel
from hkd_deploy.streams.decoding import AUTO, CPU, NONE
from hkd_det import __version__
from hkd_det.config import check_range
from hkd_det.draw import REDACTIONS
from hkd_det.errors import UsageError, run_command
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
    if flags.log_format == "text":
        return _run_demo(flags)
    report = partial(LOG_FORMATS[flags.log_format], level="error")
    return run_command("hkd-demo", lambda _: _run_demo(flags), argv, report)


def _run_demo(flags: argparse.Namespace) -> int:
    _silence_opencv()
    cameras = _read_cameras(flags)
    is_live = any(is_live_address(camera.source) for camera in cameras)
    pipelines: list[CameraPipeline] = []
    files: list[FileSink | HeatMapSink] = []
    try:
        with StopSignals() as stop_signals, ReloadSignal() as reload_signal, ExitStack() as stack:
            _run_cameras(stack, flags, cameras, pipelines, files, stop_signals, reload_signal)
    except KeyboardInterrupt:
        if not is_live:
            raise  # a camera has no other end
    finally:
        paths = [file.path for file in files if file.is_saved]
        report_end(pipelines, paths, flags.log_format, sys.stderr if flags.events == STDOUT else sys.stdout)
    return 0


def _read_cameras(flags: argparse.Namespace) -> list[CameraConfig]:
    return apply_analytics_flags(flags, read_cameras(flags.cameras) if flags.cameras else name_sources(flags.source))


def _read_cameras_again(flags: argparse.Namespace) -> list[CameraConfig]:
    if flags.cameras is None:
        raise UsageError("--source: has no file that can change. Use --cameras FILE.")
    return _read_cameras(flags)


def _run_cameras(
    stack: ExitStack,
    flags: argparse.Namespace,
    cameras: Sequence[CameraConfig],
    pipelines: list[CameraPipeline],
    files: list[FileSink | HeatMapSink],
    stop_signals: StopSignals,
    reload_signal: ReloadSignal,
) -> None:
    """Open everything and run. `pipelines` and `files` are filled, so that they are valid after an error."""
    names, log = [camera.name for camera in cameras], LOG_FORMATS[flags.log_format]
    window = stack.enter_context(open_window("hkd-demo (q closes)")) if flags.show else None
    window_sink = WindowSink(window, names) if window else None
    detector = stack.enter_context(
        open_detector(flags.model, flags.device, flags.threads, flags.backend, model_config=flags.model_config)
    )
    new_frame, hwaccel = Event(), _open_hwaccel(flags.hwaccel, log)
    sources = open_sources(stack, cameras, new_frame, hwaccel)
    events = stack.enter_context(open_events(flags.events)) if flags.events else None
    shared: list[FrameSink] = [events] if events else []
    shared += open_integrations(stack, flags, cameras, sources, pipelines, detector.metadata, log, events)
    page = next((sink for sink in shared if isinstance(sink, WebSink)), None)
    shared += [window_sink] if window_sink else []
    default_conf = detector.default_conf if flags.conf is None else flags.conf
    paths = [flags.save] if len(cameras) == 1 else make_file_paths(flags.save, names) if flags.save else []
    heatmap_paths = [flags.heatmap]
    if flags.heatmap and len(cameras) > 1:
        heatmap_paths = make_file_paths(flags.heatmap, names, HEATMAP_SUFFIX, "--heatmap")
    for index, (camera, source) in enumerate(zip(cameras, sources, strict=True)):
        sinks = list(shared)
        if flags.save:
            files.append(FileSink(paths[index], source))
            stack.callback(files[-1].close)
            sinks.append(files[-1])
        if flags.heatmap:
            files.append(HeatMapSink(heatmap_paths[index]))
            stack.callback(files[-1].close)
            sinks.append(files[-1])
        pipelines.append(make_pipeline(flags, default_conf, sinks, camera, source))
    add_camera = partial(make_added_pipeline, flags, default_conf, shared)
    reloader = CameraReloader(
        partial(_read_cameras_again, flags),
        cameras,
        pipelines,
        add_camera,
        default_conf,
        flags.privacy,
        partial(open_source, on_frame=new_frame.set, hwaccel=hwaccel),
        log,
        page,
    )
    stack.callback(reloader.close)
    progress = stack.enter_context(ProgressReport(pipelines, flags.max_frames, log))
    stack.callback(_stop_sources, pipelines)
    notifier = SystemdNotifier()
    stack.callback(notifier.close)
    heartbeat = Heartbeat(flags.heartbeat) if flags.heartbeat else None

    def report() -> None:
        if reload_signal.take():
            reloader.reload()
        progress.update()
        if heartbeat:
            heartbeat.update()
        notifier.update(sum(pipeline.stats.num_frames for pipeline in pipelines), lambda: format_totals(pipelines))

    with stop_signals.defer():
        run_cameras(
            pipelines, detector, window_sink or page, flags.max_frames, new_frame, report, stop_signals.is_requested
        )


def _open_hwaccel(text: str, log: Report) -> Hwaccel | None:
    """Find the hardware decoder, and report what `auto` found."""
    hwaccel = resolve_hwaccel(text)
    if hwaccel and text == AUTO:
        found = (
            "no hardware decoder is available; the CPU decodes" if hwaccel.kind == CPU else f"{hwaccel.kind} decodes"
        )
        log(f"--hwaccel {AUTO}: {found}")
    return hwaccel


def open_sources(
    stack: ExitStack, cameras: Sequence[CameraConfig], new_frame: Event, hwaccel: Hwaccel | None = None
) -> list[FrameSource]:
    """Open the sources of cameras. Live sources open at the same time, in the background.

    Args:
        stack: Exit stack that closes the sources.
        cameras: The cameras.
        new_frame: Set with each new frame of a live source.
        hwaccel: Hardware decoder of network cameras. None for the CPU.

    Returns:
        One source per camera.
    """
    return [
        stack.enter_context(open_source(camera.source, on_frame=new_frame.set, hwaccel=hwaccel)) for camera in cameras
    ]


def _stop_sources(pipelines: Sequence[CameraPipeline]) -> None:
    """Let the threads of all cameras end, so that they end while files are completed."""
    for pipeline in pipelines:
        if isinstance(pipeline.source, LiveSource):
            pipeline.source.stop()


def _parse_demo_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hkd-demo",
        description="Run a detector on videos, images, webcams or network cameras; show or save the result.",
        epilog="example: hkd-demo --source street.mp4 --save out.mp4",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "model",
        type=Path,
        nargs="?",
        help="file or directory written by hkd-export, an ONNX or OpenVINO file of another tool, or a shipped model "
        f"(default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--model-config",
        type=Path,
        metavar="YAML",
        help="configuration of a model that hkd-export did not write: a YAML file, or a name such as yolox (default: "
        "recognized, or MODEL.yaml next to MODEL.onnx)",
    )
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument(
        "--source",
        action="append",
        help="video, image, directory or pattern of images, webcam (0), CSI camera (csi://0), rtsp:// or http:// URL; "
        "repeat it for several",
    )
    sources.add_argument("--cameras", type=Path, metavar="FILE", help="YAML file with several cameras")
    parser.add_argument(
        "--conf",
        type=float,
        help="minimum score of drawn boxes, 0 to 1 (default: the value that the model file suggests, "
        f"otherwise {DEFAULT_CONF})",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 (default: %(default)s)")
    parser.add_argument("--backend", help=f"{', '.join(BACKENDS)} (default: by file type)")
    parser.add_argument("--threads", type=int, help="number of CPU threads (default: one per physical core)")
    parser.add_argument(
        "--hwaccel",
        default=NONE,
        metavar="DEVICE",
        help="hardware decoder of network cameras: none, auto (the CPU if there is none), or a device type of FFmpeg, "
        "such as cuda, cuda:1 or vaapi:/dev/dri/renderD128 (default: %(default)s)",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="output video .mp4, .avi or .webm; .png or .jpg for one image; a directory for several cameras",
    )
    parser.add_argument(
        "--show",
        action=argparse.BooleanOptionalAction,
        help="show a window (default: unless another output is requested)",
    )
    parser.add_argument("--headless", dest="show", action="store_false", help="alias of --no-show")
    parser.add_argument(
        "--events",
        metavar="FILE",
        help="write the detections of each frame as a line of JSON to FILE, or to stdout with -",
    )
    parser.add_argument(
        "--privacy",
        choices=REDACTIONS,
        help="blur, pixelate or fill people in everything that is shown or saved",
    )
    parser.add_argument(
        "--max-frames", type=int, metavar="N", help="stop after N frames of all cameras together (default: no limit)"
    )
    parser.add_argument(
        "--heartbeat",
        type=Path,
        metavar="FILE",
        help="update the modification time of FILE every 5 s while the loop runs, for a health check",
    )
    parser.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default="text",
        help="json writes each line of the log on stderr as an object with time, level, message and camera "
        "(default: %(default)s)",
    )
    add_analytics_flags(parser)
    add_integration_flags(parser)
    flags = parser.parse_args(argv)
    check_integration_flags(flags)
    if flags.conf is not None:
        check_range("--conf", flags.conf, 0, 1)
    if flags.max_frames is not None:
        check_range("--max-frames", flags.max_frames, 1)
    if flags.show is None:
        flags.show = not (flags.save or flags.events or flags.heatmap or has_integration(flags))
    return flags


def _silence_opencv() -> None:
    """Turn off the logs of OpenCV and its FFmpeg. Errors are raised as exceptions."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # the only setting that FFmpeg inside OpenCV reads
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def save_video(
    model: Path | str,
    source: str,
    path: Path | str,
    conf: float | None = None,
    device: str = "cpu",
    max_frames: int | None = None,
) -> FrameStats:
    """Run a model on a source and save the result, as `hkd-demo MODEL --source SOURCE --save PATH` does.

    Args:
        model: File or directory written by `hkd-export`.
        source: Image source, as for `open_source`.
        path: Video to write, or image if the source is one image.
        conf: Minimum score of drawn boxes, 0 to 1. None for `Detector.default_conf`.
        device: cpu, cuda or cuda:N.
        max_frames: Maximum number of frames. None for no limit.

    Returns:
        Statistics of the run.
    """
    with ExitStack() as stack:
        detector = stack.enter_context(open_detector(model, device))
        new_frame = Event()
        (frame_source,) = open_sources(stack, name_sources([source]), new_frame)
        file = FileSink(Path(path), frame_source)
        stack.callback(file.close)
        min_score = detector.default_conf if conf is None else conf
        pipeline = CameraPipeline(frame_source.name, frame_source, min_score, [file])
        progress = stack.enter_context(ProgressReport([pipeline], max_frames))
        run_cameras([pipeline], detector, None, max_frames, new_frame, progress.update)
    return pipeline.stats
