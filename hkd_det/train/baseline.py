"""Judging a trained detector: miss rate in total and by height, average precision, and what it weighs.

Control: the same student without its teacher, same seed and schedule, and what the teacher brought.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hkd_det.datasets import Sample
from hkd_det.datasets.catalog import load_dataset
from hkd_det.distill.methods import DistillConfig
from hkd_det.errors import UsageError
from hkd_det.files import write_text
from hkd_det.metrics.citypersons import REASONABLE, SETUPS, CityPersonsSetup, evaluate_detections
from hkd_det.metrics.coco import evaluate_average_precision
from hkd_det.models.base import BaseDetector
from hkd_det.models.checkpoint import load_detector_checkpoint
from hkd_det.models.zoo import count_params_and_flops
from hkd_det.structures import Detections
from hkd_det.train.config import TrainConfig
from hkd_det.train.distributed import resolve_device
from hkd_det.train.engine import predict_dataset

HEIGHT_BINS_PX = (20.0, 50.0, 100.0, 200.0)


def height_setups() -> list[CityPersonsSetup]:
    """People by height, as visible as in the setup All; the ranges are closed, so each ends just below the next."""
    ends = [*(float(np.nextafter(edge, 0)) for edge in HEIGHT_BINS_PX[1:]), 1e10]
    names = [*(f"{low:g}-{high:g} px" for low, high in pairwise(HEIGHT_BINS_PX)), "200 px and more"]
    return [
        CityPersonsSetup(name, span, (0.2, 1e10))
        for name, span in zip(names, zip(HEIGHT_BINS_PX, ends, strict=True), strict=True)
    ]


EVAL_SETUPS = (REASONABLE, SETUPS["All"], *height_setups())


@dataclass(frozen=True)
class EvalResult:
    """What a detector is worth and what it costs.

    miss_rates: MR^-2 by setup, fractions, -1 where nobody was to be found. people: to be found, by setup.
    ap, ap50: COCO's, fractions. parameters: numbers; flops: a picture. imgsz_hw: of the input.
    """

    miss_rates: dict[str, float]
    num_gt: dict[str, int]
    ap: float
    ap50: float
    parameters: int
    flops: int
    imgsz_hw: tuple[int, int]


def evaluate_detector(
    detector: BaseDetector,
    samples: Sequence[Sample],
    imgsz_hw: tuple[int, int],
    bf16: bool,
    setup: str = "Reasonable",
) -> tuple[EvalResult, list[Detections]]:
    """Measure a detector on samples, in `setup` and those of JUDGED_SETUPS; its detections come along."""
    found = predict_dataset(detector, samples, imgsz_hw, bf16)
    rates = evaluate_detections(samples, found, dict.fromkeys((SETUPS[setup], *EVAL_SETUPS)))
    precision = evaluate_average_precision(samples, found)
    weight = count_params_and_flops(detector, imgsz_hw)
    return EvalResult(
        {name: rate.value for name, rate in rates.items()},
        {name: rate.num_gt for name, rate in rates.items()},
        precision["AP"],
        precision["AP50"],
        weight.num_params,
        weight.flops,
        imgsz_hw,
    ), found


NUM_BOOTSTRAP = 300


@dataclass(frozen=True)
class ControlComparison:
    """What a teacher brought, measured on one split.

    taught, alone: the student with and without. low, high: of the difference in miss rate of `setup`, taught minus
    alone, the middle 95 % over pictures drawn anew with replacement (bootstrap); it knows nothing of other seeds.
    """

    setup: str
    distilled: EvalResult
    baseline: EvalResult
    ci_low: float
    ci_high: float

    @property
    def mr_difference(self) -> float:
        """In miss rate, a fraction: below 0 the teacher helped."""
        return self.distilled.miss_rates[self.setup] - self.baseline.miss_rates[self.setup]


def control_config(config: TrainConfig) -> TrainConfig:
    """The settings of the control run: nothing else differs but the teacher, and the folder it goes into.

    Unlabelled pictures go with the teacher; the labelled ones come in the same steps, views and order.

    Raises UsageError for a run without a teacher, and for a teacher in the control's place.
    """
    if not config.teacher:
        raise UsageError("--baseline shows what a teacher brings: it needs --teacher and --distill")
    if config.distill.blockwise:
        raise UsageError("--baseline: blockwise makes the student from its teacher; without there is none to train")
    if config.distill.cdd:
        raise UsageError("--baseline: cdd asks the teacher which channels may go; without one the student stays wide")
    control = replace(
        config,
        teacher="",
        teacher_config="",
        unlabeled=(),
        distill=DistillConfig(),
        save_dir=f"{config.save_dir}-baseline",
    )
    if Path(config.teacher).resolve() == (control.save_path / "best.pt").resolve():
        raise UsageError(f"--teacher {config.teacher}: the control run would write over it; --name another")
    return control


def compare_with_control(config: TrainConfig, split: str = "val") -> ControlComparison:
    """Judge both runs' best.pt and write `baseline.json` into the taught run's folder."""
    samples, device, bf16 = load_dataset(config.data, split), resolve_device(config.device), config.precision == "bf16"
    (taught, found), (alone, found_alone) = (
        evaluate_detector(
            load_detector_checkpoint(Path(run) / "best.pt").build().to(device),
            samples,
            config.imgsz_hw,
            bf16,
            config.setup,
        )
        for run in (config.save_dir, control_config(config).save_dir)
    )
    low, high = bootstrap_interval(samples, found, found_alone, config.setup)
    brought = ControlComparison(config.setup, taught, alone, low, high)
    write_text(config.save_path / "baseline.json", json.dumps(asdict(brought), indent=1) + "\n")
    return brought


def bootstrap_interval(
    samples: Sequence[Sample],
    first_detections: Sequence[Detections],
    second_detections: Sequence[Detections],
    setup: str,
    num_resamples: int = NUM_BOOTSTRAP,
) -> tuple[float, float]:
    """The middle 95 % of the difference in miss rate, first minus second, over bootstrapped sets of pictures."""
    chance, differences = np.random.default_rng(0), []
    for _ in tqdm(range(num_resamples), desc="bootstrap", leave=False, delay=2):
        drawn = chance.integers(len(samples), size=len(samples)).tolist()
        resampled = [samples[index] for index in drawn]
        rates = [
            evaluate_detections(resampled, [found[index] for index in drawn], [SETUPS[setup]])[setup]
            for found in (first_detections, second_detections)
        ]
        if rates[0].num_gt:  # a draw may hold nobody
            differences.append(rates[0].value - rates[1].value)
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)


def format_comparison(comparison: ControlComparison) -> str:
    """The comparison as a table for the terminal."""
    lines = [f"{'':<22}{'taught':>10}{'alone':>10}{'difference':>12}"]
    for name, people in comparison.distilled.num_gt.items():
        if people:
            pair = comparison.distilled.miss_rates[name], comparison.baseline.miss_rates[name]
            lines.append(_format_comparison_row(f"MR^-2 {name}", *pair))
    lines.append(_format_comparison_row("AP", comparison.distilled.ap, comparison.baseline.ap))
    lines.append(
        f"What the teacher brought, MR^-2 {comparison.setup}: {100 * comparison.mr_difference:+.2f} points "
        f"(95 % over the pictures: {100 * comparison.ci_low:+.2f} to {100 * comparison.ci_high:+.2f}; one seed)"
    )
    return "\n".join(lines)


def _format_comparison_row(name: str, distilled: float, baseline: float) -> str:
    return f"{name:<22}{100 * distilled:>8.2f} %{100 * baseline:>8.2f} %{100 * (distilled - baseline):>+12.2f}"
