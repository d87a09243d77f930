"""Report page and deployment folder of `hkd-quickstart --data`: model card, commands, systemd unit, container file."""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.axes import Axes

from hkd_bench.plots import COLORS, format_percent, render_svg
from hkd_bench.quickstart.plan import NARROW, DataCounts, OwnDataOptions, TrainingPlan
from hkd_bench.report import render_examples, write_bench_report
from hkd_bench.result import BenchResult, ModelResult
from hkd_bench.table import format_difference, format_interval
from hkd_deploy import open_detector
from hkd_det import __version__
from hkd_det.datasets.catalog import dataset_license
from hkd_det.files import write_text
from hkd_det.shipped import DEFAULT_MODEL
from hkd_det.structures import Sample

TEMPLATES = Path(__file__).with_name("templates")
SETUP = "Reasonable"
NUM_EXAMPLES = 6
UNIT, ENVIRONMENT = "hkd-demo.service", "hkd-demo.env"
STATE_DIRECTORY = "/var/lib/hkd-demo"  # of the systemd unit
FILES = {
    "model.onnx": "the detector, FP32",
    "MODEL_CARD.md": "data, license, accuracy, latency, score threshold, training and limits",
    "README.md": "commands to install and run",
    UNIT: "systemd unit",
    ENVIRONMENT: "its settings",
    "Containerfile": "container with the detector",
}
LICENSE_PLACEHOLDER = "TODO: no license is given in the data YAML. Add `license: ...` there, or write the terms here."


@dataclass(frozen=True)
class Delivery:
    """Everything that the report and the deployment folder state.

    Attributes:
        options: Flags of the command.
        plan: Decisions before training.
        counts: Numbers of images.
        eval_split: Split of the final measurement.
        results: Result of each stage.
        bench: Measurements: the other student, the student before training, the delivered student.
    """

    options: OwnDataOptions
    plan: TrainingPlan
    counts: DataCounts
    eval_split: str
    results: Mapping[str, Any]
    bench: BenchResult

    @property
    def delivered(self) -> ModelResult:
        """Measurements of the delivered student."""
        return self.bench.models[-1]

    @property
    def directory(self) -> Path:
        """Deployment folder."""
        return self.options.save_dir / "deploy"

    @property
    def has_int8(self) -> bool:
        """Whether INT8 is recommended."""
        return bool(self.results["export"]["int8"]["recommended"])


def format_command(options: OwnDataOptions) -> str:
    """Return the command line of a run.

    Args:
        options: Flags of the command.
    """
    flags = {
        "--data": options.data,
        "--save-dir": options.save_dir,
        "--max-ms": options.max_ms,
        "--device-bench": options.device_bench,
        "--hours": options.hours,
        "--epochs": options.epochs,
        "--threads": options.threads,
        "--seed": options.seed,
    }
    given = [(flag, str(value)) for flag, value in flags.items() if value is not None]
    return shlex.join(["hkd-quickstart", *(word for pair in given for word in pair)])


def write_delivery(delivery: Delivery, page: Path, samples: Sequence[Sample]) -> None:
    """Write the report page, and the deployment folder next to the exported model.

    Args:
        delivery: What the files state.
        page: HTML file to write.
        samples: Images of the final measurement.
    """
    directory, conf = delivery.directory, float(delivery.results["export"]["conf"])
    source = find_systemd_directory()
    shutil.copyfile(source / UNIT, directory / UNIT)
    write_text(directory / ENVIRONMENT, format_environment(conf))
    write_text(directory / "Containerfile", format_containerfile(conf))
    write_text(directory / "README.md", format_readme(delivery))
    write_text(directory / "MODEL_CARD.md", format_model_card(delivery))
    with open_detector(directory / "model.onnx", threads=delivery.options.threads) as detector:
        examples = render_examples(detector, samples, conf, NUM_EXAMPLES)
    results = delivery.results
    titles = {"teacher": "teacher", "control": "student alone", "distilled": "student distilled"}
    training = {
        title: [(int(epoch), float(rate)) for epoch, rate in results[name]["history"]]
        for name, title in titles.items()
        if results[name]
    }
    write_bench_report(
        page,
        delivery.bench,
        title=f"Pedestrian detector for {Path(delivery.options.data).stem}",
        intro=format_intro(delivery),
        examples=examples,
        training=training,
        sections=render_sections(delivery),
    )


