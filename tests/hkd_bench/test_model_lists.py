"""Tests of the sentences below tables with few and with many models."""

from dataclasses import replace

import pytest

from hkd_bench.device_state import RunConditions
from hkd_bench.energy import EnergyResult, PowerSource
from hkd_bench.model_lists import format_backends, format_licenses, format_names, format_values
from hkd_bench.result import SCHEMA_VERSION, AccuracyResult, BenchResult, ModelResult, StageSamples, StoredCurve
from hkd_bench.table_notes import make_notes

BACKENDS = ("onnxruntime", "openvino", "openvino-bf16")
MAX_SENTENCE = 210  # characters; 21 names alone have more


def make_row(file: int, backend: str, index: int) -> ModelResult:
    """Return one of 21 rows whose values grow with their index."""
    curve = StoredCurve((0.1,), (0.2,))
    accuracy = AccuracyResult(
        "street.yaml", {"Reasonable": 0.2}, {}, {}, {"Reasonable": 200}, 0.4, 0.8, 0.7, 0.3 + 0.01 * index, "images",
        curve, curve, (0.40, 0.45), (0.78, 0.80 + 0.01 * index), (0.6, 0.7),
    )  # fmt: skip
    times = (*(10.0 + index,) * 650, *(20.0 + 2 * index,) * 50)
    return ModelResult(
        f"model{file} {backend}", f"models/model{file}.onnx", "0f" * 32, backend, "mini",
        "AGPL-3.0" if file == 6 else "Apache-2.0", 1000, None, (96, 160), 1.5, (accuracy,), times,
        StageSamples((1.0,), (8.0,), (1.0,)), (20.0,), 100.0, 50.0, build_memory_mib=100.0 + index,
        energy=EnergyResult(0.3, 0.3, 0.301 + 0.001 * index, 0.1, 0.1, 0.102, reason=""),
        conditions=RunConditions(marks=(f"other processes use {0.3 + index:.1f} CPUs (limit 0.1 of 2)",)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[ModelResult]:
    """Seven models on three backends."""
    return [make_row(index // 3, BACKENDS[index % 3], index) for index in range(21)]


def write_notes(rows: list[ModelResult]) -> list[str]:
    result = BenchResult(
        SCHEMA_VERSION, "hkd-bench x", "2026-01-02T03:04:05+00:00", (), "cpu", 1, "street.yaml", "val", 100, 32, 700,
        1, 10, 0.5, tuple(rows), PowerSource({"RAPL": "package"}),
    )  # fmt: skip
    return make_notes(result)


def test_notes_of_21_rows_have_the_ends_of_each_range(rows: list[ModelResult]) -> None:
    """The values grow with the index, so the first row has the smallest and the last row the largest value."""
    notes = write_notes(rows)
    low, high = "model0 onnxruntime", "model6 openvino-bf16"
    for sentence in (
        f"With 99 % confidence, p90 is at most 10.0 ms ({low}) to 30.0 ms ({high}) for 21 models.",
        f"With 99 % confidence, p99 is at most 20.0 ms ({low}) to 60.0 ms ({high}) for 21 models.",
        f"Peak memory while the engine or session was built: 100 MiB ({low}) to 120 MiB ({high}) for 21 models.",
        f"Recall of Reasonable at a score of 0.300 ({low}) to 0.500 ({high}) for 21 models, with the highest "
        "F1 score on these images.",
        f"Width of the 95 % intervals over images: AP50 2.0 points ({low}) to 22.0 points ({high}) for 21 models; "
        "AP 5.0 points for 21 models; recall 10.0 points for 21 models.",
        f"Width of the 95 % intervals of the energy per frame: 1.0 mJ ({low}) to 21.0 mJ ({high}) for 21 models; "
        "above idle 2.0 mJ for 21 models.",
        "License of the weights: Apache-2.0 (all other files); AGPL-3.0 (model6).",
        f"[!] other processes use 0.3 CPUs (limit 0.1 of 2) ({low}), similarly 20 more models.",
    ):
        assert sentence in notes
    assert any(note.startswith("Standard deviation of the latency, relative to the mean: ") for note in notes)
    assert max(map(len, notes)) < MAX_SENTENCE


def test_notes_of_four_rows_name_each_model(rows: list[ModelResult]) -> None:
    notes = write_notes(rows[:4])
    values = ", ".join(f"{100 + index} MiB ({row.name})" for index, row in enumerate(rows[:4]))
    assert f"Peak memory while the engine or session was built: {values}." in notes
    assert "License of the weights: Apache-2.0." in notes
    assert sum(note.startswith("[!] model") for note in notes) == 4
    (energy,) = [note for note in notes if note.startswith("Energy per frame")]
    assert "300.0 to 304.0 mJ, above idle 100.0 to 102.0 mJ (model1 onnxruntime)" in energy
    (rates,) = [note for note in notes if note.startswith("95 % intervals")]
    assert "AP50 78.0 to 83.0, AP 40.0 to 45.0, recall 60.0 to 70.0 (model1 onnxruntime)" in rates


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0], "1 ms (m0)"),
        ([3.0, 1.0, 2.0, 4.0], "3 ms (m0), 1 ms (m1), 2 ms (m2), 4 ms (m3)"),
        ([3.0, 1.0, 2.0, 5.0, 4.0], "1 ms (m1) to 5 ms (m3) for 5 models"),
        ([3.0, 3.1, 2.9, 3.0, 3.0], "3 ms for 5 models"),
    ],
)
def test_values_of_up_to_four_models_are_listed(values: list[float], text: str) -> None:
    assert format_values([(f"m{index}", value) for index, value in enumerate(values)], "{:.0f} ms") == text


def test_names_above_four_are_counted() -> None:
    assert format_names(["a", "b", "c", "d"]) == "a, b, c, d"
    assert format_names(["a", "b", "c", "d", "e", "f"]) == "a, b, c, d and 2 more"


def test_licenses_name_each_file_once(rows: list[ModelResult]) -> None:
    few = [rows[0], rows[1], rows[18], rows[19]]  # two files on two backends
    assert format_licenses(few) == "Apache-2.0 (model0); AGPL-3.0 (model6)"
    renamed = [replace(row, name=f"n{index}") for index, row in enumerate(rows) if row.backend == "openvino"]
    assert format_licenses(renamed) == "Apache-2.0 (all other files); AGPL-3.0 (n19)"


def test_backends_are_grouped(rows: list[ModelResult]) -> None:
    assert format_backends(rows) == "onnxruntime, openvino, openvino-bf16"
    renamed = [replace(row, name=f"n{index}") for index, row in enumerate(rows)]
    assert format_backends(renamed).startswith("onnxruntime (n0, n3, n6, n9 and 3 more), openvino (n1, n4")
    assert format_backends(renamed[:1]) == "onnxruntime"
