"""Pictures with what a detector found, took for a person, and missed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_deploy import Detector
from hkd_deploy.draw import MatchStatus, draw_box, draw_detections
from hkd_det.datasets.sample import Sample, read_image
from hkd_det.detections import Detections
from hkd_det.metrics.citypersons import REASONABLE, CityPersonsSetup, match_image
from hkd_det.metrics.matching import FALSE_POSITIVE, IGNORED, TRUE_POSITIVE

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
