"""From an FP32 file to INT8 whose miss rate rises by little: calibrate, choose the method, leave layers out."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hkd_deploy.precision.calibration import (
    CALIBRATION_METHODS,
    SEED,
    CalibrationMethod,
    TensorRanges,
    calibrate,
    make_network_input,
)
from hkd_deploy.precision.int8 import convert_to_int8, fold_norms
from hkd_deploy.precision.parts import GraphRegions, find_graph_regions
from hkd_deploy.precision.search import QuantizationTrial, layer_sensitivity, select_excluded_nodes
from hkd_deploy.precision.source import Fp32Model, import_onnx
from hkd_det.datasets.sample import Sample, read_image
from hkd_det.errors import DataError

NUM_RANKING_IMAGES = 8  # pictures

# The rise of the miss rate, in percentage points, of the file at a path; the text is for the progress bar.
MeasureMrIncrease = Callable[[Path, str], float]


@dataclass(frozen=True, eq=False)
class QuantizationResult:
    """model: in INT8 but for the layers left out. method: of calibration. layers: that could have been quantised."""

    model: Any
    method: CalibrationMethod
    num_layers: int
    trial: QuantizationTrial

    def to_metadata(self, data: str, num_images: int) -> dict[str, Any]:
        """For the file's metadata; data, pictures: what it was calibrated on."""
        left = asdict(self.trial)
        return {
            "method": self.method,
            "layers": self.num_layers,
            **left,
            "data": data,
            "pictures": num_images,
            "seed": SEED,
        }


def quantize(
    source: Fp32Model, calibration: Sequence[Sample], measure_mr_increase: MeasureMrIncrease, max_mr_increase: float
) -> QuantizationResult:
    """The quickest INT8 model whose miss rate rises by `most_points` at most; where there is none, the best there was.

    All layers in INT8, by the method of calibration whose miss rate is least; then, if it rises too much, without the
    layers that cost most. Raises DataError for a graph without a layer to quantise.
    """
    folded = replace(source, model=fold_norms(source.model))
    parts = find_graph_regions(folded.model)
    if not parts.layers:
        raise DataError(f"{source.path}: no layer in it that INT8 would make quicker")
    reach = calibrate(folded, parts.layers, calibration)
    with TemporaryDirectory(prefix="hkd-precision-") as folder:

        def trial(method: CalibrationMethod, left_out: tuple[str, ...]) -> QuantizationTrial:
            path = Path(folder) / "trial.onnx"
            import_onnx().save(_quantize_except(folded.model, parts, reach[method], left_out), path)
            said = f"int8 {method}" + (f", {len(left_out)} layers left out" if left_out else "")
            return QuantizationTrial(left_out, measure_mr_increase(path, said))

        trials = {method: trial(method, ()) for method in CALIBRATION_METHODS}
        method = min(CALIBRATION_METHODS, key=lambda one: trials[one].mr_increase)
        best = trials[method]
        if best.mr_increase > max_mr_increase:
            inputs = [
                make_network_input(source.model_metadata, read_image(one.path))
                for one in calibration[:NUM_RANKING_IMAGES]
            ]
            ranked = [layer for layer, _ in layer_sensitivity(folded.model, parts, reach[method], inputs)]
            best = select_excluded_nodes(ranked, lambda names: trial(method, names).mr_increase, max_mr_increase, best)
    return QuantizationResult(
        _quantize_except(folded.model, parts, reach[method], best.excluded_nodes), method, len(parts.layers), best
    )


def _quantize_except(
    model: Any, regions: GraphRegions, tensor_ranges: TensorRanges, excluded_nodes: tuple[str, ...]
) -> Any:
    return convert_to_int8(model, [layer for layer in regions.layers if layer not in excluded_nodes], tensor_ranges)
