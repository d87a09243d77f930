"""One block: what it reports against what the assembled network does, and that it comes out the same anyhow."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hkd_det.distill.blockwise.activations import (
    count_input_bytes,
    input_cache_path,
    record_inputs,
    select_cached_layers,
    write_inputs,
)
from hkd_det.distill.blockwise.blocks import ReplaceableConv, assemble, find_replaceable_convs
from hkd_det.distill.blockwise.config import BlockwiseConfig
from hkd_det.distill.blockwise.worker import HOLDOUT_STEP, BlockTask, read_block, train_block
from hkd_det.errors import DataError
from hkd_det.models.base import BaseDetector
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec

NewTask = Callable[..., BlockTask]


@pytest.fixture
def layers(teacher: BaseDetector) -> list[ReplaceableConv]:
    return find_replaceable_convs(teacher, (64, 96), ("backbone",), 8)


@pytest.fixture
def new_task(teacher: BaseDetector, layers: list[ReplaceableConv], views: Path, tmp_path: Path) -> NewTask:
    def make(index: int = 4, block: str = "block.pt", **changes: object) -> BlockTask:
        layer, settings = layers[index], BlockwiseConfig(epochs=4, batch=8, lr=1e-2)
        task = BlockTask(
            layer.name, layer.norm, lambda: deepcopy(teacher), views, None, (), tmp_path / block, settings, 5, "cpu"
        )
        return replace(task, **changes)  # type: ignore[arg-type]

    return make


def outputs(network: nn.Module, name: str, pictures: Tensor) -> Tensor:
    """What a normalisation gives before its activation, seen in the whole network."""
    seen = []
    norm = dict(network.named_modules())[name]
    # timm's normalisations end in their activation: what they are given, and their own values, tell what came before.
    handle = norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(pictures)
    handle.remove()
    values = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return nn.functional.batch_norm(seen[0], *values, eps=norm.eps).detach()  # type: ignore[arg-type]


def held_out(views: Path) -> Tensor:
    return torch.from_numpy(np.load(views)[::HOLDOUT_STEP])


def weights_of(path: Path) -> dict[str, Tensor]:
    return read_block(path)[0]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_error_told_is_that_of_the_assembled_network(teacher: BaseDetector, new_task: NewTask, views: Path) -> None:
    task = new_task(settings=BlockwiseConfig(epochs=20, batch=8, lr=1e-2))
    learnt = train_block(task)
    network = assemble(teacher, {task.layer: weights_of(task.output_path)})
    target, got = (outputs(n, task.norm, held_out(views)).double() for n in (teacher, network))
    assert learnt.error == pytest.approx(float((got - target).square().mean()), rel=0.02)  # inputs are float16 there
    variance = target.transpose(0, 1).flatten(1).var(1, correction=0).mean()
    assert learnt.variance == pytest.approx(float(variance), rel=0.02)
    assert learnt.error < 0.6 * learnt.initial_error and learnt.num_steps == 20 * 3  # 21 views in batches of 8


def test_nothing_but_the_block_and_its_normalisation_differs_from_the_teacher(
    teacher: BaseDetector, new_task: NewTask
) -> None:
    task = new_task()
    train_block(task)
    network = assemble(teacher, {task.layer: weights_of(task.output_path)})
    mine, hers = network.state_dict(), teacher.state_dict()
    changed = {name for name, value in mine.items() if name not in hers or not torch.equal(value, hers[name])}
    assert all(name.startswith((f"{task.layer}.", f"{task.norm}.")) for name in changed)
    assert {f"{task.layer}.depthwise1.weight", f"{task.norm}.running_mean"} <= changed
    assert network.changes.separable == (task.layer,) and not network.training


def test_under_students_inputs_a_block_mends_what_those_before_it_did(
    teacher: BaseDetector, new_task: NewTask, views: Path
) -> None:
    first = new_task(3, "first.pt")
    train_block(first)
    second = new_task(4, "second.pt", before=(first.output_path,))
    learnt = train_block(second)
    blocks = {first.layer: weights_of(first.output_path), second.layer: weights_of(second.output_path)}
    target = outputs(teacher, second.norm, held_out(views)).double()
    error = (outputs(assemble(teacher, blocks), second.norm, held_out(views)).double() - target).square().mean()
    assert learnt.error == pytest.approx(float(error), rel=0.02)
    alone = new_task(4, "alone.pt")
    train_block(alone)
    shifted = assemble(teacher, {**blocks, second.layer: weights_of(alone.output_path)})
    assert error < (outputs(shifted, second.norm, held_out(views)).double() - target).square().mean()


@pytest.mark.parametrize("index", [0, 8])
def test_cached_or_computed_at_any_time_the_block_is_the_same(
    teacher: BaseDetector, layers: list[ReplaceableConv], new_task: NewTask, views: Path, tmp_path: Path, index: int
) -> None:
    write_inputs(teacher, layers, np.load(views), tmp_path / "inputs", batch=5)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    computed, cached = new_task(index, "a.pt"), new_task(index, "b.pt")
    cached = replace(cached, cached=input_cache_path(tmp_path / "inputs", cached.layer))
    threads = torch.get_num_threads()
    train_block(computed)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    torch.rand(7)  # another place in the stream of chance, and another number of threads
    torch.set_num_threads(2)
    try:
        train_block(cached)
    finally:
        torch.set_num_threads(threads)
    assert same(weights_of(computed.output_path), weights_of(cached.output_path))
    other = new_task(index, "c.pt", seed=6)
    train_block(other)
    assert not same(weights_of(computed.output_path), weights_of(other.output_path))


def test_a_pictures_activations_do_not_depend_on_its_batch() -> None:
    """In networks as wide as this one the last bits do, where a batch goes through at once."""
    torch.manual_seed(0)
    detector = HKDDetector(HKDDetectorSpec("resnet50", channels=16)).eval()
    names = ["backbone.body.layer1.1.conv2", "backbone.body.layer4.2.conv2"]
    views = torch.randint(0, 256, (16, 3, 64, 96), dtype=torch.uint8)
    together, order = record_inputs(detector, names, views), [3, 0, 14]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        mixed = record_inputs(detector, names, views[order])
    finally:
        torch.set_num_threads(threads)
    for name in names:
        assert torch.equal(together[name][order], mixed[name])
        assert torch.equal(together[name][2:3], record_inputs(detector, [name], views[2:3])[name])


def test_the_cache_holds_what_enters_and_no_more_than_its_room(
    teacher: BaseDetector, layers: list[ReplaceableConv], views: Path, tmp_path: Path
) -> None:
    pictures = np.load(views)
    room = sum(sorted(count_input_bytes(layer, len(pictures)) for layer in layers)[:5])
    kept = select_cached_layers(layers, len(pictures), room)
    assert len(kept) == 5 and len(select_cached_layers(layers, len(pictures), room - 1)) == 4
    write_inputs(teacher, kept, pictures, tmp_path, batch=7)
    files = sorted(tmp_path.glob("backbone*.npy"))
    assert len(files) == 5 and sum(np.load(file).nbytes for file in files) == room
    seen = []
    layer = kept[0].name
    handle = dict(teacher.named_modules())[layer].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        teacher(torch.from_numpy(pictures))
    handle.remove()
    np.testing.assert_allclose(np.load(input_cache_path(tmp_path, layer)), seen[0].numpy(), rtol=1e-3, atol=1e-3)


def test_a_finished_block_is_not_learnt_again(new_task: NewTask) -> None:
    def never() -> BaseDetector:
        raise AssertionError

    first = train_block(new_task())
    assert train_block(new_task(open_teacher=never)) == first


def test_a_broken_block_is_told(new_task: NewTask) -> None:
    task = new_task()
    task.output_path.write_bytes(b"half")
    with pytest.raises(DataError, match=r"block\.pt: not a readable block"):
        train_block(task)


def test_a_loss_that_explodes_is_told(new_task: NewTask) -> None:
    with pytest.raises(DataError, match=r"the loss is (nan|inf); lower distill\.blockwise\.lr"):
        train_block(new_task(settings=BlockwiseConfig(epochs=9, batch=8, lr=1e30)))


def test_activations_that_float16_cannot_hold_are_told(teacher: BaseDetector, new_task: NewTask) -> None:
    norm = dict(teacher.named_modules())["backbone.body.layer1.0.bn1"]
    norm.weight.fill_(1e6)  # type: ignore[union-attr, operator]
    task = new_task(2)
    assert task.layer == "backbone.body.layer1.0.conv2"
    with pytest.raises(DataError, match=r"before backbone\.body\.layer1\.0\.conv2 are beyond float16"):
        train_block(task)
