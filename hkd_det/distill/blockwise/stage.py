"""The block stage of a run: every block learnt, in a folder where a broken-off stage goes on.

Report: what each block came to, how long it took, and how far the schedule was from the best there is.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from hkd_det.distill.blockwise.activations import input_cache_path, select_cached_layers, write_inputs
from hkd_det.distill.blockwise.blocks import ReplaceableConv, StateDict
from hkd_det.distill.blockwise.config import BlockwiseConfig, Scheduler, compute_lower_bound, simulate
from hkd_det.distill.blockwise.executor import ExecutorConfig, RunStats, check_dask_installed, run_tasks
from hkd_det.distill.blockwise.worker import BlockResult, BlockTask, read_block, train_block
from hkd_det.errors import DataError
from hkd_det.files import write_text
from hkd_det.models.base import BaseDetector

WriteImages = Callable[[Path], None]


@dataclass(frozen=True)
class BlockwiseStage:
    """Where the blocks are learnt and from what.

    folder: holds `plan.json`, `blocks/`, `ran.json` and, while tasks run, the views and the teacher's activations.
    open_teacher: gives the teacher in any process. draw_views: writes the training views, [N, 3, H, W] uint8, to a .npy
    file. identity: plain values that fix what is learnt beside the settings: teacher, data, size, seed.
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
    """How the tasks went, in the network's order.

    ran: None if the blocks come from several starts, one of which was broken off.
    """

    block_results: list[BlockResult]
    run_stats: RunStats | None


def train_blocks(stage: BlockwiseStage, teacher: BaseDetector, layers: Sequence[ReplaceableConv]) -> StageResult:
    """Learn the blocks that are not there yet; `teacher` is the one that `open_teacher` gives, on the run's device."""
    _resume_or_clear(stage, layers)
    missing = [layer for layer in layers if not _block_path(stage, layer.name).exists()]
    if missing:
        check_dask_installed(_make_executor_config(stage.config))
        measured = _read_measured_times(stage.config, missing)
        tasks = _prepare_tasks(stage, teacher, layers, missing)
        ran = _run_block_tasks(stage, tasks, measured or _estimate_work(tasks, missing))
        if len(missing) == len(layers):
            write_text(stage.folder / "run_stats.json", json.dumps(asdict(ran)) + "\n")
    for large in ("inputs", "images.npy"):
        _remove(stage.folder / large)
    learnt = [read_block(_block_path(stage, layer.name))[1] for layer in layers]
    told = stage.folder / "run_stats.json"
    return StageResult(learnt, RunStats(**json.loads(told.read_text(encoding="utf-8"))) if told.exists() else None)


def read_blocks(folder: Path, layers: Sequence[ReplaceableConv]) -> dict[str, StateDict]:
    """The learnt blocks' weights by layer."""
    return {layer.name: read_block(folder / "blocks" / f"{layer.name}.pt")[0] for layer in layers}


def _resume_or_clear(stage: BlockwiseStage, layers: Sequence[ReplaceableConv]) -> None:
    """Go on where an earlier start of this very stage was broken off; whatever else lies there goes."""
    settings = stage.config
    learning = {name: getattr(settings, name) for name in ("num_images", "epochs", "batch", "lr", "input_source")}
    plan = {**stage.fingerprint, **learning, "layers": [layer.name for layer in layers]}
    text = json.dumps(plan, indent=1) + "\n"
    path = stage.folder / "plan.json"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        _remove(stage.folder)
        write_text(path, text)
    for aside in [*stage.folder.rglob(".*"), *stage.folder.glob("*.dask")]:  # of a process that was killed
        _remove(aside)


def _prepare_tasks(
    stage: BlockwiseStage, teacher: BaseDetector, layers: Sequence[ReplaceableConv], missing: Sequence[ReplaceableConv]
) -> dict[str, BlockTask]:
    """Views and activations in files, and a task a layer."""
    settings, views = stage.config, stage.folder / "images.npy"
    if not views.exists():
        stage.write_images(views)
    cached = select_cached_layers(missing, settings.num_images, settings.cache_mib * 2**20)
    write_inputs(teacher, cached, np.load(views, mmap_mode="r"), stage.folder / "inputs", settings.batch)
    blocks = [_block_path(stage, layer.name).resolve() for layer in layers]
    before = {layer.name: tuple(blocks[:place]) for place, layer in enumerate(layers)}
    files = {layer.name: input_cache_path(stage.folder / "inputs", layer.name).resolve() for layer in cached}
    return {
        layer.name: BlockTask(
            layer.name,
            layer.norm,
            stage.load_teacher,
            views.resolve(),
            files.get(layer.name),
            before[layer.name] if settings.input_source == "student" else (),
            _block_path(stage, layer.name).resolve(),
            settings,
            stage.seed,
            stage.device,
        )
        for layer in missing
    }


