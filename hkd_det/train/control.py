"""Control: the same student without its teacher, same seed and schedule, and what the teacher brought."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hkd_det.datasets import Sample
from hkd_det.datasets.catalogue import open_data
from hkd_det.detections import Detections
from hkd_det.distill.methods import Methods
from hkd_det.errors import UsageError
from hkd_det.files import write_text
from hkd_det.metrics.citypersons import SETUPS, evaluate
from hkd_det.metrics.tables import DetectionTable, TruthTable
from hkd_det.train.checkpoint import read_detector
from hkd_det.train.config import TrainConfig
from hkd_det.train.judge import Judged, judge
from hkd_det.train.processes import device_of

DRAWS = 300


@dataclass(frozen=True)
class Brought:
    """What a teacher brought, measured on one split.

    taught, alone: the student with and without. low, high: of the difference in miss rate of `setup`, taught minus
    alone, the middle 95 % over pictures drawn anew with replacement (bootstrap); it knows nothing of other seeds.
    """

    setup: str
    taught: Judged
    alone: Judged
    low: float
    high: float

    @property
    def difference(self) -> float:
        """In miss rate, a fraction: below 0 the teacher helped."""
        return self.taught.miss_rates[self.setup] - self.alone.miss_rates[self.setup]


def control_of(config: TrainConfig) -> TrainConfig:
    """The settings of the control run: nothing else differs but the teacher, and the folder it goes into.

    Unlabelled pictures go with the teacher; the labelled ones come in the same steps, views and order.

    Raises UsageError for a run without a teacher, and for a teacher in the control's place.
    """
    if not config.teacher:
        raise UsageError("--control shows what a teacher brings: it needs --teacher and --distill")
    if config.distill.blockwise:
        raise UsageError("--control: blockwise makes the student from its teacher; without there is none to train")
    if config.distill.cdd:
        raise UsageError("--control: cdd asks the teacher which channels may go; without one the student stays wide")
    control = replace(
        config, teacher="", teacher_description="", unlabelled=(), distill=Methods(), run=f"{config.run}-control"
    )
    if Path(config.teacher).resolve() == (control.run_dir / "best.pt").resolve():
        raise UsageError(f"--teacher {config.teacher}: the control run would write over it; --name another")
    return control


def compare(config: TrainConfig, split: str = "val") -> Brought:
    """Judge both runs' best.pt and write `control.json` into the taught run's folder."""
    samples, device, bf16 = open_data(config.data, split), device_of(config.device), config.precision == "bf16"
    (taught, found), (alone, found_alone) = (
        judge(read_detector(Path(run) / "best.pt").build().to(device), samples, config.imgsz_hw, bf16, config.setup)
        for run in (config.run, control_of(config).run)
    )
    low, high = interval(samples, found, found_alone, config.setup)
    brought = Brought(config.setup, taught, alone, low, high)
    write_text(config.run_dir / "control.json", json.dumps(asdict(brought), indent=1) + "\n")
    return brought


def interval(
    samples: Sequence[Sample], first: Sequence[Detections], second: Sequence[Detections], setup: str, draws: int = DRAWS
) -> tuple[float, float]:
    """The middle 95 % of the difference in miss rate, first minus second, over bootstrapped sets of pictures."""
    chance, differences = np.random.default_rng(0), []
    for _ in tqdm(range(draws), desc="bootstrap", leave=False, delay=2):
        drawn = chance.integers(len(samples), size=len(samples)).tolist()
        table = TruthTable.of([samples[index].truth for index in drawn])
        rates = [
            evaluate(table, DetectionTable.of([found[index] for index in drawn]), [SETUPS[setup]])[setup]
            for found in (first, second)
        ]
        if rates[0].people:  # a draw may hold nobody
            differences.append(rates[0].value - rates[1].value)
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)


def told(brought: Brought) -> str:
    """The comparison as a table for the terminal."""
    lines = [f"{'':<22}{'taught':>10}{'alone':>10}{'difference':>12}"]
    for name, people in brought.taught.people.items():
        if people:
            pair = brought.taught.miss_rates[name], brought.alone.miss_rates[name]
            lines.append(_line(f"MR^-2 {name}", *pair))
    lines.append(_line("AP", brought.taught.ap, brought.alone.ap))
    lines.append(
        f"What the teacher brought, MR^-2 {brought.setup}: {100 * brought.difference:+.2f} points "
        f"(95 % over the pictures: {100 * brought.low:+.2f} to {100 * brought.high:+.2f}; one seed)"
    )
    return "\n".join(lines)


def _line(name: str, taught: float, alone: float) -> str:
    return f"{name:<22}{100 * taught:>8.2f} %{100 * alone:>8.2f} %{100 * (taught - alone):>+12.2f}"
