"""Detectors that are part of the package: ONNX files with a model card each."""

from dataclasses import dataclass
from pathlib import Path

from hkd_det.console import format_table

DIRECTORY = Path(__file__).parent


@dataclass(frozen=True)
class ShippedModel:
    """A detector of the package. The model card NAME.md states its training, accuracy and limits.

    Attributes:
        name: Name that commands and `open_detector` accept instead of a path.
        purpose: Device class.
        imgsz_wh: Input width and height, pixels.
        num_params: Number of parameters.
        miss_rates: MR^-2 on INRIA test in percent, with the original and with the audited ground truth.
        license: License of the weights.
    """

    name: str
    purpose: str
    imgsz_wh: tuple[int, int]
    num_params: int
    miss_rates: tuple[float, float]
    license: str

    @property
    def path(self) -> Path:
        """The ONNX file."""
        return DIRECTORY / f"{self.name}.onnx"

    @property
    def card(self) -> Path:
        """The model card."""
        return DIRECTORY / f"{self.name}.md"


SHIPPED_MODELS: dict[str, ShippedModel] = {
    "hkd-cpu": ShippedModel("hkd-cpu", "CPU", (320, 320), 896_754, (8.5, 5.6), "Apache-2.0"),
}
DEFAULT_MODEL = "hkd-cpu"
FINETUNE_RECIPE = DIRECTORY / "finetune.yaml"  # hkd-train without --model, --weights and --recipe


def resolve_model(model: Path | str | None) -> Path:
    """Return the file of a model.

    Args:
        model: Path, name of a shipped model, or None for the default model. An existing file has priority over a name.

    Returns:
        The path. It need not exist if `model` is a path.
    """
    if model is None:
        return SHIPPED_MODELS[DEFAULT_MODEL].path
    path = Path(model)
    shipped = SHIPPED_MODELS.get(str(model))
    return shipped.path if shipped and not path.exists() else path


def format_model_list() -> str:
    """Return the shipped models as a text table."""
    headers = ["model", "for", "input", "parameters", "MR^-2 INRIA test, original / audited", "license", "model card"]
    rows = [
        [
            model.name,
            model.purpose,
            f"{model.imgsz_wh[0]}x{model.imgsz_wh[1]}",
            f"{model.num_params / 1e6:.2f} M",
            f"{model.miss_rates[0]:.1f} / {model.miss_rates[1]:.1f} %",
            model.license,
            str(model.card),
        ]
        for model in SHIPPED_MODELS.values()
    ]
    return format_table(rows, headers, left_columns=3)
