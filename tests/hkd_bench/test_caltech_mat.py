"""Tests of `hkd-bench score` on a `gt-SETUP.mat`, which does not contain its frames."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from hkd_bench.cli import main
from hkd_det.datasets.caltech import read_vbb
from hkd_det.metrics import caltech
from hkd_det.metrics.caltech import count_test_frames, read_caltech_ground_truth

SHARED = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set"))
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="HKD_TEST_DATA is not set")


@needs_data
def test_score_gt_mat_of_official_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own boxes as detections are all true positives; the frames are inferred from the last detections."""
    path = SHARED / "caltech" / "gt-Reasonable-csp.mat"
    table = read_caltech_ground_truth(path, caltech.AnnotationVersion.CORRECTED).table
    assert (table.num_images, int((~table.ignore).sum())) == (4024, 912)
    (tmp_path / "set06").mkdir()
    rows = [
        f"{30 * (image_index + 1)},{','.join(map(repr, box))},1"
        for image_index, box in zip(table.image_index.tolist(), table.boxes_xywh.tolist(), strict=True)
    ]
    (tmp_path / "set06" / "V000.txt").write_text("\n".join([*rows, f"{30 * 4024},600,10,20.5,50,0.5"]))
    flags = ["--annotations", str(path), "--detections", str(tmp_path), "--protocol", "caltech-new", "--json", "-"]
    assert main(["score", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["miss_rate"] == {"Reasonable": 0.0}


@needs_data
def test_score_gt_mat_without_detections_at_video_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only images with boxes have detections, so the last frames of the videos have none."""
    path = SHARED / "caltech" / "gt-Reasonable-csp.mat"
    table = read_caltech_ground_truth(path, caltech.AnnotationVersion.CORRECTED).table
    places = [(video, 30 * number) for video, count in count_test_frames().items() for number in range(1, count + 1)]
    lines: dict[str, list[str]] = {video: [] for video in count_test_frames()}
    for image_index, box in zip(table.image_index.tolist(), table.boxes_xywh.tolist(), strict=True):
        video, frame = places[image_index]
        lines[video].append(f"{frame},{','.join(map(repr, box))},1")
    for video, rows in lines.items():
        (tmp_path / video).parent.mkdir(exist_ok=True)
        (tmp_path / f"{video}.txt").write_text("\n".join(rows))
    flags = ["--annotations", str(path), "--detections", str(tmp_path), "--protocol", "caltech-new", "--json", "-"]
    assert main(["score", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["miss_rate"] == {"Reasonable": 0.0}
    (tmp_path / "set08" / "V003.txt").unlink()
    assert main(["score", *flags]) == 1
    assert "empty file for a video without detections" in capsys.readouterr().err


def test_score_other_gt_mat_must_match_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = np.empty((1, 2), object)
    cells[0, 0], cells[0, 1] = np.zeros((0, 5)), np.array([[1.0, 2, 3, 50, 0]])
    scipy.io.savemat(tmp_path / "gt-Reasonable.mat", {"gt": cells})
    (tmp_path / "set06").mkdir()
    (tmp_path / "set06" / "V000.txt").write_text("30 1 2 3 50 1")
    flags = ["--annotations", str(tmp_path / "gt-Reasonable.mat"), "--detections", str(tmp_path)]
    assert main(["score", *flags, "--protocol", "caltech"]) == 1
    assert "but not their videos" in capsys.readouterr().err


def test_count_test_frames_equals_annotations() -> None:
    counts = count_test_frames()
    assert (len(counts), sum(counts.values())) == (66, 4024)
    for path in sorted((SHARED / "caltech" / "annotations" / "set06").glob("*.vbb")):
        assert counts[f"set06/{path.stem}"] == len(read_vbb(path)) // 30


@pytest.mark.parametrize("row", [[1, 2, -3, 50, 0], [1, 2, 3, 50, np.nan], [np.inf, 2, 3, 50, 0]])
def test_score_gt_mat_with_wrong_row(row: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = np.empty((1, 2), object)
    cells[0, 0], cells[0, 1] = np.zeros((0, 5)), np.array([[1, 2, 3, 50, 0], row])
    scipy.io.savemat(tmp_path / "gt-Reasonable.mat", {"gt": cells})
    flags = ["--annotations", str(tmp_path / "gt-Reasonable.mat"), "--detections", str(tmp_path)]
    assert main(["score", *flags, "--protocol", "caltech"]) == 1
    assert (
        f"image 2: expected x y w h ignore with finite sizes of at least 0, got {[float(value) for value in row]}"
        in capsys.readouterr().err
    )