def find_systemd_directory() -> Path:
    """Return the directory of the systemd unit: in the installed package, or in a checkout."""
    installed = Path(__file__).with_name("systemd")
    return installed if installed.is_dir() else Path(__file__).parents[3] / "deploy" / "systemd"


def format_intro(delivery: Delivery) -> str:
    """Return the paragraph below the title of the report.

    Args:
        delivery: What the report states.
    """
    plan, counts = delivery.plan, delivery.counts
    teacher = f"a {plan.teacher} that was fine-tuned on the same images" if plan.teacher else f"{DEFAULT_MODEL} itself"
    chosen_on = (
        "Epochs and input size were chosen on the validation images, which are also measured here, so the miss rates "
        "are too low."
        if delivery.eval_split == "val"
        else "Epochs and input size were chosen on the validation images; the test images were not used for a choice."
    )
    return (
        f"A {plan.model} that starts from the shipped detector {DEFAULT_MODEL} was trained on {counts.train} images at "
        f"{plan.size}x{plan.size} for {plan.epochs} epochs, without a teacher and with one: {teacher}. Measured on "
        f"{counts.evaluated} images of the split {delivery.eval_split}. {chosen_on} One seed."
    )


def format_conclusions(delivery: Delivery) -> list[str]:
    """Return the conclusions of the run, one sentence or two each.

    Args:
        delivery: What the report states.
    """
    model, results = delivery.delivered, delivery.results
    accuracy = model.accuracy[0]
    interval = accuracy.intervals.get(SETUP)
    sizes = results["sizes"]
    rate = format_percent(accuracy.miss_rates[SETUP])
    lines = [
        f"Delivered: {model.name}, {model.model} at {sizes['size']}x{sizes['size']}, MR^-2 {rate}"
        f"{f' (95 % interval {format_interval(interval)})' if interval else ''} on the split {delivery.eval_split}."
    ]
    if difference := accuracy.differences.get(SETUP):
        other = delivery.bench.models[0].name
        lines.append(
            f"Effect of the teacher: {model.name} minus {other}: {format_difference(difference, model.name, other)}."
        )
    lines.append(f"Effect of the training: {_compare_with_start(delivery)}.")
    lines.append(_format_budget(delivery))
    lines.append(f"INT8: {delivery.results['export']['int8']['conclusion']}. {format_int8(delivery)}")
    return lines


def _compare_with_start(delivery: Delivery) -> str:
    rates = [model.accuracy[0].miss_rates[SETUP] for model in delivery.bench.models[1:]]
    effect = delivery.results["bench"]["training_effect"]
    if not effect:
        return f"not measured, no person of the setup {SETUP}"
    return f"MR^-2 {format_percent(rates[0])} before, {format_percent(rates[1])} after; {effect}"


def _format_budget(delivery: Delivery) -> str:
    max_ms, p50_ms = delivery.options.max_ms, delivery.delivered.latency.p50_ms
    if max_ms is None:
        return f"Latency from image to boxes on this device: {p50_ms:.1f} ms (p50). No budget was given (--max-ms)."
    row = next(row for row in delivery.results["sizes"]["rows"] if row["size"] == delivery.results["sizes"]["size"])
    if delivery.options.device_bench is not None:
        return (
            f"Latency: {row['p50_ms']:.1f} ms (p50) in {delivery.options.device_bench}, budget {max_ms:g} ms; "
            f"{p50_ms:.1f} ms on this device."
        )
    conclusion = "within the budget" if p50_ms <= max_ms else "above the budget"
    return (
        f"Latency from image to boxes on this device: {p50_ms:.1f} ms (p50), {conclusion} of {max_ms:g} ms. "
        f"It was {row['p50_ms']:.1f} ms when the input size was chosen."
    )


def format_int8(delivery: Delivery) -> str:
    """Return the comparison of INT8 with FP32 on this device.

    Args:
        delivery: What the report states.
    """
    report = delivery.results["export"]["int8"]
    speedups = ", ".join(f"{one['backend']} {one['fp32_ms'] / one['ms']:.2f}x" for one in report["latencies"])
    reasons = f" Reason: {' and '.join(report['reasons'])}." if report["reasons"] else ""
    increases = [
        f"{name} {report[f'{key}_increase']:+.2f} points ({report[f'{key}_interval'][0]:+.2f} to "
        f"{report[f'{key}_interval'][1]:+.2f})"
        for name, key in (("miss rate", "mr"), (f"recall at {report['conf']:g}", "recall"))
    ]
    return (
        f"INT8 compared with FP32 on this device: speedup {report['speedup']:.2f}x ({speedups}), "
        f"{', '.join(increases)} on the validation images.{reasons}"
    )


