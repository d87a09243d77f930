"""The named detectors' parameters and operations, as a Markdown table."""

from hkd_det.models.faster_rcnn import FasterRcnnSpec
from hkd_det.models.sizes import SIZES, build_detector, cost

if __name__ == "__main__":
    for name, spec in SIZES.items():
        weight = cost(build_detector(name), (512, 640))
        if isinstance(spec, FasterRcnnSpec):
            channels = spec.widths if spec.width != 1 else None
        else:
            channels = spec.backbone_arguments.get("channels")
        width = f", widths {'-'.join(map(str, channels))}" if channels else ""
        print(f"| `{name}` | {spec.backbone}{width} | {weight.parameters / 1e6:.2f} M | {weight.flops / 1e9:.1f} |")
