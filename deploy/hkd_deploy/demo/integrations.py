"""Flags and outputs for other programs: MQTT, webhook, metrics, recording, monitoring, collection, and the page."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

from hkd_deploy.demo.base import FrameSink
from hkd_deploy.demo.camera_recorder import RecordingConfig
from hkd_deploy.demo.cameras import CameraConfig
from hkd_deploy.demo.collect import Collector, add_collect_flags, make_collect_config
from hkd_deploy.demo.delivery import DEFAULT_EVERY_S, EventPublisher, Report
from hkd_deploy.demo.events import EventWriter
from hkd_deploy.demo.metrics import DemoMetrics
from hkd_deploy.demo.monitor import DriftMonitor, add_monitor_flags, check_monitor_flags, make_monitor
from hkd_deploy.demo.mqtt import MqttPublisher
from hkd_deploy.demo.recording import Recorder
from hkd_deploy.demo.run import CameraPipeline
from hkd_deploy.demo.web import WebSink, add_web_flags, check_web_flags
from hkd_deploy.demo.webhook import WebhookPublisher
from hkd_deploy.model_metadata import ModelMetadata
from hkd_deploy.streams import FrameSource
from hkd_det.config import check_range, parse_duration_s, parse_size_bytes
from hkd_det.errors import UsageError

RECORD_MODES = ("always", "person")


def add_integration_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags.

    Args:
        parser: Parser of hkd-demo.
    """
    group = parser.add_argument_group("events for other programs")
    group.add_argument(
        "--mqtt", metavar="URL", help="publish events to a broker: mqtt://user:password@host:1883/topic, or mqtts://"
    )
    group.add_argument(
        "--mqtt-discovery", action="store_true", help="announce the cameras to Home Assistant; requires --mqtt"
    )
    group.add_argument("--webhook", metavar="URL", help="post events as JSON to a web server, in batches")
    group.add_argument(
        "--webhook-interval",
        type=float,
        default=1.0,
        metavar="S",
        help="least time between two requests of --webhook, seconds (default: %(default)s)",
    )
    group.add_argument(
        "--events-every",
        type=float,
        default=DEFAULT_EVERY_S,
        metavar="S",
        help="--mqtt and --webhook send a frame when the number of persons changes, and after S seconds without a "
        "change; 0 sends every frame (default: %(default)s)",
    )
    group.add_argument(
        "--metrics", metavar="[HOST:]PORT", help="serve metrics for Prometheus (default host: 127.0.0.1)"
    )
    add_web_flags(parser)
    group = parser.add_argument_group("recording")
    group.add_argument("--record", type=Path, metavar="DIR", help="record each camera to files in DIR (H.264, MP4)")
    group.add_argument(
        "--record-on",
        choices=RECORD_MODES,
        default=RECORD_MODES[0],
        help="always, or only while there are persons (default: %(default)s)",
    )
    group.add_argument(
        "--record-segment", default="10m", metavar="T", help="length of a file: 90s, 10m, 1h (default: %(default)s)"
    )
    group.add_argument(
        "--record-pre-roll",
        default="5s",
        metavar="T",
        help="time before the first person with --record-on person (default: %(default)s)",
    )
    group.add_argument(
        "--record-post-roll",
        default="5s",
        metavar="T",
        help="time after the last person with --record-on person (default: %(default)s)",
    )
    group.add_argument("--record-max-age", metavar="T", help="delete files that are older: 12h, 7d (default: keep)")
    group.add_argument(
        "--record-max-size", metavar="SIZE", help="delete the oldest files above SIZE: 500MB, 20GB (default: keep)"
    )
    add_monitor_flags(parser)
    add_collect_flags(parser)


def has_integration(flags: argparse.Namespace) -> bool:
    """Return whether an output of this module is requested.

    Args:
        flags: Parsed flags.
    """
    return (
        any((flags.mqtt, flags.webhook, flags.metrics, flags.record, flags.monitor, flags.collect))
        or flags.web is not None
    )


def check_integration_flags(flags: argparse.Namespace) -> None:
    """Check values that argparse does not check.

    Args:
        flags: Parsed flags.

    Raises:
        UsageError: A value is invalid.
    """
    check_range("--events-every", flags.events_every, 0)
    check_range("--webhook-interval", flags.webhook_interval, 0)
    if flags.mqtt_discovery and not flags.mqtt:
        raise UsageError("--mqtt-discovery: requires --mqtt. Add it, or omit --mqtt-discovery.")
    check_web_flags(flags)
    make_recording_config(flags)
    check_monitor_flags(flags)
    make_collect_config(flags)


def make_recording_config(flags: argparse.Namespace) -> RecordingConfig | None:
    """Create the settings of `--record`.

    Args:
        flags: Parsed flags.

    Returns:
        The settings. None without `--record`.

    Raises:
        UsageError: A duration or a size is invalid, or a flag requires `--record`.
    """
    limits = {"--record-max-age": flags.record_max_age, "--record-max-size": flags.record_max_size}
    if flags.record is None:
        for flag in (flag for flag, value in limits.items() if value):
            raise UsageError(f"{flag}: requires --record. Add it, or omit {flag}.")
        return None
    return RecordingConfig(
        directory=flags.record,
        segment_s=parse_duration_s("--record-segment", flags.record_segment),
        only_persons=flags.record_on == "person",
        pre_roll_s=parse_duration_s("--record-pre-roll", flags.record_pre_roll),
        post_roll_s=parse_duration_s("--record-post-roll", flags.record_post_roll),
        max_age_s=flags.record_max_age and parse_duration_s("--record-max-age", flags.record_max_age),
        max_bytes=flags.record_max_size and parse_size_bytes("--record-max-size", flags.record_max_size),
    )


