"""The manifest: what hkd-export writes is read, everything else is refused by name."""

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
}
GOOD_2 = {**GOOD, "hkd.format": "2", "hkd.max_hw": "[1080, 1920]", "hkd.dynamic_size": "false", "hkd.raw": "false"}
PATH = Path("some/model.onnx")


def test_reads_every_field() -> None:
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
        max_imgsz_hw=(512, 640),
    )


def test_a_free_batch_is_none() -> None:
    assert ModelMetadata.from_metadata({**GOOD, "batch": "dynamic"}, PATH).batch is None


def test_format_2_says_which_graph_it_is() -> None:
    plain = ModelMetadata.from_metadata(GOOD_2, PATH)
    assert (plain.max_imgsz_hw, plain.dynamic, plain.letterbox, plain.preprocess, plain.raw) == (
        (1080, 1920), False, False, "uint8", False
    )  # fmt: skip
    free = ModelMetadata.from_metadata({**GOOD_2, "hkd.dynamic_size": "true", "hkd.raw": "true"}, PATH)
    assert free.dynamic and free.raw
    for change, letterbox, preprocess in (
        ({"letterbox": "in graph"}, True, "uint8"),
        ({"layout": "NCHW", "dtype": "float32", "range": [0, 1]}, False, "float01"),
    ):
        metadata = {**GOOD_2, "hkd.preprocess": json.dumps({**PREPROCESS, **change})}
        manifest = ModelMetadata.from_metadata(metadata, PATH)
        assert (manifest.letterbox, manifest.preprocess) == (letterbox, preprocess)
        with pytest.raises(DataError, match=r"metadata hkd\.preprocess is"):
            ModelMetadata.from_metadata({**metadata, "hkd.format": "1"}, PATH)


@pytest.mark.parametrize("key", sorted(set(GOOD_2) - set(GOOD)))
@pytest.mark.parametrize("value", [None, "", "True", "1", "[0, 3]"])
def test_what_format_2_adds_is_read_strictly(key: str, value: str | None) -> None:
    metadata = {name: text for name, text in {**GOOD_2, key: value}.items() if text is not None}
    with pytest.raises(DataError, match=f"metadata (has no )?{re.escape(key)}"):
        ModelMetadata.from_metadata(metadata, PATH)


def test_the_preprocess_contract_is_what_the_field_notes_say() -> None:
    assert json.loads(GOOD["hkd.preprocess"]) == PREPROCESS


@pytest.mark.parametrize("key", sorted(set(GOOD) - {"hkd.format"}))
def test_a_missing_key_is_named(key: str) -> None:
    metadata = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(DataError, match=rf"^some/model.onnx: its metadata has no {key}: .*export it again"):
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
def test_a_bad_value_is_named(key: str, value: str) -> None:
    with pytest.raises(DataError) as caught:
        ModelMetadata.from_metadata({**GOOD, key: value}, PATH)
    message = str(caught.value)
    assert message.startswith(f"some/model.onnx: metadata {key} is {value!r}: ")
    assert "\n" not in message


@pytest.mark.parametrize("found", ["3", "10"])
def test_a_newer_format_asks_for_an_update(found: str) -> None:
    with pytest.raises(DataError, match=rf"format {found} by a newer hkd-det.*pip install -U hkd-det"):
        ModelMetadata.from_metadata({**GOOD, "hkd.format": found}, PATH)


@pytest.mark.parametrize("found", ["", "0", "one", "-1", "²"])
def test_a_broken_format(found: str) -> None:
    with pytest.raises(DataError, match=r"hkd\.format is"):
        ModelMetadata.from_metadata({**GOOD, "hkd.format": found}, PATH)


def test_a_foreign_file_is_sent_to_the_exporter() -> None:
    with pytest.raises(DataError, match=r"some/model\.onnx: not an hkd-det model .*hkd-export"):
        ModelMetadata.from_metadata({"names": "{0: 'person'}", "task": "detect"}, PATH)


@settings(deadline=None)
@given(st.sampled_from([GOOD, GOOD_2]), st.dictionaries(st.sampled_from(sorted(GOOD_2)), st.text(max_size=12)))
def test_any_text_is_read_or_refused_as_bad_data(good: dict[str, str], changes: dict[str, str]) -> None:
    try:
        manifest = ModelMetadata.from_metadata({**good, **changes}, PATH)
    except DataError:
        return
    assert manifest.parameters > 0
    assert min(manifest.imgsz_hw) > 0


def test_the_metadata_survives_onnx(tiny_onnx: Callable[..., Path]) -> None:
    with open_detector(tiny_onnx(imgsz_hw=(64, 96))) as detector:
        assert detector.metadata.model == "tiny"
        assert detector.metadata.imgsz_hw == (64, 96)
        assert detector.metadata.data == "nothing"
