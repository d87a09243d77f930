"""Scenarios of MLPerf Inference on a detector with its pre- and postprocessing, with LoadGen (mlcommons-loadgen).

LoadGen issues the queries, measures their latency, applies its early-stopping rule and writes `mlperf_log_summary.txt`
and `mlperf_log_detail.txt`. The result is read from the second file.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from hkd_bench.loadgen_log import DETAIL_LOG, make_result, read_detail_log
from hkd_bench.scenarios import PERCENTILES, STREAMS, ScenarioResult, ScenarioSettings

TRIAL_CALLS = 5  # before the test, for the number of queries that LoadGen generates in advance
OFFLINE_SLACK = 1.2  # on top of the 1.1 of LoadGen: an Offline run that is too short is invalid


class DetectorSut:
    """System under test: completes each query after the detector has returned.

    Args:
        lg: The module `mlperf_loadgen`.
        detect: Function that detects in the images with the given numbers.
        batch: Largest number of images in one call for Offline and Server.

    Attributes:
        error: First exception of `detect`; later queries are completed without detection.
    """

    def __init__(self, lg: Any, detect: Callable[[Sequence[int]], object], batch: int) -> None:
        self.error: Exception | None = None
        self._lg, self._detect, self._batch = lg, detect, batch
        self._queue: SimpleQueue[Any] = SimpleQueue()

    def issue_at_once(self, samples: Sequence[Any]) -> None:
        """Detect in all images of a query with one call, for SingleStream and MultiStream.

        Args:
            samples: Query samples of LoadGen with `id` and `index`.
        """
        self._complete(samples)

    def issue_in_batches(self, samples: Sequence[Any]) -> None:
        """Detect in the images of a query batch by batch, for Offline.

        Args:
            samples: Query samples of LoadGen.
        """
        for start in range(0, len(samples), self._batch):
            self._complete(samples[start : start + self._batch])

    def issue_to_queue(self, samples: Sequence[Any]) -> None:
        """Add the images of a query to those that wait for `run_queue`, for Server.

        Args:
            samples: Query samples of LoadGen.
        """
        for sample in samples:
            self._queue.put(sample)

    def run_queue(self) -> None:
        """Detect in the waiting images until `close_queue`; those that wait together form a batch."""
        while True:
            samples = [self._queue.get()]
            while len(samples) < self._batch and not self._queue.empty():
                samples.append(self._queue.get())
            is_open = None not in samples
            self._complete([sample for sample in samples if sample is not None])
            if not is_open:
                return

    def close_queue(self) -> None:
        """End `run_queue` after the waiting images."""
        self._queue.put(None)

    def _complete(self, samples: Sequence[Any]) -> None:
        if not len(samples):
            return
        if self.error is None:
            try:
                self._detect([sample.index for sample in samples])
            except Exception as error:  # noqa: BLE001 - an exception in a callback of LoadGen ends the process
                self.error = error
        self._lg.QuerySamplesComplete([self._lg.QuerySampleResponse(sample.id, 0, 0) for sample in samples])


def run_loadgen(
    scenario: str,
    detect: Callable[[Sequence[int]], object],
    num_images: int,
    batch: int,
    settings: ScenarioSettings,
    log_dir: Path,
    enable_trace: bool = False,
) -> ScenarioResult:
    """Run one scenario.

    Args:
        scenario: SingleStream, MultiStream, Server or Offline.
        detect: Function that detects in the images with the given numbers, 0 to `num_images` - 1.
        num_images: Number of different images in memory.
        batch: Largest number of images in one call for Offline and Server.
        settings: Rate, limit and minimum numbers.
        log_dir: Directory for LoadGen's logs; created if it is missing.
        enable_trace: Write `mlperf_log_trace.json` with the latency of each query as well, about 1 kB per query.

    Returns:
        The result.

    Raises:
        HkdError: The detector failed.
        DataError: LoadGen wrote no result.
    """
    import mlperf_loadgen as lg  # noqa: PLC0415  # optional package

    log_dir.mkdir(parents=True, exist_ok=True)
    (log_dir / DETAIL_LOG).unlink(missing_ok=True)  # of a former run
    test_settings = _make_test_settings(lg, scenario, detect, num_images, batch, settings)
    sut = DetectorSut(lg, detect, batch)
    issue = {"Server": sut.issue_to_queue, "Offline": sut.issue_in_batches}.get(scenario, sut.issue_at_once)
    sut_id = lg.ConstructSUT(issue, _do_nothing)
    qsl_id = lg.ConstructQSL(num_images, num_images, _ignore_samples, _ignore_samples)  # all images are in memory
    thread = Thread(target=sut.run_queue, daemon=True)
    start = time.time()
    try:
        thread.start()
        lg.StartTestWithLogSettings(sut_id, qsl_id, test_settings, _make_log_settings(lg, log_dir, enable_trace), "")
    finally:
        sut.close_queue()
        thread.join()
        lg.DestroyQSL(qsl_id)
        lg.DestroySUT(sut_id)
    if sut.error is not None:
        raise sut.error
    result = make_result(read_detail_log(log_dir / DETAIL_LOG), settings, log_dir, (start, time.time()))
    return replace(result, batch={"SingleStream": 1, "MultiStream": STREAMS}.get(scenario, batch))


def _do_nothing() -> None:
    pass


def _ignore_samples(_: Sequence[int]) -> None:
    pass


def _make_test_settings(
    lg: Any,
    scenario: str,
    detect: Callable[[Sequence[int]], object],
    num_images: int,
    batch: int,
    settings: ScenarioSettings,
) -> Any:
    test = lg.TestSettings()
    test.scenario, test.mode = getattr(lg.TestScenario, scenario), lg.TestMode.PerformanceOnly
    test.min_duration_ms = ceil(1e3 * settings.min_duration_s)
    test.min_query_count = settings.get_min_queries(scenario)
    if scenario == "Server":
        test.server_target_qps = settings.get_target_qps()
        test.server_target_latency_ns = round(1e6 * settings.target_latency_ms)
        test.server_target_latency_percentile = PERCENTILES[scenario] / 100
        return test
    images = {"SingleStream": 1, "MultiStream": STREAMS, "Offline": batch}[scenario]
    call_s = min(_time_call(detect, num_images, images) for _ in range(TRIAL_CALLS))
    if scenario == "Offline":
        test.offline_expected_qps = OFFLINE_SLACK * images / call_s
    elif scenario == "SingleStream":
        test.single_stream_expected_latency_ns = 1e9 * call_s / 2  # enough queries if the device becomes faster
        test.single_stream_target_latency_percentile = PERCENTILES[scenario] / 100
    else:
        test.multi_stream_expected_latency_ns = 1e9 * call_s / 2
        test.multi_stream_samples_per_query = STREAMS
        test.multi_stream_target_latency_percentile = PERCENTILES[scenario] / 100
    return test


def _time_call(detect: Callable[[Sequence[int]], object], num_images: int, images: int) -> float:
    start = time.perf_counter()
    detect([index % num_images for index in range(images)])
    return max(time.perf_counter() - start, 1e-6)


def _make_log_settings(lg: Any, log_dir: Path, enable_trace: bool) -> Any:
    output = lg.LogOutputSettings()
    output.outdir = str(log_dir)
    output.copy_summary_to_stdout = False
    log_settings = lg.LogSettings()
    log_settings.log_output, log_settings.enable_trace = output, enable_trace
    return log_settings
