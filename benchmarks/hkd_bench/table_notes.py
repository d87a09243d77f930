"""Sentences below the tables of `hkd-bench`: data, conditions of the measurement, confidence, memory, licenses."""

from collections.abc import Sequence

from hkd_bench.device_state import format_other_load
from hkd_bench.latency import confidence_bound_ms
from hkd_bench.model_lists import MAX_NAMED, format_backends, format_licenses, format_marks, format_names, format_values
from hkd_bench.result import AccuracyResult, BenchResult, ModelResult
from hkd_bench.separate_tables import format_camera_notes, format_scenario_notes, format_sustained_notes
from hkd_deploy.model_metadata import MIN_DYNAMIC_SIDE
from hkd_det.metrics.bootstrap import MIN_IMAGES, MIN_PERSONS

MAX_CV = 0.1  # an idle machine with fixed clocks stays below 0.025, the warning limit of trtexec

MARK = "[!]"  # behind the name of a model whose runs were not quiet


def make_notes(result: BenchResult) -> list[str]:
    """Return the sentences below a table: data, conditions of the measurement and confidence of the percentiles.

    Args:
        result: Measurements of all models.
    """
    first = result.models[0]
    threads = "the runtime's default threads" if result.threads is None else f"{result.threads} threads"
    data = f"{result.data or 'unnamed data'}, {result.split or 'no split'}"
    warmup = f" and at least {result.warmup_s:g} s" if result.warmup_s else ""
    notes = [
        f"Miss rate over {result.num_images} images ({data}; {first.num_gt['Reasonable']} boxes in Reasonable)."
        if result.num_images
        else f"Miss rate not measured: {result.data or 'the images'}: no annotations.",
        *_format_blind_models(result),
        *_format_few_images(result),
        *_format_thresholds(result),
        *_format_rate_intervals(result),
        f"Latency from decoded frame to boxes on {result.device} with {threads}, by {format_backends(result.models)}: "
        f"{result.runs} runs in {result.rounds} processes, each after {result.warmup} warm-up runs{warmup}.",
        *_format_padded_sizes(result),
        *format_camera_notes(result),
        *format_scenario_notes(result),
        *format_sustained_notes(result),
        *_format_bounds(result),
        *_format_energy(result),
        *_format_build_memory(result),
        *_format_gpu_memory(result),
        f"License of the weights: {format_licenses(result.models)}.",
    ]
    too_few = [percentile for percentile in (90, 99) if confidence_bound_ms(first.e2e_ms, percentile) is None]
    if too_few:
        names = " and ".join(f"p{percentile}" for percentile in too_few)
        notes.append(f"{names}: too few runs for a 99 % confidence bound (p90 needs 64 runs, p99 needs 662).")
    return notes + format_marks(result.models, MARK)


def format_model_name(model: ModelResult) -> str:
    """Return the name of a model, with a mark if its runs were not quiet.

    Args:
        model: Measurements of the model.
    """
    return f"{model.name} {MARK}" if model.conditions.marks else model.name


def _format_energy(result: BenchResult) -> list[str]:
    if not result.has_energy:
        return []
    reasons = dict.fromkeys(model.energy.reason for model in result.models if model.energy.reason)
    notes = [f"Energy not measured: {reason}." for reason in reasons]
    measured = [model for model in result.models if model.energy.joules_per_frame is not None]
    if not measured:
        return notes
    power = result.power
    sensors = "; ".join(f"{name}: {scope}" for name, scope in power.sensors.items())
    missing = "".join(f" Without {name}: {reason}." for name, reason in power.missing.items())
    idle = f"{_format_watts(power.idle_before_w)} before and {_format_watts(power.idle_after_w)} after"
    usable_cpus = result.state_before.usable_cpus if result.state_before else 1
    load = format_other_load(power.idle_other_cpus, usable_cpus)
    return [
        *notes,
        _format_energy_intervals(measured),
        f"Measured by {sensors}.{missing} Idle power: {idle} the measurement.",
        *([f"{MARK} idle power: {load}; energy above idle is too low."] if load else []),
    ]


def _format_energy_intervals(measured: Sequence[ModelResult]) -> str:
    """State the 95 % intervals of the energy per frame, of many models their widths."""
    if len(measured) <= MAX_NAMED:
        texts = [
            f"{format_energy_interval(energy.ci_low, energy.ci_high)} mJ, above idle "
            f"{format_energy_interval(energy.above_idle_low, energy.above_idle_high)} mJ ({model.name})"
            for model in measured
            for energy in [model.energy]
        ]
        return f"Energy per frame, 95 % intervals: {'; '.join(texts)}."
    texts = []
    for label, start in (("", "ci"), ("above idle ", "above_idle")):
        ends = [
            (one.name, getattr(one.energy, f"{start}_low"), getattr(one.energy, f"{start}_high")) for one in measured
        ]
        widths = [(name, 1e3 * (high - low)) for name, low, high in ends if low is not None and high is not None]
        texts += [f"{label}{format_values(widths, '{:.1f} mJ')}"] if widths else []
    return f"Width of the 95 % intervals of the energy per frame: {'; '.join(texts)}."


