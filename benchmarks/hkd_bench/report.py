"""Pictures with what a detector found, took for a person, and missed.

The report: one self-contained page, without scripts or anything from elsewhere.
"""

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
from hkd_bench.result import BenchResult, ModelResult, confidence_bound_ms
from hkd_bench.table import COLUMNS, make_cells, make_notes
from hkd_deploy import Detector
from hkd_deploy.draw import MatchStatus, draw_box, draw_detections
from hkd_det.files import write_text
from hkd_det.image import read_image
from hkd_det.letterbox import format_imgsz
from hkd_det.metrics.citypersons import REASONABLE, SETUPS, CityPersonsSetup, match_image
from hkd_det.metrics.matching import FALSE_POSITIVE, IGNORED, TRUE_POSITIVE
from hkd_det.structures import Detections, Sample

MATCH_STATUS = {
    TRUE_POSITIVE: MatchStatus.TRUE_POSITIVE,
    FALSE_POSITIVE: MatchStatus.FALSE_POSITIVE,
    IGNORED: MatchStatus.IGNORED,
}


CaptionedImage = tuple[str, NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class ExampleImages:
    """Pictures, each (caption, uint8 RGB with boxes drawn), and the score from which a box is drawn."""

    conf: float
    images: tuple[CaptionedImage, ...]


def render_examples(
    detector: Detector, samples: Sequence[Sample], conf: float, num_images: int, setup: CityPersonsSetup = REASONABLE
) -> ExampleImages:
    """`count` pictures spread over those with people to be found.

    Drawn are detections with a score of at least `conf`, and the people that are then missed.
    """
    peopled = [sample for sample in samples if (~sample.ground_truth.ignore).any()] or list(samples)
    places = np.unique(np.linspace(0, len(peopled) - 1, min(num_images, len(peopled))).round().astype(int))
    pictures = []
    for place in places:
        sample = peopled[place]
        picture = read_image(sample.path)
        pictures.append(render_matches(picture, sample, detector(picture).filter(conf), setup))
    return ExampleImages(conf, tuple(pictures))


def render_matches(
    image_rgb: NDArray[np.uint8], sample: Sample, detections: Detections, setup: CityPersonsSetup = REASONABLE
) -> CaptionedImage:
    """(caption, a copy of the picture): every detection in its verdict's colour, every missed person dashed."""
    judgement = match_image(sample.ground_truth, detections, setup)
    kept = Detections(detections.boxes_xyxy[judgement.eval_indices], detections.scores[judgement.eval_indices])
    canvas = draw_detections(image_rgb, kept, [MATCH_STATUS[int(verdict)] for verdict in judgement.match_status])
    for index in judgement.missed_gt:
        draw_box(canvas, sample.ground_truth.boxes_xyxy[index], MatchStatus.FALSE_NEGATIVE)
    hits, wrong = (
        int((judgement.match_status == TRUE_POSITIVE).sum()),
        int((judgement.match_status == FALSE_POSITIVE).sum()),
    )
    people = hits + len(judgement.missed_gt)
    caption = f"{sample.path.name}: {hits} of {people} found, {wrong} false alarm{'' if wrong == 1 else 's'}"
    return caption, canvas


TEMPLATE = Path(__file__).with_name("report.html.j2")


MAX_IMAGE_PX = 1024  # the longer side of a picture on the page


JPEG_QUALITY = 82


DETAILS = (
    ("p50", "ms"),
    ("p90", "ms"),
    ("p99", "ms"),
    ("bound of p90", "ms"),
    ("bound of p99", "ms"),
    ("mean", "ms"),
    ("slowest", "ms"),
    ("scatter (standard deviation over mean)", ""),
    ("opening the file (median)", "ms"),
    ("peak memory", "MiB"),
    ("of it added by the model", "MiB"),
)


LEGEND = (
    ("found", MatchStatus.TRUE_POSITIVE),
    ("missed", MatchStatus.FALSE_NEGATIVE),
    ("false alarm", MatchStatus.FALSE_POSITIVE),
    ("not judged (ignore region, or outside Reasonable)", MatchStatus.IGNORED),
)


def write_bench_report(
    path: Path,
    result: BenchResult,
    title: str,
    intro: str = "",
    examples: ExampleImages | None = None,
    training: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    video_frames: Sequence[NDArray[np.uint8]] = (),
) -> None:
    """Write the page in one step.

    gallery: of the last model. training: by name, (epoch, miss rate as a fraction). film_frames: uint8 RGB.
    """
    write_text(path, render_html(result, title, intro, examples, training or {}, video_frames))


def render_html(
    result: BenchResult,
    title: str,
    intro: str,
    examples: ExampleImages | None,
    training: Mapping[str, Sequence[tuple[int, float]]],
    video_frames: Sequence[NDArray[np.uint8]],
) -> str:
    """The page's HTML."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    trained = {name: history for name, history in training.items() if history}
    return template.render(
        title=title,
        intro=intro,
        result=result,
        colours=[plots.COLORS[number % len(plots.COLORS)] for number in range(len(result.models))],
        figures=_make_metric_rows(result),
        setups=_make_setup_rows(result),
        details=[
            (name, unit, row)
            for (name, unit), row in zip(DETAILS, zip(*map(_format_details, result.models), strict=True), strict=True)
        ],
        imgsz=[format_imgsz(model.imgsz_hw) for model in result.models],
        notes=make_notes(result),
        miss_rate_figure=Markup(plots.plot_miss_rate(result)),
        all_figure=Markup(plots.plot_miss_rate(result, "All")),
        latency_figure=Markup(plots.plot_latency(result)),
        stage_figure=Markup(plots.plot_stages(result)),
        training_figure=Markup(plots.plot_training(trained)) if trained else "",
        gallery_model=result.models[-1].name,
        legend=[
            (name, "#{:02x}{:02x}{:02x}".format(*verdict.value), verdict is MatchStatus.FALSE_NEGATIVE)
            for name, verdict in LEGEND
        ],
        conf=examples.conf if examples else None,
        pictures=[(caption, _encode_data_uri(picture)) for caption, picture in examples.images] if examples else [],
        film_frames=[_encode_data_uri(frame) for frame in video_frames],
    )


def _make_metric_rows(result: BenchResult) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(title, unit, [(value, ratio to the first model)]): the table stood on its side, for a phone."""
    columns = list(zip(*make_cells(result), strict=True))
    return [
        (column.title, column.unit, [(cell.value, cell.ratio) for cell in row])
        for column, row in zip(COLUMNS, columns, strict=True)
    ]


def _make_setup_rows(result: BenchResult) -> list[tuple[str, str, int, list[str]]]:
    """(setup, whom it asks for, people, miss rates)."""
    return [
        (
            name,
            f"{_format_limits(setup.height_px, ' px')} high, {_format_limits(setup.visible_ratio, '')} visible",
            result.models[0].num_gt[name],
            [plots.format_percent(model.miss_rates[name]) for model in result.models],
        )
        for name, setup in SETUPS.items()
    ]


def _format_limits(ends: tuple[float, float], unit: str) -> str:
    low, high = ends
    return f"at least {low:g}{unit}" if high > 1e6 else f"{low:g} to {high:g}{unit}"


def _format_details(model: ModelResult) -> list[str]:
    """In the order of DETAILS."""
    latency = model.latency
    bounds = [confidence_bound_ms(model.e2e_ms, percentile) for percentile in (90, 99)]
    return [
        *(f"{value:.2f}" for value in (latency.p50_ms, latency.p90_ms, latency.p99_ms)),
        *("too few runs" if bound is None else f"{bound:.2f}" for bound in bounds),
        *(f"{value:.2f}" for value in (latency.mean_ms, latency.max_ms)),
        f"{100 * latency.cv:.0f} %",
        f"{np.median(model.load_ms):.0f}",
        *(f"{value:.0f}" for value in (model.peak_memory_mib, model.memory_mib)),
    ]


def _encode_data_uri(image_rgb: NDArray[np.uint8]) -> str:
    """A JPEG inside the page, made smaller where it is larger than a page can show."""
    height, width = image_rgb.shape[:2]
    scale = min(1.0, MAX_IMAGE_PX / max(height, width))
    if scale < 1:
        size = round(width * scale), round(height * scale)
        image_rgb = cv2.resize(image_rgb, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    bgr = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR)
    packed = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return "data:image/jpeg;base64," + base64.b64encode(packed.tobytes()).decode("ascii")
