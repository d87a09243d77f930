"""Pictures with what a detector found, took for a person, and missed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hkd_deploy import Detector
from hkd_deploy.draw import Verdict, draw_box, draw_detections
from hkd_det.datasets.sample import Sample, read_picture
from hkd_det.detections import Detections
from hkd_det.metrics.citypersons import REASONABLE, Setup, match
from hkd_det.metrics.matching import FALSE, IGNORED, TRUE

VERDICTS = {TRUE: Verdict.HIT, FALSE: Verdict.FALSE_POSITIVE, IGNORED: Verdict.IGNORED}

Picture = tuple[str, NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class Gallery:
    """Pictures, each (caption, uint8 RGB with boxes drawn), and the score from which a box is drawn."""

    conf: float
    pictures: tuple[Picture, ...]


def judged_pictures(
    detector: Detector, samples: Sequence[Sample], conf: float, count: int, setup: Setup = REASONABLE
) -> Gallery:
    """`count` pictures spread over those with people to be found.

    Drawn are detections with a score of at least `conf`, and the people that are then missed.
    """
    peopled = [sample for sample in samples if (~sample.truth.ignore).any()] or list(samples)
    places = np.unique(np.linspace(0, len(peopled) - 1, min(count, len(peopled))).round().astype(int))
    pictures = []
    for place in places:
        sample = peopled[place]
        picture = read_picture(sample.path)
        pictures.append(judged(picture, sample, detector(picture).above(conf), setup))
    return Gallery(conf, tuple(pictures))


def judged(picture_rgb: NDArray[np.uint8], sample: Sample, found: Detections, setup: Setup = REASONABLE) -> Picture:
    """(caption, a copy of the picture): every detection in its verdict's colour, every missed person dashed."""
    judgement = match(sample.truth, found, setup)
    kept = Detections(found.boxes_xyxy[judgement.kept], found.scores[judgement.kept])
    canvas = draw_detections(picture_rgb, kept, [VERDICTS[int(verdict)] for verdict in judgement.verdict])
    for index in judgement.missed:
        draw_box(canvas, sample.truth.boxes_xyxy[index], Verdict.MISS)
    hits, wrong = int((judgement.verdict == TRUE).sum()), int((judgement.verdict == FALSE).sum())
    people = hits + len(judgement.missed)
    caption = f"{sample.path.name}: {hits} of {people} found, {wrong} false alarm{'' if wrong == 1 else 's'}"
    return caption, canvas
