"""Results of devices: add the JSON file of one device, and write the page and the plot of all devices.

    python benchmarks/studies/devices.py add RESULT.json --name jetson-orin-nano
    python benchmarks/studies/devices.py page

`add` checks a result of `hkd-bench --json` and stores it as results/devices/NAME.json. Both commands write
results/devices/README.md and devices.png from the files of this directory.
"""

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hkd_bench.compare_cli import NamedResult, make_compare_notes, make_compare_rows
from hkd_bench.plots import PARETO_AXES, write_pareto_plot
from hkd_bench.result import SCHEMA_VERSION, BenchResult, ModelResult, read_result, write_result
from hkd_bench.table import format_data_name
from hkd_det.console import format_table
from hkd_det.errors import DataError, UsageError, run_command
from hkd_det.files import write_text

DEVICES = Path(__file__).parents[1] / "results" / "devices"
PAGE_NAME, PLOT_NAME = "README.md", "devices.png"
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
MIN_RUNS = 662  # a 99 % bound of p99 needs as many
HOST_FIELDS = ("CPU", "cores", "power mode", "memory", "GPU", "Jetson", "L4T", "ONNX Runtime", "OpenVINO", "TensorRT")
HEADER = """# Devices

Results of `hkd-bench` on devices, one JSON file each. This page is written by `benchmarks/studies/devices.py page`.
[Add a device](../../../docs/how-to/bench.md#publish-the-result-of-a-device).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command("devices.py", run, sys.argv[1:] if argv is None else argv)


def run(argv: Sequence[str] | None) -> int:
    """Add a result, or write the page.

    Args:
        argv: Arguments.

    Raises:
        UsageError: The name is invalid or taken.
        DataError: A result is missing or invalid.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="check a result and add it")
    add.add_argument("result", type=Path, metavar="RESULT.json")
    add.add_argument("--name", required=True, help="name of the device, such as jetson-orin-nano")
    add.add_argument("--replace", action="store_true", help="replace the result of this device")
    page = commands.add_parser("page", help="write the page from the files")
    for command in (add, page):
        command.add_argument("--devices", type=Path, default=DEVICES, metavar="DIR", help="directory of the results")
    flags = parser.parse_args(argv)
    if flags.command == "add":
        print(f"saved {add_result(flags.result, flags.name, flags.devices, flags.replace)}")
    print(f"saved {write_page(flags.devices)}")
    return 0


def add_result(source: Path, name: str, devices: Path, replace: bool) -> Path:
    """Check a result and store it without the directories of its machine.

    Args:
        source: File of `hkd-bench --json`.
        name: Name of the device.
        devices: Directory of the results.
        replace: Whether a result of this name is replaced.

    Returns:
        The new file.

    Raises:
        UsageError: The name is invalid or taken.
        DataError: The file is invalid, or does not state what a reader needs to repeat it.
    """
    if not NAME.fullmatch(name):
        raise UsageError(f"--name {name}: expected lower-case letters, digits and hyphens, such as jetson-orin-nano.")
    path = devices / f"{name}.json"
    if path.exists() and not replace:
        raise UsageError(f"--name {name}: {path} exists. Choose another name, or set --replace.")
    result = read_result(source)
    if problems := find_problems(result):
        raise DataError(f"{source}: {'; '.join(problems)}. Measure again with hkd-bench --json.")
    models = tuple(
        dataclasses.replace(
            model,
            path=Path(model.path).name,
            accuracy=tuple(
                dataclasses.replace(accuracy, data=format_data_name(accuracy.data)) for accuracy in model.accuracy
            ),
        )
        for model in result.models
    )
    write_result(path, dataclasses.replace(result, models=models, data=format_data_name(result.data)))
    return path


def find_problems(result: BenchResult) -> list[str]:
    """Return why a result cannot be published; empty if it can.

    Args:
        result: The result.
    """
    fields = {field.name: field.value for field in result.host}
    commit, problems = fields.get("git commit"), []
    if result.schema != SCHEMA_VERSION:
        problems.append(f"expected schema {SCHEMA_VERSION}, got {result.schema}")
    if not result.command:
        problems.append("the command is unknown, because Python called the measurement")
    if any(Path(part).is_absolute() or "=/" in part for part in shlex.split(result.command)):
        problems.append("the command contains absolute paths, run it in a directory with relative ones")
    if not commit and not fields.get("hkd-det"):
        problems.append("neither the git commit nor the version of hkd-det is known")
    if commit and "uncommitted" in commit:
        problems.append("the repository had uncommitted changes")
    if not result.num_images:
        problems.append("no miss rate was measured, --data is required")
    if result.runs < MIN_RUNS:
        problems.append(f"expected --runs {MIN_RUNS} or more, got {result.runs}")
    return problems


def read_devices(devices: Path) -> list[NamedResult]:
    """Read the results of all devices, by name.

    Args:
        devices: Directory of the results.

    Raises:
        DataError: There is no result, or one is invalid.
    """
    paths = sorted(devices.glob("*.json"))
    if not paths:
        raise DataError(f"{devices}: contains no result. Add one with devices.py add RESULT.json --name NAME.")
    return [NamedResult(path.stem, path, read_result(path)) for path in paths]


def write_page(devices: Path) -> Path:
    """Write the page and the plot of all devices.

    Args:
        devices: Directory of the results.

    Returns:
        The page.
    """
    results = read_devices(devices)
    write_pareto_plot(devices / PLOT_NAME, {named.name: list(named.result.models) for named in results})
    headers, rows = make_compare_rows(results)
    costs = [label.split(",")[0] for label, read in PARETO_AXES if any(map(read, _list_models(results)))]
    align = ["left"] * 3 + ["right"] * (len(headers) - 4) + ["left"]
    parts = [
        HEADER,
        format_table(rows, ["device", *headers[1:]], "github", align=align),
        "\n".join(f"- {note}" for note in make_compare_notes(results)),
        f"![MR^-2 Reasonable against {', '.join(costs)}]({PLOT_NAME})",
        "## Machines and commands",
        *map(_format_device, results),
    ]
    path = devices / PAGE_NAME
    write_text(path, "\n\n".join(part.strip() for part in parts) + "\n")
    return path


def _list_models(results: Sequence[NamedResult]) -> list[ModelResult]:
    return [model for named in results for model in named.result.models]


def _format_device(named: NamedResult) -> str:
    """Return the section of a device: machine, commit, date, command and file."""
    result = named.result
    fields = {field.name: field.value for field in result.host}
    known = [f"{name}: {fields[name]}" for name in HOST_FIELDS if fields.get(name)]
    version = fields.get("git commit") or f"hkd-det {fields.get('hkd-det')}"
    digests = ", ".join(f"{model.name} `{model.sha256[:12]}`" for model in result.models)
    return (
        f"### {named.name}\n\n{'; '.join(known)}.\n\nCommit {version}, {result.date}, [{named.path.name}]"
        f"({named.path.name}). SHA-256 of the files: {digests}.\n\n```\n{result.command}\n```"
    )


if __name__ == "__main__":
    sys.exit(main())
