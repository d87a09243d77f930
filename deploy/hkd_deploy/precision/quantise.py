"""From an FP32 file to INT8 whose miss rate rises by little: calibrate, choose the method, leave layers out."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hkd_deploy.precision.calibration import METHODS, SEED, Method, Reach, calibrate, network_input
from hkd_deploy.precision.int8 import to_int8, with_folded_norms
from hkd_deploy.precision.parts import Parts, parts_of
from hkd_deploy.precision.search import Trial, fewest_left_out, noise_by_layer
from hkd_deploy.precision.source import Source, import_onnx
from hkd_det.datasets.sample import Sample, read_picture
from hkd_det.errors import DataError

RANKED_ON = 8  # pictures

# The rise of the miss rate, in percentage points, of the file at a path; the text is for the progress bar.
RiseOf = Callable[[Path, str], float]


@dataclass(frozen=True, eq=False)
class Quantised:
    """model: in INT8 but for the layers left out. method: of calibration. layers: that could have been quantised."""

    model: Any
    method: Method
    layers: int
    trial: Trial

    def facts(self, data: str, pictures: int) -> dict[str, Any]:
        """For the file's metadata; data, pictures: what it was calibrated on."""
        left = asdict(self.trial)
        return {"method": self.method, "layers": self.layers, **left, "data": data, "pictures": pictures, "seed": SEED}


def quantise(source: Source, calibration: Sequence[Sample], rise_of: RiseOf, most_points: float) -> Quantised:
    """The quickest INT8 model whose miss rate rises by `most_points` at most; where there is none, the best there was.

    All layers in INT8, by the method of calibration whose miss rate is least; then, if it rises too much, without the
    layers that cost most. Raises DataError for a graph without a layer to quantise.
    """
    folded = replace(source, model=with_folded_norms(source.model))
    parts = parts_of(folded.model)
    if not parts.layers:
        raise DataError(f"{source.path}: no layer in it that INT8 would make quicker")
    reach = calibrate(folded, parts.layers, calibration)
    with TemporaryDirectory(prefix="hkd-precision-") as folder:

        def trial(method: Method, left_out: tuple[str, ...]) -> Trial:
            path = Path(folder) / "trial.onnx"
            import_onnx().save(_without(folded.model, parts, reach[method], left_out), path)
            said = f"int8 {method}" + (f", {len(left_out)} layers left out" if left_out else "")
            return Trial(left_out, rise_of(path, said))

        trials = {method: trial(method, ()) for method in METHODS}
        method = min(METHODS, key=lambda one: trials[one].rise_points)
        best = trials[method]
        if best.rise_points > most_points:
            inputs = [network_input(source.manifest, read_picture(one.path)) for one in calibration[:RANKED_ON]]
            ranked = [layer for layer, _ in noise_by_layer(folded.model, parts, reach[method], inputs)]
            best = fewest_left_out(ranked, lambda names: trial(method, names).rise_points, most_points, best)
    return Quantised(_without(folded.model, parts, reach[method], best.left_out), method, len(parts.layers), best)


def _without(model: Any, parts: Parts, reach: Reach, left_out: tuple[str, ...]) -> Any:
    return to_int8(model, [layer for layer in parts.layers if layer not in left_out], reach)
