"""Tests of the DeepStream output parser: compile the exported source and call it as nvinfer does."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

STUB = Path(__file__).parent / "nvdsinfer"
FLOAT, HALF = 0, 1
SIZE_WH = (160, 96)

Parse = Callable[..., NDArray[np.float32] | None]


@pytest.fixture(scope="module")
def parse(tmp_path_factory: pytest.TempPathFactory) -> Parse:
    """Function from boxes and scores to class, left, top, width, height, confidence. None if the parser fails."""
    if shutil.which("g++") is None or shutil.which("make") is None:
        pytest.skip("requires g++ and make")
    from importlib.resources import files

    folder = tmp_path_factory.mktemp("parser")
    for source in (files("hkd_deploy.serving") / "nvdsinfer_hkd").iterdir():
        (folder / source.name).write_text(source.read_text())
    includes = folder / "deepstream" / "sources" / "includes"
    includes.mkdir(parents=True)
    shutil.copy(STUB / "nvdsinfer_custom_impl.h", includes)
    make = ["make", "-C", str(folder), f"DEEPSTREAM={folder / 'deepstream'}", "CXXFLAGS=-O1 -Wall -Wextra -Werror"]
    subprocess.run(make, check=True, capture_output=True)
    caller = folder / "call.so"
    link = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{includes}", str(STUB / "call.cpp"), "-o", str(caller)]
    library = ["-L", str(folder), "-lnvdsinfer_hkd", f"-Wl,-rpath,{folder}"]
    subprocess.run([*link, *library], check=True, capture_output=True)
    call = ctypes.CDLL(str(caller)).call_parser
    array = np.ctypeslib.ndpointer(np.float32, flags="C")
    count = ctypes.c_uint
    call.argtypes = [array, array, count, count, ctypes.c_int, ctypes.c_int, count, count, ctypes.c_float, array]

    def run(
        boxes: NDArray[np.float32],
        scores: NDArray[np.float32],
        threshold: float = 0.3,
        score_type: int = FLOAT,
        named: bool = True,
    ) -> NDArray[np.float32] | None:
        objects = np.zeros((len(scores), 6), np.float32)
        num_objects = call(boxes, scores, len(scores), boxes.shape[1], score_type, named, *SIZE_WH, threshold, objects)
        return None if num_objects < 0 else objects[:num_objects]

    return run


@pytest.mark.slow
def test_parser_equals_numpy(parse: Parse) -> None:
    rng = np.random.default_rng(0)
    boxes = rng.uniform(-40, 200, (300, 4)).astype(np.float32)
    scores = np.sort(rng.uniform(0, 1, 300).astype(np.float32))[::-1].copy()
    clipped = np.clip(boxes, 0, [*SIZE_WH, *SIZE_WH])
    sizes = clipped[:, 2:] - clipped[:, :2]
    keep = (scores >= 0.3) & (sizes > 0).all(1)
    expected = np.column_stack([np.zeros(300), clipped[:, :2], sizes, scores])[keep].astype(np.float32)
    objects = parse(boxes, scores)
    assert objects is not None and 20 < len(objects) < 300
    np.testing.assert_allclose(objects, expected, atol=1e-5)


@pytest.mark.slow
def test_parser_low_score_or_nan_returns_no_objects(parse: Parse) -> None:
    boxes = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
    for scores in ([0.1, 0.0], [np.nan, 0.9]):
        objects = parse(boxes, np.array(scores, np.float32))
        assert objects is not None and len(objects) == 0


@pytest.mark.slow
def test_parser_other_outputs_fails(parse: Parse, capfd: pytest.CaptureFixture[str]) -> None:
    boxes, scores = np.zeros((2, 4), np.float32), np.ones(2, np.float32)
    assert parse(boxes, scores, named=False) is None
    assert "no output scores" in capfd.readouterr().err
    assert parse(boxes, scores, score_type=HALF) is None
    assert "scores: expected float32" in capfd.readouterr().err
    assert parse(np.zeros((2, 6), np.float32), scores) is None
    assert "different numbers of rows" in capfd.readouterr().err