def _run_block_tasks(stage: BlockwiseStage, tasks: dict[str, BlockTask], expected_times: Sequence[float]) -> RunStats:
    with tqdm(total=len(tasks), desc="blocks", unit="block") as bar:

        def done(name: str, learnt: BlockResult) -> None:
            bar.write(f"{name}: {100 * (learnt.residual_ratio or 0):.1f} % left unexplained, {learnt.seconds:.1f} s")
            bar.update()

        return run_tasks(train_block, tasks, expected_times, _make_executor_config(stage.config), stage.folder, done)


def _make_executor_config(config: BlockwiseConfig) -> ExecutorConfig:
    return ExecutorConfig(config.workers, config.scheduler, config.cluster, config.retries)


def _estimate_work(tasks: dict[str, BlockTask], layers: Sequence[ReplaceableConv]) -> list[float]:
    """The work that each task takes."""
    return [float(layer.estimate_macs(tasks[layer.name].input_cache is not None)) for layer in layers]


def _read_measured_times(config: BlockwiseConfig, layers: Sequence[ReplaceableConv]) -> list[float]:
    """Seconds that each task took in the earlier run that the settings name; empty if they name none."""
    if not config.timing_report:
        return []
    path = Path(config.timing_report)
    try:
        blocks = json.loads(path.read_text(encoding="utf-8"))["blocks"]
        seconds = {block["layer"]: float(block["seconds"]) for block in blocks}
        return [seconds[layer.name] for layer in layers]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"distill.blockwise.timing_report={path}: no times of these blocks there ({type(error).__name__}: {error}); "
            "give the blockwise/report.json of a run with the same teacher"
        ) from None


def _block_path(stage: BlockwiseStage, layer: str) -> Path:
    return stage.folder / "blocks" / f"{layer}.pt"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


SIMULATED_WORKERS = (1, 2, 3, 4, 8, 16)


@dataclass(frozen=True)
class AssemblyResult:
    """What was put together, judged on the validation split before fine-tuning.

    miss_rate_teacher, miss_rate: MR^-2 of the run's setup, fractions. miss_rates_alone: of each block alone in the
    teacher, by layer; empty if they were not judged. left_out: layers whose blocks were not taken.
    parameters, flops: of teacher and assembled network, a picture of the run's size.
    """

    teacher_miss_rate: float
    miss_rate: float
    block_miss_rates: dict[str, float]
    excluded_layers: list[str]
    parameters: tuple[int, int]
    flops: tuple[int, int]


def write_blockwise_report(
    path: Path, stage_result: StageResult, scheduler: Scheduler, assembly_result: AssemblyResult
) -> None:
    """`report.json`: times in seconds, errors as in `Learnt`; `replayed_s` are makespans on other numbers of workers.

    `ran` is null if the blocks come from several starts, one of which was broken off.
    """
    times = [learnt.seconds for learnt in stage_result.block_results]
    ran = stage_result.run_stats
    content: dict[str, Any] = {
        "scheduler": scheduler,
        "run_stats": {**asdict(ran), "lower_bound_s": compute_lower_bound(times, ran.num_workers)} if ran else None,
        "sum_s": sum(times),
        "simulated_s": simulate_makespans(times),
        **asdict(assembly_result),
        "blocks": [
            {**asdict(learnt), "residual_ratio": learnt.residual_ratio} for learnt in stage_result.block_results
        ],
    }
    write_text(path, json.dumps(content, indent=1) + "\n")


def simulate_makespans(times: Sequence[float]) -> dict[str, dict[str, float]]:
    """Makespans, s, of measured block times under every schedule, by number of workers, and the bound below them."""
    schedules = {name: {str(n): simulate(times, n, name) for n in SIMULATED_WORKERS} for name in get_args(Scheduler)}
    return {**schedules, "lower bound": {str(n): compute_lower_bound(times, n) for n in SIMULATED_WORKERS}}
