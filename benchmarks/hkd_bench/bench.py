"""Measurement of several models on the same images, each in processes of its own.

A round measures every model once, and the next round starts with another model. A machine that becomes warm or busy
then slows down all models alike.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from time import sleep

import numpy as np

from hkd_bench.cameras import CameraResult
from hkd_bench.detection_files import list_detection_files, make_file_stems, write_detections
from hkd_bench.device_state import (
    STATE_INTERVAL_S,
    DeviceState,
    DeviceStateReader,
    OtherLoadMeter,
    RunConditions,
    find_load,
    summarize_conditions,
)
from hkd_bench.differences import ComparedModel, write_difference_pages
from hkd_bench.energy import (
    EnergyMeter,
    EnergyResult,
    PowerSource,
    Sampler,
    compute_camera_energies,
    compute_energies,
    open_energy_meter,
    read_power_log,
)
from hkd_bench.host import read_host_fields
from hkd_bench.result import SCHEMA_VERSION, AccuracyResult, BenchResult, ModelResult, StageSamples, measure_accuracy
from hkd_bench.scenarios import LOADGEN_SCENARIOS, ScenarioResult, ScenarioSettings, check_scenarios
from hkd_bench.separate_runs import ScenarioSamples, SustainedSamples, measure_scenarios, measure_sustained
from hkd_bench.sustained import SustainedResult
from hkd_bench.sweep import list_sweep_sizes
from hkd_bench.worker import WorkerJob, WorkerResult, read_detections_npz
from hkd_bench.worker_process import run_worker
from hkd_deploy.backends import BACKENDS, get_default_backend
from hkd_deploy.external import check_model_config, is_external_model
from hkd_deploy.trt.engine_info import read_engine_info
from hkd_det.config import check_range, dataclass_from_dict
from hkd_det.console import Progress, log_stage
from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.letterbox import format_imgsz
from hkd_det.metrics.coco_files import CocoId
from hkd_det.onnxrt.openvino import hash_model_files, list_model_files
from hkd_det.structures import Detections, Sample

# Why a runtime does not state the memory of activations and workspace to Python.
CONTEXT_REASONS = {
    "tensorrt": "",
    "onnxruntime": "ONNX Runtime states it in its C interface only",
    "ort": "ONNX Runtime states it in its C interface only",
    "openvino": "OpenVINO states it for Intel GPUs only",
}


@dataclass(frozen=True)
class BenchOptions:
    """Options of `bench`.

    Attributes:
        device: cpu, cuda or cuda:N.
        backends: Each of them measures every model; None selects the default backend of the model file.
        threads: CPU threads; None for the default of the runtime.
        runs: Timed runs per model, over all rounds.
        rounds: Number of processes per model.
        warmup: Minimum number of untimed runs per round.
        warmup_s: Minimum duration of the untimed runs per round, in seconds.
        stage_runs: Runs per round that time each stage.
        max_timed_images: Maximum number of different images that are timed; they are held in memory.
        data: Name of the dataset, stored in the result.
        split: Split of the dataset, stored in the result.
        command: Command line, stored in the result.
        model_configs: YAML files or names of the configurations of the models that hkd-export did not write: one for
            all of them, or one per such model, in order. None, or no entry, selects the default of `load_model_config`.
        has_ground_truth: False for images without annotations: no miss rate is measured.
        save_detections: File for the detections of all images in COCO's result format, see `list_detection_files`. None
            writes no file.
        differences: Directory for the pages of `write_difference_pages`, on which the images are browsed where models
            differ. None writes no pages.
        category_id: Category id in this file if the images have the ids of a COCO file. None for other data: the image
            id is then the file name, and the category id is 1.
        energy: Whether the energy per frame is measured.
        power_csv: Log of an external meter, which replaces the sensors of the machine.
        energy_s: Duration of the runs whose energy is measured, per model and round, in seconds.
        idle_s: Duration over which the idle power is measured, before the first and after the last model, in seconds.
        require_quiet: Whether it is an error if the machine is not quiet before the measurement.
        imgsz_sweep: Widths in pixels of the inputs at which each model is measured; all models have a dynamic size.
            Empty for the size of the file.
        cameras_fps: Frames per second of each camera if the number of cameras is searched; None otherwise.
        scenarios: Names of the scenarios that are measured after all rounds, see `hkd_bench.scenarios`.
        scenario_settings: Rate, limit and minimum numbers of the scenarios.
        scenario_logs: Directory of LoadGen's logs, required by its scenarios; they are in DIR/MODEL/SCENARIO.
        sustained_s: Duration of a run of each model without pauses after the other measurements in seconds; 0 for none.
    """

    device: str = "cpu"
    backends: tuple[str | None, ...] = (None,)
    threads: int | None = None
    runs: int = 200
    rounds: int = 3
    warmup: int = 10
    warmup_s: float = 0.5
    stage_runs: int = 20
    max_timed_images: int = 32
    data: str = ""
    split: str = ""
    command: str = ""
    model_configs: tuple[Path | None, ...] = ()
    has_ground_truth: bool = True
    save_detections: Path | None = None
    differences: Path | None = None
    category_id: CocoId | None = None
    energy: bool = False
    power_csv: Path | None = None
    energy_s: float = 10.0
    idle_s: float = 10.0
    require_quiet: bool = False
    imgsz_sweep: tuple[int, ...] = ()
    cameras_fps: float | None = None
    scenarios: tuple[str, ...] = ()
    scenario_settings: ScenarioSettings = field(default_factory=ScenarioSettings)
    scenario_logs: Path | None = None
    sustained_s: float = 0.0

    @property
    def evaluates_images(self) -> bool:
        """Whether each model runs on all images once."""
        return self.has_ground_truth or self.save_detections is not None


@dataclass(frozen=True)
class BenchEntry:
    """One model file on one backend.

    Attributes:
        path: Model file or directory.
        backend: Name of the backend.
        name: Name in tables and plots.
        sha256: Hexadecimal digest of the file, or of the digests of a directory's files.
        model_config: YAML file that describes a model of another tool; None for its default.
        imgsz_hw: Input size in pixels of a model with a dynamic size; None for that of its export.
    """

    path: Path
    backend: str
    name: str
    sha256: str
    model_config: Path | None
    imgsz_hw: tuple[int, int] | None = None


def bench(
    models: Sequence[Path],
    samples: Sequence[Sample],
    options: BenchOptions,
    names: Sequence[str] | None = None,
    other_ground_truths: Mapping[str, Sequence[Sample]] | None = None,
) -> BenchResult:
    """Measure the miss rate over all samples, and latency and memory on some of them.

    Args:
        models: Files or directories written by hkd-export, or ONNX files of other tools.
        samples: Images, with ground truth unless `options.has_ground_truth` is false.
        options: Options of the measurement.
        names: One name per model and backend. The default is the file name.
        other_ground_truths: Further ground truths of the same images in the same order, by name of the dataset.

    Returns:
        The measurements of all models.

    Raises:
        UsageError: An option or a name is invalid, or a model of another tool has no valid configuration.
        DataError: A model or an image is missing or invalid.
        UnavailableError: A device or backend is missing, or a process ended early.
    """
    _check_options(models, samples, options)
    entries = _make_entries(models, options, names)
    if options.differences and len(entries) == 1:
        raise UsageError("--differences: expected at least two models, got 1. Give another MODEL or --backend A,B.")
    host = read_host_fields()  # before the measurement raises the load average
    measured = _measure_rounds(entries, samples, options)
    results, detections = measured.results, measured.detections
    power, energies = measured.compute_energies(entries)
    if options.save_detections:
        files = list_detection_files(options.save_detections, [entry.name for entry in entries])
        for file, model_detections in zip(files, detections, strict=True):
            write_detections(file, samples, model_detections, options.category_id)
    eval_samples = samples if options.has_ground_truth else ()
    if not options.has_ground_truth:
        detections = [[] for _ in entries]
    elif detections:
        log_stage("compute miss rates, AP and their intervals")
    accuracies = measure_accuracy(
        {options.data: eval_samples, **(other_ground_truths or {})}, detections, [rounds[0].conf for rounds in results]
    )
    if options.differences:
        _write_differences(options.differences, options.data, samples, entries, detections, accuracies)
    return BenchResult(
        schema=SCHEMA_VERSION,
        command=options.command,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        host=host,
        device=options.device,
        threads=options.threads,
        data=options.data,
        split=options.split,
        num_images=len(eval_samples),
        num_timed_images=len(_select_timed_samples(samples, options)),
        runs=options.runs,
        rounds=options.rounds,
        warmup=options.warmup,
        warmup_s=options.warmup_s,
        models=tuple(
            _make_model_result(
                entry,
                rounds,
                accuracy,
                energies[entry.name],
                measured.summarize_conditions(index),
                measured.get_cameras(index, power),
                measured.scenarios[index].mark(measured.states, options.device),
                measured.summarize_sustained(index),
            )
            for index, (entry, rounds, accuracy) in enumerate(zip(entries, results, accuracies, strict=True))
        ),
        power=power,
        state_before=measured.states[0][1],
        state_after=measured.states[-1][1],
        imgsz_sweep=options.imgsz_sweep,
    )


@dataclass
class _Measurements:
    """Measurements of all rounds, one entry per model in each list.

    Attributes:
        device: cpu, cuda or cuda:N.
        results: Results of each round.
        detections: Detections in each image.
        other_cpus: CPUs that other processes used in each round; None if it cannot be measured.
        states: Unix time in seconds and state of the device, of the whole measurement.
        meter: Power samples; None if neither energy nor a sustained run was requested.
        measures_energy: Whether the energy per frame was requested.
        scenarios: Results of the scenarios.
        sustained: Samples of the sustained run; None for a model that was not reached.
    """

    device: str
    results: list[list[WorkerResult]]
    detections: list[list[Detections]]
    other_cpus: list[list[float | None]]
    states: list[tuple[float, DeviceState]] = field(default_factory=list)
    meter: EnergyMeter | None = None
    measures_energy: bool = False
    scenarios: list[ScenarioSamples] = field(default_factory=list)
    sustained: list[SustainedSamples | None] = field(default_factory=list)

    def compute_energies(self, entries: Sequence[BenchEntry]) -> tuple[PowerSource, dict[str, EnergyResult]]:
        """Return the power sensors and the energy of each model, by name."""
        if self.meter is None or not self.measures_energy:
            return PowerSource(), {entry.name: EnergyResult() for entry in entries}
        blocks = {
            entry.name: [(start, end, frames) for one in rounds for start, end, frames in one.blocks]
            for entry, rounds in zip(entries, self.results, strict=True)
        }
        return compute_energies(self.meter, blocks)

    def summarize_conditions(self, index: int) -> RunConditions:
        """Return the state of the device during the runs of one model."""
        windows = [(one.timed_window[0], one.timed_window[1]) for one in self.results[index]]
        windows += [(one.blocks[0][0], one.blocks[-1][1]) for one in self.results[index] if one.blocks]
        known = [value for value in self.other_cpus[index] if value is not None]
        other_cpus = sum(known) / len(known) if known else None
        return summarize_conditions(self.states, windows, other_cpus, self.device)

    def get_cameras(self, index: int, source: PowerSource) -> CameraResult | None:
        """Return the number of cameras of one model with their energy; None if it was not searched."""
        values = self.results[index][-1].cameras
        if values is None:
            return None
        cameras = dataclass_from_dict(CameraResult, values)
        if self.meter is None or not self.measures_energy:
            return cameras
        return compute_camera_energies(self.meter, source, cameras)

    def summarize_sustained(self, index: int) -> SustainedResult | None:
        """Return the sustained run of one model; None if there is none."""
        run = self.sustained[index] if self.sustained else None
        if run is None:
            return None
        if self.meter is None or not self.meter.source.sensors:
            missing = self.meter.source.missing if self.meter else {}
            reason = "; ".join(f"{name}: {text}" for name, text in missing.items()) or "no power sensor"
            return run.summarize(self.states, {}, reason, self.device)
        try:
            end = run.starts[-1] + run.latencies_ms[-1] / 1e3
            return run.summarize(self.states, self.meter.make_traces(float(end)), "", self.device)
        except UsageError as error:  # the log of the external meter
            return run.summarize(self.states, {}, str(error), self.device)


def _measure_rounds(entries: Sequence[BenchEntry], samples: Sequence[Sample], options: BenchOptions) -> _Measurements:
    """Measure all models in turn, between two measurements of the idle power if energy is requested."""
    measured = _Measurements(options.device, [[] for _ in entries], [[] for _ in entries], [[] for _ in entries])
    measured.measures_energy = options.energy
    has_meter = options.energy or options.sustained_s > 0
    reader = DeviceStateReader(options.device)
    if options.require_quiet:
        _require_quiet(reader)
    with (
        tempfile.TemporaryDirectory(prefix="hkd-bench-") as work_dir,
        _make_progress(entries, samples, options) as progress,
        open_energy_meter(options.device, options.power_csv) if has_meter else nullcontext() as meter,
        Sampler(reader.read, STATE_INTERVAL_S) as states,
    ):
        has_sensors = meter is not None and options.energy and bool(meter.source.sensors)
        if meter and has_sensors:
            log_stage(f"measure idle power, {options.idle_s:g} s")
            meter.idle_before = meter.measure_idle(options.idle_s)
        for round_index in range(options.rounds):
            for turn in range(len(entries)):
                index = (turn + round_index) % len(entries)
                progress.set_label(f"round {round_index + 1}/{options.rounds} {entries[index].name}")
                job = _make_job(entries[index], samples, options, round_index, Path(work_dir), has_sensors)
                images = f", detect on {len(job.eval_images)} images" if job.eval_images else ""
                energy = f", measure energy {job.energy_s:g} s" if job.energy_s else ""
                log_stage(f"{progress.label}: measure latency{energy}{images}")
                load = OtherLoadMeter()
                measured.results[index].append(run_worker(job, Path(work_dir), progress))
                measured.other_cpus[index].append(load.read())
                if job.eval_images:
                    measured.detections[index] = read_detections_npz(Path(job.detections_npz))
        if meter and has_sensors:
            log_stage(f"measure idle power, {options.idle_s:g} s")
            sleep(options.idle_s / 2)  # a GPU keeps its clock for some seconds after the last frame
            meter.idle_after = meter.measure_idle(options.idle_s)
        _measure_separately(measured, entries, samples, options, Path(work_dir), progress)
    measured.states, measured.meter = states.samples, meter
    return measured


def _measure_separately(
    measured: _Measurements,
    entries: Sequence[BenchEntry],
    samples: Sequence[Sample],
    options: BenchOptions,
    work_dir: Path,
    progress: Progress,
) -> None:
    """Measure the scenarios and the sustained runs of all models."""
    names = [entry.name for entry in entries]
    jobs = [_make_untimed_job(entry, samples, options, work_dir) for entry in entries]
    for name, folder, job in zip(names, make_file_stems(names), jobs, strict=True):
        scenario_jobs = [
            replace(
                job,
                scenario=scenario,
                scenario_settings=options.scenario_settings,
                log_dir=str(options.scenario_logs / folder / scenario) if options.scenario_logs else "",
            )
            for scenario in options.scenarios
        ]
        measured.scenarios.append(measure_scenarios(name, scenario_jobs, work_dir, progress))
    if options.sustained_s:
        path = str(work_dir / "sustained.npz")
        sustained_jobs = [replace(job, sustained_s=options.sustained_s, sustained_npz=path) for job in jobs]
        measured.sustained = measure_sustained(names, sustained_jobs, work_dir, progress)


def _require_quiet(reader: DeviceStateReader) -> None:
    causes = find_load(reader)
    if causes:
        raise UnavailableError(f"--require-quiet: {'; '.join(causes)}. Stop the other load, or omit the flag.")


def _check_options(models: Sequence[Path], samples: Sequence[Sample], options: BenchOptions) -> None:
    if not models:
        raise UsageError("MODEL: expected at least one model.")
    if not samples:
        raise DataError(f"{options.data or 'samples'}: expected at least one image.")
    for backend in options.backends:
        if backend is not None and backend not in BACKENDS:
            raise UsageError(f"--backend: expected one of {', '.join(BACKENDS)}, got {backend}.")
    if options.differences and not options.has_ground_truth:
        raise UsageError("--differences: requires annotations. Use --data instead of --images.")
    for name in ("runs", "rounds", "stage_runs", "max_timed_images"):
        check_range(f"--{name.replace('_', '-')}", getattr(options, name), 1)
    check_scenarios(options.scenarios, options.scenario_settings)
    if set(options.scenarios) & set(LOADGEN_SCENARIOS) and options.scenario_logs is None:
        raise UsageError("--scenario-logs: expected a directory for LoadGen's logs. Set it, or --json.")
    if options.power_csv:
        read_power_log(options.power_csv)  # an invalid file is an error before the measurement
    if options.runs < options.rounds:
        raise UsageError(f"--runs: expected at least {options.rounds}, one per round, got {options.runs}.")


def _make_entries(models: Sequence[Path], options: BenchOptions, names: Sequence[str] | None) -> list[BenchEntry]:
    pairs = [(path, backend or get_default_backend(path)) for path in models for backend in options.backends]
    digests = {path: hash_model_files(path) for path in models}
    model_configs = assign_model_configs(models, options.model_configs)
    entries = [
        BenchEntry(path, backend, name, digests[path], model_configs.get(path))
        for (path, backend), name in zip(pairs, _make_names(pairs, names), strict=True)
    ]
    for entry in {entry.path: entry for entry in entries}.values():
        if is_external_model(entry.path):
            check_model_config(entry.path, entry.backend, entry.model_config)
    if not options.imgsz_sweep:
        return entries
    return [
        replace(entry, name=f"{entry.name}@{format_imgsz(imgsz_hw)}", imgsz_hw=imgsz_hw)
        for entry in entries
        for imgsz_hw in list_sweep_sizes(entry.path, options.imgsz_sweep)
    ]


def assign_model_configs(models: Sequence[Path], model_configs: Sequence[Path | None]) -> dict[Path, Path | None]:
    """Assign model configurations to the models that hkd-export did not write.

    Args:
        models: Model files or directories.
        model_configs: One YAML file or name for all such models, or one per such model in order, None for the default
            of a model; or no entry.

    Returns:
        The YAML file of each such model.

    Raises:
        UsageError: The number of files does not fit.
    """
    external = [path for path in dict.fromkeys(models) if is_external_model(path)]
    if model_configs and len(model_configs) not in (1, len(external)):
        raise UsageError(
            f"--model-config: expected one file, or {len(external)} (one per model that hkd-export did not write), "
            f"got {len(model_configs)}."
        )
    if model_configs and not external:
        raise UsageError("--model-config: has no effect, because hkd-export wrote all models. Omit the flag.")
    per_model = model_configs if len(model_configs) > 1 else [*model_configs] * len(external)
    return dict(zip(external, per_model, strict=False))


def _write_differences(
    output_dir: Path,
    data: str,
    samples: Sequence[Sample],
    entries: Sequence[BenchEntry],
    detections: Sequence[Sequence[Detections]],
    accuracies: Sequence[Sequence[AccuracyResult]],
) -> None:
    """Compare each further model with the first one, each at the threshold of its recall."""
    thresholds = [accuracy[0].threshold for accuracy in accuracies]
    models = [
        ComparedModel(entry.name, threshold, found)
        for entry, threshold, found in zip(entries, thresholds, detections, strict=True)
        if threshold is not None
    ]
    if len(models) < len(entries):
        raise DataError(f"--differences {output_dir}: {data} has no person of Reasonable. Use other data.")
    write_difference_pages(output_dir, Path(data).stem, samples, models)


def _make_names(pairs: Sequence[tuple[Path, str]], names: Sequence[str] | None) -> list[str]:
    if names is None:
        paths = {path for path, _ in pairs}
        has_unique_stems = len({path.stem for path in paths}) == len(paths)
        names = [path.stem if has_unique_stems else str(path) for path, _ in pairs]
        if len(set(names)) < len(names):
            names = [f"{name} {backend}" for name, (_, backend) in zip(names, pairs, strict=True)]
    if len(names) != len(pairs):
        raise UsageError(f"--names: expected {len(pairs)} names (each model on each backend), got {len(names)}.")
    if len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise UsageError(f"--names: expected unique names that are not empty, got {','.join(names)}.")
    return list(names)


def _select_timed_samples(samples: Sequence[Sample], options: BenchOptions) -> list[Sample]:
    """Select evenly spaced samples."""
    indices = np.linspace(0, len(samples) - 1, min(options.max_timed_images, len(samples)))
    return [samples[index] for index in indices.round().astype(int)]


def _make_job(
    entry: BenchEntry,
    samples: Sequence[Sample],
    options: BenchOptions,
    round_index: int,
    work_dir: Path,
    has_sensors: bool,
) -> WorkerJob:
    """Build the job of one round; the first round also evaluates, so that errors in the data appear early."""
    eval_samples = samples if options.evaluates_images and round_index == 0 else ()
    return WorkerJob(
        model=str(entry.path),
        device=options.device,
        backend=entry.backend,
        threads=options.threads,
        timed_images=tuple(str(sample.path) for sample in _select_timed_samples(samples, options)),
        warmup=options.warmup,
        warmup_s=options.warmup_s,
        runs=options.runs // options.rounds + (round_index < options.runs % options.rounds),
        stage_runs=options.stage_runs,
        model_config=str(entry.model_config) if entry.model_config else None,
        eval_images=tuple(str(sample.path) for sample in eval_samples),
        detections_npz=str(work_dir / "detections.npz"),
        energy_s=options.energy_s if has_sensors else 0.0,
        imgsz_hw=entry.imgsz_hw,
        cameras_fps=options.cameras_fps if round_index == options.rounds - 1 else None,
    )


def _make_untimed_job(entry: BenchEntry, samples: Sequence[Sample], options: BenchOptions, work_dir: Path) -> WorkerJob:
    """Build a job that only opens and warms up the model, for a measurement after the rounds."""
    job = _make_job(entry, samples, options, 0, work_dir, has_sensors=False)
    return replace(job, runs=0, stage_runs=0, eval_images=(), cameras_fps=None)


def _make_progress(entries: Sequence[BenchEntry], samples: Sequence[Sample], options: BenchOptions) -> Progress:
    num_eval_images = len(samples) if options.evaluates_images else 0
    runs_per_entry = options.runs + options.rounds * (options.warmup + options.stage_runs) + num_eval_images
    runs_per_entry += (len(options.scenarios) + bool(options.sustained_s)) * options.warmup + int(options.sustained_s)
    return Progress(len(entries) * runs_per_entry, "measure", "run")


def _make_model_result(
    entry: BenchEntry,
    rounds: Sequence[WorkerResult],
    accuracy: tuple[AccuracyResult, ...],
    energy: EnergyResult,
    conditions: RunConditions,
    cameras: CameraResult | None,
    scenarios: tuple[ScenarioResult, ...],
    sustained: SustainedResult | None,
) -> ModelResult:
    first, largest = rounds[0], max(rounds, key=lambda result: result.peak_memory_mib)
    stages = np.concatenate([result.stages_ms for result in rounds])
    engine = read_engine_info(entry.path) if entry.backend == "tensorrt" else None
    return ModelResult(
        name=entry.name,
        path=str(entry.path),
        sha256=entry.sha256,
        backend=entry.backend,
        model=first.model,
        license=first.license,
        parameters=first.parameters,
        flops=first.flops,
        imgsz_hw=(first.imgsz_hw[0], first.imgsz_hw[1]),
        file_mib=sum(file.stat().st_size for file in list_model_files(entry.path)) / 2**20,
        accuracy=accuracy,
        e2e_ms=tuple(sample for result in rounds for sample in result.e2e_ms),
        stages=StageSamples(*(tuple(column.tolist()) for column in stages.T)),
        load_ms=tuple(result.load_ms for result in rounds),
        peak_memory_mib=largest.peak_memory_mib,
        baseline_mib=largest.baseline_mib,
        energy=energy,
        conditions=conditions,
        gpu_memory_mib=_get_max([one.gpu_memory_mib for one in rounds]),
        build_memory_mib=max(one.build_memory_mib for one in rounds),
        gpu_build_memory_mib=_get_max([one.gpu_build_memory_mib for one in rounds]),
        gpu_memory_reason=first.gpu_memory_reason,
        cameras=cameras,
        scenarios=scenarios,
        sustained=sustained,
        engine_build_memory_mib=engine.build_memory_mib if engine else None,
        engine_build_gpu_memory_mib=engine.build_gpu_memory_mib if engine else None,
        context_mib=engine.context_mib if engine else None,
        context_reason=CONTEXT_REASONS.get(entry.backend.partition("-")[0], f"{entry.backend} does not state it"),
    )


def _get_max(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
