"""Description of this machine, and access to its NVIDIA GPU by NVML.

Every field is read from the system or missing with a reason; none is guessed.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

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
        ("CPU quota", _format_cpu_quota),
        ("power mode", _query_power_mode),
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


def _query_power_mode() -> str:
    """Read the file of nvpmodel, or ask the program where the file is missing, such as in a container."""
    try:
        return read_power_mode()
    except HostFieldError as error:
        if not Path("/usr/sbin/nvpmodel").exists():
            raise error from None
        return parse_power_mode(_run_program(["/usr/sbin/nvpmodel", "-q"]))


def parse_power_mode(text: str) -> str:
    """Read the power mode from the output of `nvpmodel -q`.

    Args:
        text: Output in one line, such as "NV Power Mode: MAXN; 0".

    Returns:
        For example "0 (MAXN)".

    Raises:
        HostFieldError: The output contains no mode.
    """
    match = re.search(r"NV Power Mode:\s*(\S+?);\s*(\d+)", text)
    if not match:
        raise HostFieldError(f"nvpmodel -q: no mode in {text!r}")
    return f"{match[2]} ({match[1]})"


def _format_cpu_quota() -> str:
    quota = read_cpu_quota()
    return "no limit" if quota is None else f"{quota:g} CPUs"


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


def read_power_mode(root: Path = Path("/")) -> str:
    """Read the power mode of a Jetson board: the state file of nvpmodel, and the name in its configuration.

    Args:
        root: Root directory of the system.

    Returns:
        For example "0 (MAXN)".

    Raises:
        HostFieldError: The machine has no nvpmodel.
    """
    status, config = root / "var/lib/nvpmodel/status", root / "etc/nvpmodel.conf"
    try:
        match = re.search(r"pmode:0*(\d+)", status.read_text())
    except OSError as error:
        raise HostFieldError(f"{status}: {error.strerror}") from None
    if not match:
        raise HostFieldError(f"{status}: contains no mode")
    name = None
    with suppress(OSError):
        name = re.search(rf"POWER_MODEL\s+ID={match[1]}\s+NAME=(\S+)", config.read_text())
    return f"{match[1]} ({name[1]})" if name else match[1]


def read_cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPUs that the container may use (cgroup v2 `cpu.max`, v1 `cpu.cfs_quota_us`); None without limit.

    Args:
        root: Root directory of the system.
    """
    quotas = []
    for folder in list_cgroup_folders(root):
        with suppress(OSError, ValueError):
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def list_cgroup_folders(root: Path = Path("/")) -> list[Path]:
    """List the cgroup of this process and those that contain it, of version 2 and of the controller `cpu` of version 1.

    In a container, the path in /proc/self/cgroup may be that of the host, and the mount is the container's own group.

    Args:
        root: Root directory of the system.

    Returns:
        Directories that exist, from the group of this process to the root group.
    """
    bases = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, name = line.split(":", 2)
            if number == "0":
                bases += [(root / "sys/fs/cgroup", name), (root / "sys/fs/cgroup/unified", name)]
            elif "cpu" in controllers.split(","):
                bases += [(root / "sys/fs/cgroup/cpu", name), (root / "sys/fs/cgroup/cpu,cpuacct", name)]
    folders: dict[Path, None] = {}
    for base, name in bases:
        folder = base / name.strip("/")
        for one in [folder, *folder.parents]:
            if one == base or base in one.parents:
                folders.setdefault(one.resolve())
    return [folder for folder in folders if folder.is_dir()]


# Clocks event reasons of NVML that reduce the clock of a busy GPU (nvml.h, nvmlClocksEventReasons).
NVML_THROTTLE_REASONS = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


class NvmlGpu:
    """NVIDIA GPU, read by NVML (package nvidia-ml-py, extra `nvml`).

    On Jetson boards NVML opens, but most of its values are not supported. Each method then raises `HostFieldError`.

    Args:
        device: cuda or cuda:N. N counts the devices of CUDA_VISIBLE_DEVICES, in the order of their PCI bus ids.

    Raises:
        HostFieldError: The package or the GPU is missing.
    """

    def __init__(self, device: str) -> None:
        try:
            import pynvml  # noqa: PLC0415  # optional package
        except ImportError:
            raise HostFieldError("nvidia-ml-py is not installed. Install hkd-det[nvml].") from None
        self._nvml = pynvml
        ordinal = int(device.partition(":")[2] or 0)
        visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        if visible and ordinal >= len(visible):
            raise HostFieldError(f"{device}: not in CUDA_VISIBLE_DEVICES")
        name = visible[ordinal] if visible else str(ordinal)
        self._query("nvmlInit")
        if name.isdigit():
            self._handle = self._query("nvmlDeviceGetHandleByIndex", int(name))
        else:
            self._handle = self._query("nvmlDeviceGetHandleByUUID", name)
        self.name = str(self._query("nvmlDeviceGetName", self._handle))

    def _query(self, function: str, *args: Any) -> Any:
        try:
            return getattr(self._nvml, function)(*args)
        except self._nvml.NVMLError as error:
            raise HostFieldError(f"NVML {function}: {error}") from None

    def read_energy_j(self) -> float:
        """Return the energy since the driver was loaded, in joules (Volta and newer, updated about every 100 ms)."""
        return float(self._query("nvmlDeviceGetTotalEnergyConsumption", self._handle)) / 1e3

    def read_power_w(self) -> float:
        """Return the power in watts."""
        return float(self._query("nvmlDeviceGetPowerUsage", self._handle)) / 1e3

    def read_clock_mhz(self) -> float:
        """Return the clock of the multiprocessors in MHz."""
        return float(self._query("nvmlDeviceGetClockInfo", self._handle, self._nvml.NVML_CLOCK_SM))

    def read_temperature_c(self) -> float:
        """Return the temperature of the GPU in degrees Celsius."""
        return float(self._query("nvmlDeviceGetTemperature", self._handle, self._nvml.NVML_TEMPERATURE_GPU))

    def read_used_memory_mib(self) -> float:
        """Return the memory of all processes and the driver in MiB."""
        return float(self._query("nvmlDeviceGetMemoryInfo", self._handle).used) / 2**20

    def list_throttle_reasons(self) -> list[str]:
        """Return the reasons that reduce the clock now."""
        reasons = int(self._query("nvmlDeviceGetCurrentClocksThrottleReasons", self._handle))
        return [f"GPU {text}" for bit, text in NVML_THROTTLE_REASONS.items() if reasons & bit]

    def list_process_memory_mib(self) -> dict[int, float | None]:
        """Return the GPU memory of each compute process in MiB, by process id; None where the driver hides it."""
        processes = self._query("nvmlDeviceGetComputeRunningProcesses", self._handle)
        return {int(p.pid): None if p.usedGpuMemory is None else float(p.usedGpuMemory) / 2**20 for p in processes}

    def read_process_memory_mib(self, pid: int) -> float:
        """Return the GPU memory of one process in MiB.

        Args:
            pid: Process id.

        Raises:
            HostFieldError: NVML does not list the process, such as in a container with its own process ids.
        """
        used = self.list_process_memory_mib().get(pid)
        if used is None:
            raise HostFieldError(f"NVML lists no memory of process {pid}; in a container, share the host's process ids")
        return used
