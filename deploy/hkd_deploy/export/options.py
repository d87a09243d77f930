"""`GraphOptions`: what the exported graph takes and gives, and the flags of hkd-export that say so."""

import argparse
from dataclasses import dataclass

from hkd_deploy.model_metadata import ModelMetadata
from hkd_det.errors import UsageError
from hkd_det.letterbox import format_imgsz, parse_imgsz

DEFAULT_MAX_IMGSZ = "1920x1080"  # the largest picture of most cameras
DYNAMIC_CHOICES = ("batch", "size")
FLAGS = ("imgsz", "batch", "dynamic", "letterbox", "max_size", "no_preprocess", "raw")


@dataclass(frozen=True)
class ExportOptions:
    """The graph's interface. Raises UsageError for what does not go together.

    imgsz_hw: (height, width) pixels the network sees; the most it sees where `dynamic_size`.
    batch: pictures at once; None for any number.
    dynamic_size: pictures of any size up to imgsz_hw, padded inside to a multiple of 32.
    letterbox_hw: the largest picture where the graph takes pictures of any size and letterboxes them itself, else None.
    preprocess: uint8 (B, H, W, 3) RGB comes in; without it float32 (B, 3, H, W) RGB, 0..1.
    raw: every candidate's box and logit go out, before any is chosen.
    """

    imgsz_hw: tuple[int, int]
    batch: int | None = 1
    dynamic_size: bool = False
    letterbox_hw: tuple[int, int] | None = None
    preprocess: bool = True
    raw: bool = False

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise UsageError(f"--batch {self.batch}: at least 1 (any number: --dynamic batch)")
        if self.letterbox_hw is None:
            return
        if self.raw:
            raise UsageError("--raw --letterbox: raw boxes are in pixels of the network's input; leave one out")
        if not self.preprocess:
            raise UsageError("--no-preprocess --letterbox: letterboxing is preprocessing; leave one out")
        if self.dynamic_size:
            raise UsageError(
                "--dynamic size --letterbox: --letterbox takes pictures of any size already; leave one out"
            )

    @property
    def max_hw(self) -> tuple[int, int]:
        """(height, width) pixels of the largest picture the graph takes."""
        return self.letterbox_hw or self.imgsz_hw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags, in a group of their own."""
    group = parser.add_argument_group("graph")
    group.add_argument("--imgsz", help="input size, width x height; by default the one trained at")
    group.add_argument("--batch", type=int, help="pictures the graph takes at once; by default 1")
    group.add_argument(
        "--dynamic",
        nargs="?",
        const="batch",
        metavar="batch,size",
        type=_parse_dynamic,
        default=(),
        help="what is left free: batch (also when bare), size (anything up to --imgsz), or both",
    )
    group.add_argument(
        "--letterbox", action="store_true", help="take pictures of any size, resize inside, answer in their pixels"
    )
    group.add_argument(
        "--max-size", help=f"the largest picture for --letterbox, width x height; by default {DEFAULT_MAX_IMGSZ}"
    )
    group.add_argument(
        "--no-preprocess", action="store_true", help="take float32 (B, 3, H, W) RGB 0..1 that you prepared yourself"
    )
    group.add_argument("--raw", action="store_true", help="give every candidate's box and logit, for your own decoder")


def make_export_options(flags: argparse.Namespace, trained_hw: tuple[int, int]) -> ExportOptions:
    """The options that the flags of `add_arguments` ask for; UsageError for what does not go together."""
    if "batch" in flags.dynamic and flags.batch is not None:
        raise UsageError(f"--batch {flags.batch} --dynamic batch: fixed or free; leave one out")
    if flags.max_size and not flags.letterbox:
        raise UsageError(f"--max-size {flags.max_size}: only for --letterbox; the largest input is --imgsz")
    return ExportOptions(
        parse_imgsz(flags.imgsz or format_imgsz(trained_hw)),
        None if "batch" in flags.dynamic else 1 if flags.batch is None else flags.batch,
        "size" in flags.dynamic,
        _parse_max_imgsz(flags.max_size or DEFAULT_MAX_IMGSZ) if flags.letterbox else None,
        not flags.no_preprocess,
        flags.raw,
    )


def read_export_options(metadata: ModelMetadata) -> ExportOptions:
    """The options that a file was exported with."""
    return ExportOptions(
        metadata.imgsz_hw,
        metadata.batch,
        metadata.dynamic,
        metadata.max_imgsz_hw if metadata.letterbox else None,
        metadata.preprocess == "uint8",
        metadata.raw,
    )


def _parse_dynamic(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if not set(words) <= set(DYNAMIC_CHOICES):
        raise UsageError(f"--dynamic {text}: expected batch, size or batch,size (the model goes before it)")
    return words


def _parse_max_imgsz(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not all(side.isascii() and side.isdigit() and int(side) > 0 for side in (width, height)):
        raise UsageError(f"--max-size {text}: expected pixels as {DEFAULT_MAX_IMGSZ} (width x height)")
    return int(height), int(width)
