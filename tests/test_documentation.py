"""The commands and examples of the documentation work as they are written."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 600


def run_command(command: str, cwd: Path) -> None:
    """Run a documented command with the console scripts and the Python of this environment."""
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    if words[0] == "python":
        program = sys.executable
    else:
        found = shutil.which(words[0], path=str(Path(sys.executable).parent))
        assert found, f"{words[0]} is not installed"
        program = found
    done = subprocess.run(
        [program, *words[1:]], cwd=cwd, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def documented_commands(page: Path) -> list[str]:
    """Return the `hkd-*` commands of a page's code blocks without a language, in order."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    plain = [block for language, block in blocks if not language]
    return [command for block in plain for command in re.findall(r"^hkd-(?:.*\\\n)*.*$", block, re.MULTILINE)]


# As `make demo`, with fewer images and epochs.
QUICKSTART = """
from pathlib import Path
from hkd_bench.quickstart.steps import QuickstartConfig, run_quickstart
config = QuickstartConfig(num_train=80, num_val=12, epochs=4, runs=20, video_frames=25)
run_quickstart(Path("runs/quickstart"), config=config)
"""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory in which a small quickstart was run."""
    directory = tmp_path_factory.mktemp("quickstart")
    done = subprocess.run(
        [sys.executable, "-c", QUICKSTART], cwd=directory, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return directory


@pytest.mark.documentation
def test_quickstart_writes_what_the_tutorial_lists(quickstart: Path) -> None:
    tutorial = (ROOT / "docs" / "tutorials" / "quickstart.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \| ", tutorial, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) >= 10
    assert [name for name in names if not (quickstart / "runs" / "quickstart" / name).exists()] == []
    report = (quickstart / "runs" / "quickstart" / "report.html").read_text(encoding="utf-8")
    assert "MR" in report and "<img" in report


@pytest.mark.documentation
def test_readme_commands_run(quickstart: Path) -> None:
    commands = documented_commands(ROOT / "README.md")
    assert {command.split()[0] for command in commands} == {"hkd-train", "hkd-export", "hkd-bench", "hkd-demo"}
    for command in commands:
        # Little training leaves near-equal scores, which rounding can reorder.
        run_command(f"{command} --no-verify" if ".pt --output" in command else command, quickstart)
    assert (quickstart / "detections.mp4").stat().st_size > 10_000


@pytest.mark.documentation
def test_examples_run(quickstart: Path) -> None:
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"`(python examples/[^`]+)`", readme)
    assert {command.split()[1] for command in commands} == {
        f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")
    }
    image = next((quickstart / "runs" / "quickstart" / "street").rglob("*.png"))
    shutil.copy(image, quickstart / "image.jpg")
    for command in commands:
        epochs = " 1" if "distill_student" in command else ""
        run_command(command.replace("examples/", f"{ROOT}/examples/", 1) + epochs, quickstart)
    assert (quickstart / "detections.png").stat().st_size > 10_000


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse formats help differently in other versions")
def test_generated_reference_pages_are_current() -> None:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs" / "generate_reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    outdated = [path.name for path, format_page in module.PAGES.items() if path.read_text("utf-8") != format_page()]
    assert outdated == [], "run `make docs-reference`"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150
