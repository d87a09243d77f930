"""Options of the exported graph and the flags of hkd-export that set them."""

import argparse
from dataclasses import dataclass

from hkd_deploy.model_metadata import ModelMetadata
from hkd_det.errors import UsageError
from hkd_det.letterbox import parse_imgsz

DEFAULT_MAX_IMGSZ = "1920x1080"  # Full HD, the largest image of most cameras
DYNAMIC_CHOICES = ("batch", "size")
FLAGS = ("imgsz", "batch", "dynamic", "letterbox", "max_imgsz", "no_preprocess", "raw")


@dataclass(frozen=True)
class ExportOptions:
    """Inputs and outputs of the exported graph.

    Attributes:
        imgsz_hw: (height, width) of the network input in pixels; the upper limit if `dynamic_size`.
        batch: Images per batch, or None for a dynamic batch size.
        dynamic_size: Accept any size up to `imgsz_hw` and pad to multiples of 32 in the graph.
        letterbox_hw: (height, width) of the largest image in pixels if the graph letterboxes images of any size.
            None if the caller letterboxes.
        preprocess: Take uint8 RGB (B, H, W, 3). If False, take float32 RGB (B, 3, H, W), 0 to 1.
        raw: Return the boxes and logits of all candidates instead of the final detections.

    Raises:
        UsageError: If two options exclude each other or `batch` is below 1.
    """

    imgsz_hw: tuple[int, int]
    batch: int | None = 1
    dynamic_size: bool = False
    letterbox_hw: tuple[int, int] | None = None
    preprocess: bool = True
    raw: bool = False

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise UsageError(f"--batch {self.batch}: expected at least 1. For any batch size, set --dynamic batch.")
        if self.letterbox_hw is None:
            return
        if self.raw:
            raise UsageError("--raw: not available with --letterbox; raw boxes are in network input pixels. Omit one.")
        if not self.preprocess:
            raise UsageError("--no-preprocess: not available with --letterbox, which is preprocessing. Omit one.")
        if self.dynamic_size:
            raise UsageError("--dynamic size: not available with --letterbox, which accepts any size. Omit one.")

    @property
    def max_hw(self) -> tuple[int, int]:
        """(height, width) of the largest image that the graph accepts, in pixels."""
        return self.letterbox_hw or self.imgsz_hw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the graph flags to `parser`.

    Args:
        parser: Parser of hkd-export.
    """
    group = parser.add_argument_group("graph", "require weights (.pt) as input")
    group.add_argument(
        "--imgsz", metavar="WxH", help="input size, width x height, multiples of 32 (default: training size)"
    )
    group.add_argument("--batch", type=int, metavar="N", help="images per batch (default: 1)")
    group.add_argument(
        "--dynamic",
        nargs="?",
        const="batch",
        metavar="batch,size",
        type=_parse_dynamic,
        default=(),
        help="dynamic axes: batch (also without a value), size (any size up to --imgsz), or both",
    )
    group.add_argument(
        "--letterbox",
        action="store_true",
        help="resize images of any size in the graph and return boxes in image pixels",
    )
    group.add_argument(
        "--max-imgsz",
        metavar="WxH",
        help=f"largest image, width x height (default: {DEFAULT_MAX_IMGSZ}); requires --letterbox",
    )
    group.add_argument(
        "--no-preprocess", action="store_true", help="float32 RGB input (B, 3, H, W), 0 to 1, instead of uint8"
    )
    group.add_argument(
        "--raw", action="store_true", help="output boxes and logits of all candidates, for a custom decoder"
    )


def make_export_options(flags: argparse.Namespace, trained_hw: tuple[int, int] | None) -> ExportOptions:
    """Return the options that the flags of `add_arguments` set.

    Args:
        flags: Parsed command line.
        trained_hw: (height, width) of the training input in pixels, the default of `--imgsz`. None if the checkpoint
            does not contain it.

    Raises:
        UsageError: If flags exclude each other, have an invalid value, or --imgsz is required.
    """
    imgsz_hw = parse_imgsz(flags.imgsz) if flags.imgsz else trained_hw
    if imgsz_hw is None:
        raise UsageError("--imgsz: required, because the checkpoint does not contain an input size. Set WIDTHxHEIGHT.")
    if "batch" in flags.dynamic and flags.batch is not None:
        raise UsageError(f"--batch {flags.batch}: not available with --dynamic batch. Omit one.")
    if flags.max_imgsz and not flags.letterbox:
        raise UsageError(f"--max-imgsz {flags.max_imgsz}: requires --letterbox. Set --imgsz for the network input.")
    return ExportOptions(
        imgsz_hw,
        None if "batch" in flags.dynamic else 1 if flags.batch is None else flags.batch,
        "size" in flags.dynamic,
        _parse_max_imgsz(flags.max_imgsz or DEFAULT_MAX_IMGSZ) if flags.letterbox else None,
        not flags.no_preprocess,
        flags.raw,
    )


def read_export_options(metadata: ModelMetadata) -> ExportOptions:
    """Return the options that a model file was exported with.

    Args:
        metadata: Metadata of the file.
    """
    return ExportOptions(
        metadata.imgsz_hw,
        metadata.batch,
        metadata.dynamic,
        metadata.max_imgsz_hw if metadata.letterbox else None,
        metadata.preprocess == "uint8",
        metadata.raw,
    )


def _parse_dynamic(text: str) -> tuple[str, ...]:
    axes = tuple(text.split(","))
    if not set(axes) <= set(DYNAMIC_CHOICES):
        raise UsageError(f"--dynamic {text}: expected batch, size or batch,size. Place the model before this flag.")
    return axes


def _parse_max_imgsz(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not all(side.isascii() and side.isdigit() and int(side) > 0 for side in (width, height)):
        raise UsageError(f"--max-imgsz {text}: expected WIDTHxHEIGHT in pixels. Example: {DEFAULT_MAX_IMGSZ}.")
    return int(height), int(width)
