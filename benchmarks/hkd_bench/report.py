"""Report of `hkd-bench`: one self-contained HTML page without scripts, with example images."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from hkd_bench import plots
from hkd_bench.device_state import RunConditions
from hkd_bench.latency import confidence_bound_ms
from hkd_bench.load_plots import plot_cameras, plot_sustained
from hkd_bench.result import BenchResult, ModelResult
from hkd_bench.separate_tables import (
    BATCH_HEADERS,
    SCENARIO_HEADERS,
    SUSTAINED_HEADERS,
    list_camera_headers,
    make_batch_rows,
    make_camera_rows,
    make_scenario_rows,
    make_sustained_rows,
)
from hkd_bench.sweep_plot import plot_sweep
from hkd_bench.table import format_data_name, format_difference, format_interval, list_columns, make_cells
from hkd_bench.table_notes import MARK, format_energy_interval, format_model_name, make_notes
from hkd_deploy import Detector
from hkd_det.draw import MatchStatus, draw_box, draw_detections
from hkd_det.files import write_text
from hkd_det.image import read_image
from hkd_det.letterbox import format_imgsz
from hkd_det.metrics.citypersons import REASONABLE, SETUPS, CityPersonsSetup, match_image
from hkd_det.metrics.matching import FALSE_POSITIVE, IGNORED, TRUE_POSITIVE
from hkd_det.structures import Detections, Sample

CaptionedImage = tuple[str, NDArray[np.uint8]]

TEMPLATE = Path(__file__).with_name("report.html.j2")
MAX_IMAGE_PX = 1024  # longer side of an image on the page
JPEG_QUALITY = 82
MATCH_STATUS = {
    TRUE_POSITIVE: MatchStatus.TRUE_POSITIVE,
    FALSE_POSITIVE: MatchStatus.FALSE_POSITIVE,
    IGNORED: MatchStatus.IGNORED,
}
GPU_MEMORY = (
    "GPU memory after the build",
    "GPU memory of the process",
    "peak memory at the build of the TensorRT engine",
    "GPU memory at the build of the TensorRT engine",
    "activations and workspace",
)
DETAILS = (
    ("p50", "ms"),
    ("p90", "ms"),
    ("p99", "ms"),
    ("99 % bound of p90", "ms"),
    ("99 % bound of p99", "ms"),
    ("mean", "ms"),
    ("maximum", "ms"),
    ("standard deviation / mean", ""),
    ("model loading (median)", "ms"),
    ("peak memory at the build of engine or session", "MiB"),
    ("peak memory", "MiB"),
    ("peak memory minus baseline", "MiB"),
    *((name, "MiB") for name in GPU_MEMORY),
)
ENERGY_DETAILS = (
    ("energy per frame", "mJ"),
    ("95 % interval", "mJ"),
    ("energy per frame above idle", "mJ"),
    ("95 % interval", "mJ"),
    ("mean power", "W"),
    ("frames", ""),
    ("duration", "s"),
)
STATE_NAMES = {
    "cpu_mhz": "CPU clock",
    "cpu_limit_mhz": "CPU clock limit",
    "governor": "CPU governor",
    "gpu_mhz": "GPU clock",
    "power_mode": "power mode",
    "temperatures_c": "temperatures",
    "throttle_counts": "throttle events",
    "other_cpus": "CPUs used by other processes",
    "load_average": "load average",
    "gpu_memory_used_mib": "GPU memory in use",
}
LEGEND = (
    ("true positive", MatchStatus.TRUE_POSITIVE),
    ("false negative", MatchStatus.FALSE_NEGATIVE),
    ("false positive", MatchStatus.FALSE_POSITIVE),
    ("ignored (ignore region, or outside Reasonable)", MatchStatus.IGNORED),
)


@dataclass(frozen=True, eq=False)
class ExampleImages:
    """Images with drawn boxes.

    Attributes:
        conf: Minimum score of a drawn box.
        images: Caption and image (uint8 array[H, W, 3], RGB) of each example.
    """

    conf: float
    images: tuple[CaptionedImage, ...]


def render_examples(
    detector: Detector, samples: Sequence[Sample], conf: float, num_images: int, setup: CityPersonsSetup = REASONABLE
) -> ExampleImages:
    """Run a detector on evenly spaced images and draw true positives, false positives and missed boxes.

    Args:
        detector: Detector to run.
        samples: Annotated images; those with ground-truth boxes are preferred.
        conf: Minimum score of a detection.
        num_images: Maximum number of images.
        setup: Setup that selects the evaluated boxes.

    Returns:
        The drawn images with captions.
    """
    candidates = [sample for sample in samples if (~sample.ground_truth.ignore).any()] or list(samples)
    indices = np.unique(np.linspace(0, len(candidates) - 1, min(num_images, len(candidates))).round().astype(int))
    images = []
    for index in indices:
        sample = candidates[index]
        image = read_image(sample.path)
        images.append(render_matches(image, sample, detector(image).filter(conf), setup))
    return ExampleImages(conf, tuple(images))


def render_matches(
    image_rgb: NDArray[np.uint8], sample: Sample, detections: Detections, setup: CityPersonsSetup = REASONABLE
) -> CaptionedImage:
    """Draw detections in the color of their match status and missed boxes with dashed lines.

    Args:
        image_rgb (uint8 array[H, W, 3]): Image, RGB.
        sample: Its ground truth and path.
        detections: Detections in the image.
        setup: Setup that selects the evaluated boxes.

    Returns:
        The caption and a copy of the image with boxes.
    """
    matches = match_image(sample.ground_truth, detections, setup)
    evaluated = Detections(detections.boxes_xyxy[matches.eval_indices], detections.scores[matches.eval_indices])
    canvas = draw_detections(image_rgb, evaluated, [MATCH_STATUS[int(status)] for status in matches.match_status])
    for index in matches.missed_gt:
        draw_box(canvas, sample.ground_truth.boxes_xyxy[index], MatchStatus.FALSE_NEGATIVE)
    num_tp = int((matches.match_status == TRUE_POSITIVE).sum())
    num_fp = int((matches.match_status == FALSE_POSITIVE).sum())
    num_gt = num_tp + len(matches.missed_gt)
    caption = f"{sample.path.name}: {num_tp} of {num_gt} detected, {num_fp} false positive{'' if num_fp == 1 else 's'}"
    return caption, canvas


def write_bench_report(
    path: Path,
    result: BenchResult,
    title: str,
    intro: str = "",
    examples: ExampleImages | None = None,
    training: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    video_frames: Sequence[NDArray[np.uint8]] = (),
    sections: str = "",
) -> None:
    """Write the report; the file is replaced atomically.

    Args:
        path: Output file (.html).
        result: Measurements of all models.
        title: Title of the page.
        intro: Paragraph below the title.
        examples: Example images of the last model.
        training: Name of each training run, with the epoch and the miss rate (fraction) of each evaluation.
        video_frames (uint8 array[H, W, 3]): Frames of a processed video, RGB.
        sections: HTML of further sections below the intro.
    """
    write_text(path, render_html(result, title, intro, examples, training or {}, video_frames, sections))


def render_html(
    result: BenchResult,
    title: str,
    intro: str,
    examples: ExampleImages | None,
    training: Mapping[str, Sequence[tuple[int, float]]],
    video_frames: Sequence[NDArray[np.uint8]],
    sections: str = "",
) -> str:
    """Render the HTML of the report; see `write_bench_report` for the arguments.

    Args:
        result: Measurements of all models.
        title: Title of the page.
        intro: Paragraph below the title.
        examples: Example images of the last model.
        training: Name of each training run, with the epoch and the miss rate (fraction) of each evaluation.
        video_frames (uint8 array[H, W, 3]): Frames of a processed video, RGB.
        sections: HTML of further sections below the intro.

    Returns:
        The page.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    trained = {name: history for name, history in training.items() if history}
    return template.render(
        title=title,
        intro=intro,
        sections=Markup(sections),
        result=result,
        colors=[plots.COLORS[index % len(plots.COLORS)] for index in range(len(result.models))],
        metric_rows=_make_metric_rows(result),
        setup_tables=[
            (format_data_name(accuracy.data), _make_setup_rows(result, index))
            for index, accuracy in enumerate(result.models[0].accuracy)
        ],
        detail_rows=[
            (name, unit, row)
            for (name, unit), row in zip(DETAILS, zip(*map(_format_details, result.models), strict=True), strict=True)
            if result.device.startswith("cuda") or name not in GPU_MEMORY
        ],
        energy_rows=[
            (name, unit, row)
            for (name, unit), row in zip(
                ENERGY_DETAILS, zip(*map(_format_energy_details, result.models), strict=True), strict=True
            )
        ],
        camera_headers=list_camera_headers(result),
        camera_rows=make_camera_rows(result),
        camera_plot=Markup(plot_cameras(result)),
        batch_headers=BATCH_HEADERS,
        batch_rows=make_batch_rows(result),
        scenario_headers=SCENARIO_HEADERS,
        scenario_rows=make_scenario_rows(result),
        sustained_headers=SUSTAINED_HEADERS,
        sustained_rows=make_sustained_rows(result),
        sustained_plots=[(title, Markup(svg)) for title, svg in plot_sustained(result)],
        state_rows=make_state_rows(result),
        missing_state=_list_missing_state(result),
        names=[format_model_name(model) for model in result.models],
        mark=MARK,
        imgsz=[format_imgsz(model.imgsz_hw) for model in result.models],
        notes=make_notes(result),
        miss_rate_plot=Markup(plots.plot_miss_rate(result)),
        all_setup_plot=Markup(plots.plot_miss_rate(result, "All")),
        sweep_plot=Markup(plot_sweep(result)),
        latency_plot=Markup(plots.plot_latency(result)),
        stage_plot=Markup(plots.plot_stages(result)),
        training_plot=Markup(plots.plot_training(trained)) if trained else "",
        example_model=result.models[-1].name,
        legend=[
            (name, "#{:02x}{:02x}{:02x}".format(*status.value), status is MatchStatus.FALSE_NEGATIVE)
            for name, status in LEGEND
        ],
        conf=examples.conf if examples else None,
        images=[(caption, _encode_data_uri(image)) for caption, image in examples.images] if examples else [],
        video_frames=[_encode_data_uri(frame) for frame in video_frames],
    )


