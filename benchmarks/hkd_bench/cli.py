"""Entry point of `hkd-bench` and `hkd-bench score`.

It checks the optional packages before it imports the command, so that a missing one gives one line of error.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from hkd_det.errors import UnavailableError, run_command

# Packages of the extra `bench` that the commands import.
BENCH_PACKAGES = ("imagesize", "jinja2", "matplotlib", "msgspec", "psutil", "pycocotools", "scipy", "tabulate", "tqdm")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hkd-bench` or `hkd-bench score` and return the exit code.

    Args:
        argv: Arguments after the command name; the default is `sys.argv`.
    """
    return run_command("hkd-bench", _run_subcommand, sys.argv[1:] if argv is None else argv)


def _run_subcommand(argv: Sequence[str] | None) -> int:
    args = argv or []
    for package in BENCH_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(f"{package} is not installed. Run pip install 'hkd-det[bench]'.")
    exit_code: int
    if args[:1] == ["score"]:
        exit_code = importlib.import_module("hkd_bench.score_cli").run_score(args[1:])
    else:
        exit_code = importlib.import_module("hkd_bench.bench_cli").run_bench(args)
    return exit_code
