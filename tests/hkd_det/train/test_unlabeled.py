"""Unlabelled images: mixed in on top, silent to every task loss, the same in a resumed run."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from hkd_det.datasets import GroundTruth, Sample
from hkd_det.datasets.catalog import load_dataset
from hkd_det.datasets.image_files import read_unlabeled
from hkd_det.distill.dense import SoftLabelConfig
from hkd_det.distill.distiller import Distiller
from hkd_det.errors import DataError, UsageError
from hkd_det.models import zoo as sizes
from hkd_det.models.base import DenseOutputs, ProposalOutputs, Targets
from hkd_det.models.checkpoint import load_training_state
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec
from hkd_det.models.faster_rcnn import FasterRCNN, FasterRCNNSpec
from hkd_det.models.zoo import build_model
from hkd_det.ops.losses import clamp_min_one
from hkd_det.structures import unlabeled_ground_truth
from hkd_det.train.augment import AugmentedImage, augment
from hkd_det.train.baseline import make_baseline_config
from hkd_det.train.config import TrainConfig
from hkd_det.train.dataset import EpochPlan, build_dataloader, iterate_batches
from hkd_det.train.trainer import train

TINY = HKDDetectorSpec("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}, channels=16, head_depth=1)
TWO_STAGE = FasterRCNNSpec(
    "resnet18", width_mult=0.125, channels=8, head_width=16, anchor_sizes=(16, 32, 64, 128, 256)
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images of other sizes and forms, one below, and what is none."""
    rng = np.random.default_rng(0)
    (tmp_path / "own" / "more").mkdir(parents=True)
    for index, name in enumerate(["b.png", "a.jpg", "c.JPG", "more/d.png", "wide.png"]):
        hw = (40 + 20 * index, 150 - 20 * index)
        cv2.imwrite(str(tmp_path / "own" / name), rng.integers(0, 255, (*hw, 3)).astype(np.uint8))
    (tmp_path / "own" / "notes.txt").write_text("no image")
    return tmp_path / "own"


def config(data_yaml: Path, run: Path, folder: Path, teacher: str, **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "data": str(data_yaml), "model": "mini-student", "save_dir": str(run), "imgsz_hw": (64, 96), "epochs": 2,
        "batch": 4, "workers": 0, "device": "cpu", "no_aug_ratio": 0.0, "teacher": teacher, "unlabeled": (str(folder),),
        "distill": {"soft_labels": SoftLabelConfig()},
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]


