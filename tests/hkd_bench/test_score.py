"""Tests of `hkd-bench score` on files of every form, against second implementations, and on invalid input."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hkd_bench.cli import main
from hkd_det.datasets.caltech import read_vbb
from hkd_det.errors import HkdError
from hkd_det.metrics import caltech, citypersons
from hkd_det.metrics.coco_files import read_coco_detections, read_coco_ground_truth

SHARED = Path(os.environ.get("HKD_TEST_DATA", "HKD_TEST_DATA is not set"))
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="HKD_TEST_DATA is not set")

WITHOUT_TERMINAL = """
import sys
from hkd_det import console
from hkd_bench.cli import main
console.LINE_INTERVAL_S = 0.0
sys.exit(main(sys.argv[1:]))
"""
TIME_STAMPED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.+)")


def load_reference(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "hkd_det" / "metrics" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_for_score", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def person(number: int, image: int, box: list[float], **extra: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": 1, "bbox": box, "iscrowd": 0, "area": 4000, **extra}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two images with a person each; one is detected: the miss rate is 0.5 at every point."""
    content = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "pedestrian"}, {"id": 2, "name": "rider"}],
        "annotations": [person(1, 1, [10, 10, 40, 100]), person(2, 2, [10, 10, 40, 100])],
    }
    detections = [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 100], "score": 0.9}]
    (tmp_path / "gt.json").write_text(json.dumps(content))
    (tmp_path / "dt.json").write_text(json.dumps(detections))
    return tmp_path


def run(files: Path, *flags: str, detections: str = "dt.json", protocol: str = "citypersons") -> int:
    required = [
        "--annotations",
        str(files / "gt.json"),
        "--detections",
        str(files / detections),
        "--protocol",
        protocol,
    ]
    return main(["score", *required, *flags])


def test_score_json_contains_unrounded_fractions(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files, "--json", "-") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["protocol"] == "citypersons" and set(printed["miss_rate"]) == set(citypersons.SETUPS)
    assert printed["miss_rate"]["Reasonable"] == pytest.approx(0.5, abs=1e-15)
    assert printed["miss_rate"]["heavy"] == -1 and printed["num_gt"]["heavy"] == 0
    assert run(files, "--json", str(files / "o.json"), "--setup", "Reasonable") == 0
    assert list(json.loads((files / "o.json").read_text())["miss_rate"]) == ["Reasonable"]


def test_score_reads_matlab_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A single detection is a bare object, and ids are fractions."""
    (files / "m.json").write_text('{"image_id":1.0,"category_id":1.0,"bbox":[10.0,10.0,40.0,100.0],"score":9e-1}')
    assert run(files, "--json", "-", detections="m.json") == 0
    assert json.loads(capsys.readouterr().out)["miss_rate"]["Reasonable"] == pytest.approx(0.5, abs=1e-15)


def test_score_uses_iscrowd_without_height_and_vis_ratio(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With height and vis_ratio, the official program counts a record without `ignore` as a person."""
    content = json.loads((files / "gt.json").read_text())
    for extra, num_gt in (
        ({}, 1),
        ({"height": 100, "vis_ratio": 1}, 2),
        ({"height": 100, "vis_ratio": 1, "ignore": 1}, 1),
    ):
        content["annotations"][1] = {**person(2, 2, [10, 10, 40, 100]), "iscrowd": 1, **extra}
        (files / "gt.json").write_text(json.dumps(content))
        assert run(files, "--json", "-") == 0
        assert json.loads(capsys.readouterr().out)["num_gt"]["Reasonable"] == num_gt


