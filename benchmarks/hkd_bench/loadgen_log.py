"""Result of a LoadGen run from its file `mlperf_log_detail.txt`.

Each line is `:::MLLOG` and a JSON object with key and value, as MLPerf's log parser reads it
(tools/submission/log_parser.py in mlcommons/inference).
"""

import json
import re
from pathlib import Path
from typing import Any

from hkd_bench.scenarios import PERCENTILES, STREAMS, ScenarioResult, ScenarioSettings
from hkd_det.errors import DataError

DETAIL_LOG = "mlperf_log_detail.txt"
LOG_MARKER = ":::MLLOG"


def read_detail_log(path: Path) -> dict[str, Any]:
    """Read the values of `mlperf_log_detail.txt`.

    Args:
        path: The file.

    Returns:
        Value of each key; the first one if a key is repeated.

    Raises:
        DataError: The file is missing or has an invalid line.
    """
    values: dict[str, Any] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Run the scenario again.") from None
    for number, line in enumerate(lines, 1):
        if line.startswith(LOG_MARKER):
            try:
                message = json.loads(line.removeprefix(LOG_MARKER))
                values.setdefault(message["key"], message["value"])
            except (ValueError, KeyError):
                raise DataError(f"{path}: line {number} is not a message of LoadGen. Run the scenario again.") from None
    if "result_validity" not in values:
        raise DataError(f"{path}: contains no result. Run the scenario again.")
    return values


def make_result(
    values: dict[str, Any], settings: ScenarioSettings, log_dir: Path, window: tuple[float, float]
) -> ScenarioResult:
    """Create the result from the values of the detail log.

    Args:
        values: Value of each key.
        settings: Settings of the run.
        log_dir: Directory of the logs.
        window: Start and end of the run, Unix time in seconds.

    Returns:
        The result.
    """
    scenario = values["effective_scenario"].replace(" ", "")
    unit = "per_query_latency" if scenario == "MultiStream" else "latency"
    p50, p90, p99 = (1e-6 * values[f"result_{percent}.00_percentile_{unit}_ns"] for percent in (50, 90, 99))
    percentile, queries = PERCENTILES.get(scenario), int(values["result_query_count"])
    seconds = window[1] - window[0]
    images = {"MultiStream": STREAMS * queries, "Offline": int(values.get("generated_samples_per_query", 0))}
    num_images = images.get(scenario, queries)
    rates = {
        "SingleStream": values.get("result_qps_with_loadgen_overhead"),
        "Server": values.get("result_completed_samples_per_sec"),
        "Offline": values.get("result_samples_per_second"),
    }
    rate = rates.get(scenario)
    bound_ns = values.get({"SingleStream": "early_stopping_latency_ss"}.get(scenario, "early_stopping_latency_ms"))
    is_server = scenario == "Server"
    return ScenarioResult(
        scenario=scenario,
        is_valid=values["result_validity"] == "VALID",
        reasons=tuple(_list_reasons(values, settings)),
        queries=queries,
        images=num_images,
        seconds=seconds,
        images_per_s=num_images / seconds if rate is None else float(rate),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        percentile=percentile,
        percentile_ms={90: p90, 99: p99}.get(percentile or 0),
        bound_ms=1e-6 * bound_ns if bound_ns and percentile else None,
        target_qps=settings.target_qps if is_server else None,
        target_latency_ms=settings.target_latency_ms if is_server else None,
        min_duration_s=settings.min_duration_s,
        min_queries=settings.get_min_queries(scenario),
        late=int(values["result_overlatency_query_count"]) if is_server else None,
        log_dir=str(log_dir),
        loadgen=str(values.get("loadgen_version", "")),
        window=window,
    )


def _list_reasons(values: dict[str, Any], settings: ScenarioSettings) -> list[str]:
    """Return why LoadGen states an invalid result."""
    if values["result_validity"] == "VALID":
        return []
    texts = {
        "result_perf_constraints_met": f"p99 exceeds the limit of {settings.target_latency_ms:g} ms",
        "result_min_duration_met": f"shorter than {settings.min_duration_s:g} s",
        "result_min_queries_met": f"{values['result_query_count']} queries are too few",
    }
    reasons = [text for key, text in texts.items() if values.get(key) is False]
    if values.get("early_stopping_met") is False:
        rule = re.sub(r"\s+", " ", str(values.get("early_stopping_result", ""))).strip(" *.").replace(". * ", "; ")
        reasons.append(f"early-stopping rule: {rule}")
    if values.get("num_errors"):
        reasons.append(f"{values['num_errors']} errors in the log")
    return reasons or ["see mlperf_log_summary.txt"]
