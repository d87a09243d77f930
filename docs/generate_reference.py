"""Write cli.md, methods.md and bench-result.schema.json of docs/reference: `python docs/generate_reference.py`.

The command reference is the `--help` output of all commands. The method reference reads `METHODS`: the docstring, the
requirements and the settings of each distillation method.
"""

import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from hkd_bench.cameras import BatchPoint, CameraPoint, CameraResult
from hkd_bench.device_state import DeviceState, RunConditions
from hkd_bench.energy import EnergyResult, PowerSource
from hkd_bench.host import HostField
from hkd_bench.result import SCHEMA_VERSION, AccuracyResult, BenchResult, ModelResult, StageSamples, StoredCurve
from hkd_bench.scenarios import ScenarioResult
from hkd_bench.sustained import SustainedPart, SustainedResult
from hkd_det.distill import METHODS, load_method
from hkd_det.metrics.bootstrap import MissRateDifference, MissRateInterval

DOCS = Path(__file__).parent
COMMANDS = {
    "hkd-train": ("hkd_det.train.cli", []),
    "hkd-export": ("hkd_deploy.export.cli", []),
    "hkd-bench": ("hkd_bench.cli", []),
    "hkd-bench score": ("hkd_bench.cli", ["score"]),
    "hkd-bench compare": ("hkd_bench.cli", ["compare"]),
    "hkd-demo": ("hkd_deploy.demo.cli", []),
    "hkd-quickstart": ("hkd_bench.quickstart", []),
}
CLI_HEADER = """# Command reference

The output of `--help` of each command, written by `make docs-reference`.
Exit codes: 0 success, 1 failure, 2 usage error.
"""
METHODS_HEADER = """# Distillation methods

Requirements and settings of each method, written by `make docs-reference` from `hkd_det.distill.METHODS`. A setting is
`distill.METHOD.KEY` in `--set`, and a key below `distill: METHOD:` in a recipe. Usage: [Distill](../how-to/distill.md).
"""


def format_help(module: str, subcommand: list[str]) -> str:
    """Return the help text of a command, wrapped at 100 columns.

    Args:
        module: Module with the command's `main`.
        subcommand: Arguments in front of `--help`.
    """
    os.environ["COLUMNS"] = "100"
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        importlib.import_module(module).main([*subcommand, "--help"])
    return output.getvalue().rstrip()


def format_cli_page() -> str:
    """Return the command reference as Markdown."""
    sections = [f"## {name}\n\n```\n{format_help(*command)}\n```\n" for name, command in COMMANDS.items()]
    return "\n".join([CLI_HEADER, *sections])


def format_methods_page() -> str:
    """Return the method reference as Markdown."""
    rows = ["| method | does | requires of the teacher | conflicts with |", "| --- | --- | --- | --- |"]
    for name in METHODS:
        method = load_method(name)
        requires, conflicts = (", ".join(sorted(names)) or "-" for names in (method.requires, method.conflicts))
        rows.append(f"| [`{name}`](#{name}) | {_get_summary(method)} | {requires} | {conflicts} |")
    return "\n".join([METHODS_HEADER, *rows, "", *(_format_method(name) for name in METHODS)])


def _format_method(name: str) -> str:
    method = load_method(name)
    page = DOCS / "explanation" / "methods" / f"{name.replace('_', '-')}.md"
    link = f" [Method and paper](../explanation/methods/{page.name})." if page.exists() else ""
    settings = [f"| `{key}` | {default} | {meaning} |" for key, default, meaning in _iterate_settings(method.Config)]
    table = "\n".join(["| key | default | meaning |", "| --- | --- | --- |", *settings])
    return f"## {name}\n\n{_get_summary(method)}{link}\n\n{table}\n"


def _get_summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _iterate_settings(config: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield key, default and meaning of each setting; nested dataclasses have dotted keys."""
    meanings = _read_meanings(config)
    for field in dataclasses.fields(config):
        has_factory = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if has_factory else field.default  # type: ignore[misc]
        if dataclasses.is_dataclass(default):
            yield from _iterate_settings(type(default), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", _format_default(default), meanings[field.name]


def _read_meanings(config: Any) -> dict[str, str]:
    attributes = (inspect.getdoc(config) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def format_bench_schema() -> str:
    """Return the JSON schema of `hkd-bench --json`, from the dataclasses of the result."""
    schema = msgspec.json.schema(BenchResult)
    classes = (
        BenchResult,
        HostField,
        ModelResult,
        AccuracyResult,
        StageSamples,
        StoredCurve,
        MissRateInterval,
        MissRateDifference,
        EnergyResult,
        RunConditions,
        PowerSource,
        ScenarioResult,
        SustainedPart,
        SustainedResult,
        DeviceState,
        CameraResult,
        BatchPoint,
        CameraPoint,
    )
    for cls in classes:
        definition, meanings = schema["$defs"][cls.__name__], _read_meanings(cls)
        definition |= {"description": _get_summary(cls), "additionalProperties": False}
        for name, field in definition["properties"].items():
            if name in meanings and "$ref" not in field:
                field["description"] = meanings[name]
    schema["$defs"]["BenchResult"]["properties"]["schema"] = {"const": SCHEMA_VERSION}
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Result of hkd-bench --json, schema {SCHEMA_VERSION}",
    }
    return json.dumps({**head, **schema}, indent=1) + "\n"


def _format_default(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return {"": '""', (): "[]"}.get(value, str(list(value) if isinstance(value, tuple) else value))


PAGES = {
    DOCS / "reference" / "cli.md": format_cli_page,
    DOCS / "reference" / "methods.md": format_methods_page,
    DOCS / "reference" / "bench-result.schema.json": format_bench_schema,
}

if __name__ == "__main__":
    for path, format_page in PAGES.items():
        path.write_text(format_page(), encoding="utf-8")
        print(path)
