"""What an exported file says of itself: the keys the field's readers know, and ours under `hkd.`."""

import json
from datetime import datetime, timezone
from importlib.metadata import version

from hkd_deploy.artifact import METADATA_FORMAT, PREPROCESS, PREPROCESS_FLOAT01, PREPROCESS_IN_GRAPH
from hkd_deploy.export.options import ExportOptions
from hkd_det.datasets.catalogue import dataset_license
from hkd_det.errors import HkdError
from hkd_det.imgsz import STRIDE
from hkd_det.models.sizes import count_params_and_flops
from hkd_det.models.yolo import UltralyticsSpec
from hkd_det.train.checkpoint import DetectorCheckpoint, weights_sha256


def make_metadata(checkpoint: DetectorCheckpoint, options: ExportOptions) -> dict[str, str]:
    """Every key with its text; `hkd_deploy.artifact.Manifest` reads them."""
    weight = count_params_and_flops(checkpoint.build(), options.imgsz_hw)
    return {
        "description": f"hkd-det {checkpoint.model}, pedestrian detector, {'raw' if options.raw else 'end to end'}",
        "author": "hkd-det",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": version("hkd-det"),
        "license": f"{_get_license(checkpoint)} (code); weights: as {_get_weights_license(checkpoint)}",
        "task": "detect",
        "stride": str(STRIDE),
        "batch": str(options.batch or "dynamic"),
        "imgsz": str(list(options.imgsz_hw)),
        "channels": "3",
        "names": "{0: 'person'}",
        "hkd.format": str(_select_format(options)),
        "hkd.model": checkpoint.model,
        "hkd.parameters": str(weight.num_params),
        "hkd.flops": str(weight.flops),
        "hkd.preprocess": json.dumps(_describe_preprocess(options)),
        "hkd.max_hw": str(list(options.max_hw)),
        "hkd.dynamic_size": _format_bool(options.dynamic_size),
        "hkd.raw": _format_bool(options.raw),
        "hkd.weights_sha256": weights_sha256(checkpoint.weights),
        "hkd.data": str(checkpoint.config["data"]),
        **_make_eval_metadata(checkpoint),
    }


def _select_format(options: ExportOptions) -> int:
    """Readers of format 1 can run the one graph that there was then."""
    plain = options.preprocess and not (options.dynamic_size or options.letterbox_hw or options.raw)
    return 1 if plain else METADATA_FORMAT


def _describe_preprocess(options: ExportOptions) -> dict[str, object]:
    if options.letterbox_hw:
        return PREPROCESS_IN_GRAPH
    return PREPROCESS if options.preprocess else PREPROCESS_FLOAT01


def _make_eval_metadata(checkpoint: DetectorCheckpoint) -> dict[str, str]:
    """How good the weights were when they were chosen, and on what."""
    if "setup" not in checkpoint.config:  # nobody judged it
        return {}
    return {
        "hkd.epoch": str(checkpoint.epoch),
        "hkd.miss_rate": f"{checkpoint.miss_rate:.6f}",
        "hkd.miss_rate_on": f"{checkpoint.config['data']}, val, {checkpoint.config['setup']}, trained weights in torch",
    }


def _get_license(checkpoint: DetectorCheckpoint) -> str:
    """A YOLO model's network is Ultralytics' work, whoever trained it."""
    return "AGPL-3.0" if isinstance(checkpoint.spec, UltralyticsSpec) else "Apache-2.0"


def _get_weights_license(checkpoint: DetectorCheckpoint) -> str:
    """In words, as far as is known: the data's yaml may not have come along with the weights."""
    try:
        terms = dataset_license(str(checkpoint.config["data"]))
    except HkdError:
        terms = ""
    return f"the owners of {checkpoint.config['data']} allow: {terms}" if terms else "their training data allows"


def _format_bool(value: bool) -> str:
    return "true" if value else "false"
