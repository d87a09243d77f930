"""Tests that the commands of the deployment guides are valid and that the named files exist."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from hkd_bench import cli as bench
from hkd_deploy.demo import cli as demo
from hkd_deploy.export import cli as export

ROOT = Path(__file__).parents[3]
HOW_TO = ROOT / "docs" / "how-to"
GUIDES = sorted([*HOW_TO.glob("deploy*.md"), HOW_TO / "demo.md", HOW_TO / "several-cameras.md"])
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "hkd-export": export._build_parser().parse_args,
    "hkd-bench": bench.parse_bench_args,
    "hkd-demo": demo._parse_demo_arguments,
}


def list_commands() -> list[str]:
    """Return the hkd-* commands in code blocks, also those inside `docker run`, with continued lines joined."""
    blocks = [block for guide in GUIDES for block in re.findall(r"^```\n(.*?)^```", guide.read_text(), re.M | re.S)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        match[1] for line in lines if (match := re.search(r"(?:^|hkd-det:\w+ )(hkd-(?:export|bench|demo) .*)$", line))
    ]


@pytest.mark.parametrize("line", list_commands())
def test_guide_command_is_valid(line: str) -> None:
    name, *words = shlex.split(line)
    PARSERS[name](words)


def test_guides_show_all_commands() -> None:
    lines = list_commands()
    assert len(lines) > 12 and {line.split()[0] for line in lines} == set(PARSERS)
    for flag in ("--trt", "--serving triton", "--serving deepstream", "--no-show", "--precision int8"):
        assert any(flag in line for line in lines), flag


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_guide_links_and_files_exist(guide: Path) -> None:
    text = guide.read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
        assert link.startswith("https://") or (guide.parent / link).is_file(), link
    for path in re.findall(r"\bdeploy/(?:systemd|triton|jetson|desktop)/[\w.-]+", text):
        assert (ROOT / path).is_file(), path
