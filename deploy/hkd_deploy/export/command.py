"""`hkd-export`: a trained detector as one file that needs nothing but a runtime."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hkd_deploy.export.onnx_file import write_onnx
from hkd_deploy.export.parity import Parity, compare
from hkd_det.datasets.catalogue import open_data
from hkd_det.errors import HkdError, UsageError, run_command
from hkd_det.files import replacing
from hkd_det.imgsz import format_imgsz, parse_imgsz
from hkd_det.train.checkpoint import DetectorCheckpoint, read_detector

VERIFY_ON = 16  # pictures


class ParityError(HkdError):
    """The exported file does not say what the trained detector says."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry; returns its exit code."""
    return run_command("hkd-export", _body, argv)


def export(
    checkpoint: DetectorCheckpoint,
    path: Path,
    imgsz_hw: tuple[int, int],
    batch: int | None,
    verify_on: Sequence[Path],
) -> Parity:
    """Write `path` and compare it with the trained detector on the pictures `verify_on`; batch None leaves it free.

    The file appears under its name only if parity holds: ParityError otherwise.
    """
    with replacing(path) as aside:
        write_onnx(checkpoint, aside, imgsz_hw, batch)
        parity = compare(checkpoint, aside, imgsz_hw, verify_on)
        if not parity.holds:
            raise ParityError(
                f"{path}: not written: boxes differ by up to {parity.box_px:.3g} px and scores by "
                f"{parity.score:.3g} from the trained detector; please report this with both versions"
            )
    return parity


def _body(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    checkpoint = read_detector(Path(arguments.weights))
    trained_hw = tuple(checkpoint.config["imgsz_hw"])
    imgsz_hw = parse_imgsz(arguments.imgsz or format_imgsz((trained_hw[0], trained_hw[1])))
    path = Path(arguments.output or Path(arguments.weights).with_suffix(".onnx"))
    if path.suffix != ".onnx":
        raise UsageError(f"--output {path}: must end in .onnx")
    batch = None if arguments.dynamic else arguments.batch
    if arguments.no_verify:
        write_onnx(checkpoint, path, imgsz_hw, batch)
        verdict = "not compared with torch, as asked by --no-verify"
    else:
        parity = export(checkpoint, path, imgsz_hw, batch, _pictures(arguments.data or str(checkpoint.config["data"])))
        verdict = (
            f"agrees with torch on {parity.pictures} pictures: boxes within {parity.box_px:.2g} px, "
            f"scores within {parity.score:.2g}"
        )
    print(f"{path}: {checkpoint.model}, {format_imgsz(imgsz_hw)}, {path.stat().st_size / 2**20:.1f} MiB; {verdict}")
    return 0


def _pictures(data: str) -> list[Path]:
    try:
        samples = open_data(data, "val")
    except HkdError as error:
        raise type(error)(f"no pictures to verify on: {error} (or --data OTHER, or --no-verify)") from error
    return [sample.path for sample in samples[:VERIFY_ON]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hkd-export", description=__doc__)
    parser.add_argument("weights", help="best.pt of a run")
    parser.add_argument("--output", help="the file to write; by default best.onnx beside the weights")
    parser.add_argument("--imgsz", help="input size, width x height; by default the one trained at")
    parser.add_argument("--batch", type=int, default=1, help="pictures the graph takes at once")
    parser.add_argument("--dynamic", action="store_true", help="leave the batch size free")
    parser.add_argument("--data", help="pictures to verify on; by default the training data's val split")
    parser.add_argument("--no-verify", action="store_true", help="do not compare with the trained detector")
    return parser
