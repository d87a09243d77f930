"""Metrics for Prometheus: `hkd-demo --metrics [HOST:]PORT`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hkd_deploy.demo.base import REMOVED_STATUS, FrameResult
from hkd_det import __version__
from hkd_det.errors import UsageError, import_package

DEFAULT_HOST = "127.0.0.1"
INSTALL_HINT = "--metrics requires it. Run pip install 'hkd-det[metrics]'."
DOWN = ("camera lost", "ended")  # beginning of the status of a camera without images
AGE_BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
STAGE_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
STAGES = ("preprocess", "inference", "postprocess")


class DemoMetrics:
    """Metrics of a run, in a registry of their own, and the server that Prometheus reads. It is a `FrameSink`.

    Args:
        address: Port, or host and port: `9108`, `0.0.0.0:9108`, `[::]:9108`.
        cameras: Names of the cameras.

    Raises:
        UsageError: The address is invalid or in use.
        UnavailableError: prometheus_client is not installed.
    """

    def __init__(self, address: str, cameras: Sequence[str]) -> None:
        host, port = parse_listen_address(address)
        client = import_package("prometheus_client", "prometheus-client", INSTALL_HINT)
        self._registry = client.CollectorRegistry()
        self._is_down: dict[str, bool] = {}

        def make(kind: Callable[..., Any], name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"hkd_{name}", text, ["camera", *labels], registry=self._registry, **options)

        self._frames = make(client.Counter, "frames", "Processed frames.")
        self._reconnects = make(client.Counter, "camera_reconnects", "Times that a lost camera came back.")
        self._up = make(client.Gauge, "camera_up", "1 while the camera delivers images, otherwise 0.")
        self._persons = make(client.Gauge, "persons", "Persons in the newest frame.")
        text = "Persons who crossed a line."
        self._crossings = make(client.Counter, "crossings", text, "line", "direction")
        self._zone_persons = make(client.Gauge, "zone_persons", "Persons in a zone.", "zone")
        text = "Time from the capture to the detections of live sources."
        self._age = make(client.Histogram, "frame_age_seconds", text, buckets=AGE_BUCKETS_S)
        text = "Time of each stage."
        self._stages = make(client.Histogram, "stage_seconds", text, "stage", buckets=STAGE_BUCKETS_S)
        for camera in cameras:  # a series that begins with 0 makes its first increase visible
            for metric in (self._frames, self._reconnects, self._persons, self._up, self._age):
                metric.labels(camera)
        client.Info("hkd_build", "Version.", registry=self._registry).info({"version": __version__})
        client.ProcessCollector(registry=self._registry)
        self._core = import_package("prometheus_client.core", "prometheus-client", INSTALL_HINT)
        try:
            self._server, self._thread = client.start_http_server(port, host, self._registry)
        except OSError as error:
            message = f"--metrics {address}: {error.strerror or 'unknown host'}. Choose another host or port."
            raise UsageError(message) from None
        self.port: int = self._server.server_port

    def write(self, result: FrameResult) -> None:
        """Record a processed frame; see `FrameSink.write`."""
        camera = result.camera
        self._frames.labels(camera).inc()
        self._persons.labels(camera).set(len(result.detections))
        self._up.labels(camera).set(1)
        for name, sides in result.counts.get("lines", {}).items():
            for direction in sides:
                self._crossings.labels(camera, name, direction)  # a series begins with 0
        for event in result.count_events:
            if event.event == "crossing":
                self._crossings.labels(camera, event.name, event.direction).inc()
        for name, values in result.counts.get("zones", {}).items():
            self._zone_persons.labels(camera, name).set(values["persons"])
        for stage in STAGES:
            self._stages.labels(camera, stage).observe(1e-3 * getattr(result.times, f"{stage}_ms"))
        if result.age_ms is not None:
            self._age.labels(camera).observe(1e-3 * result.age_ms)

    def write_status(self, camera: str, status: str) -> None:
        """Record the status of a camera; see `FrameSink.write_status`."""
        if status == REMOVED_STATUS:
            for gauge in (self._up, self._persons):
                gauge.remove(camera)  # so that no alert is raised
            self._is_down.pop(camera, None)
            return
        is_down = status.startswith(DOWN)
        if is_down:
            self._persons.labels(camera).set(0)
        elif self._is_down.get(camera):
            self._reconnects.labels(camera).inc()
        self._is_down[camera] = is_down
        self._up.labels(camera).set(not is_down)

    def add_counter(self, name: str, text: str, label: str, read: Callable[[], Iterable[tuple[str, float]]]) -> None:
        """Add a counter that is read when Prometheus asks.

        Args:
            name: Name without `hkd_` and `_total`.
            text: Description.
            label: Name of the label.
            read: Returns the value of each label.
        """
        family = self._core.CounterMetricFamily
        self._registry.register(_CallbackMetric(family, name, text, [label], lambda: (((k,), v) for k, v in read())))

    def add_gauge(
        self, name: str, text: str, labels: Sequence[str], read: Callable[[], Iterable[tuple[tuple[str, ...], float]]]
    ) -> None:
        """Add a gauge that is read when Prometheus asks.

        Args:
            name: Name without `hkd_`.
            text: Description.
            labels: Names of the labels.
            read: Returns the value of each combination of labels.
        """
        self._registry.register(_CallbackMetric(self._core.GaugeMetricFamily, name, text, labels, read))

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _CallbackMetric:
    """A collector of prometheus_client that reads its values from a function."""

    def __init__(
        self,
        family: Any,
        name: str,
        text: str,
        labels: Sequence[str],
        read: Callable[[], Iterable[tuple[tuple[str, ...], float]]],
    ) -> None:
        self._family = family
        self._name, self._text, self._labels, self._read = name, text, labels, read

    def collect(self) -> Iterable[Any]:
        """Yield the metric."""
        family = self._family(f"hkd_{self._name}", self._text, labels=self._labels)
        for labels, value in self._read():
            family.add_metric(labels, value)
        yield family


def parse_listen_address(address: str) -> tuple[str, int]:
    """Parse the address at which the server listens.

    Args:
        address: `PORT`, `HOST:PORT` or `[IPV6]:PORT`.

    Returns:
        Host and port, 0 to 65535. The default host is 127.0.0.1; port 0 is any free port.

    Raises:
        UsageError: The address is invalid.
    """
    host, _, port = address.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"--metrics {address}: expected PORT or HOST:PORT.")
    return host.strip("[]") or DEFAULT_HOST, int(port)