def test_score_two_files_in_one_table_and_plot(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "none.json").write_text("[]")
    flags = ["--annotations", str(files / "gt.json"), "--protocol", "citypersons", "--json", str(files / "o.json")]
    paths = [str(files / "dt.json"), str(files / "none.json")]
    assert main(["score", *flags, "--detections", *paths, "--plot", str(files / "p.svg")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Reasonable "))
    assert line.split() == ["Reasonable", "2", "50.00", "100.00"]
    results = json.loads((files / "o.json").read_text())["results"]
    assert [result["name"] for result in results] == ["dt", "none"] and results[1]["miss_rate"]["All"] == 1
    assert (files / "p.svg").read_text().count("</svg>") == 1


def write_dataset(folder: Path, num_images: int) -> None:
    """Images with one person; `good.json` detects all but one, `bad.json` those of the last half."""
    images = list(range(1, num_images + 1))
    content = {
        "images": [{"id": image} for image in images],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [person(image, image, [10, 10, 40, 100]) for image in images],
    }
    detections = [{"image_id": image, "category_id": 1, "bbox": [10, 10, 40, 100], "score": 0.9} for image in images]
    (folder / "gt.json").write_text(json.dumps(content))
    (folder / "good.json").write_text(json.dumps(detections[1:]))
    (folder / "bad.json").write_text(json.dumps(detections[num_images // 2 :]))


def test_score_reports_interval_and_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without false positives, the miss rate of a resample is the ratio of missed images in it: binomial."""
    write_dataset(tmp_path, 100)
    flags = ["--annotations", str(tmp_path / "gt.json"), "--protocol", "citypersons", "--setup", "All"]
    paths = [str(tmp_path / "good.json"), str(tmp_path / "bad.json")]
    assert main(["score", *flags, "--detections", *paths, "--json", str(tmp_path / "o.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].endswith("difference to good")
    assert lines[-3].split()[:3] == ["All", "good", "1.00"] and lines[-3].split()[-1] in ("3.0", "4.0")
    assert lines[-2].split()[:2] == ["bad", "50.00"] and lines[-2].endswith(": good is better")
    good, bad = json.loads((tmp_path / "o.json").read_text())["results"]
    assert bad["interval"]["All"] == pytest.approx([0.40, 0.60], abs=0.011)  # quantiles of Binomial(100, 0.5) / 100
    assert good["interval"]["All"] == pytest.approx([0.0, 0.03], abs=0.011)
    assert bad["difference_to"] == "good" and "difference" not in good
    difference = bad["difference"]["All"]
    assert difference["value"] == pytest.approx(0.49) and difference["conclusion"] == "worse"
    assert [difference["ci_low"], difference["ci_high"]] == pytest.approx([0.39, 0.59], abs=0.011)
    assert main(["score", *flags, "--detections", *paths, "--json", "-", "--bootstrap", "0"]) == 0
    assert all(result["interval"] == {} for result in json.loads(capsys.readouterr().out)["results"])


def test_score_on_two_ground_truths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the second ground truth, the persons that bad.json misses are ignore regions."""
    write_dataset(tmp_path, 10)
    content = json.loads((tmp_path / "gt.json").read_text())
    for annotation in content["annotations"][:5]:
        annotation["ignore"] = 1
    (tmp_path / "audited.json").write_text(json.dumps(content))
    flags = ["--annotations", str(tmp_path / "gt.json"), str(tmp_path / "audited.json"), "--setup", "All"]
    flags += ["--detections", str(tmp_path / "bad.json"), "--protocol", "citypersons"]
    assert main(["score", *flags, "--json", str(tmp_path / "o.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.index("gt.json:") < printed.index("50.00") < printed.index("audited.json:") < printed.index(" 0.00")
    first, second = json.loads((tmp_path / "o.json").read_text())["ground_truths"]
    assert (first["miss_rate"]["All"], second["miss_rate"]["All"]) == (0.5, 0)
    assert first["annotations"].endswith("gt.json") and second["num_gt"]["All"] == 5
    assert main(["score", *flags, "--plot", str(tmp_path / "p.svg")]) == 2
    assert "--plot: requires one ground truth" in capsys.readouterr().err


def test_score_coco_equals_pycocotools(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    boxes = [[10 * i, 10, 40, int(h)] for i, h in enumerate(rng.integers(20, 200, 30))]
    content = json.loads((files / "gt.json").read_text())
    content["annotations"] = [
        person(i + 1, 1 + i % 2, box, area=box[2] * box[3], iscrowd=int(i % 7 == 0)) for i, box in enumerate(boxes)
    ]
    found = [
        {
            "image_id": 1 + i % 2,
            "category_id": 1,
            "bbox": [box[0] + float(rng.normal(0, 3)), *box[1:]],
            "score": float(rng.random()),
        }
        for i, box in enumerate(boxes)
    ]
    (files / "gt.json").write_text(json.dumps(content))
    (files / "dt.json").write_text(json.dumps(found))
    coco = COCO(str(files / "gt.json"))
    coco_eval = COCOeval(coco, coco.loadRes(str(files / "dt.json")), "bbox")
    coco_eval.params.catIds = [1]
    coco_eval.evaluate()
    coco_eval.accumulate()
    coco_eval.summarize()
    capsys.readouterr()
    assert run(files, "--json", "-", protocol="coco") == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert list(metrics.values()) == pytest.approx(coco_eval.stats.tolist(), abs=1e-12)
    assert 0.1 < metrics["AP"] < 1


@needs_data
@pytest.mark.slow
def test_score_official_val_file_equals_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = SHARED / "citypersons" / "val_gt.json"
    content = json.loads(path.read_text())
    rng = np.random.default_rng(1)
    found = []
    for record in content["annotations"]:
        x, y, width, height = record["bbox"]
        if rng.random() < 0.7:
            dx, dy, dw, dh = rng.normal(0, 0.08, 4) * [width, height, width, height]
            box = [x + dx, y + dy, max(1.0, width + dw), max(1.0, height + dh)]
            score = round(float(rng.random()), 2)
            found.append({"image_id": record["image_id"], "category_id": 1, "bbox": box, "score": score})
    (tmp_path / "dt.json").write_text(json.dumps(found))
    flags = ["--annotations", str(path), "--detections", str(tmp_path / "dt.json"), "--protocol", "citypersons"]
    assert main(["score", *flags, "--json", "-"]) == 0
    miss_rates = json.loads(capsys.readouterr().out)["miss_rate"]
    reference = load_reference("official_citypersons")
    data = [
        (
            [record for record in content["annotations"] if record["image_id"] == image["id"]],
            [(one["bbox"], one["score"]) for one in found if one["image_id"] == image["id"]],
        )
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]
    for name, setup in citypersons.SETUPS.items():
        assert abs(miss_rates[name] - reference.miss_rate(data, setup.height_px, setup.visible_ratio)) < 1e-9


@needs_data
@pytest.mark.slow
def test_score_caltech_videos_equals_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)
    data = []
    for path in sorted((SHARED / "caltech" / "annotations" / "set06").glob("*.vbb")):
        lines = []
        for index, frame in enumerate(read_vbb(path)):
            kept = rng.random(len(frame)) < 0.7
            rows = [
                [*(box + rng.normal(0, 0.06, 4) * box[[2, 3, 2, 3]]).round(3).tolist(), float(rng.integers(9))]
                for box in frame.boxes_xywh[kept]
            ]
            lines += [" ".join(map(repr, [float(index + 1), *row])) for row in rows]
            if index % 30 == 29:
                objects = [
                    {"lbl": label, "bb": box, "bbv": seen}
                    for label, box, seen in zip(
                        frame.labels, frame.boxes_xywh.tolist(), frame.visible_xywh.tolist(), strict=True
                    )
                ]
                data.append((objects, rows))
        (tmp_path / "set06").mkdir(exist_ok=True)
        (tmp_path / "set06" / f"{path.stem}.txt").write_text("\n".join(lines))
    flags = ["--annotations", str(SHARED / "caltech" / "annotations"), "--protocol", "caltech", "--json", "-"]
    assert main(["score", *flags, "--detections", str(tmp_path)]) == 0
    output = capsys.readouterr()
    printed = json.loads(output.out)
    assert printed["num_images"] == len(data) and "are outside 0 to 1" in output.err
    reference = load_reference("official_caltech")
    for name, setup in caltech.SETUPS.items():
        expected = reference.miss_rate(
            data,
            "caltech",
            setup.height_px,
            setup.visible_ratio,
            setup.aspect_deviation,
            setup.iou_threshold,
            setup.height_margin,
        )
        assert abs(printed["miss_rate"][name] - expected) < 1e-9, name
    assert 0 < printed["miss_rate"]["Reasonable"] < 1


@needs_data
def test_score_corrected_annotations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, lines in ((29, "person 100 50 41 100 0 0 0 0 0 0 0\nperson? 300 50 41 100 0 0 0 0 0 0 0"), (59, "")):
        (tmp_path / f"set06_V000_I{index:05}.jpg.txt").write_text(f"% bbGt version=3\n{lines}\n")
    (tmp_path / "dt" / "set06").mkdir(parents=True)
    (tmp_path / "dt" / "set06" / "V000.txt").write_text("30 100 50 41 100 0.9\n31 0 0 5 5 1\n")
    flags = ["--annotations", str(tmp_path), "--detections", str(tmp_path / "dt"), "--protocol", "caltech-new"]
    assert main(["score", *flags, "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["num_images"] == 2 and printed["miss_rate"]["Reasonable"] == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 3}, "image_id 3 is not among the 2 images"),
        ({"bbox": [1, 2, -3, 4]}, "got [1.0, 2.0, -3.0, 4.0]."),
        ({"bbox": [1, 2, 1e200, 1e200]}, "got [1.0, 2.0, 1e+200, 1e+200]."),
        ({"bbox": [1, 2, 3]}, "$[0].bbox"),
        ({"score": "high"}, "$[0].score"),
        ({"score": float("nan")}, "dt.json"),
        ({"category_id": 7}, "no detection is of category_id 1"),
    ],
)
def test_score_wrong_detection_gives_one_line(
    files: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    detections = json.loads((files / "dt.json").read_text())
    (files / "dt.json").write_text(json.dumps([{**detections[0], **change}]))
    assert run(files) == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and error.startswith("hkd-bench: ") and "dt.json" in error and message in error


def test_score_duplicate_id_is_an_error(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detections = json.loads((files / "dt.json").read_text())
    (files / "dt.json").write_text(json.dumps([{**detections[0], "id": 5}, {**detections[0], "id": 5}]))
    assert run(files) == 1 and "duplicate detection id 5" in capsys.readouterr().err


def test_score_outside_0_to_1_is_a_warning(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detections = json.loads((files / "dt.json").read_text())
    (files / "dt.json").write_text(json.dumps([{**detections[0], "score": -12.5}]))
    assert run(files) == 0
    output = capsys.readouterr()
    assert "1 of 1 scores are outside 0 to 1" in output.err and "50.00" in output.out


@pytest.mark.parametrize(
    ("flags", "protocol", "code", "message"),
    [
        (["--setup", "Small"], "citypersons", 2, "got Small."),
        (["--setup", "Reasonable"], "coco", 2, "--setup"),
        (["--plot", "p.txt"], "citypersons", 2, "--plot"),
        (["--plot", "p.svg"], "coco", 2, "--plot"),
        (["--zero-recall-before-curve"], "caltech", 2, "--zero-recall-before-curve"),
        (["--caltech-sets", "set06"], "citypersons", 2, "--caltech-sets"),
        (["--json", "."], "citypersons", 2, "--json"),
        (["--names", "a,b"], "citypersons", 2, "--names"),
        (["--caltech-sets", "set99"], "caltech", 2, "set99"),
        ([], "caltech", 1, "gt.json"),
    ],
)
def test_score_wrong_flag_gives_one_line(
    files: Path, flags: list[str], protocol: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files, *flags, protocol=protocol) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hkd-bench: ")]
    assert len(lines) == 1 and message in lines[0]


def test_score_wrong_caltech_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set06_V000_I00029.txt").write_text("% bbGt version=3\n")
    path = tmp_path / "dt" / "set06" / "V000.txt"
    flags = ["--annotations", str(tmp_path), "--detections", str(tmp_path / "dt"), "--protocol", "caltech-new"]
    (tmp_path / "dt").mkdir()
    assert main(["score", *flags]) == 1 and "Write an empty file" in capsys.readouterr().err
    path.parent.mkdir()
    for text, message in (
        ("30 1 2 3 4 0.5\n30 1 2 3 4", "line 2"),
        ("30 1 2 -3 4 0.5", "line 1"),
        ("0 1 2 3 4 0.5", "line 1"),
        ("30 1 2 3 x 0.5", "line 1"),
        ("30 1 2 3 nan 0.5", "line 1"),
        ("30 1 2 1e200 1e200 0.5", "line 1"),
        ("inf 1 2 3 4 0.5", "line 1"),
        ("29 1 2 3 4 0.5", "Count frames from 1"),
    ):
        path.write_text(text)
        assert main(["score", *flags]) == 1
        error = capsys.readouterr().err.strip()
        assert "V000.txt" in error and message in error and "\n" not in error


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_read_mutated_files_raises_only_hkd_errors(files: Path, data: st.DataObject) -> None:
    raw_files = {name: bytearray((files / f"{name}.json").read_bytes()) for name in ("gt", "dt")}
    name = data.draw(st.sampled_from(["gt", "dt"]))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw_files[name]) - 1))
        raw_files[name][place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    for one, raw in raw_files.items():
        (files / f"mutated_{one}.json").write_bytes(raw)
    try:
        ground_truth = read_coco_ground_truth(files / "mutated_gt.json")
        detections = read_coco_detections(files / "mutated_dt.json", ground_truth)
        citypersons.evaluate(ground_truth.table, detections)
    except HkdError as error:
        assert "mutated_" in str(error)


@pytest.mark.slow
def test_score_without_terminal_prints_stages(files: Path) -> None:
    flags = ["--annotations", "gt.json", "--detections", "dt.json", "--protocol", "citypersons"]
    command = [sys.executable, "-c", WITHOUT_TERMINAL, "score", *flags]
    done = subprocess.run(command, cwd=files, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    lines = [match[1] for match in map(TIME_STAMPED.fullmatch, done.stdout.splitlines()) if match]
    assert lines == ["score 1 detection file with gt.json", "score: 1/1 files, 0:00 left"]
    done = subprocess.run([*command, "--json", "-"], cwd=files, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["num_detections"] == 1 and "score: 1/1 files" in done.stderr
