"""The block stage of a run: every block learnt, in a folder where a broken-off stage goes on."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hkd_det.distill.blockwise.activations import cached_file, cached_layers, write_inputs
from hkd_det.distill.blockwise.assembly import Weights
from hkd_det.distill.blockwise.engine import Ran, Workers, check_installed, run_all
from hkd_det.distill.blockwise.replaceable import Layer
from hkd_det.distill.blockwise.settings import Blockwise
from hkd_det.distill.blockwise.task import Learnt, Task, learn, read_block
from hkd_det.errors import DataError
from hkd_det.files import write_text
from hkd_det.models.family import PersonDetector

DrawViews = Callable[[Path], None]


@dataclass(frozen=True)
class Stage:
    """Where the blocks are learnt and from what.

    folder: holds `plan.json`, `blocks/`, `ran.json` and, while tasks run, the views and the teacher's activations.
    open_teacher: gives the teacher in any process. draw_views: writes the training views, [N, 3, H, W] uint8, to a .npy
    file. identity: plain values that fix what is learnt beside the settings: teacher, data, size, seed.
    """

    folder: Path
    open_teacher: Callable[[], PersonDetector]
    draw_views: DrawViews
    settings: Blockwise
    identity: dict[str, Any]
    seed: int
    device: str


@dataclass(frozen=True)
class Course:
    """How the tasks went, in the network's order.

    ran: None if the blocks come from several starts, one of which was broken off.
    """

    learnt: list[Learnt]
    ran: Ran | None


def learn_blocks(stage: Stage, teacher: PersonDetector, layers: Sequence[Layer]) -> Course:
    """Learn the blocks that are not there yet; `teacher` is the one that `open_teacher` gives, on the run's device."""
    _take_up(stage, layers)
    missing = [layer for layer in layers if not _block(stage, layer.name).exists()]
    if missing:
        check_installed(_workers(stage.settings))
        measured = _measured(stage.settings, missing)
        tasks = _prepared(stage, teacher, layers, missing)
        ran = _run(stage, tasks, measured or _counted(tasks, missing))
        if len(missing) == len(layers):
            write_text(stage.folder / "ran.json", json.dumps(asdict(ran)) + "\n")
    for large in ("inputs", "views.npy"):
        _remove(stage.folder / large)
    learnt = [read_block(_block(stage, layer.name))[1] for layer in layers]
    told = stage.folder / "ran.json"
    return Course(learnt, Ran(**json.loads(told.read_text(encoding="utf-8"))) if told.exists() else None)


def read_blocks(folder: Path, layers: Sequence[Layer]) -> dict[str, Weights]:
    """The learnt blocks' weights by layer."""
    return {layer.name: read_block(folder / "blocks" / f"{layer.name}.pt")[0] for layer in layers}


def _take_up(stage: Stage, layers: Sequence[Layer]) -> None:
    """Go on where an earlier start of this very stage was broken off; whatever else lies there goes."""
    settings = stage.settings
    learning = {name: getattr(settings, name) for name in ("views", "epochs", "batch", "lr", "inputs")}
    plan = {**stage.identity, **learning, "layers": [layer.name for layer in layers]}
    text = json.dumps(plan, indent=1) + "\n"
    path = stage.folder / "plan.json"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        _remove(stage.folder)
        write_text(path, text)
    for aside in [*stage.folder.rglob(".*"), *stage.folder.glob("*.dask")]:  # of a process that was killed
        _remove(aside)


def _prepared(
    stage: Stage, teacher: PersonDetector, layers: Sequence[Layer], missing: Sequence[Layer]
) -> dict[str, Task]:
    """Views and activations in files, and a task a layer."""
    settings, views = stage.settings, stage.folder / "views.npy"
    if not views.exists():
        stage.draw_views(views)
    cached = cached_layers(missing, settings.views, settings.cache_mib * 2**20)
    write_inputs(teacher, cached, np.load(views, mmap_mode="r"), stage.folder / "inputs", settings.batch)
    blocks = [_block(stage, layer.name).resolve() for layer in layers]
    before = {layer.name: tuple(blocks[:place]) for place, layer in enumerate(layers)}
    files = {layer.name: cached_file(stage.folder / "inputs", layer.name).resolve() for layer in cached}
    return {
        layer.name: Task(
            layer.name,
            layer.norm,
            stage.open_teacher,
            views.resolve(),
            files.get(layer.name),
            before[layer.name] if settings.inputs == "student" else (),
            _block(stage, layer.name).resolve(),
            settings,
            stage.seed,
            stage.device,
        )
        for layer in missing
    }


def _run(stage: Stage, tasks: dict[str, Task], expected: Sequence[float]) -> Ran:
    with tqdm(total=len(tasks), desc="blocks", unit="block") as bar:

        def done(name: str, learnt: Learnt) -> None:
            bar.write(f"{name}: {100 * (learnt.unexplained or 0):.1f} % left unexplained, {learnt.seconds:.1f} s")
            bar.update()

        return run_all(learn, tasks, expected, _workers(stage.settings), stage.folder, done)


def _workers(settings: Blockwise) -> Workers:
    return Workers(settings.workers, settings.scheduler, settings.cluster, settings.retries)


def _counted(tasks: dict[str, Task], layers: Sequence[Layer]) -> list[float]:
    """The work that each task takes."""
    return [float(layer.expected_work(tasks[layer.name].cached is not None)) for layer in layers]


def _measured(settings: Blockwise, layers: Sequence[Layer]) -> list[float]:
    """Seconds that each task took in the earlier run that the settings name; empty if they name none."""
    if not settings.times:
        return []
    path = Path(settings.times)
    try:
        blocks = json.loads(path.read_text(encoding="utf-8"))["blocks"]
        seconds = {block["layer"]: float(block["seconds"]) for block in blocks}
        return [seconds[layer.name] for layer in layers]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"distill.blockwise.times={path}: no times of these blocks there ({type(error).__name__}: {error}); "
            "give the blockwise/report.json of a run with the same teacher"
        ) from None


def _block(stage: Stage, layer: str) -> Path:
    return stage.folder / "blocks" / f"{layer}.pt"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
