"""Table and notes of the load scenarios of `hkd-bench --scenario`."""

from collections.abc import Sequence
from pathlib import Path

from hkd_bench.result import BenchResult, ModelResult
from hkd_bench.scenarios import PACED, ScenarioResult

SCENARIO_HEADERS = (
    "scenarios", "scenario", "result", "queries", "images/s", "p50, ms", "p90, ms", "p99, ms", "estimate, ms",
    "late, %",
)  # fmt: skip


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
