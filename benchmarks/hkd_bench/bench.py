"""`bench`: several models on the same pictures, each in processes of its own, in turn.

A round measures every model once; the next round starts with another model. A machine that grows warm or busy
then slows all of them alike, instead of the last one.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hkd_bench.host import host_facts
from hkd_bench.result import SCHEMA, BenchResult, Curve, ModelResult, StageSamples
from hkd_bench.worker import ERRORS, Job, Measured, read_detections
from hkd_deploy.backends.opening import BACKENDS, backend_of
from hkd_deploy.backends.openvino_folder import model_files
from hkd_det.datasets.sample import Sample
from hkd_det.detections import Detections
from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.files import sha256_of
from hkd_det.metrics.citypersons import REASONABLE, evaluate
from hkd_det.metrics.curve import MissRate
from hkd_det.metrics.tables import DetectionTable, TruthTable


@dataclass(frozen=True)
class BenchOptions:
    """How to measure.

    data, split, command: where the samples come from and what was typed, for the record. annotated: the samples' truth
    is known; without it no miss rate is measured. backends: each of them measures every model; None is the one of the
    model's kind of file. threads: CPU threads, None leaves it to the runtime. runs: timed runs a model over all rounds.
    warm_up, warm_up_s: untimed runs a round, at least so many and for at least so long. staged_runs: runs a round that
    time the stages. timed_pictures: most different pictures that are timed; they are held in memory.
    """

    device: str = "cpu"
    backends: tuple[str | None, ...] = (None,)
    threads: int | None = None
    runs: int = 200
    rounds: int = 3
    warm_up: int = 10
    warm_up_s: float = 0.5
    staged_runs: int = 20
    timed_pictures: int = 32
    data: str = ""
    split: str = ""
    command: str = ""
    annotated: bool = True


@dataclass(frozen=True)
class Contender:
    """A model file on a backend, under the name it has in the tables. sha256: 64 hexadecimal digits of the file."""

    path: Path
    backend: str
    name: str
    sha256: str


def bench(
    models: Sequence[Path], samples: Sequence[Sample], options: BenchOptions, names: Sequence[str] | None = None
) -> BenchResult:
    """Measure model files side by side: miss rate over all samples, latency on some of them, memory.

    names: one a model and backend for the tables, the file names by default. Raises UsageError for options that make no
    sense, DataError and UnavailableError as opening and reading raise them.
    """
    _check(models, samples, options)
    contenders = _contenders(models, options.backends, names)
    facts = host_facts()  # before the measurement itself raises the load
    rounds: list[list[Measured]] = [[] for _ in contenders]
    detections: list[list[Detections]] = [[] for _ in contenders]
    with tempfile.TemporaryDirectory(prefix="hkd-bench-") as folder, _progress(contenders, samples, options) as bar:
        for number in range(options.rounds):
            for turn in range(len(contenders)):
                index = (turn + number) % len(contenders)
                bar.set_description(f"round {number + 1}/{options.rounds} {contenders[index].name}")
                job = _job(contenders[index], samples, options, number, Path(folder))
                rounds[index].append(_measure(job, Path(folder), bar))
                if job.evaluated_pictures:
                    detections[index] = read_detections(Path(job.detections_npz))
    return BenchResult(
        schema=SCHEMA,
        command=options.command,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        host=facts,
        device=options.device,
        threads=options.threads,
        data=options.data,
        split=options.split,
        pictures=len(samples) if options.annotated else 0,
        timed_pictures=len(_timed(samples, options)),
        runs=options.runs,
        rounds=options.rounds,
        warm_up=options.warm_up,
        warm_up_s=options.warm_up_s,
        models=tuple(
            _model_result(contender, measured, _judged(found, samples))
            for contender, measured, found in zip(contenders, rounds, detections, strict=True)
        ),
    )


def _check(models: Sequence[Path], samples: Sequence[Sample], options: BenchOptions) -> None:
    if not models:
        raise UsageError("no model to measure")
    if not samples:
        raise DataError("no pictures to measure on")
    for backend in options.backends:
        if backend is not None and backend not in BACKENDS:
            raise UsageError(f"--backend {backend}: expected {', '.join(BACKENDS)}")
    for name in ("runs", "rounds", "staged_runs", "timed_pictures"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    if options.runs < options.rounds:
        raise UsageError(f"--runs {options.runs}: fewer than the {options.rounds} rounds")


def _contenders(models: Sequence[Path], backends: Sequence[str | None], names: Sequence[str] | None) -> list[Contender]:
    pairs = [(path, backend or backend_of(path)) for path in models for backend in backends]
    digests = {path: _sha256(path) for path in models}
    return [
        Contender(path, backend, name, digests[path])
        for (path, backend), name in zip(pairs, _names(pairs, names), strict=True)
    ]


def _names(pairs: Sequence[tuple[Path, str]], names: Sequence[str] | None) -> list[str]:
    if names is None:
        paths = {path for path, _ in pairs}
        short = len({path.stem for path in paths}) == len(paths)
        names = [path.stem if short else str(path) for path, _ in pairs]
        if len(set(names)) < len(names):
            names = [f"{name} {backend}" for name, (_, backend) in zip(names, pairs, strict=True)]
    if len(names) != len(pairs):
        raise UsageError(f"--names: {len(names)} names for {len(pairs)} models (each on each backend)")
    if len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise UsageError(f"--names {','.join(names)}: every model needs a name of its own")
    return list(names)


def _sha256(path: Path) -> str:
    digests = [sha256_of(file) for file in model_files(path)]
    return digests[0] if len(digests) == 1 else sha256("".join(digests).encode()).hexdigest()


def _timed(samples: Sequence[Sample], options: BenchOptions) -> list[Sample]:
    """Spread over the split."""
    places = np.linspace(0, len(samples) - 1, min(options.timed_pictures, len(samples)))
    return [samples[place] for place in places.round().astype(int)]


def _job(contender: Contender, samples: Sequence[Sample], options: BenchOptions, number: int, folder: Path) -> Job:
    """The first round evaluates too, after its times are taken: what is wrong with the data shows early."""
    evaluated = samples if options.annotated and number == 0 else ()
    return Job(
        model=str(contender.path),
        device=options.device,
        backend=contender.backend,
        threads=options.threads,
        timed_pictures=tuple(str(sample.path) for sample in _timed(samples, options)),
        warm_up=options.warm_up,
        warm_up_s=options.warm_up_s,
        runs=options.runs // options.rounds + (number < options.runs % options.rounds),
        staged_runs=options.staged_runs,
        evaluated_pictures=tuple(str(sample.path) for sample in evaluated),
        detections_npz=str(folder / "detections.npz"),
    )


def _progress(contenders: Sequence[Contender], samples: Sequence[Sample], options: BenchOptions) -> "tqdm[Any]":
    each = options.runs + options.rounds * (options.warm_up + options.staged_runs) + options.annotated * len(samples)
    return tqdm(total=len(contenders) * each, unit="run", leave=False)


def _measure(job: Job, folder: Path, bar: "tqdm[Any]") -> Measured:
    """Run one worker to its end; its HkdError is raised here."""
    job_path, out_path, log_path = folder / "job.json", folder / "out.json", folder / "worker.log"
    job_path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    out_path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "hkd_bench.worker", str(job_path), str(out_path)]
    with log_path.open("wb") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as worker:
        try:
            assert worker.stdout is not None
            for line in worker.stdout:
                bar.update(int(line) if line.strip().isdigit() else 0)  # a library may talk too
        except BaseException:
            worker.kill()
            raise
    if not out_path.exists():
        raise UnavailableError(f"{job.model}: {_death(worker.returncode, log_path)}")
    found = json.loads(out_path.read_text(encoding="utf-8"))
    if "error" in found:
        raise ERRORS[found["error"]](found["message"])
    return Measured(**found["measured"])


def _death(code: int, log: Path) -> str:
    """Why a worker ended without a word."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if code == -9:
        return "the measuring process was killed (signal 9), most likely for lack of memory; close other programs"
    return f"the measuring process ended with code {code}: {lines[-1] if lines else 'no message'}"


