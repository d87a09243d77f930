"""`hkd-export --verify`: its flags, and the pictures that forms are compared on."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hkd_deploy.artifact import ModelMetadata
from hkd_deploy.export.reference import Reference, onnx_reference
from hkd_deploy.export.verify import Verification
from hkd_deploy.trt.source import read_onnx_file
from hkd_det.datasets.catalogue import load_dataset
from hkd_det.datasets.sample import Sample
from hkd_det.errors import HkdError, UsageError

NUM_PARITY_IMAGES = 16  # pictures


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """The group of flags; --data is the command's own."""
    group = parser.add_argument_group("verification", "on --data's val split (docs/export/verification.md)")
    group.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare each form with what it was made of, and measure its miss rate; on unless --no-verify",
    )
    group.add_argument(
        "--verify-images", type=int, metavar="N", help="measure miss rates on N pictures; by default all"
    )


def check_verify_flags(flags: argparse.Namespace) -> None:
    """Raises UsageError for flags that make no sense."""
    if flags.verify_images is not None and flags.verify_images < 1:
        raise UsageError(f"--verify-images {flags.verify_images}: at least 1")


def build_verification(reference: Reference, data: str, flags: argparse.Namespace) -> Verification:
    """Parity on 16 pictures of a data set's val split, miss rates on --verify-images of it.

    Raises as `open_data` does, with what to do about it.
    """
    try:
        samples = load_dataset(data, "val")
    except HkdError as error:
        raise type(error)(f"no pictures to verify on: {error} (or --data OTHER, or --no-verify)") from error
    pictures = [sample.path for sample in _select_evenly(samples, NUM_PARITY_IMAGES)]
    return Verification(reference, pictures, _select_evenly(samples, flags.verify_images or len(samples)), data)


def build_onnx_verification(onnx: Path, flags: argparse.Namespace) -> Verification | None:
    """Against an ONNX file itself; None with --no-verify.

    A device has seldom the data that a detector was trained on: where nobody has said --verify or --data, a line says
    that nothing is verified. Raises as reading the file and the data does.
    """
    if flags.verify is False:
        return None
    source = read_onnx_file(onnx)
    try:
        data = flags.data or ModelMetadata.from_metadata(source.metadata, onnx).data
        return build_verification(onnx_reference(onnx), data, flags)
    except HkdError as error:
        if flags.verify or flags.data:
            raise
        print(f"hkd-export: not verified: {error}", file=sys.stderr)
        return None


def _select_evenly(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` of them, evenly over all."""
    places = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    return [samples[place] for place in places]