def _make_metric_rows(result: BenchResult) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Return title, unit and (value, ratio) of each model for each metric: a transposed table that fits a phone."""
    columns = list(zip(*make_cells(result), strict=True))
    return [
        (column.title, column.unit, [(cell.value, cell.ratio) for cell in row])
        for column, row in zip(list_columns(result), columns, strict=True)
    ]


def _make_setup_rows(result: BenchResult, index: int) -> list[tuple[str, str, int, list[tuple[str, str, str]]]]:
    """Return name, limits, number of boxes, and the cells of all models of each setup on one ground truth."""
    return [
        (
            name,
            f"{_format_limits(setup.height_px, ' px')} tall, {_format_limits(setup.visible_ratio, '')} visible",
            result.models[0].accuracy[index].num_gt[name],
            [_make_setup_cell(model, index, name, result.models[0].name) for model in result.models],
        )
        for name, setup in SETUPS.items()
    ]


def _make_setup_cell(model: ModelResult, index: int, setup: str, reference_name: str) -> tuple[str, str, str]:
    """Return miss rate, interval and difference to the first model."""
    accuracy = model.accuracy[index]
    interval, difference = accuracy.intervals.get(setup), accuracy.differences.get(setup)
    return (
        plots.format_percent(accuracy.miss_rates[setup]),
        format_interval(interval) if interval else "",
        format_difference(difference, model.name, reference_name) if difference else "",
    )


def _format_limits(limits: tuple[float, float], unit: str) -> str:
    low, high = limits
    return f"at least {low:g}{unit}" if high > 1e6 else f"{low:g} to {high:g}{unit}"


def _format_details(model: ModelResult) -> list[str]:
    """Return the values of `DETAILS`."""
    latency = model.latency
    bounds = [confidence_bound_ms(model.e2e_ms, percentile) for percentile in (90, 99)]
    return [
        *(f"{value:.2f}" for value in (latency.p50_ms, latency.p90_ms, latency.p99_ms)),
        *("too few runs" if bound is None else f"{bound:.2f}" for bound in bounds),
        *(f"{value:.2f}" for value in (latency.mean_ms, latency.max_ms)),
        f"{100 * latency.cv:.0f} %",
        f"{np.median(model.load_ms):.0f}",
        *(_format_mib(value) for value in (model.build_memory_mib, model.peak_memory_mib, model.memory_mib)),
        *(_format_mib(value) for value in (model.gpu_build_memory_mib, model.gpu_memory_mib)),
        *(_format_mib(value) for value in (model.engine_build_memory_mib, model.engine_build_gpu_memory_mib)),
        model.context_reason if model.context_mib is None else f"{model.context_mib:.1f}",
    ]


def _format_mib(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.0f}"


def _format_energy_details(model: ModelResult) -> list[str]:
    """Return the values of `ENERGY_DETAILS`."""
    energy = model.energy
    if energy.joules_per_frame is None or energy.above_idle is None or energy.watts is None:
        return ["not measured", *[""] * (len(ENERGY_DETAILS) - 1)]
    return [
        f"{1e3 * energy.joules_per_frame:.1f}",
        format_energy_interval(energy.ci_low, energy.ci_high),
        f"{1e3 * energy.above_idle:.1f}",
        format_energy_interval(energy.above_idle_low, energy.above_idle_high),
        f"{energy.watts:.2f}",
        str(energy.frames),
        f"{energy.seconds:.0f}",
    ]


def make_state_rows(result: BenchResult) -> list[list[str]]:
    """Return the state of the device: name, before, during the runs of each model, after.

    Args:
        result: Measurements of all models.

    Returns:
        One row per value that was read; none if the result has no state.
    """
    first, last = result.state_before, result.state_after
    if first is None or last is None:
        return []
    runs = [model.conditions for model in result.models]
    empty = [""] * len(runs)
    rows = [
        ["CPU clock, MHz", _format_number(first.cpu_mhz), *(_format_clock(run.cpu_mhz) for run in runs),
         _format_number(last.cpu_mhz)],
        ["CPU clock limit, MHz", _format_number(first.cpu_limit_mhz), *empty, _format_number(last.cpu_limit_mhz)],
        ["CPU governor", first.governor or "", *empty, last.governor or ""],
        ["power mode", first.power_mode or "", *empty, last.power_mode or ""],
        ["GPU clock, MHz", _format_number(first.gpu_mhz), *(_format_clock(run.gpu_mhz) for run in runs),
         _format_number(last.gpu_mhz)],
        ["highest temperature, °C", _format_temperature(first.temperatures_c),
         *(_format_temperature(run.max_temperatures_c) for run in runs), _format_temperature(last.temperatures_c)],
        [f"throttle events ({', '.join(first.throttle_counts)})", "",
         *(_format_events(run) if first.throttle_counts else "" for run in runs), ""],
        ["throttled by", ", ".join(first.throttle_flags), *(", ".join(run.throttle_flags) for run in runs),
         ", ".join(last.throttle_flags)],
        ["CPUs used by other processes", "", *(_format_number(run.other_cpus, 1) for run in runs), ""],
        ["load average", _format_number(first.load_average, 1), *empty, _format_number(last.load_average, 1)],
        ["CPUs of the container", _format_number(first.cpu_quota, 1), *empty, _format_number(last.cpu_quota, 1)],
        ["memory in use, MiB", _format_number(first.memory_used_mib), *(_format_number(run.memory_used_mib) for run in
         runs), _format_number(last.memory_used_mib)],
        ["GPU memory in use, MiB", _format_number(first.gpu_memory_used_mib),
         *(_format_number(run.gpu_memory_used_mib) for run in runs), _format_number(last.gpu_memory_used_mib)],
    ]  # fmt: skip
    return [row for row in rows if any(row[1:])]


def _list_missing_state(result: BenchResult) -> list[str]:
    """Return each value that was not read, with the reason."""
    states = [result.state_before, *(model.conditions for model in result.models)]
    missing = {name: reason for state in states if state for name, reason in state.missing.items()}
    has_gpu = result.device.startswith("cuda")
    return [
        f"{STATE_NAMES[name]}: {reason}" for name, reason in missing.items() if has_gpu or not name.startswith("gpu_")
    ]


def _format_number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _format_clock(percentiles: Sequence[float]) -> str:
    return f"{percentiles[0]:.0f} to {percentiles[2]:.0f}" if percentiles else ""


def _format_temperature(temperatures: Mapping[str, float]) -> str:
    if not temperatures:
        return ""
    name = max(temperatures, key=temperatures.__getitem__)
    return f"{temperatures[name]:.0f} ({name})"


def _format_events(run: RunConditions) -> str:
    return ", ".join(f"{count} {name}" for name, count in run.throttle_events.items()) or "none"


def _encode_data_uri(image_rgb: NDArray[np.uint8]) -> str:
    """Encode an image as the data URI of a JPEG, with its longer side reduced to `MAX_IMAGE_PX`."""
    height, width = image_rgb.shape[:2]
    scale = min(1.0, MAX_IMAGE_PX / max(height, width))
    if scale < 1:
        size = round(width * scale), round(height * scale)
        image_rgb = cv2.resize(image_rgb, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    bgr = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode("ascii")
