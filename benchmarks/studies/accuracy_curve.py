"""Miss rate against end-to-end time: our models at several input sizes, and peers, on the same images in one run.

    python benchmarks/studies/accuracy_curve.py --data inria.yaml,inria_audited.yaml --split test \\
        --peer YOLOX-nano=yolox_nano.onnx --peer PicoDet-S=picodet_s_416.onnx \\
        --model-config recipes/onnx/yolox.yaml,recipes/onnx/picodet.yaml \\
        --series cpu-student=cpu_192.onnx,cpu_256.onnx,cpu_320.onnx,cpu_416.onnx

`--series` names the files of one model at several input sizes (`hkd-export --imgsz`), `--peer` a model of another tool.
hkd-bench measures them from decoded frame to boxes: each model in processes of its own, alternating with the others.
All times are medians of the same run, so their ratios do not depend on the speed of the machine. Differences in miss
rate refer to the first peer.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from hkd_bench.bench import BenchOptions, bench
from hkd_bench.cli import parse_model_configs
from hkd_bench.host import read_host_fields
from hkd_bench.plots import COLORS
from hkd_bench.result import BenchResult, ModelResult, align_samples, read_result, write_result
from hkd_bench.table import format_data_name, format_difference, format_interval
from hkd_det.console import format_table
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import UsageError, run_command
from hkd_det.files import atomic_write, write_text
from hkd_det.letterbox import format_imgsz
from hkd_det.metrics.citypersons import SETUPS

SEPARATOR = " | "  # between series, file and backend in the names of hkd-bench
TIME_TICKS_MS = (1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000)


@dataclass(frozen=True)
class CurvePoint:
    """One model file with its miss rates, and its time on each backend.

    Attributes:
        series: Name of the model.
        is_peer: True for a model of another tool.
        result: Measurement on the first backend, with the miss rates.
        p50_ms: Median time from frame to boxes by backend.
    """

    series: str
    is_peer: bool
    result: ModelResult
    p50_ms: dict[str, float]

    def miss_rate(self, index: int, setup: str) -> float:
        """Return the miss rate on a ground truth in percent.

        Args:
            index: Index of the ground truth.
            setup: Name of the setup.
        """
        return 100 * (self.result.accuracy[index].miss_rates[setup] or 0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all models, write the page and the plots, and return the exit code.

    Args:
        argv: Arguments; the default is `sys.argv`.
    """
    return run_command("accuracy_curve", run_study, argv)


def run_study(argv: Sequence[str] | None) -> int:
    """Run the study and return the exit code.

    Args:
        argv: Arguments.
    """
    flags = parse_flags(argv)
    if flags.setup not in SETUPS:
        raise UsageError(f"--setup {flags.setup}: expected one of {', '.join(SETUPS)}")
    peers, series = parse_models(flags.peer), parse_models(flags.series)
    result = read_result(flags.from_json) if flags.from_json else measure({**peers, **series}, flags)
    if flags.json:
        write_result(flags.json, result)
    points = make_points(result, set(peers))
    write_plots(flags.results, result, points, flags.setup)
    command = " ".join(["python", *sys.argv]) if argv is None else " ".join(argv)
    text = format_page(result, points, flags.setup, command, flags.results.with_suffix(".png").name)
    write_text(flags.results, text)
    print(text)
    return 0


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags.

    Args:
        argv: Arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset, or several with other ground truths: A.yaml,B.yaml")
    parser.add_argument("--split", default="test", help="(default: %(default)s)")
    parser.add_argument("--setup", default="All", help="setup of the miss rate (default: %(default)s)")
    parser.add_argument("--series", action="append", default=[], help="NAME=FILE[,FILE...], may be repeated")
    parser.add_argument("--peer", action="append", default=[], help="NAME=FILE[,FILE...], may be repeated")
    parser.add_argument("--model-config", help="YAML[,YAML...] of the peers (default: next to the models)")
    parser.add_argument("--backend", default="onnxruntime,openvino", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=160, help="timed runs per model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="processes per model (default: %(default)s)")
    parser.add_argument("--max-images", type=int, help="use only the first images")
    parser.add_argument("--json", type=Path, help="write all measurements")
    parser.add_argument("--from-json", type=Path, help="use the measurements of --json instead of measuring")
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results/accuracy_curve.md"), help="(default: %(default)s)"
    )
    return parser.parse_args(argv)


