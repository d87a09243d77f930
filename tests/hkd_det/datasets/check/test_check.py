"""`hkd-train --check`: every fault with its place, figures that were counted by hand, the page and its pictures."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from hkd_det.boxes import xyxy_from_xywh
from hkd_det.datasets import Sample, Truth
from hkd_det.datasets.check.drawings import PERSON, contact_sheet
from hkd_det.datasets.check.summary import summarise
from hkd_det.train.command import main


def sample(number: int, boxes: list[list[float]], ignore: list[bool], seen: float = 1) -> Sample:
    whole = xyxy_from_xywh(np.array(boxes, np.float32)).astype(np.float32)
    visible = whole.copy()
    visible[:, 3] = whole[:, 1] + seen * (whole[:, 3] - whole[:, 1])
    labels = tuple("rider" if flag else "pedestrian" for flag in ignore)
    return Sample(number, Path(f"{number}.png"), Truth(whole, np.array(ignore, bool), visible, labels))


def test_figures_counted_by_hand() -> None:
    first = sample(1, [[0, 0, 20, 50], [0, 0, 20, 49], [0, 0, 9, 600]], [False, False, True])
    second = sample(2, [[0, 0, 10, 19.5]], [False], seen=0.5)
    third = sample(3, [[0, 0, 10, 30]], [True])
    found = summarise("val", [first, second, third], [(100, 200), (100, 200), None])
    assert (found.pictures, found.empty, found.people, found.regions) == (3, 1, 3, 2)
    assert dict(found.labels) == {"pedestrian": 3, "rider": 2} and found.sizes == (("200 x 100", 2),)
    heights = {bar.label: bar.count for bar in found.heights if bar.count}
    assert heights == {"0 to 20 px": 1, "30 to 50 px": 1, "50 to 75 px": 1}
    assert {bar.label: bar.count for bar in found.visibilities if bar.count} == {"0.4 to 0.65": 1, "all of it": 2}


def coco(root: Path, **changes: Any) -> Path:
    """Four pictures; of the first, two people. `changes` go into the second annotation."""
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
    (root / "mine.yaml").write_text(
        yaml.safe_dump({"format": "coco", "val": {"images": ".", "annotations": "all.json"}})
    )
    return root / "mine.yaml"


def run(data: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(data.parent)
    return main(["--data", str(data), "--check"])


def test_a_sound_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(coco(tmp_path), monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "no faults" in printed and "4, 3 of them without people" in printed and "100 x 80: 4" in printed
    page = (tmp_path / "runs" / "check" / "mine" / "index.html").read_text()
    assert "No faults found" in page and not re.findall(r'(?:src|href)="(?!data:)', page)
    sheet = cv2.imread(str(tmp_path / "runs" / "check" / "mine" / "val_pictures.jpg"))
    assert sheet is not None and sheet.shape[1] == 400


def test_every_fault_is_told_with_its_place(
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
    faults = (tmp_path / "runs" / "check" / "mine" / "faults.txt").read_text().splitlines()
    assert len(faults) == 4 and "4 faults" in output.out and "Traceback" not in output.err
    record = next(fault for fault in faults if "annotation 2" in fault)
    told = re.search(r"all\.json, line (\d+)", record)
    assert told is not None and 0 < line - int(told[1]) < 10  # the record's first line, a few above the wrong number
    assert sum("1.png" in fault for fault in faults) == 1 and sum("2.png" in fault for fault in faults) == 1
    assert any("3.png: is 8 x 8 pixels, its annotation says 100 x 80" in fault for fault in faults)


def test_a_file_in_one_line_has_a_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coco(tmp_path, bbox="none")
    text = json.dumps(json.loads((tmp_path / "all.json").read_text()))
    (tmp_path / "all.json").write_text(text)
    assert run(data, monkeypatch) == 1
    column = text.rindex('{"id": 2') + 1
    assert f"all.json, line 1, column {column}: annotation 2" in capsys.readouterr().out


def test_a_file_that_can_not_be_read_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = coco(tmp_path)
    (tmp_path / "all.json").write_text("{")
    assert run(data, monkeypatch) == 1 and "all.json: not JSON" in capsys.readouterr().out
    assert main(["--check"]) == 2 and main(["--check", "--data", "nothing"]) == 2


def test_boxes_are_drawn_where_people_stand(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((300, 400, 3), np.uint8))
    one = sample(1, [[100, 50, 60, 200]], [False])
    sheet = contact_sheet([Sample(1, tmp_path / "a.png", one.truth)])
    green = (sheet[:300, :400] == PERSON).all(2)
    rows, columns = np.flatnonzero(green.any(1)), np.flatnonzero(green.any(0))
    assert abs(int(rows[0]) - 50) <= 1 and abs(int(rows[-1]) - 250) <= 1
    assert abs(int(columns[0]) - 100) <= 1 and abs(int(columns[-1]) - 160) <= 1


def test_checking_needs_no_torch(tmp_path: Path) -> None:
    data = coco(tmp_path)
    code = (
        "import sys; from hkd_det.train.command import main;"
        f"code = main(['--data', {str(data)!r}, '--check']); sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False).returncode == 0
