"""`hkd-export --verify`: table, miss rates, and refusal of models that differ."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch

from hkd_deploy import open_detector
from hkd_deploy.backends.openvino import export_openvino
from hkd_deploy.drift import QUANTITIES, Distribution, DriftReference
from hkd_deploy.export import exporter, verify
from hkd_deploy.export.cli import main
from hkd_deploy.export.parity import Parity, ParityError, make_onnx_reference
from hkd_deploy.export.verify import ExportedModel, Verification, VerificationRow
from hkd_deploy.model_metadata import ExportOptions
from hkd_det.models.checkpoint import DetectorCheckpoint, save_detector_checkpoint
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.structures import Detections, GroundTruth, Sample

HW = (96, 160)  # input size of `tiny_onnx`, which returns the bounding box of all bright pixels
SPEC = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=12)


@pytest.fixture
def street(tmp_path: Path) -> Callable[..., Path]:
    """Write six dark images with a bright person of 25x64 px each; return the data YAML.

    `num_distractors` images have a bright object far from the person. `annotated` sets whether persons have labels.
    """

    def write(num_distractors: int = 0, annotated: bool = True) -> Path:
        for folder in ("images", "labels"):
            (tmp_path / "street" / folder / "val").mkdir(parents=True, exist_ok=True)
        for number in range(6):
            image = np.full((*HW, 3), 20, np.uint8)
            image[16:80, 10 + number : 35 + number] = 255
            image[:8, 150:] = 255 if number < num_distractors else 20
            cv2.imwrite(str(tmp_path / "street" / "images" / "val" / f"{number}.png"), image)
            line = f"0 {(22.5 + number) / HW[1]:.6f} {48 / HW[0]:.6f} {25 / HW[1]:.6f} {64 / HW[0]:.6f}\n"
            (tmp_path / "street" / "labels" / "val" / f"{number}.txt").write_text(line if annotated else "")
        path = tmp_path / "street.yaml"
        path.write_text("path: street\ntrain: images/val\nval: images/val\nnames: {0: person}\n")
        return path

    return write


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Write an untrained detector whose scores differ."""
    torch.manual_seed(0)
    detector = HKDDetector(SPEC)
    torch.nn.init.normal_(detector.head.one2many.weight, std=0.5)
    torch.nn.init.normal_(detector.head.one2one.weight, std=0.5)
    config = {"data": "street.yaml", "imgsz_hw": [64, 96]}
    path = tmp_path / "best.pt"
    save_detector_checkpoint(path, DetectorCheckpoint("small", SPEC, detector.state_dict(), config, 1, 0.5))
    return path


def parse_rows(output: str) -> list[list[str]]:
    """Return the cells of the table without its header."""
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("model "))
    rows = [[cell for cell in line.split("  ") if cell] for line in lines[start + 1 :]]
    return [row for row in rows if len(row) > 1]  # notes are single cells


def scale_scores(path: Path, factor: float) -> Path:
    """Multiply the scores of a file of `tiny_onnx` by a factor."""
    model = onnx.load(path)
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "to_score")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(factor), "to_score"))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("num_distractors", "rate"), [(0, "0.00 %"), (6, "100.00 %")])
def test_verify_onnx_and_openvino_folder(
    tiny_onnx: Callable[..., Path],
    street: Callable[..., Path],
    num_distractors: int,
    rate: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tiny_onnx()
    assert main([str(path), "--openvino", "--data", str(street(num_distractors)), "--verify-images", "4"]) == 0
    output = capsys.readouterr().out
    reference, folder = parse_rows(output)
    assert [cell.strip() for cell in reference] == [str(path), "onnxruntime", "-", "-", rate, "-"]
    assert folder[0].endswith("tiny_openvino") and folder[1].strip() == "openvino"
    is_blind = num_distractors == 6
    assert folder[-2].strip() == rate and folder[-1].strip() == ("-" if is_blind else "+0.00 points")
    assert ("detects no person of the setup Reasonable: increases are not stated" in output) == is_blind
    assert ("increase: no interval from 4 images with 4 persons, at least 50 and 50 are needed" in output) != is_blind
    assert "on 6 images" in output and "Reasonable on 4 images of " in output


def test_verify_engine_without_gpu_states_reason(
    tiny_onnx: Callable[..., Path],
    street: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tiny_onnx()
    monkeypatch.setattr("hkd_deploy.trt.cli.run_trt", lambda onnx, _flags, _output: onnx.with_suffix(".engine"))
    assert main([str(path), "--trt", "--device", "cuda:1", "--data", str(street())]) == 0
    output = capsys.readouterr().out
    _, engine = parse_rows(output)
    assert engine[0].strip() == str(path.with_suffix(".engine")) and engine[1].strip() == "tensorrt"
    assert engine[2].strip() == "not run" and f"{engine[0].strip()} on tensorrt: not run: " in output


def test_verify_without_ground_truth_reports_parity(
    tiny_onnx: Callable[..., Path], street: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_onnx()), "--openvino", "--data", str(street(annotated=False))]) == 0
    reference, folder = parse_rows(capsys.readouterr().out)
    assert reference[-2].strip() == folder[-2].strip() == "no persons" and folder[2].strip() == "0 px"


