"""Tests of the energy meter on files with the form of the kernel's counters."""

from pathlib import Path

import pytest

from hkd_bench.host import RaplMeter


def write_zone(powercap: Path, name: str, energy_uj: int, range_uj: int = 262_143_328_850) -> None:
    zone = powercap / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    (zone / "max_energy_range_uj").write_text(f"{range_uj}\n")


def test_total_sums_packages_without_their_parts(tmp_path: Path) -> None:
    for name, start in (("intel-rapl:0", 5_000_000), ("intel-rapl:1", 0), ("intel-rapl:0:0", 0)):
        write_zone(tmp_path, name, start)
    meter = RaplMeter(tmp_path)
    for name, now in (("intel-rapl:0", 7_500_000), ("intel-rapl:1", 1_000_000), ("intel-rapl:0:0", 9_000_000)):
        write_zone(tmp_path, name, now)
    assert meter.total().joules == pytest.approx(3.5)
    write_zone(tmp_path, "intel-rapl:1", 2_000_000)
    assert meter.total().joules == pytest.approx(4.5)


def test_total_handles_wrapped_counter(tmp_path: Path) -> None:
    write_zone(tmp_path, "intel-rapl:0", 9_000_000, range_uj=10_000_000)
    meter = RaplMeter(tmp_path)
    write_zone(tmp_path, "intel-rapl:0", 500_000, range_uj=10_000_000)
    assert meter.total().joules == pytest.approx(1.5)


def test_total_without_counters_gives_reason(tmp_path: Path) -> None:
    energy = RaplMeter(tmp_path).total()
    assert energy.joules is None and str(tmp_path) in energy.reason


def test_total_of_unreadable_counter_gives_reason(tmp_path: Path) -> None:
    write_zone(tmp_path, "intel-rapl:0", 0)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("not a number")
    energy = RaplMeter(tmp_path).total()
    assert energy.joules is None and energy.reason
