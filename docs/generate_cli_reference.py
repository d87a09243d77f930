"""Write docs/reference/cli.md from the `--help` output of all commands: `python docs/generate_cli_reference.py`."""

import contextlib
import importlib
import io
import os
from pathlib import Path

PAGE = Path(__file__).parent / "reference" / "cli.md"
COMMANDS = {
    "hkd-train": ("hkd_det.train.cli", []),
    "hkd-export": ("hkd_deploy.export.cli", []),
    "hkd-bench": ("hkd_bench.cli", []),
    "hkd-bench score": ("hkd_bench.cli", ["score"]),
    "hkd-demo": ("hkd_deploy.demo.cli", []),
    "hkd-quickstart": ("hkd_bench.quickstart", []),
}
HEADER = """# Command reference

The output of `--help` of each command, written by `python docs/generate_cli_reference.py`.
Exit codes: 0 success, 1 failure, 2 usage error.
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


def format_page() -> str:
    """Return the whole page as Markdown."""
    sections = [f"## {name}\n\n```\n{format_help(*command)}\n```\n" for name, command in COMMANDS.items()]
    return "\n".join([HEADER, *sections])


if __name__ == "__main__":
    PAGE.write_text(format_page(), encoding="utf-8")
    print(PAGE)
