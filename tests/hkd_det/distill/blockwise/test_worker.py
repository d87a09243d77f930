"""Training of one block: reported errors, determinism, the input cache and error messages."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hkd_det.distill.blockwise.blocks import ReplaceableConv, assemble, find_replaceable_convs, record_inputs
from hkd_det.distill.blockwise.stage import count_input_bytes, get_input_cache_path, select_cached_layers, write_inputs
from hkd_det.distill.blockwise.worker import HOLDOUT_STEP, BlockTask, BlockwiseConfig, read_block, train_block
from hkd_det.errors import DataError
from hkd_det.models.base import BaseDetector
from hkd_det.models.detector import HKDDetector, HKDDetectorSpec

MakeTask = Callable[..., BlockTask]


@pytest.fixture
def layers(teacher: BaseDetector) -> list[ReplaceableConv]:
    return find_replaceable_convs(teacher, (64, 96), ("backbone",), 8)


@pytest.fixture
def make_task(teacher: BaseDetector, layers: list[ReplaceableConv], images_path: Path, tmp_path: Path) -> MakeTask:
    def make(index: int = 4, file_name: str = "block.pt", **changes: object) -> BlockTask:
        layer, config = layers[index], BlockwiseConfig(epochs=4, batch=8, lr=1e-2)
        output_path = tmp_path / file_name
        task = BlockTask(layer, lambda: deepcopy(teacher), images_path, None, (), output_path, config, 5, "cpu")
        return replace(task, **changes)  # type: ignore[arg-type]  # fields of several types

    return make


def compute_norm_output(network: nn.Module, name: str, images: Tensor) -> Tensor:
    """Return the output of a batch normalization before its activation, in a forward pass of the whole network."""
    inputs = []
    norm = dict(network.named_modules())[name]
    # timm's normalizations include the activation. Their input and parameters give the value before it.
    handle = norm.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        network(images)
    handle.remove()
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return nn.functional.batch_norm(inputs[0], *statistics, eps=norm.eps).detach()  # type: ignore[arg-type]  # untyped


def load_holdout(images_path: Path) -> Tensor:
    return torch.from_numpy(np.load(images_path)[::HOLDOUT_STEP])


def read_weights(path: Path) -> dict[str, Tensor]:
    return read_block(path)[0]


def are_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_result_matches_the_assembled_network(teacher: BaseDetector, make_task: MakeTask, images_path: Path) -> None:
    task = make_task(config=BlockwiseConfig(epochs=20, batch=8, lr=1e-2))
    result = train_block(task)
    network = assemble(teacher, {task.layer.name: read_weights(task.output_path)})
    target, output = (
        compute_norm_output(model, task.layer.norms[0], load_holdout(images_path)).double()
        for model in (teacher, network)
    )
    expected_error = float((output - target).square().mean())
    assert result.error == pytest.approx(expected_error, rel=0.02)  # the task rounds its inputs to float16
    variance = target.transpose(0, 1).flatten(1).var(1, correction=0).mean()
    assert result.variance == pytest.approx(float(variance), rel=0.02)
    assert result.error < 0.6 * result.initial_error and result.num_steps == 20 * 3  # 21 images in batches of 8


def test_assembled_network_differs_only_in_block_and_norm(teacher: BaseDetector, make_task: MakeTask) -> None:
    task = make_task()
    train_block(task)
    network = assemble(teacher, {task.layer.name: read_weights(task.output_path)})
    state_dict, teacher_state_dict = network.state_dict(), teacher.state_dict()
    changed = {
        name
        for name, value in state_dict.items()
        if name not in teacher_state_dict or not torch.equal(value, teacher_state_dict[name])
    }
    assert all(name.startswith((f"{task.layer.name}.", f"{task.layer.norms[0]}.")) for name in changed)
    assert {f"{task.layer.name}.depthwise1.weight", f"{task.layer.norms[0]}.running_mean"} <= changed
    assert network.changes.separable == (task.layer.name,) and not network.training


@pytest.mark.slow
def test_student_inputs_correct_errors_of_preceding_blocks(
    teacher: BaseDetector, make_task: MakeTask, images_path: Path
) -> None:
    first = make_task(3, "first.pt")
    train_block(first)
    second = make_task(4, "second.pt", preceding_blocks=(first.output_path,))
    result = train_block(second)
    blocks = {first.layer.name: read_weights(first.output_path), second.layer.name: read_weights(second.output_path)}
    images = load_holdout(images_path)
    target = compute_norm_output(teacher, second.layer.norms[0], images).double()
    error = (
        (compute_norm_output(assemble(teacher, blocks), second.layer.norms[0], images).double() - target)
        .square()
        .mean()
    )
    assert result.error == pytest.approx(float(error), rel=0.02)
    independent = make_task(4, "independent.pt")
    train_block(independent)
    network = assemble(teacher, {**blocks, second.layer.name: read_weights(independent.output_path)})
    assert error < (compute_norm_output(network, second.layer.norms[0], images).double() - target).square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 8])
def test_block_is_identical_with_cached_and_computed_inputs(
    teacher: BaseDetector,
    layers: list[ReplaceableConv],
    make_task: MakeTask,
    images_path: Path,
    tmp_path: Path,
    index: int,
) -> None:
    write_inputs(teacher, layers, np.load(images_path), tmp_path / "inputs", batch=5)
    torch.manual_seed(99)
    rng_state = torch.get_rng_state()
    computed, cached = make_task(index, "a.pt"), make_task(index, "b.pt")
    cached = replace(cached, input_cache=get_input_cache_path(tmp_path / "inputs", cached.layer.name))
    num_threads = torch.get_num_threads()
    train_block(computed)
    assert torch.equal(torch.get_rng_state(), rng_state) and torch.get_num_threads() == num_threads
    torch.rand(7)  # another state of the generator and another number of threads
    torch.set_num_threads(2)
    try:
        train_block(cached)
    finally:
        torch.set_num_threads(num_threads)
    assert are_equal(read_weights(computed.output_path), read_weights(cached.output_path))
    other_seed = make_task(index, "c.pt", seed=6)
    train_block(other_seed)
    assert not are_equal(read_weights(computed.output_path), read_weights(other_seed.output_path))


@pytest.mark.slow
def test_recorded_inputs_do_not_depend_on_the_batch() -> None:
    """In a network of this width the last bits would differ if a batch was processed at once."""
    torch.manual_seed(0)
    detector = HKDDetector(HKDDetectorSpec("resnet50", channels=16)).eval()
    names = ["backbone.body.layer1.1.conv2", "backbone.body.layer4.2.conv2"]
    images = torch.randint(0, 256, (16, 3, 64, 96), dtype=torch.uint8)
    layers = [layer for layer in find_replaceable_convs(detector, (64, 96), ("backbone",), 1) if layer.name in names]
    all_inputs, order = record_inputs(detector, layers, images), [3, 0, 14]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        reordered = record_inputs(detector, layers, images[order])
    finally:
        torch.set_num_threads(num_threads)
    for layer in layers:
        assert torch.equal(all_inputs[layer.name][order], reordered[layer.name])
        assert torch.equal(all_inputs[layer.name][2:3], record_inputs(detector, [layer], images[2:3])[layer.name])


def test_input_cache_stays_within_its_capacity(
    teacher: BaseDetector, layers: list[ReplaceableConv], images_path: Path, tmp_path: Path
) -> None:
    images = np.load(images_path)
    capacity_bytes = sum(sorted(count_input_bytes(layer, len(images)) for layer in layers)[:5])
    selected = select_cached_layers(layers, len(images), capacity_bytes)
    assert len(selected) == 5 and len(select_cached_layers(layers, len(images), capacity_bytes - 1)) == 4
    write_inputs(teacher, selected, images, tmp_path, batch=7)
    files = sorted(tmp_path.glob("backbone*.npy"))
    assert len(files) == 5 and sum(np.load(file).nbytes for file in files) == capacity_bytes
    inputs = []
    layer = selected[0].name
    module = dict(teacher.named_modules())[layer]
    handle = module.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        teacher(torch.from_numpy(images))
    handle.remove()
    cached = np.load(get_input_cache_path(tmp_path, layer))
    np.testing.assert_allclose(cached, inputs[0].flatten(2).numpy(), rtol=1e-3, atol=1e-3)


def test_finished_block_is_not_trained_again(make_task: MakeTask) -> None:
    def raise_error() -> BaseDetector:
        raise AssertionError

    first = train_block(make_task())
    assert train_block(make_task(load_teacher=raise_error)) == first


def test_unreadable_block_raises_data_error(make_task: MakeTask) -> None:
    task = make_task()
    task.output_path.write_bytes(b"half")
    with pytest.raises(DataError, match=r"block\.pt: not a readable block"):
        train_block(task)


def test_infinite_loss_raises_data_error(make_task: MakeTask) -> None:
    with pytest.raises(DataError, match=r"the loss is (nan|inf)\. Lower distill\.blockwise\.lr"):
        train_block(make_task(config=BlockwiseConfig(epochs=9, batch=8, lr=1e30)))


def test_activations_beyond_float16_raise_data_error(teacher: BaseDetector, make_task: MakeTask) -> None:
    norm = dict(teacher.named_modules())["backbone.body.layer1.0.bn1"]
    norm.weight.fill_(1e6)  # type: ignore[union-attr, operator]  # nn.Module attributes are untyped
    task = make_task(2)
    assert task.layer.name == "backbone.body.layer1.0.conv2"
    with pytest.raises(DataError, match=r"layer1\.0\.conv2: .* outside the range of float16"):
        train_block(task)
