"""Tests that the Dockerfiles copy existing files and install existing extras. No image is built."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[3]
SERVICE_EXTRAS = {"bench", "live", "track", "mqtt", "metrics", "web"}
DOCKERFILES = sorted((ROOT / "deploy").glob("*/*.Dockerfile"))


def parse_instructions(path: Path) -> list[tuple[str, str]]:
    """Return (instruction, arguments) with continued lines joined and without comments."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    split = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(word.upper(), rest) for word, rest in split]


def passes_dockerignore(path: str) -> bool:
    """Apply .dockerignore: the last line that matches the path or a parent directory decides."""
    parts = path.rstrip("/").split("/")
    parents = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    passes = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!").rstrip("/")
        if line and not line.startswith("#") and any(fnmatch(folder, pattern) for folder in parents):
            passes = line.startswith("!")
    return passes


def test_dockerfiles_exist() -> None:
    names = [f"{path.parent.name}/{path.stem}" for path in DOCKERFILES]
    assert names == ["desktop/cpu", "desktop/nvidia", "jetson/jetpack6", "jetson/jetpack7"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_dockerfile_copies_existing_files(path: Path) -> None:
    copied = [rest.split()[:-1] for word, rest in parse_instructions(path) if word == "COPY" and "--from" not in rest]
    sources = [source for sources in copied for source in sources]
    for source in sources:
        assert (ROOT / source).exists() and passes_dockerignore(source), source
        assert source.endswith("/") == (ROOT / source).is_dir()
    # Everything that the wheel build reads, from pyproject.toml.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], project["project"]["readme"], "pyproject.toml", "LICENSE"}
    assert {source.rstrip("/") for source in sources} >= needed


def test_dockerignore_excludes_other_files() -> None:
    for path in (
        "runs/best.pt",
        ".git/config",
        ".venv/bin/python",
        "deploy/jetson/jetpack6.Dockerfile",
        "docs/how-to/data.md",
    ):
        assert not passes_dockerignore(path), path
    assert not passes_dockerignore("hkd_det/__pycache__") and passes_dockerignore("hkd_det/models/detector.py")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_dockerfile_extras_exist_and_user_is_unprivileged(path: Path) -> None:
    entries = parse_instructions(path)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    runs = " ".join(rest for word, rest in entries if word == "RUN")
    named = [name for group in re.findall(r"'\.\[([a-z,]+)\]'", runs) for name in group.split(",")]
    if "cpu.lock" in runs:
        named = re.findall(r"--extra (\w+)", (ROOT / "deploy" / "desktop" / "cpu.lock").read_text().split("anyio")[0])
        assert "--no-deps --require-hashes -r cpu.lock" in runs
    assert set(named) >= SERVICE_EXTRAS and set(named) <= set(extras) - {"train", "yolo"}
    assert [word for word, _ in entries][-4:] == ["USER", "HEALTHCHECK", "WORKDIR", "CMD"]
    (user,) = (rest for word, rest in entries if word == "USER")
    assert int(user) > 999 and f"--uid {user} " in runs
    # No package index except PyPI by default.
    assert "http" not in runs and not any(
        word == "ARG" and rest.startswith("ONNXRUNTIME_INDEX=") for word, rest in entries
    )
