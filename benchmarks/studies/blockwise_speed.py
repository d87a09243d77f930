"""How much faster blocks are learnt by several workers: measured block times replayed, and measured on this machine.

    python benchmarks/studies/blockwise_speed.py RUN/blockwise/report.json [--measure TEACHER]

Replays the times of a finished block stage under every schedule, on 1 to 8 workers, against the bound that none can
beat; sets the published times beside it; with --measure learns the blocks of a teacher for real, by one and by two
workers in turn (nothing else should run then). Writes results/blockwise.md.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from distillation_plan import DATA

from hkd_bench.host import RaplMeter, read_host_fields
from hkd_det.datasets.catalog import load_dataset
from hkd_det.distill.blockwise.config import BlockwiseConfig, Scheduler, compute_lower_bound, simulate
from hkd_det.distill.methods import DistillConfig
from hkd_det.files import write_text
from hkd_det.letterbox import parse_imgsz
from hkd_det.models.zoo import model_name
from hkd_det.train.blockwise import prepare_blockwise_student
from hkd_det.train.config import TrainConfig
from hkd_det.train.distributed import init_distributed

RESULT = Path(__file__).parent / "../results/blockwise.md"
WORKERS = (1, 2, 3, 4, 8)
# The 3x3 convolutions on CIFAR's pictures of 32 x 32: channels in and out, side of the output.
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
SAVED = {"VGG16": (0.19, 3920 / 1275), "ResNet-50": (0.29, 8113 / 2094)}  # energy, and speed-up, on four GPUs


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="blockwise/report.json of a run")
    parser.add_argument("--measure", type=Path, metavar="TEACHER", help="best.pt whose blocks are learnt for real")
    parser.add_argument("--imgsz", default="224x160", help="for --measure, width x height")
    parser.add_argument("--views", type=int, default=256, help="for --measure")
    flags = parser.parse_args()
    content = json.loads(flags.report.read_text())
    blocks = {block["layer"]: float(block["seconds"]) for block in content["blocks"]}
    parts = ["# Blocks in parallel: how much faster", replayed(blocks), published(), energy(list(blocks.values()))]
    if flags.measure:
        parts.append(measured(flags.measure, flags.imgsz, flags.views))
    write_text(RESULT.resolve(), "\n\n".join(parts) + "\n")


def replayed(blocks: dict[str, float]) -> str:
    """Speed-ups of the measured times, schedule by schedule."""
    times, whole = list(blocks.values()), sum(blocks.values())
    rows = [[name, *(f"{whole / simulate(times, n, name):.2f}" for n in WORKERS)] for name in get_args(Scheduler)]
    rows.append(["none can beat", *(f"{whole / compute_lower_bound(times, n):.2f}" for n in WORKERS)])
    longest = max(blocks, key=lambda layer: blocks[layer])
    return (
        f"## Replay of measured times\n{len(blocks)} blocks of one run, {whole:.1f} s in all, the longest "
        f"({longest}) {blocks[longest]:.1f} s. Computed from these times: how many times faster on N workers that do "
        "not disturb each other, starting them left out.\n\n"
        f"{table(['schedule', *map(str, WORKERS)], rows)}"
    )


def published() -> str:
    """What was published, beside a replay of block costs."""
    rows = []
    for network, layers, scheduler, seconds in PUBLISHED:
        costs = [float(c_in * c_out * side**2) for c_in, c_out, side in layers]
        told = [f"{seconds[1] / seconds[n]:.2f}" if n in seconds else "-" for n in (2, 3, 4)]
        ours = [f"{sum(costs) / simulate(costs, n, scheduler):.2f}" for n in (2, 3, 4)]
        rows.append([f"{network}, {scheduler}", *(f"{a} / {b}" for a, b in zip(told, ours, strict=True))])
    return (
        "## Published\nSpeed-up on 2, 3 and 4 GPUs as published (Blakeney et al. 2021) / by replay. Their block times "
        "are not public; the replay takes blocks to cost as much as their convolutions multiply, which no GPU keeps "
        "to: it shows what the schedules can give, not what their machine did.\n\n"
        f"{table(['network, schedule', '2', '3', '4'], rows)}"
    )


def energy(times: Sequence[float]) -> str:
    """Computed: a machine draws a share of its power for being on, the rest for the work, whoever does it."""
    shares = {network: saved / (1 - 1 / faster) for network, (saved, faster) in SAVED.items()}
    rows = []
    for network, share in shares.items():
        savings = [share * (1 - simulate(times, n, "bin-packing") / sum(times)) for n in WORKERS]
        rows.append([f"{100 * share:.0f} % ({network})", *(f"{-100 * saving:.0f} %" for saving in savings)])
    meter = RaplMeter().total()
    here = "can be read here; --measure reads it." if meter.joules is not None else f"is not known: {meter.reason}."
    return (
        f"## Energy\nComputed, not measured; this machine's own {here} The model: one machine draws a share of its "
        "power for being on, and the rest for the work, which stays the same: E(N) / E(1) = share x makespan(N) / "
        "makespan(1) + (1 - share). The shares are those at which the published savings on four GPUs (19 % and 29 %) "
        "follow from the published speed-ups. Our blocks, bin packing:\n\n"
        f"{table(['share', *map(str, WORKERS)], rows)}"
    )


def measured(teacher: Path, imgsz: str, views: int) -> str:
    """One and two workers in turn, for real."""
    rows, makespans = [], {}
    for workers in (1, 2):
        meter = RaplMeter()
        content = learnt(teacher, imgsz, BlockwiseConfig(num_images=views, epochs=4, workers=workers))
        ran, spent = content["ran"], meter.total()
        makespans[workers] = ran["makespan_s"]
        joules = "-" if spent.joules is None else f"{spent.joules:.0f} J"
        rows.append(
            [
                str(workers),
                f"{ran['started_s']:.1f} s",
                f"{ran['makespan_s']:.1f} s",
                f"{ran['lower_bound_s']:.1f} s",
                f"{content['sum_s']:.1f} s",
                joules,
            ]
        )
    told = ("CPU", "cores", "load average at the start")
    here = ", ".join(f"{fact.name} {fact.value}" for fact in read_host_fields() if fact.name in told)
    return (
        f"## Measured\n{model_name(teacher)} at {imgsz}, {views} views, 4 epochs, bin packing by estimated times, on "
        f"{here}: two workers are {makespans[1] / makespans[2]:.2f} times as fast.\n\n"
        + table(["workers", "start-up", "makespan", "bound", "sum of block times", "energy"], rows)
    )


def learnt(teacher: Path, imgsz: str, settings: BlockwiseConfig) -> dict[str, Any]:
    """The report of one block stage."""
    with tempfile.TemporaryDirectory() as folder, init_distributed("cpu") as processes:
        config = TrainConfig(
            str(DATA),
            model_name(teacher),
            folder,
            parse_imgsz(imgsz),
            teacher=str(teacher),
            distill=DistillConfig(blockwise=settings),
            device="cpu",
        )
        training, validation = load_dataset(config.data, "train"), load_dataset(config.data, "val")
        prepare_blockwise_student(config, settings, processes, training, validation[:64], resume=False)
        content: dict[str, Any] = json.loads((Path(folder) / "blockwise/report.json").read_text())
        return content


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
