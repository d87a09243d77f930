"""The block stage of a run: training of all blocks in a directory, with resume.

The inputs of the convolutions are cached in files as far as they fit. Otherwise they are computed on each use.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hkd_det.console import Progress, log_line
from hkd_det.distill.blockwise.blocks import ReplaceableConv, StateDict, record_inputs
from hkd_det.distill.blockwise.executor import ExecutorConfig, RunStats, check_dask_installed, run_tasks
from hkd_det.distill.blockwise.worker import BlockResult, BlockTask, BlockwiseConfig, read_block, train_block
from hkd_det.errors import DataError
from hkd_det.files import atomic_write, write_text
from hkd_det.models.base import BaseDetector

WriteImages = Callable[[Path], None]

# Settings that change the blocks. With other values the stage starts again.
BLOCK_SETTINGS = ("num_images", "epochs", "batch", "lr", "input_source")


@dataclass(frozen=True)
class BlockwiseStage:
    """Directory and inputs of the block stage.

    Attributes:
        folder: Contains `plan.json`, `blocks/`, `run_stats.json` and, during the training, images and activations.
        load_teacher: Returns the teacher in any process.
        write_images: Writes the training images, uint8 [N, 3, H, W], to a .npy file.
        config: Settings of the method.
        fingerprint: JSON values that determine the blocks in addition to the settings: teacher, data, size, seed.
        seed: Seed of the run.
        device: Device of the workers, see `BlockTask`.
    """

    folder: Path
    load_teacher: Callable[[], BaseDetector]
    write_images: WriteImages
    config: BlockwiseConfig
    fingerprint: dict[str, Any]
    seed: int
    device: str


@dataclass(frozen=True)
class StageResult:
    """Results of the block stage.

    Attributes:
        block_results: Results of the blocks, in the order of the forward pass.
        run_stats: Timing of the stage; None if it was interrupted and resumed.
    """

    block_results: list[BlockResult]
    run_stats: RunStats | None


def train_blocks(stage: BlockwiseStage, teacher: BaseDetector, layers: Sequence[ReplaceableConv]) -> StageResult:
    """Train the blocks that do not exist yet.

    Args:
        stage: Directory and inputs.
        teacher: The teacher on the device of the run.
        layers: Convolutions to replace, in the order of the forward pass.

    Returns:
        The results of all blocks.

    Raises:
        DataError: `timing_report` does not contain the times of these blocks.
        UnavailableError: Dask is needed but not installed.
        BlockError: A block could not be trained.
    """
    _resume_or_clear(stage, layers)
    stats_path = stage.folder / "run_stats.json"
    missing = [layer for layer in layers if not _get_block_path(stage, layer.name).exists()]
    if missing:
        check_dask_installed(_make_executor_config(stage.config))
        measured_times = _read_measured_times(stage.config, missing)
        tasks = _prepare_tasks(stage, teacher, layers, missing)
        stats = _run_block_tasks(stage, tasks, measured_times or _estimate_work(tasks, missing))
        if len(missing) == len(layers):
            write_text(stats_path, json.dumps(asdict(stats)) + "\n")
    for temporary in ("inputs", "images.npy"):
        _remove(stage.folder / temporary)
    results = [read_block(_get_block_path(stage, layer.name))[1] for layer in layers]
    run_stats = RunStats(**json.loads(stats_path.read_text(encoding="utf-8"))) if stats_path.exists() else None
    return StageResult(results, run_stats)


def read_blocks(folder: Path, layers: Sequence[ReplaceableConv]) -> dict[str, StateDict]:
    """Read the weights of trained blocks.

    Args:
        folder: Directory of the stage.
        layers: The replaced convolutions.

    Returns:
        State dicts by layer.
    """
    return {layer.name: read_block(folder / "blocks" / f"{layer.name}.pt")[0] for layer in layers}


def select_cached_layers(
    layers: Sequence[ReplaceableConv], num_images: int, capacity_bytes: int
) -> list[ReplaceableConv]:
    """Select the layers whose inputs are cached: the smallest first. Those are mostly the deepest layers.

    Args:
        layers: Candidates.
        num_images: Number of images.
        capacity_bytes: Size limit of the cache.

    Returns:
        The selected layers, smallest inputs first.
    """
    selected, free_bytes = [], capacity_bytes
    for layer in sorted(layers, key=lambda layer: (count_input_bytes(layer, num_images), layer.name)):
        free_bytes -= count_input_bytes(layer, num_images)
        if free_bytes < 0:
            break
        selected.append(layer)
    return selected


def count_input_bytes(layer: ReplaceableConv, num_images: int) -> int:
    """Return the size of a layer's inputs in float16, bytes.

    Args:
        layer: The layer.
        num_images: Number of images.
    """
    channels, positions = layer.cache_shape
    return 2 * num_images * channels * positions


def write_inputs(
    teacher: nn.Module, layers: Sequence[ReplaceableConv], images: NDArray[np.uint8], folder: Path, batch: int
) -> None:
    """Run the teacher once over all images and write the inputs of layers to files. Existing files are kept.

    Args:
        teacher: The teacher, in evaluation mode.
        layers: Layers to record.
        images: uint8 [N, 3, H, W].
        folder: Directory of the files, see `get_input_cache_path`; each contains float16 [N, C, P] with the
            positions P of all calls.
        batch: Images that are loaded at once.
    """
    missing = [layer for layer in layers if not get_input_cache_path(folder, layer.name).exists()]
    if not missing:
        return
    device = next(teacher.parameters()).device
    with ExitStack() as stack:
        shapes = {layer.name: (len(images), *layer.cache_shape) for layer in missing}
        arrays = {
            name: stack.enter_context(create_npy(get_input_cache_path(folder, name), shape, np.float16))
            for name, shape in shapes.items()
        }
        for start in range(0, len(images), batch):
            image_batch = torch.from_numpy(np.array(images[start : start + batch])).to(device)
            for name, values in record_inputs(teacher, missing, image_batch).items():
                arrays[name][start : start + len(values)] = values.cpu().numpy()


def get_input_cache_path(folder: Path, name: str) -> Path:
    """Return the cache file of a layer's inputs.

    Args:
        folder: Directory of the cache.
        name: Name of the layer.
    """
    return folder / f"{name}.npy"


@contextmanager
def create_npy(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> Iterator[NDArray[Any]]:
    """Create a .npy file through memory mapping. The file appears at `path` when the context ends without an error.

    Args:
        path: The file.
        shape: Shape of the array.
        dtype: Data type of the array.

    Yields:
        The writable array.
    """
    with atomic_write(path) as temp_path:
        array = np.lib.format.open_memmap(temp_path, mode="w+", dtype=dtype, shape=shape)
        yield array
        array.flush()


def _resume_or_clear(stage: BlockwiseStage, layers: Sequence[ReplaceableConv]) -> None:
    """Keep the directory of an interrupted stage with the same plan; clear any other."""
    settings = {name: getattr(stage.config, name) for name in BLOCK_SETTINGS}
    plan = {**stage.fingerprint, **settings, "layers": [layer.name for layer in layers]}
    text = json.dumps(plan, indent=1) + "\n"
    path = stage.folder / "plan.json"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        _remove(stage.folder)
        write_text(path, text)
    for temporary in [*stage.folder.rglob(".*"), *stage.folder.glob("*.dask")]:  # left by a killed process
        _remove(temporary)


def _prepare_tasks(
    stage: BlockwiseStage, teacher: BaseDetector, layers: Sequence[ReplaceableConv], missing: Sequence[ReplaceableConv]
) -> dict[str, BlockTask]:
    """Write images and activations to files, and return the tasks by layer."""
    config, images_path = stage.config, stage.folder / "images.npy"
    if not images_path.exists():
        stage.write_images(images_path)
    cached = select_cached_layers(missing, config.num_images, config.cache_mib * 2**20)
    write_inputs(teacher, cached, np.load(images_path, mmap_mode="r"), stage.folder / "inputs", config.batch)
    block_paths = [_get_block_path(stage, layer.name).resolve() for layer in layers]
    preceding = {layer.name: tuple(block_paths[:index]) for index, layer in enumerate(layers)}
    input_caches = {layer.name: get_input_cache_path(stage.folder / "inputs", layer.name).resolve() for layer in cached}
    return {
        layer.name: BlockTask(
            layer,
            stage.load_teacher,
            images_path.resolve(),
            input_caches.get(layer.name),
            preceding[layer.name] if config.input_source == "student" else (),
            _get_block_path(stage, layer.name).resolve(),
            config,
            stage.seed,
            stage.device,
        )
        for layer in missing
    }


def _run_block_tasks(stage: BlockwiseStage, tasks: dict[str, BlockTask], expected_times: Sequence[float]) -> RunStats:
    with Progress(len(tasks), "train blocks", "block") as progress:

        def on_done(name: str, result: BlockResult) -> None:
            residual = 100 * (result.residual_ratio or 0)
            log_line(f"{name}: residual {residual:.1f} % of the variance, {result.seconds:.1f} s")
            progress.update()

        return run_tasks(train_block, tasks, expected_times, _make_executor_config(stage.config), stage.folder, on_done)


def _make_executor_config(config: BlockwiseConfig) -> ExecutorConfig:
    return ExecutorConfig(config.workers, config.scheduler, config.cluster, config.retries)


def _estimate_work(tasks: dict[str, BlockTask], layers: Sequence[ReplaceableConv]) -> list[float]:
    return [float(layer.estimate_macs(tasks[layer.name].input_cache is not None)) for layer in layers]


def _read_measured_times(config: BlockwiseConfig, layers: Sequence[ReplaceableConv]) -> list[float]:
    """Return the seconds of each block in the run of `timing_report`; empty without one."""
    if not config.timing_report:
        return []
    path = Path(config.timing_report)
    try:
        blocks = json.loads(path.read_text(encoding="utf-8"))["blocks"]
        seconds = {block["layer"]: float(block["seconds"]) for block in blocks}
        return [seconds[layer.name] for layer in layers]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"distill.blockwise.timing_report={path}: no times of these blocks ({type(error).__name__}: {error}). "
            "Pass the blockwise/report.json of a run with the same teacher."
        ) from None


def _get_block_path(stage: BlockwiseStage, layer: str) -> Path:
    return stage.folder / "blocks" / f"{layer}.pt"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
