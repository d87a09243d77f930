"""Description of this machine, and the energy counters of its processor (Linux powercap, RAPL).

Every field is read from the system or missing with a reason; none is guessed.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

POWERCAP = Path("/sys/class/powercap")
DISTRIBUTIONS = {
    "ONNX Runtime": ("onnxruntime", "onnxruntime-gpu"),
    "OpenVINO": ("openvino",),
    "TensorRT": ("tensorrt",),
    "NumPy": ("numpy",),
    "OpenCV": ("opencv-python-headless", "opencv-python"),
    "hkd-det": ("hkd-det",),
}


@dataclass(frozen=True)
class HostField:
    """One field of the machine description.

    Attributes:
        name: Name of the field.
        value: Value as text, or None if it cannot be read.
        reason: Reason why `value` is None; empty otherwise.
    """

    name: str
    value: str | None
    reason: str = ""


class HostFieldError(Exception):
    """A field cannot be read; the message gives the reason."""


def read_host_fields() -> tuple[HostField, ...]:
    """Read all fields, in display order.

    Returns:
        Name and value of each field, or the reason why it cannot be read.
    """
    readers: tuple[tuple[str, Callable[[], str]], ...] = (
        ("CPU", _read_cpu_model),
        ("cores", _read_core_count),
        ("CPU frequency", _read_cpu_frequency),
        ("CPU governor", lambda: _read_first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"))),
        ("load average at start", lambda: f"{os.getloadavg()[0]:.2f} over the last minute"),
        ("memory", lambda: f"{psutil.virtual_memory().total / 2**30:.1f} GiB"),
        ("operating system", _read_os_name),
        ("kernel", platform.release),
        ("GPU", _query_nvidia_gpu),
        ("Jetson", lambda: _read_first_line(Path("/proc/device-tree/model"))),
        ("L4T", lambda: _read_first_line(Path("/etc/nv_tegra_release"))),
        ("Python", platform.python_version),
        *((name, _make_version_reader(names)) for name, names in DISTRIBUTIONS.items()),
        ("git commit", _read_git_commit),
    )
    return tuple(_read_field(name, read) for name, read in readers)


def _read_field(name: str, read: Callable[[], str]) -> HostField:
    try:
        value = read()
        return HostField(name, value) if value else HostField(name, None, "empty")
    except (HostFieldError, OSError, ValueError) as error:  # ValueError: a system file that contains no number
        return HostField(name, None, str(error))


def _read_first_line(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError as error:
        raise HostFieldError(f"{path}: {error.strerror}") from None
    return text.splitlines()[0] if text else ""


def _read_cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match[1].strip()
    if platform.processor():
        return platform.processor()
    match = re.search(r"Model name:\s*([^;]+)", _run_program(["lscpu"]))  # on Arm only lscpu has the name
    if match and match[1].strip() != "-":
        return match[1].strip()
    raise HostFieldError("not in /proc/cpuinfo or the output of lscpu")


def _read_core_count() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    physical = psutil.cpu_count(logical=False)
    return f"{usable} usable, {os.cpu_count()} logical" + (f", {physical} physical" if physical else "")


def _read_cpu_frequency() -> str:
    folder = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    low, high = (int(_read_first_line(folder / f"cpuinfo_{end}_freq")) / 1000 for end in ("min", "max"))
    return f"{low:.0f} to {high:.0f} MHz"


def _read_os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform()


def _query_nvidia_gpu() -> str:
    return _run_program(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])


def _read_git_commit() -> str:
    folder = Path(__file__).parent
    # Fails if the package is installed inside another repository.
    _run_program(["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name])
    commit = _run_program(["git", "-C", str(folder), "rev-parse", "HEAD"])
    dirty = _run_program(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return commit + (" with uncommitted changes" if dirty else "")


def _make_version_reader(distributions: tuple[str, ...]) -> Callable[[], str]:
    def read() -> str:
        for name in distributions:
            try:
                return f"{importlib.metadata.version(name)} ({name})"
            except importlib.metadata.PackageNotFoundError:
                continue
        raise HostFieldError("not installed as a Python distribution")

    return read


def _run_program(command: list[str]) -> str:
    """Run a program and return its output in one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:
        raise HostFieldError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise HostFieldError(f"{command[0]} did not finish within 10 s") from None
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise HostFieldError(f"{command[0]}: {reason[0] if reason else f'exit code {done.returncode}'}")
    return "; ".join(line.strip() for line in done.stdout.splitlines() if line.strip())


@dataclass(frozen=True)
class Energy:
    """Energy of all processor packages, including their idle power.

    Attributes:
        joules: Energy in joules, or None if it cannot be read.
        reason: Reason why `joules` is None; empty otherwise.
    """

    joules: float | None
    reason: str = ""


class RaplMeter:
    """Energy meter that starts at its creation. Call `total` at least once per hour, because the counters wrap around.

    Args:
        powercap: Directory of the kernel's powercap interface.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        # Zones with one colon are packages. Zones with two are parts of a package and included in it.
        self.zones = sorted(zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1)
        self.reason = "" if self.zones else f"{powercap}/intel-rapl:*: this machine has no such counters"
        self.joules = 0.0
        self.last_uj = self._read_energy_uj()

    def total(self) -> Energy:
        """Return the energy since the creation of the meter."""
        now = self._read_energy_uj()
        for zone, (before, after) in enumerate(zip(self.last_uj, now, strict=True)):
            wrapped = after < before
            self.joules += (after - before + (self._read_range_uj(zone) if wrapped else 0)) / 1e6
        self.last_uj = now
        return Energy(None, self.reason) if self.reason else Energy(self.joules)

    def _read_energy_uj(self) -> list[int]:
        try:
            return [int((zone / "energy_uj").read_text()) for zone in self.zones]
        except PermissionError as error:
            self.reason = f"{error.filename}: permission denied. Run sudo chmod a+r {error.filename}."
        except (OSError, ValueError) as error:
            self.reason = f"{self.zones[0]}: {error}"
        self.zones = []
        return []

    def _read_range_uj(self, zone: int) -> int:
        return int((self.zones[zone] / "max_energy_range_uj").read_text())