def test_verify_openvino_folder_that_differs_is_not_written(
    tiny_onnx: Callable[..., Path], street: Callable[..., Path]
) -> None:
    path, other = tiny_onnx(), scale_scores(tiny_onnx("other.onnx"), 0.9)
    image_paths = sorted((street().parent / "street" / "images" / "val").iterdir())
    verification = Verification(make_onnx_reference(other), image_paths)
    files = sorted(path.parent.iterdir())
    with pytest.raises(ParityError, match=r"tiny_openvino: not written: differs from .*other\.onnx .* scores: 0\.0"):
        export_openvino(
            path, check=lambda name, temp: verification.add(ExportedModel(name, "openvino", is_exact=True), temp)
        )
    assert sorted(path.parent.iterdir()) == files


def test_verification_of_reduced_precision_rejects_nan_only(
    tiny_onnx: Callable[..., Path], street: Callable[..., Path]
) -> None:
    image_paths = sorted((street().parent / "street" / "images" / "val").iterdir())
    high, low, nan = (scale_scores(tiny_onnx(f"{factor}.onnx"), factor) for factor in (3, 2.7, float("nan")))
    verification = Verification(make_onnx_reference(high), image_paths)
    parity = verification.add(ExportedModel(low, "onnxruntime", is_exact=False))
    score = (25 * 64 * 255 + (96 * 160 - 25 * 64) * 20) / (96 * 160 * 255)  # the score of `tiny_onnx`
    assert (
        parity is not None and parity.box_error_px == 0 and parity.score_error == pytest.approx(0.3 * score, rel=1e-3)
    )
    with pytest.raises(ParityError, match=r"nan\.onnx: outputs are NaN on onnxruntime"):
        verification.add(ExportedModel(nan, "onnxruntime", is_exact=False))


