"""In-graph letterbox and padding: agreement with the host letterbox within one gray level."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_deploy.export.graph import LetterboxModule, compute_content_hw, pad_to_stride, scale_boxes_to_source
from hkd_det.letterbox import Letterbox
from hkd_det.onnxrt.openvino import create_core

INPUT_HW = (64, 96)
SIZES = [(64, 96), (128, 192), (50, 70), (333, 517), (480, 97), (1, 300), (300, 1), (3, 5)]


def make_noise(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_within_one_level(actual: np.ndarray, expected: np.ndarray) -> None:
    """Compare float [3, h, w] of integer values with uint8 (h, w, 3)."""
    levels = actual.transpose(1, 2, 0)
    np.testing.assert_array_equal(levels, levels.round())
    np.testing.assert_allclose(levels, expected.astype(np.float32), atol=1)
    # cv2 rounds half up when it halves a side; the graph rounds half to even. The bias is small.
    assert abs(float(levels.mean()) - float(expected.mean())) < 0.2


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(1, 200))
def test_letterbox_module_matches_host_letterbox(height: int, width: int) -> None:
    image, letterbox = make_noise(height, width), Letterbox((height, width), INPUT_HW)
    inputs, source_hw, content_hw = LetterboxModule(INPUT_HW)(torch.from_numpy(image)[None].float())
    assert tuple(source_hw.int().tolist()) == (height, width)
    assert tuple(content_hw.int().tolist()) == letterbox.content_hw
    assert_within_one_level(inputs[0].numpy(), letterbox.apply(image))


def test_compute_content_hw_matches_host_for_camera_sizes() -> None:
    for source_hw in ((1080, 1920), (720, 1280), (480, 640), (576, 704), (1024, 1280), (1079, 1917)):
        for input_hw in ((512, 640), (640, 640), (224, 160), (480, 864)):
            content_hw = compute_content_hw(torch.tensor(source_hw).float(), input_hw)
            assert tuple(content_hw.int().tolist()) == Letterbox(source_hw, input_hw).content_hw


def test_scale_boxes_to_source_matches_host() -> None:
    boxes = np.random.default_rng(0).uniform(-20, 120, (50, 4)).astype(np.float32)
    for source_hw in SIZES:
        letterbox = Letterbox(source_hw, INPUT_HW)
        scaled = scale_boxes_to_source(
            torch.from_numpy(boxes)[None], *(torch.tensor(s) * 1.0 for s in (source_hw, letterbox.content_hw))
        )
        np.testing.assert_allclose(scaled[0].numpy(), letterbox.boxes_to_source(boxes), rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def letterbox_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    class LetterboxGraph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.letterbox = LetterboxModule(INPUT_HW)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.letterbox(images.float())  # type: ignore[no-any-return]

    path = tmp_path_factory.mktemp("letterbox") / "letterbox.onnx"
    torch.onnx.export(
        LetterboxGraph(), (torch.zeros(1, *INPUT_HW, 3, dtype=torch.uint8),), str(path), input_names=["images"],
        dynamic_axes={"images": {0: "batch", 1: "height", 2: "width"}}, opset_version=17, dynamo=False,
    )  # fmt: skip
    return path


@pytest.mark.filterwarnings("ignore")
def test_letterbox_graph_accepts_any_size_in_every_runtime(letterbox_onnx: Path) -> None:
    session = onnxruntime.InferenceSession(letterbox_onnx, providers=["CPUExecutionProvider"])
    compiled = create_core().compile_model(str(letterbox_onnx), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for source_hw in SIZES:
        images = np.stack([make_noise(*source_hw), 255 - make_noise(*source_hw)])
        expected = [Letterbox(source_hw, INPUT_HW).apply(image) for image in images]
        for inputs in (session.run(None, {"images": images})[0], compiled({"images": images})[0]):
            for pair in zip(inputs, expected, strict=True):
                assert_within_one_level(*pair)


@pytest.mark.parametrize(
    ("size_hw", "expected_hw"), [((64, 64), (64, 64)), ((65, 70), (96, 96)), ((20, 130), (64, 160))]
)
def test_pad_to_stride_adds_gray(size_hw: tuple[int, int], expected_hw: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size_hw) * 255
    padded = pad_to_stride(images, (64, 96) if size_hw[1] > 64 else (64, 64))
    assert padded.shape == (2, 3, *expected_hw)
    assert torch.equal(padded[:, :, : size_hw[0], : size_hw[1]], images)
    assert (padded[:, :, size_hw[0] :] == 114).all() and (padded[:, :, :, size_hw[1] :] == 114).all()
