"""Writing a smaller file: what its source said of itself comes along, and what was done to it."""

import json
from pathlib import Path
from typing import Any

from hkd_deploy.precision.source import Fp32Model, import_onnx


def save_model(
    source: Fp32Model,
    model: Any,
    path: Path,
    precision: str,
    quantization: dict[str, Any],
    precision_report: dict[str, Any],
) -> None:
    """Write `model` with its source's metadata and with

    hkd.precision: fp16, bf16 or int8. hkd.quantised: JSON, how INT8 was made; {} of others. hkd.verdict: JSON.
    hkd.source_sha256: of the FP32 file.
    """
    onnx = import_onnx()
    onnx.helper.set_model_props(
        model,
        {
            **source.get_metadata(),
            "hkd.precision": precision,
            "hkd.quantised": json.dumps(quantization),
            "hkd.verdict": json.dumps(precision_report),
            "hkd.source_sha256": source.sha256,
        },
    )
    onnx.save(model, path)