def test_verify_without_data_is_skipped_or_fails(
    tiny_onnx: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without --verify and --data, missing data only gives a note: a device rarely has the training data."""
    path = tiny_onnx()
    for flags, code, message in (
        (["--openvino"], 0, "not verified: verification images: "),
        (["--openvino", "--verify"], 2, "verification images: "),
        (["--openvino", "--data", str(tmp_path / "none.yaml")], 1, "none.yaml"),
        (["--openvino", "--verify-images", "0"], 2, "--verify-images: expected at least 1, got 0."),
    ):
        assert main([str(path), *flags]) == code
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1 and message in errors[0]
    assert main([str(path), "--openvino", "--no-verify"]) == 0
    assert capsys.readouterr().err == ""


def test_openvino_export_states_each_problem_once(
    tiny_onnx: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tiny_onnx("foreign.onnx", changes={"hkd.format": None})
    assert main([str(foreign), "--openvino"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"hkd-export: {foreign}: not an hkd-det model: ")
    # Nothing can be created below /proc, not even by root.
    assert main([str(tiny_onnx()), "--openvino", "--no-verify", "--output", "/proc/folder"]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("hkd-export: /proc/folder: ") and "Check the path, its permissions" in error


@pytest.mark.slow
def test_verify_weights_and_exported_files(
    weights: Path, street: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(weights), "--data", str(street()), "--precision", "bf16"]) == 0
    output = capsys.readouterr().out
    torch_row, exact, half = parse_rows(output)
    assert torch_row[0].strip() == str(weights) and torch_row[1].strip() == "torch"
    assert exact[0].strip() == str(weights.with_suffix(".onnx")) and exact[-1].strip() in ("+0.00 points", "-")
    assert exact[-2] == torch_row[-2] and 0 <= float(exact[2].removesuffix("px")) < 0.5
    assert half[2].strip() == "not run" and "not run: ONNX Runtime has no bfloat16" in output


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--raw"], pytest.param(["--no-preprocess"], marks=pytest.mark.slow)])
def test_verify_raw_and_float_graphs_measures_no_miss_rate(
    weights: Path, street: Callable[..., Path], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(weights), "--data", str(street()), *flags]) == 0
    _, onnx_row = parse_rows(capsys.readouterr().out)
    assert onnx_row[-2].strip() == "not measured" and float(onnx_row[2].removesuffix("px")) < 0.5


@pytest.mark.slow
def test_verify_image_above_max_imgsz_is_not_measured(
    weights: Path, street: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(weights), "--data", str(street()), "--letterbox", "--max-imgsz", "96x64"]) == 0
    output = capsys.readouterr().out
    assert "not measured" in output and any("160x96" in line and "96x64" in line for line in output.splitlines())


@pytest.mark.slow
def test_export_that_differs_names_worst_layer(
    weights: Path, street: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original_export = exporter.export_onnx

    def export_with_changed_bias(source: DetectorCheckpoint, path: Path, options: ExportOptions) -> None:
        original_export(source, path, options)
        model = onnx.load(path)
        bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("head.one2many.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.5, bias.name))
        onnx.save(model, path)

    data = street()
    files = sorted(weights.parent.iterdir())
    monkeypatch.setattr(exporter, "export_onnx", export_with_changed_bias)
    assert main([str(weights), "--data", str(data)]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hkd-export: ")]
    assert f"best.onnx: not written: differs from {weights} on torch (boxes: " in error
    assert "the first stage that differs is head" in error and "the worst layer is head.one2many (" in error
    assert sorted(weights.parent.iterdir()) == files


def make_scored_samples(path: Path, num_images: int) -> tuple[list[Sample], list[Detections]]:
    """Return images with one person each, and detections: 80 % of the persons and twice as many false positives."""
    rng = np.random.default_rng(0)
    person, elsewhere = np.array([[10, 10, 40, 90]], np.float32), np.array([[200, 10, 230, 90]], np.float32)
    samples, detections = [], []
    for number in range(num_images):
        gt = GroundTruth(person, np.array([False]), person, ("person",))
        samples.append(Sample(number, path, gt, (100, 300)))
        boxes = np.concatenate([person] * (number % 5 > 0) + [elsewhere] * 2)
        scores = np.concatenate([rng.uniform(0.3, 1, len(boxes) - 2), rng.uniform(0, 0.6, 2)])
        detections.append(Detections(boxes, scores))
    return samples, detections


def compute_best_threshold(detections: list[Detections]) -> float:
    """Compute F1 = 2 TP / (detections + persons) at every score, by counting."""
    rows = [(float(score), box[0] < 100) for one in detections for box, score in one]

    def compute_f1(limit: float) -> float:
        num_hits = sum(hit for score, hit in rows if score >= limit)
        return 2 * num_hits / (sum(score >= limit for score, _ in rows) + len(detections))

    return max((score for score, _ in rows), key=lambda score: (compute_f1(score), score))


@pytest.mark.parametrize(("num_images", "is_suggested"), [(49, False), (50, True), (200, True)])
def test_suggest_conf_has_highest_f1(
    tiny_onnx: Callable[..., Path], tmp_path: Path, num_images: int, is_suggested: bool
) -> None:
    samples, detections = make_scored_samples(tmp_path / "image.png", num_images)
    reference = replace(make_onnx_reference(tiny_onnx()), predict=lambda _samples: detections)
    conf = Verification(reference, [], samples, "street").suggest_conf()
    if not is_suggested:
        assert conf is None
        return
    threshold = compute_best_threshold(detections)
    assert conf is not None and threshold - 0.001 < conf <= threshold
    nothing = replace(reference, predict=lambda _samples: [Detections.empty()] * num_images)
    assert Verification(nothing, [], samples, "street").suggest_conf() is None
    assert Verification(reference, [], [], "street").suggest_conf() is None


@pytest.mark.slow
@pytest.mark.parametrize("conf", [None, 0.5])
def test_reference_has_the_detections_of_the_samples(
    tiny_onnx: Callable[..., Path], tmp_path: Path, conf: float | None
) -> None:
    """Counts are compared with counting by hand. The image height is 100 pixels."""
    samples, detections = make_scored_samples(tmp_path / "image.png", 200)
    source = replace(make_onnx_reference(tiny_onnx()), predict=lambda _samples: detections)
    reference = Verification(source, [], samples, "street").measure_reference(conf)
    assert reference is not None and reference.num_images == 200
    min_score = 0.3 if conf is None else conf
    assert reference.conf == min_score
    persons = [sum(score >= min_score for _, score in one) for one in detections]
    edges, counts = reference.distributions["persons"].edges, reference.distributions["persons"].counts
    assert counts == tuple(np.histogram(persons, [-1, *edges, 100])[0])
    score, height = reference.distributions["score"], reference.distributions["height"]
    assert sum(score.counts) == sum(value >= 0.05 for one in detections for _, value in one)
    assert sum(height.counts) == sum(persons) and height.edges[0] > 0.8  # all boxes have the height 0.8
    for edge, below in zip(score.edges, np.cumsum(score.counts), strict=False):
        assert below == sum(0.05 <= value < edge for one in detections for _, value in one)
    too_few = replace(source, predict=lambda _samples: [Detections.empty()] * 200)
    assert Verification(too_few, [], samples, "street").measure_reference(conf) is None


@pytest.mark.slow
def test_exported_weights_contain_suggested_conf(weights: Path, street: Callable[..., Path], tmp_path: Path) -> None:
    """The verification of six images suggests none; one that suggests a value writes it, and predicts once."""
    data, out = street(), tmp_path / "out.onnx"
    flags = [str(weights), "--output", str(out), "--data", str(data)]
    assert main(flags) == 0
    before = open_detector(out)
    assert before.metadata.conf is None and before.default_conf == 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Verification, "suggest_conf", lambda _self: 0.1234)
        distribution = Distribution((0.5,), (30, 70), 12.5)
        reference = DriftReference(100, 0.123, dict.fromkeys(QUANTITIES, distribution))
        patch.setattr(Verification, "measure_reference", lambda _self, _conf: reference)
        assert main(flags) == 0
    after = open_detector(out)
    assert after.default_conf == 0.123 and after.metadata.reference == reference
    assert replace(after.metadata, conf=None, reference=None, date="") == replace(before.metadata, date="")


def test_increase_has_an_interval_from_enough_images(
    tiny_onnx: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model loses 10 of 80 persons: 12.5 points, with a standard deviation of sqrt(0.125 * 0.875 / 100), 3.3."""
    path = tiny_onnx()
    samples, detections = make_scored_samples(tmp_path / "image.png", 100)
    has_person = [number for number in range(100) if number % 5]
    lost = set(has_person[:10])
    kept = [Detections.empty() if number in lost else one for number, one in enumerate(detections)]
    reference = replace(make_onnx_reference(path), predict=lambda _samples: detections)
    for predicted, has_gap in ((kept, True), ([Detections.empty()] * 100, False)):
        verification = Verification(reference, [], samples, "street")
        verification._rows.append(VerificationRow(ExportedModel(path, "onnxruntime", is_exact=False), Parity(1, 0, 0)))
        monkeypatch.setattr(verify, "predict_samples", lambda *_args, predicted=predicted: predicted)
        table = verification.format_table({})
        (value, low, high) = (
            float(text) for text in re.findall(r"([+-][\d.]+) points \(([+-][\d.]+) to ([+-][\d.]+)\)", table)[0]
        )
        assert low < value < high and low > 0
        assert (f"{path} on onnxruntime detects no person" in table) != has_gap
