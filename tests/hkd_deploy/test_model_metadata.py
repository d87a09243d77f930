"""Tests of the metadata reader: valid values are parsed, invalid values raise an error with the key."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_deploy import open_detector
from hkd_deploy.model_metadata import PREPROCESS, ModelMetadata
from hkd_det.errors import DataError

GOOD = {
    "task": "detect",
    "batch": "1",
    "imgsz": "[512, 640]",
    "license": "Apache-2.0",
    "date": "2026-01-02",
    "version": "0.1.0",
    "hkd.format": "1",
    "hkd.model": "mini-student",
    "hkd.parameters": "3100000",
    "hkd.flops": "5400000000",
    "hkd.preprocess": '{"pad": 114, "layout": "NHWC", "color": "RGB", "dtype": "uint8", "letterbox": "top-left"}',
    "hkd.weights_sha256": "ab" * 32,
    "hkd.data": "citypersons",
    "hkd.max_imgsz": "[1080, 1920]",
    "hkd.dynamic": "false",
    "hkd.raw": "false",
}
PATH = Path("some/model.onnx")


def test_from_metadata_reads_all_keys() -> None:
    assert ModelMetadata.from_metadata(GOOD, PATH) == ModelMetadata(
        model="mini-student",
        imgsz_hw=(512, 640),
        batch=1,
        parameters=3_100_000,
        flops=5_400_000_000,
        weights_sha256="ab" * 32,
        data="citypersons",
        license="Apache-2.0",
        date="2026-01-02",
        version="0.1.0",
        max_imgsz_hw=(1080, 1920),
    )


def test_from_metadata_reads_former_keys() -> None:
    renamed = {"hkd.max_imgsz": "hkd.max_hw", "hkd.dynamic": "hkd.dynamic_size"}
    former = {renamed.get(key, key): value for key, value in GOOD.items()}
    assert ModelMetadata.from_metadata(former, PATH) == ModelMetadata.from_metadata(GOOD, PATH)


def test_from_metadata_dynamic_batch_is_none() -> None:
    assert ModelMetadata.from_metadata({**GOOD, "batch": "dynamic"}, PATH).batch is None


def test_from_metadata_reads_graph_interface() -> None:
    dynamic = ModelMetadata.from_metadata({**GOOD, "hkd.dynamic": "true", "hkd.raw": "true"}, PATH)
    assert dynamic.dynamic and dynamic.raw
    for change, letterbox, preprocess in (
        ({"letterbox": "in graph"}, True, "uint8"),
        ({"layout": "NCHW", "dtype": "float32", "range": [0, 1]}, False, "float01"),
    ):
        strings = {**GOOD, "hkd.preprocess": json.dumps({**PREPROCESS, **change})}
        metadata = ModelMetadata.from_metadata(strings, PATH)
        assert (metadata.letterbox, metadata.preprocess) == (letterbox, preprocess)


@pytest.mark.parametrize("key", ["hkd.max_imgsz", "hkd.dynamic", "hkd.raw"])
@pytest.mark.parametrize("value", [None, "", "True", "1", "[0, 3]"])
def test_from_metadata_reads_interface_strictly(key: str, value: str | None) -> None:
    metadata = {name: text for name, text in {**GOOD, key: value}.items() if text is not None}
    with pytest.raises(DataError, match=f"metadata (key )?{re.escape(key)}"):
        ModelMetadata.from_metadata(metadata, PATH)


def test_preprocess_is_unchanged() -> None:
    assert json.loads(GOOD["hkd.preprocess"]) == PREPROCESS


@pytest.mark.parametrize("key", sorted(set(GOOD) - {"hkd.format"}))
def test_from_metadata_missing_key_raises(key: str) -> None:
    metadata = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(DataError, match=rf"^some/model.onnx: metadata key {key} is missing. Export the model again"):
        ModelMetadata.from_metadata(metadata, PATH)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task", "segment"),
        ("batch", "0"),
        ("batch", "-1"),
        ("batch", "two"),
        ("imgsz", "640"),
        ("imgsz", "[640]"),
        ("imgsz", "[0, 640]"),
        ("imgsz", "(512, 640)"),
        ("hkd.parameters", ""),
        ("hkd.parameters", "3.1e6"),
        ("hkd.flops", "-4"),
        ("hkd.preprocess", "{"),
        ("hkd.preprocess", '{"layout": "NCHW"}'),
        ("hkd.weights_sha256", "AB" * 32),
        ("hkd.weights_sha256", "ab"),
        ("hkd.model", "  "),
        ("license", ""),
    ],
)
def test_from_metadata_invalid_value_raises(key: str, value: str) -> None:
    with pytest.raises(DataError) as caught:
        ModelMetadata.from_metadata({**GOOD, key: value}, PATH)
    message = str(caught.value)
    assert message.startswith(f"some/model.onnx: metadata {key}: invalid value {value!r}: ")
    assert "\n" not in message


@pytest.mark.parametrize("version", ["2", "10"])
def test_from_metadata_newer_format_raises(version: str) -> None:
    with pytest.raises(DataError, match=rf"got {version} from a newer hkd-det.*Update hkd-det on this"):
        ModelMetadata.from_metadata({**GOOD, "hkd.format": version}, PATH)


@pytest.mark.parametrize("version", ["", "0", "one", "-1", "²"])
def test_from_metadata_invalid_format_raises(version: str) -> None:
    with pytest.raises(DataError, match=r"hkd\.format: expected a positive integer"):
        ModelMetadata.from_metadata({**GOOD, "hkd.format": version}, PATH)


def test_from_metadata_other_tool_raises() -> None:
    with pytest.raises(DataError, match=r"some/model\.onnx: not an hkd-det model: .*hkd-export"):
        ModelMetadata.from_metadata({"names": "{0: 'person'}", "task": "detect"}, PATH)


@pytest.mark.slow
@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(GOOD)), st.text(max_size=12)))
def test_from_metadata_any_text_parses_or_raises_data_error(changes: dict[str, str]) -> None:
    try:
        metadata = ModelMetadata.from_metadata({**GOOD, **changes}, PATH)
    except DataError:
        return
    assert metadata.parameters > 0
    assert min(metadata.imgsz_hw) > 0


def test_open_detector_reads_metadata(tiny_onnx: Callable[..., Path]) -> None:
    with open_detector(tiny_onnx(imgsz_hw=(64, 96))) as detector:
        assert detector.metadata.model == "tiny"
        assert detector.metadata.imgsz_hw == (64, 96)
        assert detector.metadata.data == "nothing"
