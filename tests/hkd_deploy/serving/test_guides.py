"""Every hkd-* line of the deploy guides is one that the command takes; every file they name is there."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from hkd_bench import bench_cli as bench
from hkd_deploy.demo import cli as demo
from hkd_deploy.export import cli as export

ROOT = Path(__file__).parents[3]
GUIDES = [ROOT / "docs" / "deploy.md", *sorted((ROOT / "docs" / "deploy").glob("*.md"))]
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "hkd-export": export._build_parser().parse_args,
    "hkd-bench": bench._parse_bench_args,
    "hkd-demo": demo._parse_demo_arguments,
}


def hkd_lines() -> list[str]:
    """The command lines in code blocks, continued ones joined; inside `docker run` too, from the command on."""
    blocks = [block for guide in GUIDES for block in re.findall(r"^```\n(.*?)^```", guide.read_text(), re.M | re.S)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        match[1] for line in lines if (match := re.search(r"(?:^|hkd-det:\w+ )(hkd-(?:export|bench|demo) .*)$", line))
    ]


@pytest.mark.parametrize("line", hkd_lines())
def test_the_command_takes_it(line: str) -> None:
    name, *words = shlex.split(line)
    PARSERS[name](words)


def test_every_command_is_shown() -> None:
    lines = hkd_lines()
    assert len(lines) > 12 and {line.split()[0] for line in lines} == set(PARSERS)
    for flag in ("--trt", "--serving triton", "--serving deepstream", "--headless", "--precision int8"):
        assert any(flag in line for line in lines), flag


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_what_it_names_is_there(guide: Path) -> None:
    text = guide.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (guide.parent / link).is_file(), link
    for path in re.findall(r"\bdeploy/(?:systemd|triton|jetson|desktop)/[\w.-]+", text):
        assert (ROOT / path).is_file(), path
