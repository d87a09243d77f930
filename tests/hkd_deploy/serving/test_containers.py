"""The Dockerfiles against the repository: what they copy is there and passes .dockerignore, what they install exists.

No daemon here: the images themselves are built by nobody in these tests.
"""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[3]
DOCKERFILES = sorted((ROOT / "deploy").glob("*/*.Dockerfile"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, the rest), continued lines joined, comments out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    split = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(word.upper(), rest) for word, rest in split]


def let_through(path: str) -> bool:
    """By .dockerignore: the last line that matches the path or a folder above it decides."""
    parts = path.rstrip("/").split("/")
    above = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    passes = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!").rstrip("/")
        if line and not line.startswith("#") and any(fnmatch(folder, pattern) for folder in above):
            passes = line.startswith("!")
    return passes


def test_all_four_are_there() -> None:
    names = [f"{path.parent.name}/{path.stem}" for path in DOCKERFILES]
    assert names == ["desktop/cpu", "desktop/nvidia", "jetson/jetpack6", "jetson/jetpack7"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_copies_what_is_there(path: Path) -> None:
    copied = [rest.split()[:-1] for word, rest in instructions(path) if word == "COPY" and "--from" not in rest]
    sources = [source for sources in copied for source in sources]
    for source in sources:
        assert (ROOT / source).exists() and let_through(source), source
        assert source.endswith("/") == (ROOT / source).is_dir()
    # All that building the wheel reads, by pyproject.toml.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], project["project"]["readme"], "pyproject.toml", "LICENSE"}
    assert {source.rstrip("/") for source in sources} >= needed


def test_nothing_else_reaches_the_build() -> None:
    for path in (
        "runs/best.pt",
        ".git/config",
        ".venv/bin/python",
        "deploy/jetson/jetpack6.Dockerfile",
        "docs/data.md",
    ):
        assert not let_through(path), path
    assert not let_through("hkd_det/__pycache__") and let_through("hkd_det/models/detector.py")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_installs_extras_that_exist_and_runs_as_nobody_special(path: Path) -> None:
    found = instructions(path)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    runs = " ".join(rest for word, rest in found if word == "RUN")
    named = [name for group in re.findall(r"'\.\[([a-z,]+)\]'", runs) for name in group.split(",")]
    assert named and set(named) <= set(extras) - {"train", "yolo"}
    assert [word for word, _ in found][-3:] == ["USER", "WORKDIR", "CMD"]
    (user,) = (rest for word, rest in found if word == "USER")
    assert int(user) > 999 and f"--uid {user} " in runs
    # An index other than pip's own is the builder's to name.
    assert "http" not in runs and not any(
        word == "ARG" and rest.startswith("ONNXRUNTIME_INDEX=") for word, rest in found
    )