def plot_sizes(rows: Sequence[Mapping[str, Any]], chosen: int, max_ms: float | None) -> str:
    """Plot the miss rate of the trained student against its latency, one point per input size, as inline SVG.

    Args:
        rows: Size, p50_ms and miss_rate of each input size.
        chosen: Chosen size.
        max_ms: Latency budget, milliseconds, or None.

    Returns:
        Inline SVG.
    """
    timed = [row for row in rows if row["p50_ms"] is not None]

    def draw(axes: Axes) -> None:
        times, rates = [row["p50_ms"] for row in timed], [100 * row["miss_rate"] for row in timed]
        axes.plot(times, rates, "-o", color=COLORS[0], markersize=5)
        for row, time_ms, rate in zip(timed, times, rates, strict=True):
            axes.annotate(str(row["size"]), (time_ms, rate), xytext=(4, 5), textcoords="offset points", fontsize=8.5)
            if row["size"] == chosen:
                axes.plot(time_ms, rate, "o", color=COLORS[1], markersize=10, label=f"exported: {chosen}x{chosen}")
        if max_ms is not None:
            axes.axvline(max_ms, color=COLORS[2], linestyle="--", label=f"budget {max_ms:g} ms")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0, top=1.15 * max(rates, default=1.0) + 1)
        axes.set(xlabel="p50 latency from image to boxes, ms", ylabel="MR^-2 Reasonable on val, %")
        axes.legend(loc="upper right")

    descriptions = [f"{row['size']}: {row['p50_ms']:.1f} ms, {100 * row['miss_rate']:.2f} %" for row in timed]
    return render_svg(draw, "Miss rate against latency over input sizes", descriptions)


def render_sections(delivery: Delivery) -> str:
    """Render the sections of the report above those of hkd-bench as HTML.

    Args:
        delivery: What the report states.
    """
    results, sizes = delivery.results, delivery.results["sizes"]
    before = {one["size"]: one["ap50"] for one in results["measure"]["candidates"] if one["model"] == NARROW}
    rows = [
        {
            "input": f"{row['size']}x{row['size']}",
            "p50": "-" if row["p50_ms"] is None else f"{row['p50_ms']:.1f}",
            "miss_rate": format_percent(row["miss_rate"]),
            "before": format_percent(before.get(row["size"])),
            "is_chosen": row["size"] == sizes["size"],
        }
        for row in sizes["rows"]
    ]
    device = f"times of {delivery.options.device_bench}" if delivery.options.device_bench else "times on this device"
    return render_template(
        "sections.html.j2",
        conclusions=[line.replace("^-2", "\u207b\u00b2") for line in format_conclusions(delivery)],
        curve_plot=Markup(plot_sizes(sizes["rows"], sizes["size"], delivery.options.max_ms)),
        curve_caption=f"The trained student at other input sizes; it was trained at {delivery.plan.size}; {device}.",
        sizes=rows,
        data_columns=("images", "persons", "problems", *_AUDIT_COLUMNS.values()),
        data_rows=[(name, _make_data_cells(results["check"], name)) for name in results["check"]["splits"]],
        directory=delivery.options.save_dir.as_posix(),
        int8=format_int8(delivery),
        demo_command=f"cd {delivery.directory.as_posix()} && {format_demo_command(delivery)}",
        files=_list_files(delivery),
    )


_AUDIT_COLUMNS = {
    "num_missing": "probably missing labels",
    "num_location": "badly placed",
    "num_improbable": "improbable",
    "num_rotated": "rotated images",
}


def _make_data_cells(check: Mapping[str, Any], split: str) -> list[int]:
    counted, audit = check["splits"][split], check["audit"].get(split, {})
    problems = sum(problem["count"] for problem in counted["problems"])
    return [counted["images"], counted["persons"], problems, *(audit.get(key, 0) for key in _AUDIT_COLUMNS)]


def _list_files(delivery: Delivery) -> list[tuple[str, str]]:
    files = dict(FILES)
    if delivery.has_int8:
        files["model.int8.onnx"] = "the detector in INT8, for the runtime that the model card names"
    return list(files.items())


