"""Speed-up of blockwise distillation with several workers: simulated from measured block times, and measured.

    python benchmarks/studies/blockwise_speed.py RUN/blockwise/report.json [--measure TEACHER --data DATA.yaml]

Simulates the block times of a finished run under every schedule on 1 to 8 workers. Compares them with the lower bound
and with the published times. --measure trains the blocks of a teacher with one and with two workers. Run no other
program during the measurement. Writes results/blockwise.md.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from hkd_bench.energy import open_energy_meter
from hkd_bench.host import read_host_fields
from hkd_det.console import format_table
from hkd_det.datasets.catalog import load_dataset
from hkd_det.distill.blockwise.executor import Scheduler, compute_lower_bound, simulate
from hkd_det.distill.blockwise.worker import BlockwiseConfig
from hkd_det.files import write_text
from hkd_det.letterbox import parse_imgsz
from hkd_det.models.zoo import read_model_name
from hkd_det.train.config import TrainConfig
from hkd_det.train.context import init_distributed, make_epoch_plan, make_run_context, resolve_initial_weights

RESULT = Path(__file__).parent / "../results/blockwise.md"
WORKERS = (1, 2, 3, 4, 8)
# 3x3 convolutions on CIFAR's 32 x 32 images: (input channels, output channels, side of the output).
VGG16 = [
    (3, 64, 32), (64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8), (256, 256, 8), (256, 256, 8),
    (256, 512, 4), (512, 512, 4), (512, 512, 4), (512, 512, 2), (512, 512, 2), (512, 512, 2),
]  # fmt: skip
RESNET50 = [(64, 64, 32)] * 3 + [(128, 128, 16)] * 4 + [(256, 256, 8)] * 6 + [(512, 512, 4)] * 3
Published = tuple[str, list[tuple[int, int, int]], Scheduler, dict[int, int]]
# Blakeney et al. 2021: seconds by number of GPUs.
PUBLISHED: list[Published] = [
    ("VGG16", VGG16, "round-robin", {1: 3570, 2: 2020, 3: 1655, 4: 1386}),
    ("VGG16", VGG16, "bin-packing", {1: 3920, 2: 2215, 3: 1603, 4: 1275}),
    ("ResNet-50", RESNET50, "bin-packing", {1: 9693, 2: 5061, 3: 3876, 4: 2750}),
    ("ResNet-50", RESNET50, "work-stealing", {1: 8113, 2: 4064, 4: 2094}),
]
# Published energy saving (ratio) and speed-up on four GPUs.
SAVED = {"VGG16": (0.19, 3920 / 1275), "ResNet-50": (0.29, 8113 / 2094)}

INTRODUCTION = """# Speed-up of blockwise distillation with several workers

Makespan of the block stage on several workers: simulated from measured block times, compared with the published times,
and measured with one and two workers.

```bash
python benchmarks/studies/blockwise_speed.py RUN/blockwise/report.json --measure TEACHER --data DATA.yaml
```"""


def main() -> None:
    """Write the result page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="blockwise/report.json of a run")
    parser.add_argument("--measure", type=Path, metavar="TEACHER", help="best.pt whose blocks are trained")
    parser.add_argument("--data", type=Path, help="data YAML with the splits train and val; required by --measure")
    parser.add_argument("--imgsz", default="224x160", help="input size WxH for --measure (default: %(default)s)")
    parser.add_argument("--images", type=int, default=256, help="training images for --measure (default: %(default)s)")
    flags = parser.parse_args()
    if flags.measure and flags.data is None:
        parser.error("--data: required by --measure. Pass a data YAML.")
    content = json.loads(flags.report.read_text())
    blocks = {block["layer"]: float(block["seconds"]) for block in content["blocks"]}
    times = list(blocks.values())
    parts = [INTRODUCTION, format_simulation(blocks), format_published(), format_energy(times)]
    if flags.measure:
        parts.append(format_measurement(flags.measure, flags.data, flags.imgsz, flags.images))
    write_text(RESULT.resolve(), "\n\n".join(parts) + "\n")


def format_simulation(blocks: dict[str, float]) -> str:
    """Return the simulated speed-ups of every schedule.

    Args:
        blocks: Measured seconds by block.
    """
    times, total = list(blocks.values()), sum(blocks.values())
    rows = [[name, *(f"{total / simulate(times, n, name):.2f}" for n in WORKERS)] for name in get_args(Scheduler)]
    rows.append(["upper bound", *(f"{total / compute_lower_bound(times, n):.2f}" for n in WORKERS)])
    longest = max(blocks, key=lambda layer: blocks[layer])
    return (
        f"## Simulation from measured times\n\n{len(blocks)} blocks of one run took {total:.1f} s in total; the "
        f"longest ({longest}) took {blocks[longest]:.1f} s. The table gives the speed-up on N workers that do not slow "
        "each other down, without the start of the workers.\n\n"
        f"{format_table(rows, ['schedule', *map(str, WORKERS)], style='github')}"
    )


