"""Tests of the Triton model repository, parsed with Triton's protobuf."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf import text_format

from hkd_deploy.export.cli import main
from hkd_deploy.serving.writers import compute_preferred_batch_sizes


def read_config(triton_proto: ModuleType, path: Path) -> Any:
    """Parse strictly: an unknown field or value is an error."""
    return text_format.Parse(path.read_text(), triton_proto.ModelConfig())


@pytest.mark.slow
def test_write_triton_repository_free_batch(tiny_onnx: Callable[..., Path], triton_proto: ModuleType) -> None:
    model = tiny_onnx("student.onnx")
    assert main([str(model), "--serving", "triton", "--max-batch", "6"]) == 0
    folder = model.parent / "triton" / "student"
    assert (folder / "1" / "model.onnx").read_bytes() == model.read_bytes()
    config = read_config(triton_proto, folder / "config.pbtxt")
    assert (config.name, config.platform, config.max_batch_size) == ("student", "onnxruntime_onnx", 6)
    (images,) = config.input
    assert (images.name, images.data_type, list(images.dims)) == ("images", triton_proto.TYPE_UINT8, [96, 160, 3])
    boxes, scores, count = config.output
    assert (boxes.name, boxes.data_type, list(boxes.dims)) == ("boxes", triton_proto.TYPE_FP32, [2, 4])
    assert (scores.name, scores.data_type, list(scores.dims)) == ("scores", triton_proto.TYPE_FP32, [2])
    # One value per image: section "Reshape" of the Triton documentation.
    assert (count.name, count.data_type, list(count.dims)) == ("count", triton_proto.TYPE_INT64, [1])
    assert count.HasField("reshape") and list(count.reshape.shape) == [] and not scores.HasField("reshape")
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 4, 6]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    (group,) = config.instance_group
    assert (group.kind, group.count) == (triton_proto.ModelInstanceGroup.KIND_CPU, 1)
    (warmup,) = config.model_warmup
    black_image = warmup.inputs["images"]
    assert (list(black_image.dims), black_image.data_type, black_image.zero_data) == (
        [96, 160, 3],
        triton_proto.TYPE_UINT8,
        True,
    )


@pytest.mark.slow
def test_write_triton_repository_fixed_batch(tiny_onnx: Callable[..., Path], triton_proto: ModuleType) -> None:
    """Batching in Triton requires a free first dimension. A fixed one is part of the shape, with max_batch_size 0."""
    model = tiny_onnx("student.onnx", batch=2)
    assert main([str(model), "--serving", "triton", "--serving-device", "gpu"]) == 0
    config = read_config(triton_proto, model.parent / "triton" / "student" / "config.pbtxt")
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert [list(value.dims) for value in (*config.input, *config.output)] == [[2, 96, 160, 3], [2, 2, 4], [2, 2], [2]]
    assert config.instance_group[0].kind == triton_proto.ModelInstanceGroup.KIND_GPU
    (warmup,) = config.model_warmup
    assert warmup.batch_size == 1 and list(warmup.inputs["images"].dims) == [2, 96, 160, 3]


@pytest.mark.slow
def test_write_triton_repository_escapes_name(tiny_onnx: Callable[..., Path], triton_proto: ModuleType) -> None:
    model = tiny_onnx('day "2" \\ ü.onnx')
    assert main([str(model), "--serving", "triton"]) == 0
    path = model.parent / "triton" / model.stem / "config.pbtxt"
    assert text_format.Parse(path.read_text(encoding="utf-8"), triton_proto.ModelConfig()).name == model.stem


@pytest.mark.slow
def test_write_triton_repository_free_size(tiny_onnx: Callable[..., Path], triton_proto: ModuleType) -> None:
    """The warmup image has the size of the network input."""
    model = tiny_onnx("student.onnx", free_size=True, changes={"hkd.dynamic": "true"})
    assert main([str(model), "--serving", "triton", "--max-batch", "1"]) == 0
    config = read_config(triton_proto, model.parent / "triton" / "student" / "config.pbtxt")
    assert list(config.input[0].dims) == [-1, -1, 3] and config.max_batch_size == 1
    assert list(config.model_warmup[0].inputs["images"].dims) == [96, 160, 3]
    assert not config.HasField("dynamic_batching")


@pytest.mark.slow
def test_write_triton_repository_engine(
    engine: Callable[..., Path], triton_proto: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data types and free dimensions come from the JSON file, the largest batch from the profile."""
    model = engine()
    assert main([str(model), "--serving", "triton"]) == 0
    folder = model.parent / "triton" / "student"
    assert (folder / "1" / "model.plan").read_bytes() == model.read_bytes()
    config = read_config(triton_proto, folder / "config.pbtxt")
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 4)
    assert [(value.name, value.data_type, list(value.dims)) for value in (*config.input, *config.output)] == [
        ("images", triton_proto.TYPE_UINT8, [96, 160, 3]),
        ("boxes", triton_proto.TYPE_FP32, [2, 4]),
        ("scores", triton_proto.TYPE_FP32, [2]),
        ("count", triton_proto.TYPE_INT64, [1]),
    ]
    assert config.instance_group[0].kind == triton_proto.ModelInstanceGroup.KIND_GPU
    assert config.optimization.cuda.graphs
    capsys.readouterr()
    for flags, message in (
        (["--max-batch", "5"], "--max-batch 5: "),
        (["--serving-device", "cpu"], "runs on a GPU only"),
    ):
        assert main([str(model), "--serving", "triton", *flags]) == 2
        assert message in capsys.readouterr().err
    model.write_bytes(b"a pl")
    assert main([str(model), "--serving", "triton"]) == 1
    assert "truncated or changed" in capsys.readouterr().err


def test_write_triton_repository_several_models(tiny_onnx: Callable[..., Path]) -> None:
    first, second = tiny_onnx("first.onnx"), tiny_onnx("second.onnx")
    folder = first.parent / "models"
    for model in (first, second, first):
        assert main([str(model), "--serving", "triton", "--serving-dir", str(folder)]) == 0
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written == {
        f"triton/{name}/{part}" for name in ("first", "second") for part in ("config.pbtxt", "1/model.onnx")
    }


def test_compute_preferred_batch_sizes() -> None:
    assert [compute_preferred_batch_sizes(max_batch) for max_batch in (2, 3, 4, 8, 12)] == [
        [2],
        [2, 3],
        [2, 4],
        [2, 4, 8],
        [2, 4, 8, 12],
    ]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--serving", "tritton"], 2, "--serving tritton: expected triton or deepstream"),
        (["--serving", "triton,"], 2, "expected triton or deepstream"),
        (["--serving", "triton", "--max-batch", "0"], 2, "--max-batch: expected at least 1, got 0."),
    ],
)
def test_serving_invalid_flag_prints_one_line(
    tiny_onnx: Callable[..., Path], capsys: pytest.CaptureFixture[str], flags: list[str], code: int, message: str
) -> None:
    model = tiny_onnx()
    assert main([str(model), *flags]) == code
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert list(model.parent.iterdir()) == [model]


def test_serving_invalid_model_prints_one_line(
    tiny_onnx: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not onnx")
    foreign = tmp_path / "student.onnx"
    shutil.copyfile(__file__, foreign)
    others = tiny_onnx("others.onnx", changes={"hkd.format": None})
    for path in (broken, foreign, others, tmp_path / "none.onnx"):
        assert main([str(path), "--serving", "triton"]) == 1
        error = capsys.readouterr().err.strip()
        assert str(path) in error and len(error.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"broken.onnx", "student.onnx", "others.onnx"}