def _judged(detections: Sequence[Detections], samples: Sequence[Sample]) -> dict[str, MissRate]:
    """By setup; over no pictures where none was evaluated."""
    truths = [sample.truth for sample in samples] if detections else []
    return evaluate(TruthTable.of(truths), DetectionTable.of(detections))


def _model_result(contender: Contender, rounds: Sequence[Measured], judged: dict[str, MissRate]) -> ModelResult:
    first, largest = rounds[0], max(rounds, key=lambda one: one.peak_memory_mib)
    stages = np.concatenate([one.stages_ms for one in rounds])
    return ModelResult(
        name=contender.name,
        path=str(contender.path),
        sha256=contender.sha256,
        backend=contender.backend,
        model=first.model,
        parameters=first.parameters,
        flops=first.flops,
        imgsz_hw=(first.imgsz_hw[0], first.imgsz_hw[1]),
        file_mib=sum(file.stat().st_size for file in model_files(contender.path)) / 2**20,
        miss_rates={setup: found.value if found.people else None for setup, found in judged.items()},
        people={setup: found.people for setup, found in judged.items()},
        curve=Curve.of(judged[REASONABLE.name]),
        curve_all=Curve.of(judged["All"]),
        e2e_ms=tuple(sample for one in rounds for sample in one.e2e_ms),
        stages=StageSamples(*(tuple(column.tolist()) for column in stages.T)),
        load_ms=tuple(one.load_ms for one in rounds),
        peak_memory_mib=largest.peak_memory_mib,
        baseline_mib=largest.baseline_mib,
    )