def format_published() -> str:
    """Return the published speed-ups next to simulated ones."""
    rows = []
    for network, layers, scheduler, seconds in PUBLISHED:
        costs = [float(c_in * c_out * side**2) for c_in, c_out, side in layers]
        reported = [f"{seconds[1] / seconds[n]:.2f}" if n in seconds else "-" for n in (2, 3, 4)]
        simulated = [f"{sum(costs) / simulate(costs, n, scheduler):.2f}" for n in (2, 3, 4)]
        rows.append([f"{network}, {scheduler}", *(f"{a} / {b}" for a, b in zip(reported, simulated, strict=True))])
    return (
        "## Published times\n\nSpeed-up on 2, 3 and 4 GPUs: published (Blakeney et al. 2021) / simulated. The paper "
        "gives no block times. The simulation assumes times proportional to the MACs of the convolutions. "
        "It shows what the schedules allow, not what the machine of the paper did.\n\n"
        f"{format_table(rows, ['network, schedule', '2', '3', '4'], style='github')}"
    )


def format_energy(times: Sequence[float]) -> str:
    """Return the computed energy: one machine needs a constant part of its power, and a part for the work.

    Args:
        times: Measured seconds of the blocks.
    """
    idle_ratios = {network: saved / (1 - 1 / faster) for network, (saved, faster) in SAVED.items()}
    rows = []
    for network, idle_ratio in idle_ratios.items():
        savings = [idle_ratio * (1 - simulate(times, n, "bin-packing") / sum(times)) for n in WORKERS]
        rows.append([f"{100 * idle_ratio:.0f} % ({network})", *(f"{-100 * saving:.0f} %" for saving in savings)])
    with open_energy_meter("cpu", None) as meter:
        joules, reason = meter.compute_total()
    local = "is in the table below." if joules is not None else f"cannot be read: {reason}."
    return (
        f"## Energy\n\nThese values are computed, not measured. The energy of this machine {local} The model: a "
        "machine needs a constant part of its power. The energy for the work itself is the same for any number of "
        "workers. Then E(N) / E(1) = c x makespan(N) / makespan(1) + (1 - c). The published speed-ups and savings on "
        "four GPUs (19 % and 29 %) give the value of c. Blocks of the first table, bin "
        "packing:\n\n"
        f"{format_table(rows, ['c', *map(str, WORKERS)], style='github')}"
    )


def format_measurement(teacher: Path, data: Path, imgsz: str, num_images: int) -> str:
    """Train the blocks with one and with two workers and return the measured times.

    Args:
        teacher: Checkpoint of the teacher.
        data: Data YAML.
        imgsz: Input size, WxH.
        num_images: Training images of the blocks.
    """
    rows, makespans = [], {}
    for workers in (1, 2):
        config = BlockwiseConfig(num_images=num_images, epochs=4, workers=workers)
        with open_energy_meter("cpu", None) as meter:
            content = train_blocks(teacher, data, imgsz, config)
        stats, (energy_j, _) = content["run_stats"], meter.compute_total()
        makespans[workers] = stats["makespan_s"]
        joules = "-" if energy_j is None else f"{energy_j:.0f} J"
        rows.append(
            [
                str(workers),
                f"{stats['startup_s']:.1f} s",
                f"{stats['makespan_s']:.1f} s",
                f"{stats['lower_bound_s']:.1f} s",
                f"{content['sum_s']:.1f} s",
                joules,
            ]
        )
    field_names = ("CPU", "cores", "load average at start")
    host = ", ".join(f"{field.name} {field.value}" for field in read_host_fields() if field.name in field_names)
    return (
        f"## Measurement\n\n{read_model_name(teacher)} at {imgsz}, {num_images} images, 4 epochs, bin packing by "
        f"estimated times, on {host}. Two workers are {makespans[1] / makespans[2]:.2f} times as fast.\n\n"
        + format_table(
            rows, ["workers", "start-up", "makespan", "bound", "sum of block times", "energy"], style="github"
        )
    )


def train_blocks(teacher: Path, data: Path, imgsz: str, blockwise_config: BlockwiseConfig) -> dict[str, Any]:
    """Run one block stage and return its report.

    Args:
        teacher: Checkpoint of the teacher.
        data: Data YAML.
        imgsz: Input size, WxH.
        blockwise_config: Settings of the method.
    """
    with tempfile.TemporaryDirectory() as folder, init_distributed("cpu") as context:
        config = TrainConfig(
            str(data),
            read_model_name(teacher),
            folder,
            parse_imgsz(imgsz),
            teacher=str(teacher),
            distill={"blockwise": blockwise_config},
            device="cpu",
        )
        train_samples, val_samples = load_dataset(config.data, "train"), load_dataset(config.data, "val")
        plan = make_epoch_plan(config, len(train_samples), 0)
        resolve_initial_weights(
            config, make_run_context(config, plan, context, train_samples, val_samples[:64], resume=False)
        )
        content: dict[str, Any] = json.loads((Path(folder) / "blockwise/report.json").read_text())
        return content


if __name__ == "__main__":
    main()
