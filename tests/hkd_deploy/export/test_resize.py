"""The graph's letterbox is the host's, to one grey level; padding adds grey and nothing else."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hkd_deploy.backends.openvino import create_core
from hkd_deploy.export.graph import LetterboxModule, compute_content_hw, pad_to_stride, scale_boxes_to_source
from hkd_det.letterbox import Letterbox

INPUT_HW = (64, 96)
SIZES = [(64, 96), (128, 192), (50, 70), (333, 517), (480, 97), (1, 300), (300, 1), (3, 5)]


def noise(height: int, width: int) -> np.ndarray:
    chance = np.random.default_rng(height * 1000 + width)
    return chance.integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_alike(found: np.ndarray, wanted: np.ndarray) -> None:
    """[3, h, w] float and (h, w, 3) uint8: within a level, and whole levels."""
    levels = found.transpose(1, 2, 0)
    np.testing.assert_array_equal(levels, levels.round())
    np.testing.assert_allclose(levels, wanted.astype(np.float32), atol=1)
    # cv2 rounds a half up where it halves a side, the graph to even: a bias there is, but a small one.
    assert abs(float(levels.mean()) - float(wanted.mean())) < 0.2


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(1, 200))
def test_any_size_as_opencv_does_it(height: int, width: int) -> None:
    picture, letterbox = noise(height, width), Letterbox((height, width), INPUT_HW)
    inputs, source_hw, inside_hw = LetterboxModule(INPUT_HW)(torch.from_numpy(picture)[None].float())
    assert tuple(source_hw.int().tolist()) == (height, width)
    assert tuple(inside_hw.int().tolist()) == letterbox.content_hw
    assert_alike(inputs[0].numpy(), letterbox.apply(picture))


def test_the_sizes_that_cameras_have_are_scaled_as_on_the_host() -> None:
    for source_hw in ((1080, 1920), (720, 1280), (480, 640), (576, 704), (1024, 1280), (1079, 1917)):
        for input_hw in ((512, 640), (640, 640), (224, 160), (480, 864)):
            found = compute_content_hw(torch.tensor(source_hw).float(), input_hw)
            assert tuple(found.int().tolist()) == Letterbox(source_hw, input_hw).content_hw


def test_boxes_come_back_as_on_the_host() -> None:
    boxes = np.random.default_rng(0).uniform(-20, 120, (50, 4)).astype(np.float32)
    for source_hw in SIZES:
        letterbox = Letterbox(source_hw, INPUT_HW)
        found = scale_boxes_to_source(
            torch.from_numpy(boxes)[None], *(torch.tensor(s) * 1.0 for s in (source_hw, letterbox.content_hw))
        )
        np.testing.assert_allclose(found[0].numpy(), letterbox.boxes_to_source(boxes), rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def letterbox_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    class Alone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.letterbox = LetterboxModule(INPUT_HW)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.letterbox(images.float())  # type: ignore[no-any-return]

    path = tmp_path_factory.mktemp("letterbox") / "letterbox.onnx"
    torch.onnx.export(
        Alone(), (torch.zeros(1, *INPUT_HW, 3, dtype=torch.uint8),), str(path), input_names=["images"],
        dynamic_axes={"images": {0: "batch", 1: "height", 2: "width"}}, opset_version=17, dynamo=False,
    )  # fmt: skip
    return path


@pytest.mark.filterwarnings("ignore")
def test_one_file_for_all_sizes_in_every_runtime(letterbox_onnx: Path) -> None:
    session = onnxruntime.InferenceSession(letterbox_onnx, providers=["CPUExecutionProvider"])
    compiled = create_core().compile_model(str(letterbox_onnx), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for source_hw in SIZES:
        pictures = np.stack([noise(*source_hw), 255 - noise(*source_hw)])
        wanted = [Letterbox(source_hw, INPUT_HW).apply(picture) for picture in pictures]
        for inputs in (session.run(None, {"images": pictures})[0], compiled({"images": pictures})[0]):
            for one, other in zip(inputs, wanted, strict=True):
                assert_alike(one, other)


@pytest.mark.parametrize(("size_hw", "wanted_hw"), [((64, 64), (64, 64)), ((65, 70), (96, 96)), ((20, 130), (64, 160))])
def test_padding(size_hw: tuple[int, int], wanted_hw: tuple[int, int]) -> None:
    pictures = torch.rand(2, 3, *size_hw) * 255
    found = pad_to_stride(pictures, (64, 96) if size_hw[1] > 64 else (64, 64))
    assert found.shape == (2, 3, *wanted_hw)
    assert torch.equal(found[:, :, : size_hw[0], : size_hw[1]], pictures)
    assert (found[:, :, size_hw[0] :] == 114).all() and (found[:, :, :, size_hw[1] :] == 114).all()