def format_energy_interval(low: float | None, high: float | None) -> str:
    """Format the interval of an energy in millijoules.

    Args:
        low: Lower end in joules; None if it was not measured.
        high: Upper end.

    Returns:
        For example "310.2 to 318.9".
    """
    return "" if low is None or high is None else f"{1e3 * low:.1f} to {1e3 * high:.1f}"


def _format_watts(watts: float | None) -> str:
    return "unknown" if watts is None else f"{watts:.2f} W"


def _format_build_memory(result: BenchResult) -> list[str]:
    values = [(model.name, model.build_memory_mib) for model in result.models if model.build_memory_mib is not None]
    return (
        [f"Peak memory while the engine or session was built: {format_values(values, '{:.0f} MiB')}."] if values else []
    )


def _format_gpu_memory(result: BenchResult) -> list[str]:
    if not result.device.startswith("cuda"):
        return []
    if result.state_before and result.state_before.is_memory_unified:
        used = [(model.name, model.conditions.memory_used_mib or 0) for model in result.models]
        before = f"{result.state_before.memory_used_mib:.0f} MiB"
        return [
            f"Unified memory: the CPU and the GPU share it. In use on the machine: {before} before, at most "
            f"{format_values(used, '{:.0f} MiB')} during the runs."
        ]
    reasons = dict.fromkeys(model.gpu_memory_reason for model in result.models if model.gpu_memory_reason)
    return [f"GPU memory not measured: {reason}." for reason in reasons]


def _format_blind_models(result: BenchResult) -> list[str]:
    """Name the models whose every miss rate is 100 %."""
    notes = []
    for model in result.models:
        for accuracy in model.accuracy:
            rates = [rate for rate in accuracy.miss_rates.values() if rate is not None]
            if rates and min(rates) == 1:
                notes.append(f"{model.name} detects no person of {accuracy.data}: check its input and the annotations.")
    return notes


def _format_few_images(result: BenchResult) -> list[str]:
    num_gt = result.models[0].num_gt["Reasonable"]
    if not result.num_images or (result.num_images >= MIN_IMAGES and num_gt >= MIN_PERSONS):
        return []
    return [
        f"Fewer than {MIN_IMAGES} images or {MIN_PERSONS} persons of Reasonable: the intervals are too narrow. "
        "Models are not compared."
    ]


def _format_thresholds(result: BenchResult) -> list[str]:
    sources = {"model": "stored in the model", "images": "with the highest F1 score on these images"}
    texts = []
    for source, description in sources.items():
        values = [
            (model.name, model.accuracy[0].threshold)
            for model in result.models
            if model.accuracy[0].threshold is not None and model.accuracy[0].threshold_source == source
        ]
        texts += [f"{format_values(values, '{:.3f}')}, {description}"] if values else []
    return [f"Recall of Reasonable at a score of {'; '.join(texts)}."] if texts else []


def _format_rate_intervals(result: BenchResult) -> list[str]:
    """State the 95 % intervals of AP50, AP and recall, of many models their widths."""
    intervals = {model.name: _get_rate_intervals(model.accuracy[0]) for model in result.models}
    if len(intervals) > MAX_NAMED:
        widths: dict[str, list[tuple[str, float]]] = {}
        for model, named in intervals.items():
            for rate, (low, high) in named.items():
                widths.setdefault(rate, []).append((model, 100 * (high - low)))
        texts = [f"{rate} {format_values(values, '{:.1f} points')}" for rate, values in widths.items()]
        return [f"Width of the 95 % intervals over images: {'; '.join(texts)}."] if texts else []
    texts = [
        ", ".join(f"{rate} {100 * low:.1f} to {100 * high:.1f}" for rate, (low, high) in named.items()) + f" ({model})"
        for model, named in intervals.items()
        if named
    ]
    return [f"95 % intervals over images: {'; '.join(texts)}."] if texts else []


def _get_rate_intervals(accuracy: AccuracyResult) -> dict[str, tuple[float, float]]:
    ends = {"AP50": accuracy.ap50_interval, "AP": accuracy.ap_interval, "recall": accuracy.recall_interval}
    return {rate: interval for rate, interval in ends.items() if interval}


def _format_padded_sizes(result: BenchResult) -> list[str]:
    """Name the inputs that the graph of a model with a dynamic size pads to its smallest side."""
    if not result.imgsz_sweep:
        return []
    names = [model.name for model in result.models if min(model.imgsz_hw) < MIN_DYNAMIC_SIDE]
    limit = f"{MIN_DYNAMIC_SIDE} pixels, or to the side of the export if that is smaller"
    return [f"The graph pads shorter sides to {limit}, which takes time: {format_names(names)}."] if names else []


def _format_bounds(result: BenchResult) -> list[str]:
    notes = []
    for percentile in (90, 99):
        bounds = [(model.name, confidence_bound_ms(model.e2e_ms, percentile)) for model in result.models]
        known = [(name, bound) for name, bound in bounds if bound]
        if known:
            values = format_values(known, "{:.1f} ms")
            notes.append(f"With 99 % confidence, p{percentile} is at most {values}.")
    unsteady = [(model.name, 100 * model.latency.cv) for model in result.models if model.latency.cv > MAX_CV]
    if unsteady:
        notes.append(
            f"Standard deviation of the latency, relative to the mean: {format_values(unsteady, '{:.0f} %')}. Other "
            "processes or variable clock rates affect p90 and p99."
        )
    return notes
