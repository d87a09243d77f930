"""The service's unit: systemd's own verifier, and its command line by hkd-demo's own parser."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hkd_deploy.demo.cli import _parse_demo_arguments

FOLDER = Path(__file__).parents[3] / "deploy" / "systemd"
UNIT, SETTINGS = FOLDER / "hkd-demo.service", FOLDER / "hkd-demo.env"


def settings() -> dict[str, str]:
    lines = [line for line in SETTINGS.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_the_command_is_one_hkd_demo_takes() -> None:
    """Expanded as systemd does: ${X} is one word, a bare $X is split."""
    (command,) = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    values = settings()
    words: list[str] = []
    for word in command.split()[1:]:
        if match := re.fullmatch(r"\$\{(\w+)\}", word):
            words.append(values.pop(match[1]))
        elif match := re.fullmatch(r"\$(\w+)", word):
            words += values.pop(match[1]).split()
        else:
            words.append(word)
    flags = _parse_demo_arguments(words)
    assert (flags.source, flags.device, flags.conf) == ("rtsp://user:password@camera.local:554/stream", "cuda", 0.3)
    assert flags.show is False and flags.save == Path("/var/lib/hkd-demo/seen.mp4")
    assert not values  # each setting is used


@pytest.mark.slow
def test_systemd_reads_it(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd is not here")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/hkd/bin/hkd-demo", str(shutil.which("true"))))
    done = subprocess.run([analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False)
    # systemd before 254 says of these two that it does not know them; the unit says so, too.
    said = [line for line in done.stderr.splitlines() if "RestartSteps" not in line and "RestartMaxDelay" not in line]
    assert done.returncode == 0 and said == []
    security = [analyze, "security", "--offline=true", "--threshold=25", str(copy)]  # of 100: 2.5 in its own words
    done = subprocess.run(security, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-200:]
