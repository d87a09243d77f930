"""Print parameters and FLOPs of the named detectors at 640x512 as a Markdown table.

python benchmarks/studies/model_complexity.py
"""

from hkd_det.models.checkpoint import spec_to_dict
from hkd_det.models.zoo import MODELS, build_model, count_params_and_flops

if __name__ == "__main__":
    for name, spec in MODELS.items():
        complexity = count_params_and_flops(build_model(name), (512, 640))
        values = spec_to_dict(spec)
        channels = values.get("backbone_kwargs", {}).get("channels")
        if values.get("width_mult", 1) != 1:
            channels = getattr(spec, "stage_channels", None)
        widths = f", widths {'-'.join(map(str, channels))}" if channels else ""
        num_params, flops = complexity.num_params / 1e6, complexity.flops / 1e9
        print(f"| `{name}` | {values.get('backbone', values['family'])}{widths} | {num_params:.2f} M | {flops:.1f} |")