def format_demo_command(delivery: Delivery) -> str:
    """Return the command that runs the model on the first camera.

    Args:
        delivery: What the files state.
    """
    return f"hkd-demo model.onnx --source 0 --conf {delivery.results['export']['conf']:.2f}"


def format_environment(conf: float) -> str:
    """Return the settings file of the systemd unit.

    Args:
        conf: Suggested score threshold.
    """
    return (
        f"# Settings of {UNIT}. Contains the password of the camera: owner root, mode 0600.\n"
        f"HKD_MODEL={STATE_DIRECTORY}/model.onnx\n"
        "# --source and rtsp://user:password@host/path, http://..., or 0 for the first USB camera; or --cameras FILE\n"
        "HKD_INPUT=--source 0\n"
        "HKD_DEVICE=cpu\n"
        f"HKD_CONF={conf:.2f}\n"
        "# Other flags of hkd-demo, separated by spaces\n"
        "HKD_FLAGS=\n"
    )


def format_containerfile(conf: float) -> str:
    """Return the container file. Its base is the image of `deploy/desktop/cpu.Dockerfile`.

    Args:
        conf: Suggested score threshold.
    """
    return (
        "# The base image, built once in a checkout of hkd-det:\n"
        "#   docker build -f deploy/desktop/cpu.Dockerfile -t hkd-det:cpu .\n"
        "ARG BASE=hkd-det:cpu\n"
        "FROM ${BASE}\n"
        "COPY model.onnx /opt/hkd/model.onnx\n"
        f'ENTRYPOINT ["hkd-demo", "/opt/hkd/model.onnx", "--conf", "{conf:.2f}", "--no-show"]\n'
        'CMD ["--source", "0"]\n'
    )


def format_readme(delivery: Delivery) -> str:
    """Return the README of the deployment folder.

    Args:
        delivery: What the files state.
    """
    return render_template(
        "README.md.j2",
        name=Path(delivery.options.data).stem,
        version=__version__,
        files=_list_files(delivery),
        demo_command=format_demo_command(delivery),
        state_directory=STATE_DIRECTORY,
    )


def format_model_card(delivery: Delivery) -> str:
    """Return the model card.

    Args:
        delivery: What the files state.
    """
    options, plan, results, bench = delivery.options, delivery.plan, delivery.results, delivery.bench
    export, winner = results["export"], results["sizes"]["winner"]
    teacher = f"{plan.teacher}, fine-tuned on the same images" if plan.teacher else f"the shipped {DEFAULT_MODEL}"
    distilled = f"dense distillation and half of the detection losses; teacher: {teacher}"
    return render_template(
        "MODEL_CARD.md.j2",
        name=Path(options.data).stem,
        model=delivery.delivered,
        conf=export["conf"],
        conf_source="the highest F1 score on the validation images"
        if export["is_conf_measured"]
        else "the default: the validation images have too few persons to measure one",
        data=options.data,
        counts=delivery.counts,
        license=dataset_license(options.data) or LICENSE_PLACEHOLDER,
        plan=plan,
        seed=options.seed,
        method=distilled if winner == "distilled" else "labels only",
        epoch=results[winner]["epoch"],
        command=format_command(options),
        eval_split=delivery.eval_split,
        rows=[_make_card_row(model) for model in bench.models],
        conclusions=format_conclusions(delivery),
        threads="default threads" if bench.threads is None else f"{bench.threads} threads",
        processor=_get_processor(bench),
        date=bench.date[:10],
    )


def render_template(file_name: str, **values: Any) -> str:
    """Render a template of the directory `templates`; values are escaped for HTML in .html files.

    Args:
        file_name: Name of the template.
        values: Variables of the template.

    Returns:
        The text.
    """
    environment = jinja2.Environment(
        autoescape=".html" in file_name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string((TEMPLATES / file_name).read_text(encoding="utf-8")).render(**values)


def _get_processor(bench: BenchResult) -> str:
    return next((str(field.value) for field in bench.host if field.name == "CPU" and field.value), "unknown processor")


def _make_card_row(model: ModelResult) -> tuple[str, ...]:
    accuracy = model.accuracy[0]
    interval = accuracy.intervals.get(SETUP)
    rate, rate_all = (format_percent(accuracy.miss_rates[name]) for name in (SETUP, "All"))
    with_interval = f"{rate} ({format_interval(interval)})" if interval else rate
    return model.name, with_interval, rate_all, f"{model.latency.p50_ms:.1f} ms"