def test_unlabeled_images_are_listed_in_order(folder: Path, tmp_path: Path) -> None:
    names = [sample.path.relative_to(folder).as_posix() for sample in read_unlabeled([folder])]
    assert names == ["a.jpg", "b.png", "c.JPG", "more/d.png", "wide.png"]
    assert len(read_unlabeled([folder, folder / "more"])) == 6
    with pytest.raises(DataError, match=r"--unlabeled .*nowhere: no such directory"):
        read_unlabeled([folder, tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"--unlabeled .*empty: expected images"):
        read_unlabeled([tmp_path / "empty"])


def make_augmented_image(size_hw: tuple[int, int], tiles: int, seed: int) -> AugmentedImage:
    """Return an augmented image or mosaic without annotations."""
    rng = np.random.default_rng(seed)
    hw = (int(rng.integers(20, 200)), int(rng.integers(20, 200)))
    ground_truth = unlabeled_ground_truth()
    source = AugmentedImage(
        np.full((*hw, 3), 200, np.uint8), ground_truth.boxes_xyxy, ground_truth.visible_xyxy, ground_truth.ignore
    )
    return augment([lambda _frame: source] * tiles, size_hw, rng)


@pytest.mark.parametrize("seed", range(20))
def test_ignore_region_covers_augmented_image(seed: int) -> None:
    """The ignore region includes the gray padding of a small image, mirrored or not."""
    augmented = make_augmented_image((64, 96), 1, seed)
    assert augmented.boxes_xyxy.tolist() == [[0, 0, 96, 64]] and augmented.ignore.tolist() == [True]
    covered = np.zeros((64, 96), bool)
    mosaic = make_augmented_image((64, 96), 4, seed)
    for x1, y1, x2, y2 in mosaic.boxes_xyxy.astype(int):
        covered[y1:y2, x1:x2] = True
    assert covered.all() and mosaic.ignore.all() and len(mosaic.ignore) == 4


@pytest.mark.parametrize("name", ["ours", "yolo26n", "faster-rcnn"])
def test_detection_losses_ignore_unlabeled_images(name: str) -> None:
    """The detection losses of a batch have no gradient at the outputs for its unlabeled image."""
    torch.manual_seed(0)
    detector = {"ours": lambda: HKDDetector(TINY), "faster-rcnn": lambda: FasterRCNN(TWO_STAGE)}.get(
        name, lambda: build_model(name)
    )()
    images = torch.randint(0, 255, (2, 3, 64, 96), dtype=torch.uint8)
    boxes = torch.tensor([[[10.0, 5.0, 34.0, 60.0]], [[0.0, 0.0, 96.0, 64.0]]])
    valid = torch.tensor([[True], [False]])
    distiller = Distiller(detector.eval())
    output = detector(images)
    if isinstance(output, DenseOutputs):
        tensors = [
            tensor
            for branch in (output.one2many, output.one2one)
            if branch
            for tensor in (branch.logits, branch.boxes_xyxy)
        ]
    else:
        assert isinstance(output, ProposalOutputs)
        tensors = [output.objectness, output.box_deltas, *output.features]
    for tensor in tensors:
        tensor.retain_grad()
    torch.stack(
        list(distiller.student.loss(output, Targets(boxes, valid, ~valid), clamp_min_one).values())
    ).sum().backward()
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    assert len(gradients) >= 3 and all(grad[0].any() for grad in gradients[:2])
    assert not any(grad[1].any() for grad in gradients)


def make_plan(**changes: object) -> EpochPlan:
    values = {"num_images": 10, "batch": 4, "size_hw": (64, 96), "multi_scale": 0.25, "mosaic": 0.5, "seed": 3}
    return EpochPlan(**{**values, **changes})  # type: ignore[arg-type]


def test_unlabeled_images_leave_labeled_ones_unchanged() -> None:
    labeled, mixed = make_plan(), make_plan(num_unlabeled=5, unlabeled_batch=2)
    for epoch in range(3):
        labeled_batches, mixed_batches = (list(plan.sample_batches(epoch, no_aug=False)) for plan in (labeled, mixed))
        assert [batch[:4] for batch in mixed_batches] == labeled_batches
        unlabeled = [spec for batch in mixed_batches for spec in batch[4:]]
        assert len(unlabeled) == 6 and {spec.indices for spec in unlabeled} == {(index,) for index in range(10, 15)}
        assert len({spec.seed for spec in unlabeled}) == 6
        assert all(len({spec.size_hw for spec in batch}) == 1 for batch in mixed_batches)
        last_batches = list(mixed.sample_batches(epoch, no_aug=True, no_unlabeled=True))
        assert last_batches == list(labeled.sample_batches(epoch, no_aug=True))
    first, second = ([spec.indices for batch in mixed.sample_batches(e, False) for spec in batch[4:]] for e in (0, 1))
    assert first != second


def test_exif_rotation_applies_to_all_images(tmp_path: Path) -> None:
    """The EXIF orientation rotates by 90 degrees, so the black left half becomes the upper half."""
    image = np.full((64, 64, 3), 255, np.uint8)
    image[:, :32] = 0
    _, jpeg = cv2.imencode(".jpg", image)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    raw = jpeg.tobytes()
    path = tmp_path / "rotated.jpg"
    path.write_bytes(raw[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + raw[2:])
    samples = [Sample(0, path), Sample(1, path, unlabeled_ground_truth())]
    loader, sampler = build_dataloader(
        samples, make_plan(num_images=1, batch=1, num_unlabeled=1, unlabeled_batch=1), 0, 1, 0, 1
    )
    for index in (0, 1):
        upright = loader.dataset.images.read(index, (64, 64)).image[..., 0]  # type: ignore[attr-defined]
        assert upright[:30].max() < 50 and upright[34:].min() > 200
    assert len(sampler) == 1


def test_unreadable_image_is_reported_by_name(folder: Path, data_yaml: Path) -> None:
    (folder / "a.jpg").write_bytes(b"nothing")
    samples, unlabeled = load_dataset(str(data_yaml), "train"), read_unlabeled([folder])
    plan = make_plan(num_images=len(samples), num_unlabeled=len(unlabeled), unlabeled_batch=4)
    loader, _ = build_dataloader([*samples, *unlabeled], plan, 0, 1, 0, 1)
    with pytest.raises(DataError, match=r"a\.jpg: not a readable image"):
        list(iterate_batches(loader))


@pytest.fixture
def teacher(data_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sizes.MODELS, "mini-student", TINY)
    return str(train(config(data_yaml, tmp_path / "t", tmp_path, "", epochs=1, unlabeled=(), distill={})).best)


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run(
    data_yaml: Path, tmp_path: Path, folder: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config(data_yaml, tmp_path / "whole", folder, teacher))
    assert {"soft_cls", "soft_box", "cls"} <= whole.history[0].losses.keys()

    def interrupt(*_args: object) -> float:
        raise KeyboardInterrupt

    interrupted = config(data_yaml, tmp_path / "cut", folder, teacher)
    with monkeypatch.context() as patch:
        from hkd_det.train import trainer as run

        original = run.Trainer._compute_lr
        patch.setattr(run.Trainer, "_compute_lr", lambda self, step: interrupt() if step == 4 else original(self, step))
        with pytest.raises(KeyboardInterrupt):
            train(interrupted)
    saved = TrainConfig.from_dict(load_training_state(tmp_path / "cut" / "last.pt")["config"])
    assert saved == interrupted
    train(saved, resume=True)
    whole_state, resumed_state = (
        load_training_state(tmp_path / name / "last.pt")["distiller"] for name in ("whole", "cut")
    )
    assert whole_state.keys() == resumed_state.keys()
    assert all(torch.equal(value, resumed_state[name]) for name, value in whole_state.items())


def test_invalid_unlabeled_settings_raise_usage_error(data_yaml: Path, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"--unlabeled.*--teacher"):
        config(data_yaml, tmp_path, folder, "", distill={})
    with pytest.raises(UsageError, match="--unlabeled"):
        config(data_yaml, tmp_path, folder, "best.pt", distill={"blockwise": {}})
    with pytest.raises(UsageError, match="unlabeled_ratio"):
        config(data_yaml, tmp_path, folder, "best.pt", unlabeled_ratio=0.0)
    distilled = config(data_yaml, tmp_path, folder, "best.pt", unlabeled_ratio=0.01)
    assert distilled.unlabeled_batch == 1
    baseline = make_baseline_config(distilled)
    assert baseline.unlabeled == () and baseline.unlabeled_batch == 0 and baseline.batch == distilled.batch


def test_annotation_check_reads_labeled_images_only(
    data_yaml: Path, tmp_path: Path, folder: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hkd_det.train import trainer as run

    empty_samples = [
        Sample(sample.image_id, sample.path, GroundTruth.empty()) for sample in load_dataset(str(data_yaml), "train")
    ]
    original = run.load_dataset
    monkeypatch.setattr(
        run, "load_dataset", lambda data, split: empty_samples if split == "train" else original(data, split)
    )
    with pytest.raises(DataError, match="the train split contains no person"):
        train(config(data_yaml, tmp_path / "empty", folder, teacher))
