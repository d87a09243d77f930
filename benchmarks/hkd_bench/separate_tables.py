"""Tables and notes of cameras, load scenarios and sustained runs: `--cameras`, `--scenario` and `--sustained`."""

from collections.abc import Sequence
from pathlib import Path

from hkd_bench.cameras import CameraPoint
from hkd_bench.model_lists import MAX_NAMED, format_names, format_values
from hkd_bench.result import BenchResult, ModelResult
from hkd_bench.scenarios import PACED, ScenarioResult
from hkd_bench.sustained import SustainedResult

SCENARIO_HEADERS = (
    "scenarios", "scenario", "result", "queries", "images/s", "p50, ms", "p90, ms", "p99, ms", "estimate, ms",
    "late, %",
)  # fmt: skip

SUSTAINED_HEADERS = (
    "sustained", "part", "p50, ms", "p90, ms", "p99, ms", "images/s", "CPU, MHz", "GPU, MHz", "highest, °C", "power, W",
)  # fmt: skip


CAMERA_HEADERS = ("cameras", "number", "p50, ms", "p99, ms", "dropped, %", "held")
CAMERA_ENERGY_HEADER = "energy per camera, J/s"
BATCH_HEADERS = ("batches", "images", "p50, ms", "p99, ms", "images/s", "held")


def make_scenario_rows(result: BenchResult) -> list[list[str]]:
    """Return one row per model and scenario, with the entries of `SCENARIO_HEADERS`.

    Args:
        result: Measurements of all models.
    """
    return [
        [
            "" if index else model.name,
            one.scenario,
            "VALID" if one.is_valid else "INVALID",
            str(one.queries),
            f"{one.images_per_s:.1f}",
            *("-" if value is None else f"{value:.1f}" for value in (one.p50_ms, one.p90_ms, one.p99_ms)),
            "" if one.bound_ms is None else f"{one.bound_ms:.1f} (p{one.percentile})",
            "" if one.late is None else f"{100 * one.late / one.queries:.1f}",
        ]
        for model in result.models
        for index, one in enumerate(model.scenarios)
    ]


def format_scenario_notes(result: BenchResult) -> list[str]:
    """Return the sentences below the table: rates and limits, invalid runs, marks and the place of the logs.

    Args:
        result: Measurements of all models.
    """
    runs = [(model, one) for model in result.models for one in model.scenarios]
    if not runs:
        return []
    first = runs[0][1]
    notes = [f"Scenarios: at least {first.min_duration_s:g} s each{_format_limits([one for _, one in runs])}."]
    if any(one.bound_ms is not None for _, one in runs):
        notes.append("Estimate: percentile by MLPerf's early-stopping rule, above the true one with 99 % confidence.")
    notes += [f"INVALID {one.scenario} ({model.name}): {'; '.join(one.reasons)}." for model, one in runs if one.reasons]
    notes += [f"[!] {one.scenario} ({model.name}): {'; '.join(one.marks)}." for model, one in runs if one.marks]
    logs = next((one for _, one in runs if one.log_dir), None)
    if logs:
        parent = Path(logs.log_dir).parent.parent
        notes.append(f"Measured by MLPerf LoadGen {logs.loadgen.split(' ')[0]}; its logs are in {parent}.")
    return notes


def _format_limits(runs: Sequence[ScenarioResult]) -> str:
    texts = {
        one.scenario: f"{one.scenario} at {one.target_qps:g} "
        + ("frames/s of one camera" if one.scenario == PACED else "queries/s (Poisson)")
        + f" with p99 below {one.target_latency_ms:.1f} ms"
        for one in runs
        if one.target_qps is not None
    }
    return "".join(f"; {text}" for text in texts.values())


def list_invalid_scenarios(models: Sequence[ModelResult]) -> list[str]:
    """Return model, scenario and reasons of each invalid run.

    Args:
        models: Measurements of all models.
    """
    return [
        f"{model.name} {one.scenario}: {'; '.join(one.reasons)}"
        for model in models
        for one in model.scenarios
        if not one.is_valid
    ]


def make_sustained_rows(result: BenchResult) -> list[list[str]]:
    """Return the last tenth and the first minute of each model, with the entries of `SUSTAINED_HEADERS`.

    Args:
        result: Measurements of all models.
    """
    return [
        [
            "" if label == "first" else model.name,
            f"{label} {part.seconds:.0f} s",
            *(f"{value:.1f}" for value in (part.p50_ms, part.p90_ms, part.p99_ms, part.frames / part.seconds)),
            *("-" if value is None else f"{value:.0f}" for value in (part.cpu_mhz, part.gpu_mhz, part.temperature_c)),
            "-" if part.watts is None else f"{part.watts:.2f}",
        ]
        for model in result.models
        if (run := model.sustained)
        for label, part in (("last", run.last), ("first", run.first))
    ]