def parse_models(values: Sequence[str]) -> dict[str, list[Path]]:
    """Parse the values of --series or --peer.

    Args:
        values: Values of the form NAME=FILE[,FILE...].

    Returns:
        The files by name.

    Raises:
        UsageError: A value has another form.
    """
    models = {}
    for value in values:
        name, equals, files = value.partition("=")
        if not equals or not name or not all(files.split(",")) or SEPARATOR in name:
            raise UsageError(f"--series, --peer {value}: expected NAME=FILE[,FILE...]")
        models[name] = [Path(file) for file in files.split(",")]
    return models


def measure(models: dict[str, list[Path]], flags: argparse.Namespace) -> BenchResult:
    """Measure all files on all backends.

    Args:
        models: Files by name of the model.
        flags: Flags of the command.

    Returns:
        The measurements. The names of models consist of name, file and backend.
    """
    if not models:
        raise UsageError("--series, --peer: expected at least one model")
    first_data, *other_data = flags.data.split(",")
    samples = load_dataset(first_data, flags.split)[: flags.max_images]
    backends = tuple(flags.backend.split(","))
    options = BenchOptions(
        backends=backends,
        threads=flags.threads,
        runs=flags.runs,
        rounds=flags.rounds,
        data=first_data,
        split=flags.split,
        model_configs=parse_model_configs(flags.model_config),
    )
    files = [(name, path.name) for name, paths in models.items() for path in paths]
    names = [SEPARATOR.join((*file, backend)) for file in files for backend in backends]
    others = {name: align_samples(samples, load_dataset(name, flags.split), name) for name in other_data}
    return bench([path for paths in models.values() for path in paths], samples, options, names, others)


def make_points(result: BenchResult, peers: set[str]) -> list[CurvePoint]:
    """Combine the backends of each file.

    Args:
        result: Measurements of `measure`.
        peers: Names of the peers.

    Returns:
        One point per file.
    """
    by_file: dict[tuple[str, str], list[ModelResult]] = {}
    for model in result.models:
        series, file, _ = model.name.split(SEPARATOR)
        by_file.setdefault((series, file), []).append(model)
    return [
        CurvePoint(series, series in peers, models[0], {model.backend: model.latency.p50_ms for model in models})
        for (series, _), models in by_file.items()
    ]


def find_equal_peer(
    point: CurvePoint, points: Sequence[CurvePoint], index: int, setup: str, backend: str
) -> CurvePoint | None:
    """Return the fastest peer whose miss rate is at most that of a point, or None.

    Args:
        point: A model of ours.
        points: All points.
        index: Index of the ground truth.
        setup: Name of the setup.
        backend: Name of the backend.
    """
    equal = [peer for peer in points if peer.is_peer and peer.miss_rate(index, setup) <= point.miss_rate(index, setup)]
    return min(equal, key=lambda peer: peer.p50_ms[backend], default=None)


def format_page(result: BenchResult, points: Sequence[CurvePoint], setup: str, command: str, image: str) -> str:
    """Format the page: conditions, plot, all points, and the comparison at equal miss rate.

    Args:
        result: Measurements.
        points: The points of `make_points`.
        setup: Name of the setup.
        command: Command line.
        image: File name of the plot.

    Returns:
        The Markdown text.
    """
    processor = next(field.value for field in read_host_fields() if field.name == "CPU")
    data_names = [format_data_name(accuracy.data) for accuracy in points[0].result.accuracy]
    lines = [
        "# Miss rate against time",
        "",
        f"MR^-2 {setup} on {' and '.join(data_names)} ({result.num_images} images), and the median time from decoded "
        f"frame to boxes, with preprocessing and NMS, on {processor or 'the CPU'}, threads: {result.threads}. "
        f"All models were measured in one run of {result.rounds} alternating rounds ({result.date[:10]}).",
        "",
        f"```bash\n{command}\n```",
        "",
        f"![Miss rate against time]({image})",
        "",
        _format_points(points, setup, data_names),
        "",
        *_format_equal_miss_rate(points, setup, data_names),
    ]
    return "\n".join(lines) + "\n"


