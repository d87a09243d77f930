"""Shipped models: files, model cards, names in all commands, and accuracy on real images."""

import os
from pathlib import Path

import numpy as np
import pytest

from hkd_bench.cli import main as bench_main
from hkd_deploy import open_detector
from hkd_deploy.pipeline import ExportedDetector
from hkd_det.datasets import read_image
from hkd_det.datasets.catalog import load_dataset
from hkd_det.metrics.citypersons import SETUPS, evaluate_detections
from hkd_det.shipped import DEFAULT_MODEL, SHIPPED_MODELS, ShippedModel, resolve_model

DATA = Path(os.environ.get("HKD_TEST_DATA", ""), "inria")
needs_inria = pytest.mark.skipif(not DATA.is_dir(), reason="HKD_TEST_DATA has no inria")


@pytest.fixture(params=SHIPPED_MODELS.values(), ids=lambda model: model.name)
def shipped(request: pytest.FixtureRequest) -> ShippedModel:
    model: ShippedModel = request.param
    return model


def test_metadata_equals_the_list(shipped: ShippedModel) -> None:
    with open_detector(shipped.name, threads=1) as detector:
        assert isinstance(detector, ExportedDetector)
        assert detector.metadata.imgsz_hw == shipped.imgsz_wh[::-1]
        assert detector.metadata.reference is not None  # for hkd-demo --monitor
        assert detector.metadata.reference.conf == detector.default_conf
        detections = detector(np.full((240, 320, 3), 127, np.uint8))
    assert not (detections.scores > 0.3).any()  # an empty image contains no person


def test_model_card_states_what_a_user_needs(shipped: ShippedModel) -> None:
    card = shipped.card.read_text(encoding="utf-8")
    sections = ("## Intended use", "## Training data", "## Accuracy", "## Limits", "## License")
    assert [section for section in sections if section not in card] == []
    assert shipped.license in card
    assert f"{shipped.miss_rates[0]:.1f} / {shipped.miss_rates[1]:.1f} %" in card


def test_default_model_is_shipped() -> None:
    assert resolve_model(None) == SHIPPED_MODELS[DEFAULT_MODEL].path == resolve_model(DEFAULT_MODEL)
    assert resolve_model(None).is_file()


def test_existing_file_has_priority_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(DEFAULT_MODEL).touch()
    assert resolve_model(DEFAULT_MODEL) == Path(DEFAULT_MODEL)


def test_list_models_names_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_main(["--list-models"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in SHIPPED_MODELS)


def test_bench_without_model_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_main(["--images", "."]) == 2
    assert "expected at least one model" in capsys.readouterr().err


@needs_inria
@pytest.mark.slow
def test_miss_rates_equal_the_list(shipped: ShippedModel, tmp_path: Path) -> None:
    for miss_rate, name in zip(shipped.miss_rates, ("test", "test_audited"), strict=True):
        data_yaml = tmp_path / f"{name}.yaml"
        data_yaml.write_text(f"format: coco\nval: {{images: {DATA}, annotations: {DATA / name}.json}}\n")
        samples = load_dataset(str(data_yaml), "val")
        with open_detector(shipped.name, threads=1) as detector:
            detections = [detector(read_image(sample.path)) for sample in samples]
        result = evaluate_detections(samples, detections, [SETUPS["All"]])["All"]
        assert 100 * result.value == pytest.approx(miss_rate, abs=0.3)