def open_integrations(
    stack: ExitStack,
    flags: argparse.Namespace,
    configs: Sequence[CameraConfig],
    sources: Sequence[FrameSource],
    pipelines: Sequence[CameraPipeline],
    metadata: ModelMetadata,
    report: Report,
    events: EventWriter | None = None,
) -> list[FrameSink]:
    """Open the requested outputs.

    Args:
        stack: Exit stack that closes them, all at the same time.
        flags: Parsed flags.
        configs: The cameras.
        sources: Their sources.
        pipelines: List that is filled with the pipelines later; the metrics and the page read it.
        metadata: Metadata of the model, for the reference of `--monitor`.
        report: Called with each line of the log.
        events: Output of `--events`, which gets the events of `--monitor`, too.

    Returns:
        One sink per output, for all cameras.

    Raises:
        UsageError: An address is invalid, a port or a directory cannot be used, or the model has no reference.
        UnavailableError: A package is not installed.
    """
    cameras = [config.name for config in configs]
    sinks: list[FrameSink] = []
    stack.callback(_close_all, sinks)
    publishers: list[EventPublisher] = []
    if flags.mqtt:
        publisher = MqttPublisher(flags.mqtt, cameras, report, flags.events_every, flags.mqtt_discovery)
        publishers.append(publisher)
    if flags.webhook:
        publishers.append(WebhookPublisher(flags.webhook, report, flags.events_every, flags.webhook_interval))
    sinks += publishers
    recorder = None
    if config := make_recording_config(flags):
        is_live = {camera: source.is_live for camera, source in zip(cameras, sources, strict=True)}
        recorder = Recorder(config, is_live, report)
        sinks.append(recorder)
    monitor = None
    if flags.monitor:
        publish = [output.publish for output in ([events] if events else [])]
        publish += [publisher.publish for publisher in publishers]
        monitor = make_monitor(flags, metadata, publish, report)
        sinks.append(monitor)
    if flags.web is not None:
        camera_file = None if flags.line or flags.zone else flags.cameras  # flags and file would have the same names
        describe_drift = monitor.describe if monitor else None
        page = WebSink(configs, pipelines, flags.web, flags.host, camera_file, report, describe_drift)
        sinks.append(page)
        report(f"page: {page.url}")
    if collect_config := make_collect_config(flags):
        sinks.append(Collector(collect_config, cameras, report))
    if flags.metrics:
        metrics = DemoMetrics(flags.metrics, cameras)
        sinks.append(metrics)
        _add_counters(metrics, pipelines, publishers, recorder)
        if monitor:
            _add_drift_gauges(metrics, monitor)
    return sinks


def _add_counters(
    metrics: DemoMetrics,
    pipelines: Sequence[CameraPipeline],
    publishers: Sequence[EventPublisher],
    recorder: Recorder | None,
) -> None:
    """Add the counters that other objects hold."""
    metrics.add_counter(
        "frames_dropped",
        "Frames of a camera that a newer frame replaced.",
        "camera",
        lambda: [(pipeline.name, pipeline.source.num_dropped) for pipeline in list(pipelines)],
    )
    metrics.add_gauge(
        "camera_decoder",
        "1 for the device that decodes the camera, with --hwaccel.",
        ("camera", "decoder"),
        lambda: [((pipeline.name, device), 1) for pipeline in list(pipelines) if (device := pipeline.source.decoder)],
    )
    if publishers:
        metrics.add_counter(
            "events_delivered",
            "Events that a receiver confirmed.",
            "receiver",
            lambda: [(publisher.name, publisher.num_delivered) for publisher in publishers],
        )
        metrics.add_counter(
            "events_dropped",
            "Events that were lost, because the buffer was full or the receiver refused them.",
            "receiver",
            lambda: [(publisher.name, publisher.num_dropped) for publisher in publishers],
        )
    if recorder:
        metrics.add_counter(
            "recorded_frames",
            "Frames in recordings.",
            "camera",
            lambda: [(name, camera.num_frames) for name, camera in recorder.recorders.items()],
        )
        metrics.add_counter(
            "recorded_frames_dropped",
            "Frames that should have been recorded and were not.",
            "camera",
            lambda: [(name, camera.num_dropped) for name, camera in recorder.recorders.items()],
        )


def _add_drift_gauges(metrics: DemoMetrics, monitor: DriftMonitor) -> None:
    labels, text = ("camera", "quantity"), "Population stability index against the reference."
    metrics.add_gauge("drift_psi", text, labels, lambda: monitor.iterate_values("psi"))
    text = "Population stability index above which there is drift."
    metrics.add_gauge("drift_threshold", text, labels, lambda: monitor.iterate_values("threshold"))
    text = "1 while there is drift of any quantity, otherwise 0."
    metrics.add_gauge("drift", text, ("camera",), lambda: monitor.iterate_values("is_drift"))


def _close_all(sinks: Sequence[FrameSink]) -> None:
    """Close outputs at the same time: each may need a second."""
    threads = [Thread(target=sink.close) for sink in sinks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