def _format_points(points: Sequence[CurvePoint], setup: str, data_names: Sequence[str]) -> str:
    backends = list(points[0].p50_ms)
    headers = ["model", "input", "parameters"]
    for name in data_names:
        headers += [f"MR^-2 {name}, % (95 % interval)", f"difference to {points[0].series}"]
    headers += [f"{backend}, ms (ratio)" for backend in backends]
    rows = []
    for point in points:
        row = [point.series, format_imgsz(point.result.imgsz_hw), f"{point.result.parameters / 1e6:.2f} M"]
        for index, accuracy in enumerate(point.result.accuracy):
            difference = accuracy.differences.get(setup)
            row.append(f"{point.miss_rate(index, setup):.1f} ({format_interval(accuracy.intervals[setup])})")
            row.append(format_difference(difference, point.series, points[0].series) if difference else "")
        ratios = {backend: point.p50_ms[backend] / points[0].p50_ms[backend] for backend in backends}
        rows.append([*row, *(f"{point.p50_ms[backend]:.1f} ({ratio:.2f})" for backend, ratio in ratios.items())])
    return format_table(rows, headers, "github")


def _format_equal_miss_rate(points: Sequence[CurvePoint], setup: str, data_names: Sequence[str]) -> list[str]:
    """Compare each of our points with the fastest peer that is at least as accurate."""
    own = [point for point in points if not point.is_peer]
    if not own or len(own) == len(points):
        return []
    rows = []
    for index, data_name in enumerate(data_names):
        for point in own:
            row = [data_name, point.series, format_imgsz(point.result.imgsz_hw), f"{point.miss_rate(index, setup):.1f}"]
            for backend, time_ms in point.p50_ms.items():
                peer = find_equal_peer(point, points, index, setup, backend)
                row.append(f"{time_ms / peer.p50_ms[backend]:.2f} ({peer.series})" if peer else "no peer")
            rows.append(row)
    headers = ["ground truth", "model", "input", "MR^-2, %", *(f"time ratio, {backend}" for backend in own[0].p50_ms)]
    return [
        "## At equal miss rate",
        "",
        'Time divided by that of the fastest peer whose miss rate is at most that of the model; "no peer" if none '
        "reaches it.",
        "",
        format_table(rows, headers, "github"),
    ]


def write_plots(path: Path, result: BenchResult, points: Sequence[CurvePoint], setup: str) -> None:
    """Plot miss rate against time as .png and .svg next to the page: one row per ground truth, one column per backend.

    Args:
        path: Page; its suffix is replaced.
        result: Measurements.
        points: The points of `make_points`.
        setup: Name of the setup.
    """
    backends, accuracies = list(points[0].p50_ms), result.models[0].accuracy
    figure = Figure(figsize=(5.4 * len(backends), 4.2 * len(accuracies)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(accuracies), len(backends), squeeze=False)
    for index, accuracy in enumerate(accuracies):
        for column, backend in enumerate(backends):
            axes = panels[index, column]
            draw_curves(axes, points, index, setup, backend)
            axes.set_title(f"{format_data_name(accuracy.data)}, {backend}, threads: {result.threads}")
    panels[0, 0].legend(frameon=False)
    for suffix in (".png", ".svg"):
        with atomic_write(path.with_suffix(suffix)) as temp_path:
            figure.savefig(temp_path, dpi=150, format=suffix[1:])


def draw_curves(axes: Axes, points: Sequence[CurvePoint], index: int, setup: str, backend: str) -> None:
    """Draw one line per model, with the input size at each point.

    Args:
        axes: Axes to draw on.
        points: The points of `make_points`.
        index: Index of the ground truth.
        setup: Name of the setup.
        backend: Name of the backend.
    """
    for number, series in enumerate(dict.fromkeys(point.series for point in points)):
        own = sorted((p for p in points if p.series == series), key=lambda point: point.p50_ms[backend])
        times, rates = [p.p50_ms[backend] for p in own], [p.miss_rate(index, setup) for p in own]
        color, marker = COLORS[number % len(COLORS)], "s" if own[0].is_peer else "o"
        axes.plot(times, rates, marker=marker, color=color, label=series, linewidth=1.8, markersize=5)
        for point, time_ms, rate in zip(own, times, rates, strict=True):
            size = point.result.imgsz_hw
            text = str(size[0]) if size[0] == size[1] else format_imgsz(size)
            axes.annotate(text, (time_ms, rate), (4, 4), textcoords="offset points", fontsize=8, color=color)
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(FixedLocator(TIME_TICKS_MS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    axes.set(xlabel="median time from frame to boxes, ms", ylabel=f"MR^-2 {setup}, %")
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    sys.exit(main())