def format_sustained_notes(result: BenchResult) -> list[str]:
    """Return the sentences below the table: duration, drift, marks and what was not measured.

    Args:
        result: Measurements of all models.
    """
    runs = [(model.name, model.sustained) for model in result.models if model.sustained]
    if not runs:
        return []
    notes = [
        f"Sustained for {runs[0][1].requested_s:g} s without pauses; quote the last tenth. Its p50 against the start: "
        f"{_format_drifts(runs)}."
    ]
    notes += [
        f"{name}: interrupted after {run.seconds:.0f} of {run.requested_s:g} s."
        for name, run in runs
        if run.is_interrupted
    ]
    missing = [model.name for model in result.models if model.sustained is None]
    notes += [f"Not sustained after the interruption: {format_names(missing)}."] if missing else []
    notes += [f"[!] sustained {name}: {'; '.join(run.marks)}." for name, run in runs if run.marks]
    reasons = dict.fromkeys(run.power_reason for _, run in runs if run.power_reason)
    return notes + [f"Power over time not measured: {reason}." for reason in reasons]


def _format_drifts(runs: Sequence[tuple[str, SustainedResult]]) -> str:
    """State the change of the latency of each model, of many models the range and those that became slower."""
    if len(runs) <= MAX_NAMED:
        return "; ".join(f"{_format_drift(run)} ({name})" for name, run in runs)
    slower = [name for name, run in runs if run.conclusion == "slower"]
    names = f"; slower: {format_names(slower)}" if slower else ""
    return format_values([(name, 100 * run.drift) for name, run in runs], "{:+.1f} %") + names


def _format_drift(run: SustainedResult) -> str:
    if run.drift_low is None or run.drift_high is None:
        return f"{100 * run.drift:+.1f} %, {run.conclusion}"
    return f"{100 * run.drift:+.1f} % ({100 * run.drift_low:+.1f} to {100 * run.drift_high:+.1f}): {run.conclusion}"


def list_camera_headers(result: BenchResult) -> list[str]:
    """Return the headers of the table of cameras: energy only if it was requested.

    Args:
        result: Measurements of all models.
    """
    return [*CAMERA_HEADERS, *([CAMERA_ENERGY_HEADER] if result.has_energy else [])]


def _format_camera_energy(point: CameraPoint) -> str:
    return "-" if point.joules_per_camera_s is None else f"{point.joules_per_camera_s:.2f}"


def make_camera_rows(result: BenchResult) -> list[list[str]]:
    """Return one row per model and number of cameras, with the entries of `list_camera_headers`.

    Args:
        result: Measurements of all models.
    """
    return [
        [
            "" if index else model.name,
            str(point.cameras),
            *("-" if value is None else f"{value:.1f}" for value in (point.p50_ms, point.p99_ms)),
            f"{100 * point.dropped:.1f}",
            "yes" if point.is_held(cameras.fps) else "no",
            *([_format_camera_energy(point)] if result.has_energy else []),
        ]
        for model in result.models
        if (cameras := model.cameras)
        for index, point in enumerate(cameras.points)
    ]


def make_batch_rows(result: BenchResult) -> list[list[str]]:
    """Return one row per model and batch size, with the entries of `BATCH_HEADERS`.

    Args:
        result: Measurements of all models.
    """
    return [
        [
            "" if index else model.name,
            str(point.batch),
            *(f"{value:.1f}" for value in (point.p50_ms, point.p99_ms, point.images_per_s)),
            "yes" if point.is_held(cameras.fps) else "no",
        ]
        for model in result.models
        if (cameras := model.cameras)
        for index, point in enumerate(cameras.batches)
    ]


def format_camera_notes(result: BenchResult) -> list[str]:
    """Return the number of cameras that the device holds, and the largest batch, as sentences.

    Args:
        result: Measurements of all models.
    """
    found = [(model, model.cameras) for model in result.models if model.cameras]
    if not found:
        return []
    fps = found[0][1].fps
    counts = format_values([(model.name, cameras.cameras) for model, cameras in found], "{}")
    notes = [
        f"Cameras at {fps:g} frames per second with p99 from the arrival of a frame to its boxes below "
        f"{1e3 / fps:.1f} ms: {counts}. A dropped frame counts as infinite."
    ]
    batches = [(model.name, one.largest_batch) for model, one in found if one.largest_batch is not None]
    if batches:
        fixed = [model.name for model, cameras in found if len(cameras.batches) == 1 and cameras.largest_batch]
        hint = f" The batch of {format_names(fixed)} is fixed; see hkd-export --dynamic batch." if fixed else ""
        notes.append(
            "Largest batch of frames that arrive together, with p99 below the period: "
            f"{format_values(batches, '{}')}.{hint}"
        )
    if not result.has_energy:
        return notes
    reasons = dict.fromkeys(cameras.energy_reason for _, cameras in found if cameras.energy_reason)
    return notes + [f"Energy per camera not measured: {reason}." for reason in reasons]
