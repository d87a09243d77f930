"""The named detectors' parameters and operations, as a Markdown table."""

from hkd_det.models.faster_rcnn import FasterRCNNSpec
from hkd_det.models.zoo import MODELS, build_model, count_params_and_flops

if __name__ == "__main__":
    for name, spec in MODELS.items():
        weight = count_params_and_flops(build_model(name), (512, 640))
        if isinstance(spec, FasterRCNNSpec):
            channels = spec.stage_channels if spec.width_mult != 1 else None
        else:
            channels = spec.backbone_kwargs.get("channels")
        width = f", widths {'-'.join(map(str, channels))}" if channels else ""
        print(f"| `{name}` | {spec.backbone}{width} | {weight.num_params / 1e6:.2f} M | {weight.flops / 1e9:.1f} |")
