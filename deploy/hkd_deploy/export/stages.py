"""Where inside an exported file the difference begins: stage by stage against torch, and the worst layer."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from hkd_deploy.export.graph import ExportModule
from hkd_deploy.export.layers import LayerComparison, compare_layers
from hkd_deploy.export.parity import BOX_TOLERANCE_PX, SCORE_TOLERANCE, max_abs_difference

# Share of the values' size. Rounding alone gives some 1e-6 behind a deep network; what shows in an answer is more.
MAX_RELATIVE_ERROR = 1e-4


def locate_difference(export_module: ExportModule, path: Path, batch: NDArray[Any]) -> str:
    """Which stage is the first that differs, and which layer is the worst: part of a sentence.

    batch: one picture, on which the difference shows.
    """
    rows = export_module.options.batch or 1
    layers, wanted, found = compare_layers(export_module, onnx.load(path), np.repeat(batch, rows, axis=0))
    if not layers:
        return "where the difference begins can't be told: no node's name says of which of torch's layers it is"
    box_px, score = max_abs_difference(wanted, found)
    if box_px <= BOX_TOLERANCE_PX and score <= SCORE_TOLERANCE:
        return "it agrees as soon as its inside is looked at, so it is the runtime that fuses its operators wrongly"
    return f"{_find_first_stage(layers)}; {_find_worst_layer(layers)}"


def _find_first_stage(layers: list[LayerComparison]) -> str:
    """preprocessing ends where the first layer begins, decoding begins where the last ends."""
    stages = {"preprocessing": layers[0].input_error}
    for layer in layers:
        stage = _get_stage(layer.name)
        stages[stage] = max(stages.get(stage, 0), layer.output_error)
    for stage, apart in stages.items():
        if apart > MAX_RELATIVE_ERROR:
            return f"the first stage that differs is {stage} (by {apart:.2g} of its values)"
    # Which of two overlapping boxes suppresses the other, or which peaks or proposals are best, is rounding's
    # choice where scores are that close: of a detector that has learnt for a minute they all are.
    return (
        f"the first stage that differs is decoding (all {len(layers)} layers before it agree): of a hardly trained "
        "detector rounding chooses among scores that are all alike, then train it longer or say --no-verify"
    )


def _get_stage(name: str) -> str:
    """backbone, neck, head; of a detector that is one row of layers, the layer's place in the row."""
    parts = name.removeprefix("detector.").split(".")
    return ".".join(parts[:3]) if parts[0] == "network" else parts[0]


def _find_worst_layer(layers: list[LayerComparison]) -> str:
    worst = max(layers, key=lambda layer: layer.layer_error)
    if worst.layer_error <= MAX_RELATIVE_ERROR:
        return f"given the same input, every layer agrees (the worst, {_strip_detector_prefix(worst)}, by {worst.layer_error:.2g})"
    return f"the worst layer is {_strip_detector_prefix(worst)} (given the same input, by {worst.layer_error:.2g} of its values)"


def _strip_detector_prefix(layer: LayerComparison) -> str:
    return layer.name.removeprefix("detector.")
