"""From a training's best.pt to an ONNX file that has shown that it says the same. Needs torch."""

from collections.abc import Sequence
from pathlib import Path

from hkd_deploy.export.onnx_file import write_onnx
from hkd_deploy.export.options import GraphOptions
from hkd_deploy.export.parity import Parity, compare
from hkd_det.errors import HkdError
from hkd_det.files import replacing
from hkd_det.train.checkpoint import DetectorCheckpoint


class ParityError(HkdError):
    """The exported file does not say what the trained detector says."""


def export(checkpoint: DetectorCheckpoint, path: Path, options: GraphOptions, verify_on: Sequence[Path]) -> Parity:
    """Write `path` and compare it with the trained detector on the pictures `verify_on`.

    The file appears under its name only if parity holds: ParityError otherwise.
    """
    with replacing(path) as aside:
        write_onnx(checkpoint, aside, options)
        parity = compare(checkpoint, aside, options, verify_on)
        if not parity.holds:
            raise ParityError(
                f"{path}: not written: boxes differ by up to {parity.box_px:.3g} px and scores by "
                f"{parity.score:.3g} from the trained detector; please report this with both versions"
            )
    return parity
