"""Tests of `hkd-train --check`: errors with their location, statistics, the report and its images."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_det.datasets import GroundTruth, Sample, check
from hkd_det.datasets.check_report import (
    CAPTION_HEIGHT_PX,
    GAP_PX,
    IGNORED_COLOR,
    PERSON_COLOR,
    SOURCE_NAME,
    VISIBLE_COLOR,
    choose_report_dir,
    describe_source,
    make_contact_sheet,
)
from hkd_det.datasets.check_summary import HEIGHT_EDGES_PX, VISIBLE_RATIO_EDGES, Range, escape_nonprintable, summarize
from hkd_det.structures import xyxy_from_xywh
from hkd_det.train.cli import main

SHARED = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set"))
NO_TORCH = """
import importlib.abc, sys

class BlockImports(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "onnx"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, BlockImports())
from hkd_det.train.cli import main
sys.exit(main(sys.argv[1:]))
"""

WITHOUT_TERMINAL = """
import sys
from hkd_det import console
from hkd_det.train.cli import main
console.LINE_INTERVAL_S = 0.0
sys.exit(main(sys.argv[1:]))
"""
TIME_STAMPED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.+)")


def make_sample(number: int, boxes: list[list[float]], ignore: list[bool], visible_ratio: float = 1) -> Sample:
    boxes_xyxy = xyxy_from_xywh(np.array(boxes, np.float32)).astype(np.float32)
    visible = boxes_xyxy.copy()
    visible[:, 3] = boxes_xyxy[:, 1] + visible_ratio * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])
    labels = tuple("rider" if flag else "pedestrian" for flag in ignore)
    return Sample(number, Path(f"{number}.png"), GroundTruth(boxes_xyxy, np.array(ignore, bool), visible, labels))


def test_summarize_counts() -> None:
    first = make_sample(1, [[0, 0, 20, 50], [0, 0, 20, 49], [0, 0, 9, 600]], [False, False, True])
    second = make_sample(2, [[0, 0, 10, 19.5]], [False], visible_ratio=0.5)
    third = make_sample(3, [[0, 0, 10, 30]], [True])
    summary = summarize("val", [first, second, third], [(100, 200), (100, 200), None])
    assert (
        summary.num_images,
        summary.num_empty,
        summary.num_unreadable,
        summary.num_gt,
        summary.num_ignore_regions,
    ) == (
        3,
        1,
        1,
        3,
        2,
    )
    assert summary.width_range == Range(200, 200, 200) and summary.height_range == Range(100, 100, 100)
    assert dict(summary.label_counts) == {"pedestrian": 3, "rider": 2} and summary.size_counts == (("200 x 100", 2),)
    heights = {bar.label: bar.count for bar in summary.height_bins if bar.count}
    assert heights == {"0 to 20 px": 1, "30 to 50 px": 1, "50 to 75 px": 1}
    assert {bar.label: bar.count for bar in summary.visible_ratio_bins if bar.count} == {
        "0.4 to 0.65": 1,
        "fully visible": 2,
    }


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 100), st.booleans()), max_size=30))
def test_summarize_histograms_equal_numpy(persons: list[tuple[int, int, bool]]) -> None:
    samples = [
        make_sample(number, [[0, 0, 5, height]], [ignore], ratio / 100)
        for number, (height, ratio, ignore) in enumerate(persons)
    ]
    summary = summarize("val", samples, [None] * len(samples))
    kept = [one.ground_truth for one in samples if not one.ground_truth.ignore[0]]
    heights = np.histogram([one.heights_px[0] for one in kept], HEIGHT_EDGES_PX)[0]
    ratios = np.histogram([one.visible_ratio[0] for one in kept], VISIBLE_RATIO_EDGES)[0]
    assert [bar.count for bar in summary.height_bins] == heights.tolist()
    assert [bar.count for bar in summary.visible_ratio_bins] == ratios.tolist()
    assert summary.num_gt == len(kept) and summary.width_range is None


def coco(root: Path, **changes: Any) -> Path:
    """COCO dataset of four images with two persons in the first; `changes` apply to the second annotation."""
    for number in range(4):
        cv2.imwrite(str(root / f"{number}.png"), np.full((80, 100, 3), 50 * number, np.uint8))
    images = [{"id": number, "file_name": f"{number}.png", "width": 100, "height": 80} for number in range(4)]
    person = {"image_id": 0, "category_id": 1, "bbox": [10, 20, 30, 50]}
    content = {
        "images": images,
        "annotations": [{"id": 1, **person}, {"id": 2, **person, **changes}],
        "categories": [{"id": 1, "name": "person"}],
    }
    (root / "all.json").write_text(json.dumps(content, indent=1))
    (root / "custom.yaml").write_text(
        yaml.safe_dump({"format": "coco", "val": {"images": ".", "annotations": "all.json"}})
    )
    return root / "custom.yaml"


def run(data: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.chdir(data.parent)
    return main(["--data", str(data), "--check", *flags])


def test_check_valid_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(coco(tmp_path), monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "no errors" in printed and "4; 3 without ground-truth boxes" in printed and "100 x 80: 4" in printed
    folder = tmp_path / "runs" / "check" / "custom"
    page = (folder / "index.html").read_text()
    assert "No errors" in page and page.count("data:image/jpeg") == 1
    assert not re.findall(r'(?:src|href)="(?!data:|images\.html")|url\(|@import', page)
    assert (folder / "errors.txt").read_text() == ""
    for name in ("val_images.png", "val_histograms.png"):
        assert cv2.imread(str(folder / name)) is not None
    assert run(tmp_path / "custom.yaml", monkeypatch, "--project", "here", "--name", "first") == 0
    assert (tmp_path / "here" / "first" / "index.html").is_file()


def test_check_reports_every_error_with_location(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coco(tmp_path, bbox=[1, 2, -3, 4])
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    cv2.imwrite(str(tmp_path / "3.png"), np.zeros((8, 8, 3), np.uint8))
    lines = [line.strip() for line in (tmp_path / "all.json").read_text().split("\n")]
    line = lines.index("-3,") + 1
    assert run(data, monkeypatch) == 1
    output = capsys.readouterr()
    errors = (tmp_path / "runs" / "check" / "custom" / "errors.txt").read_text().splitlines()
    assert len(errors) == 4 and "4 errors" in output.out and "Traceback" not in output.err
    record = next(error for error in errors if "annotation 2" in error)
    match = re.search(r"all\.json, line (\d+)", record)
    assert match is not None and 0 < line - int(match[1]) < 10  # the first line of the annotation
    assert sum("1.png" in error for error in errors) == 1 and sum("2.png" in error for error in errors) == 1
    assert any("3.png: expected 100 x 80 pixels as annotated, got 8 x 8" in error for error in errors)


def test_check_writes_json_with_one_record_per_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coco(tmp_path, bbox=[1, 2, -3, 4])
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    assert run(data, monkeypatch, "--json", "-") == 1
    output = capsys.readouterr()
    content = json.loads(output.out)
    assert "2 errors" in output.err
    split = content["splits"]["val"]
    assert (split["images"], split["persons"], split["ignored"], split["unused_classes"]) == (3, 1, 0, {})
    problems = {(one["kind"], Path(one["file"]).name, one["count"], one["severity"]) for one in split["problems"]}
    assert {("annotation", "all.json", 1, "error"), ("image", "2.png", 1, "error")} <= problems
    assert run(data, monkeypatch, "--json", "out/check.json") == 1
    assert json.loads((tmp_path / "out" / "check.json").read_text()) == content


def test_check_reports_column_of_one_line_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coco(tmp_path, bbox="none")
    text = json.dumps(json.loads((tmp_path / "all.json").read_text()))
    (tmp_path / "all.json").write_text(text)
    assert run(data, monkeypatch) == 1
    column = text.rindex('{"id": 2') + 1
    assert f"all.json, line 1, column {column}: annotation 2" in capsys.readouterr().out


def test_check_unreadable_annotation_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coco(tmp_path)
    (tmp_path / "all.json").write_text("{")
    assert run(data, monkeypatch) == 1 and "all.json: not JSON" in capsys.readouterr().out
    assert main(["--check"]) == 2 and main(["--check", "--data", "nothing"]) == 2
    data.write_text("format: coco\n")
    assert run(data, monkeypatch) == 2 and "nothing to check" in capsys.readouterr().err


def test_check_reports_wrong_image_entry_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coco(tmp_path)
    content = json.loads((tmp_path / "all.json").read_text())
    content["images"][0]["width"] = -1
    content["images"][1]["file_name"] = "half a pair\ud800\n.png"
    (tmp_path / "all.json").write_text(json.dumps(content))
    assert run(data, monkeypatch) == 1
    printed = capsys.readouterr().out
    assert "2 errors" in printed and "all.json, line 1, column 13: image 0: expected a width" in printed
    assert r"the first is half a pair\ud800\n.png. Add" in printed.replace(f"{tmp_path}/", "")


def test_check_yolo_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for name in "abc":
        cv2.imwrite(str(tmp_path / "images" / f"{name}.jpg"), np.zeros((80, 100, 3), np.uint8))
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.5\n0 0.5 0.5\n0 0.5 0.5 0.2 -0.5\n")
    jpeg = (tmp_path / "images" / "b.jpg").read_bytes()
    (tmp_path / "images" / "b.jpg").write_bytes(jpeg[:-20])
    (tmp_path / "labels" / "c.txt").mkdir()  # an unreadable file ends the split and not the check
    (tmp_path / "custom.yaml").write_text("train: images\nval: images\nnames: [person]\n")
    assert run(tmp_path / "custom.yaml", monkeypatch) == 1
    errors = (tmp_path / "runs" / "check" / "custom" / "errors.txt").read_text()
    assert "train: " in errors and "val: " in errors and "c.txt: Is a directory" in errors
    (tmp_path / "labels" / "c.txt").rmdir()
    assert run(tmp_path / "custom.yaml", monkeypatch) == 1
    lines = (tmp_path / "runs" / "check" / "custom" / "errors.txt").read_text().replace(f"{tmp_path}/", "").splitlines()
    assert [line.split(": ")[1] for line in lines if line.startswith("val: ")] == [
        "labels/a.txt, line 2",
        "labels/a.txt, line 3",
        "images/b.jpg",
    ]


def test_contact_sheet_draws_boxes_at_their_place(tmp_path: Path) -> None:
    """A black 4:3 image is drawn about 400 pixels high; each color is at the place of its box."""
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((300, 400, 3), np.uint8))
    ground_truth = make_sample(
        1, [[100, 50, 60, 200], [300, 100, 40, 100]], [False, True], visible_ratio=0.5
    ).ground_truth
    sheet = make_contact_sheet([(Sample(1, tmp_path / "a.png", ground_truth), (300, 400))])
    scale = (400 * 4 / 3 - GAP_PX) / 400
    top = CAPTION_HEIGHT_PX + 4 + (400 - 300 * scale) / 2
    tile = sheet[CAPTION_HEIGHT_PX + 4 : CAPTION_HEIGHT_PX + 4 + 400]
    assert sheet.shape[0] == 2 * CAPTION_HEIGHT_PX + 4 + 400
    for color, (left, upper, right, lower) in (
        (PERSON_COLOR, (100, 50, 160, 250)),
        (VISIBLE_COLOR, (100, 50, 160, 150)),
        (IGNORED_COLOR, (300, 100, 340, 200)),
    ):
        mask = (tile == color).all(2)
        rows, columns = np.flatnonzero(mask.any(1)) + CAPTION_HEIGHT_PX + 4, np.flatnonzero(mask.any(0))
        assert abs(rows[-1] - (top + lower * scale)) <= 2, color
        if color != VISIBLE_COLOR:  # its other sides are covered by the box
            assert abs(rows[0] - (top + upper * scale)) <= 2
            assert abs(columns[0] - left * scale) <= 2 and abs(columns[-1] - right * scale) <= 2


def test_contact_sheet_of_any_image_shape(tmp_path: Path) -> None:
    shapes = [(1, 1), (1, 900), (900, 1), (300, 400), (40, 30)] * 4
    readable = []
    for number, (height, width) in enumerate(shapes):
        path = tmp_path / f"caf\u00e9 {number} {'long ' * 30}.png"
        cv2.imencode(".png", np.zeros((height, width, 3), np.uint8))[1].tofile(path)
        ground_truth = make_sample(1, [[-5e6, -1, 1e7, 900]], [bool(number % 2)]).ground_truth
        readable.append((Sample(number, path, ground_truth), (height, width)))
    for count in (1, 2, len(shapes)):
        sheet = make_contact_sheet(readable[:count])
        assert sheet.shape[1] < 1700 and sheet.shape[0] > 100


def test_escape_nonprintable_gives_one_line() -> None:
    assert escape_nonprintable("caf\u00e9\n\ud800\x1b[31m") == r"caf\u00e9\n\ud800\x1b[31m".replace(r"\u00e9", "\u00e9")
    assert len(escape_nonprintable("x" * 10_000)) < 1000


@pytest.mark.skipif(not SHARED.is_dir(), reason="HKD_TEST_DATA is not set")
@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            {"format": "coco", "path": "inria", "val": {"images": ".", "annotations": "test.json"}},
            ["288; 0 without ground-truth boxes", "ground-truth boxes  597"],
        ),
        (
            {"format": "citypersons", "path": "citypersons", "skip_missing": True, "train": "train", "val": "val"},
            ["2; 0 without ground-truth", "3; 0 without ground-truth", "2048 x 1024: 3", "rider: 2"],
        ),
    ],
)
def test_check_real_data_has_no_errors(
    entry: dict[str, Any],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "real.yaml").write_text(yaml.safe_dump({**entry, "path": str(SHARED / entry["path"])}))
    assert run(tmp_path / "real.yaml", monkeypatch) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in expected)


@pytest.mark.slow
def test_check_works_without_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NO_TORCH, "--data", str(coco(tmp_path)), "--check"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "no errors" in done.stdout, done.stderr


@pytest.mark.slow
def test_check_without_terminal_prints_stages(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TERMINAL, "--data", str(coco(tmp_path)), "--check"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    lines = [match[1] for match in map(TIME_STAMPED.fullmatch, done.stdout.splitlines()) if match]
    assert lines[:2] == ["val: read the annotations", "val: decode 4 images"]
    assert lines[2].startswith("decode: 1/4 images, 0:00 left") and "search near-duplicates" in lines


def test_datasets_with_equal_names_have_their_own_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "a/export/data.yaml",
        "b/export/data.yaml",
        "a/my.yaml",
        "b/my.yaml",
        "a/train/_annotations.coco.json",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    names = {}
    for data in (
        "a/export/data.yaml",
        "b/export/data.yaml",
        "b/export",
        "a/my.yaml",
        "b/my.yaml",
        str(tmp_path / "a" / "my.yaml"),
        "a/train/_annotations.coco.json",
        "coco-person",
    ):
        directory = choose_report_dir(Path("reports"), data)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / SOURCE_NAME).write_text(f"{describe_source(data)}\n")
        names[data] = directory.name
    assert list(names.values()) == ["export", "export-2", "export-2", "my", "my-2", "my", "a-train", "coco-person"]
    assert choose_report_dir(Path("runs"), "b/export", "quickstart-") == Path("runs/quickstart-export")


def test_failed_check_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    assert run(tmp_path / "bad.zip", monkeypatch) == 1 and "damaged archive" in capsys.readouterr().err
    data = coco(tmp_path)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "inspect_images", interrupt)
    assert run(data, monkeypatch) == 130
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_split_of_background_images_is_an_error(tmp_path: Path) -> None:
    """Training needs a person in train and in val. Images without persons are correct in test."""
    content = {"path": str(tmp_path), "names": ["person"]}
    for split in ("train", "val", "test"):
        cv2.imwrite(str(tmp_path / f"{split}.png"), np.random.default_rng(len(split)).integers(0, 255, (64, 64, 3)))
        (tmp_path / f"{split}.txt").touch()
        (tmp_path / f"{split}.list").write_text(f"{split}.png\n")
        content[split] = f"{split}.list"
    (tmp_path / "d.yaml").write_text(json.dumps(content))
    assert check.check_dataset(str(tmp_path / "d.yaml"), tmp_path / "out", json_output=str(tmp_path / "o.json")) == 1
    splits = json.loads((tmp_path / "o.json").read_text())["splits"]
    errors = {name: [one["kind"] for one in split["problems"]] for name, split in splits.items()}
    assert errors == {"train": ["no_persons"], "val": ["no_persons"], "test": []}
