"""`hkd-export --verify`: its flags, and the pictures that forms are compared on."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hkd_deploy.artifact import Manifest
from hkd_deploy.export.reference import Reference, exported_reference
from hkd_deploy.export.verify import Verification
from hkd_deploy.trt.source import read_source
from hkd_det.datasets.catalogue import open_data
from hkd_det.datasets.sample import Sample
from hkd_det.errors import HkdError, UsageError

PARITY_ON = 16  # pictures


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def check(flags: argparse.Namespace) -> None:
    """Raises UsageError for flags that make no sense."""
    if flags.verify_images is not None and flags.verify_images < 1:
        raise UsageError(f"--verify-images {flags.verify_images}: at least 1")


def verification(reference: Reference, data: str, flags: argparse.Namespace) -> Verification:
    """Parity on 16 pictures of a data set's val split, miss rates on --verify-images of it.

    Raises as `open_data` does, with what to do about it.
    """
    try:
        samples = open_data(data, "val")
    except HkdError as error:
        raise type(error)(f"no pictures to verify on: {error} (or --data OTHER, or --no-verify)") from error
    pictures = [sample.path for sample in _spread(samples, PARITY_ON)]
    return Verification(reference, pictures, _spread(samples, flags.verify_images or len(samples)), data)


def verification_of_onnx(onnx: Path, flags: argparse.Namespace) -> Verification | None:
    """Against an ONNX file itself; None with --no-verify.

    A device has seldom the data that a detector was trained on: where nobody has said --verify or --data, a line says
    that nothing is verified. Raises as reading the file and the data does.
    """
    if flags.verify is False:
        return None
    source = read_source(onnx)
    try:
        data = flags.data or Manifest.from_metadata(source.metadata, onnx).data
        return verification(exported_reference(onnx), data, flags)
    except HkdError as error:
        if flags.verify or flags.data:
            raise
        print(f"hkd-export: not verified: {error}", file=sys.stderr)
        return None


def _spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` of them, evenly over all."""
    places = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    return [samples[place] for place in places]
