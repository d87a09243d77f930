"""Pages of differences: counts on hand-made boxes, agreement with the recall of hkd-bench, command line, odd names."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from hkd_bench.cli import main
from hkd_bench.detection_files import read_detections, write_detections
from hkd_bench.differences import ComparedModel, compare_image, write_difference_pages
from hkd_bench.result import measure_accuracy, read_result
from hkd_det.structures import Detections, GroundTruth, Sample


def make_box(x: float, height: float = 100) -> list[float]:
    return [x, 0, x + 40, height]


def make_sample(*boxes: list[float], path: Path = Path("a.jpg"), ignore: tuple[bool, ...] = ()) -> Sample:
    array = np.array(boxes, np.float32).reshape(-1, 4)
    flags = np.array(ignore or (False,) * len(boxes), bool)
    return Sample(path.name, path, GroundTruth(array, flags, array, ("person",) * len(boxes)))


def make_detections(*boxes: list[float], scores: tuple[float, ...] = ()) -> Detections:
    values = scores or tuple(0.9 - 0.1 * index for index in range(len(boxes)))
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), np.array(values, np.float32))


def read_content(page: Path) -> Any:
    return json.loads(page.read_text().split('<script type="application/json" id="data">')[1].split("</script", 1)[0])


def test_compare_image_counts_each_kind_of_difference() -> None:
    """Persons at 0, 100, 200, 300; false positives at 500 (both), 600 (first), 700 and 800 (second)."""
    sample = make_sample(*(make_box(x) for x in (0, 100, 200, 300)))
    first = make_detections(*(make_box(x) for x in (0, 100, 500, 600)))
    second = make_detections(*(make_box(x) for x in (0, 200, 505, 700, 800)))
    difference = compare_image(sample, first, second)
    assert Counter(kind for _, kind, _ in difference.notes) == {
        "only_first_detects": 1, "only_second_detects": 1, "both_miss": 1,
        "only_first_false": 1, "only_second_false": 2, "both_false": 1,
    }  # fmt: skip
    assert difference.num_differences == 5


def test_compare_image_pairs_false_positives_one_to_one() -> None:
    """Two false positives of the first model overlap one of the second; the nearer one is common."""
    first = make_detections(make_box(500), make_box(510))
    difference = compare_image(make_sample(), first, make_detections(make_box(512)))
    assert [(kind, text) for _, kind, text in difference.notes] == [
        ("only_first_false", "score 0.90, 100 px tall"),
        ("both_false", "score 0.80, 100 px tall"),
    ]


def test_compare_image_without_boxes_has_no_difference() -> None:
    assert compare_image(make_sample(), make_detections(), make_detections()).notes == []
    sample = make_sample(make_box(0), make_box(100, 40), ignore=(True, False))  # ignored, and below 50 px
    difference = compare_image(sample, make_detections(make_box(0), make_box(100, 40)), make_detections())
    assert difference.notes == []


@pytest.fixture
def images(tmp_path: Path) -> list[Sample]:
    """Twelve images with random persons."""
    rng, samples = np.random.default_rng(0), []
    for number in range(12):
        path = tmp_path / f"{number}.jpg"
        cv2.imwrite(str(path), rng.integers(0, 255, (120, 400, 3), np.uint8))
        samples.append(make_sample(*(make_box(x) for x in rng.choice(8, 3, replace=False) * 45.0), path=path))
    return samples


def make_random_model(name: str, samples: list[Sample], seed: int) -> ComparedModel:
    rng, detections = np.random.default_rng(seed), []
    for sample in samples:
        persons = sample.ground_truth.boxes_xyxy[rng.random(3) < 0.7]
        wrong = np.array([make_box(x) for x in rng.uniform(0, 360, 2)], np.float32)
        boxes = np.concatenate([persons, wrong])
        detections.append(Detections(boxes, rng.random(len(boxes)).astype(np.float32)))
    return ComparedModel(name, 0.4, detections)


def test_pages_have_the_recall_of_the_bench(tmp_path: Path, images: list[Sample]) -> None:
    """Persons that are neither missed by both nor by one model are the recall at the threshold."""
    models = [make_random_model(name, images, seed) for seed, name in enumerate(("a", "b", "c"))]
    pages = write_difference_pages(tmp_path / "pages", "my", images, models)
    assert [page.name for page in pages] == ["index.html", "3.html"]
    accuracies = measure_accuracy({"my": images}, [model.detections for model in models], [0.4] * 3, num_resamples=10)
    for page, accuracy in zip(pages, accuracies[1:], strict=True):
        content = read_content(page)
        kinds = [content["kinds"][kind][0] for image in content["images"] for kind, _ in image[-1]]
        for index, missed in ((0, "only_second_detects"), (None, "only_first_detects")):
            recall = accuracies[0][0].recall if index == 0 else accuracy[0].recall
            num_missed = kinds.count(missed) + kinds.count("both_miss")
            assert recall == pytest.approx(1 - num_missed / 36)
        totals = [sum(content["kinds"][kind][0].startswith("only") for kind, _ in one[-1]) for one in content["images"]]
        assert totals == sorted(totals, reverse=True) and len(totals) == 12
        assert all((tmp_path / "pages/thumbnails/images" / f"{one[4]}.jpg").is_file() for one in content["images"])


def test_pages_limit_keeps_the_images_that_differ(tmp_path: Path, images: list[Sample]) -> None:
    first = make_random_model("a", images, 0)
    changed = [make_detections() if index == 7 else one for index, one in enumerate(first.detections)]
    write_difference_pages(tmp_path / "p", "my", images, [first, ComparedModel("b", 0.4, changed)], max_images=2)
    content = read_content(tmp_path / "p" / "index.html")
    assert [one[2] for one in content["images"]] == ["7.jpg", "0.jpg"]
    assert len(list((tmp_path / "p" / "thumbnails").rglob("*.jpg"))) == 2
    assert "2 of 12" in (tmp_path / "p" / "index.html").read_text()


def test_pages_escape_names_of_models(tmp_path: Path, images: list[Sample]) -> None:
    names = "</script><img src=x onerror=alert(1)>", "${b}`\"'"
    models = [make_random_model(name, images[:1], seed) for seed, name in enumerate(names)]
    [page] = write_difference_pages(tmp_path / "p", "<b>my", images[:1], models)
    text = page.read_text()
    assert "<img src=x" not in text and "<b>my" not in text and text.count("<script") == 2
    assert text.count("</script>") == 2


def test_saved_detections_are_read_again(tmp_path: Path, images: list[Sample]) -> None:
    detections = make_random_model("a", images, 0).detections
    detections = [*detections[:-1], make_detections()]  # the last image has none
    write_detections(tmp_path / "d.json", images, detections, None)
    for before, after in zip(detections, read_detections(tmp_path / "d.json", images, None), strict=True):
        np.testing.assert_array_equal(before.scores, after.scores)
        np.testing.assert_allclose(before.boxes_xyxy, after.boxes_xyxy, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("one_round")
def test_bench_and_compare_write_the_same_page(
    write_tiny_onnx: Callable[..., Path], half_right: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(write_tiny_onnx(tmp_path / "tiny.onnx"))
    out = [str(tmp_path / name) for name in ("a.json", "d.json", "pages", "again")]
    flags = ["--data", str(half_right), "--runs", "3", "--threads", "1"]
    command = [model, model, "--names", "a,b", *flags, "--json", out[0], "--save-detections", out[1]]
    assert main([*command, "--differences", out[2]]) == 0
    assert f"saved {out[2]}/index.html" in capsys.readouterr().out
    files = f"{tmp_path}/d-a.json,{tmp_path}/d-b.json"
    assert main(["compare", out[0], "--differences", out[3], "--data", str(half_right), "--detections", files]) == 0
    contents = [read_content(Path(folder) / "index.html") for folder in out[2:]]
    assert contents[0]["images"] == contents[1]["images"]
    kinds = Counter(contents[0]["kinds"][kind][0] for one in contents[0]["images"] for kind, _ in one[-1])
    assert kinds == {"both_miss": 1, "both_false": 1}  # one of two images is wrong, for both models
    assert read_result(tmp_path / "a.json").models[1].accuracy[0].recall == 0.5
    capsys.readouterr()
    assert main([model, *flags, "--differences", out[2]]) == 2
    assert "--differences: expected at least two models" in capsys.readouterr().err
    assert main([model, model, "--names", "a,b", "--images", str(half_right.parent), "--differences", out[2]]) == 2
    assert "--differences: requires annotations" in capsys.readouterr().err
    assert main(["compare", out[0], "--differences", out[3]]) == 2
    assert "expected all of them or none" in capsys.readouterr().err
