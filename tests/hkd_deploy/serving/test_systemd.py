"""Tests of the systemd unit with `systemd-analyze` and with the argument parser of hkd-demo."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hkd_deploy.demo.cli import _parse_demo_arguments

FOLDER = Path(__file__).parents[3] / "deploy" / "systemd"
UNIT, SETTINGS = FOLDER / "hkd-demo.service", FOLDER / "hkd-demo.env"


def read_settings() -> dict[str, str]:
    lines = [line for line in SETTINGS.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_unit_command_is_valid() -> None:
    """Expand the command as systemd: ${X} is one word, $X is split at spaces."""
    (command,) = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    values = read_settings()
    words: list[str] = []
    for word in command.split()[1:]:
        if match := re.fullmatch(r"\$\{(\w+)\}", word):
            words.append(values.pop(match[1]))
        elif match := re.fullmatch(r"\$(\w+)", word):
            words += values.pop(match[1]).split()
        else:
            words.append(word)
    flags = _parse_demo_arguments(words)
    assert (flags.source, flags.device, flags.conf) == (["rtsp://user:password@camera.local:554/stream"], "cuda", 0.3)
    assert flags.show is False and flags.events == "/var/lib/hkd-demo/events.jsonl"
    assert not values  # all settings are used
    lines = UNIT.read_text().splitlines()
    assert "Type=notify" in lines and "WatchdogSec=30s" in lines  # see SystemdNotifier
    assert "ExecReload=/bin/kill -USR1 $MAINPID" in lines  # see ReloadSignal


@pytest.mark.slow
def test_unit_passes_systemd_analyze(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("requires systemd-analyze")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/hkd/bin/hkd-demo", str(shutil.which("true"))))
    done = subprocess.run([analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False)
    # Versions before 254 do not support these two settings.
    warnings = [
        line for line in done.stderr.splitlines() if "RestartSteps" not in line and "RestartMaxDelay" not in line
    ]
    assert done.returncode == 0 and warnings == []
    security = [analyze, "security", "--offline=true", "--threshold=25", str(copy)]  # in percent: a score of 2.5
    done = subprocess.run(security, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-200:]
