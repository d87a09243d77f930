"""The stages of `hkd-quickstart --data`, from the check of the images to the deployment folder. Requires torch."""

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hkd_bench.bench import BenchOptions, bench
from hkd_bench.quickstart.candidates import (
    NUM_TIMED_IMAGES,
    make_initial_checkpoint,
    measure_candidates,
    measure_latencies_ms,
    predict_exported,
    read_device_latencies,
    select_evenly_spaced,
)
from hkd_bench.quickstart.delivery import Delivery, format_command, write_delivery
from hkd_bench.quickstart.plan import (
    DEFAULT_SIZE,
    NARROW,
    STUDENT_SIZES,
    DataCounts,
    OwnDataOptions,
    PlanFile,
    Results,
    Speeds,
    Stage,
    StudentCandidate,
    TrainingPlan,
    as_plain,
    choose_size,
    choose_students,
    estimate_stages,
    format_candidates,
    format_plan,
    plan_training,
    run_stages,
)
from hkd_bench.result import read_result, write_result
from hkd_deploy import open_detector
from hkd_deploy.export.exporter import export_and_verify, export_onnx, make_torch_reference
from hkd_deploy.export.verify import NUM_PARITY_IMAGES, Verification
from hkd_deploy.model_metadata import ExportOptions
from hkd_deploy.precision.cli import convert_precision
from hkd_deploy.precision.model import select_evenly
from hkd_deploy.trt.onnx_file import read_onnx_file
from hkd_det.config import dataclass_from_dict
from hkd_det.console import Progress, log_line
from hkd_det.datasets.audit_run import AuditOptions
from hkd_det.datasets.catalog import DEFAULT_VAL_RATIO, list_splits, load_dataset
from hkd_det.datasets.check import check_dataset
from hkd_det.datasets.check_report import SOURCE_NAME, describe_source
from hkd_det.datasets.data_yaml import load_data_yaml
from hkd_det.datasets.image_files import locate_path
from hkd_det.datasets.layouts import YAML_SUFFIXES
from hkd_det.errors import DataError, HkdError, UsageError
from hkd_det.files import bytes_sha256, file_sha256, read_json, read_yaml, write_text
from hkd_det.image import read_image
from hkd_det.metrics.bootstrap import compare_miss_rates
from hkd_det.metrics.citypersons import REASONABLE, evaluate_detections
from hkd_det.metrics.matching import MissRateResult
from hkd_det.models.checkpoint import load_detector_checkpoint, load_training_state
from hkd_det.shipped import DEFAULT_MODEL, FINETUNE_RECIPE, resolve_model
from hkd_det.structures import Sample
from hkd_det.train.config import TrainConfig
from hkd_det.train.run import handle_interrupts, lock_run
from hkd_det.train.trainer import train

NUM_STAGES = 9
CALIB_IMAGES = 512
MAX_MR_INCREASE = 0.5  # percentage points; INT8 is not recommended above it
DEFAULT_CONF = 0.3  # if the validation images have too few persons to suggest a score threshold


@dataclass(frozen=True)
class OwnDataset:
    """The user's dataset.

    Attributes:
        counts: Numbers of images.
        fingerprint: Digest of images and labels.
        eval_split: Split of the final measurement: test if there is one, otherwise val.
    """

    counts: DataCounts
    fingerprint: str
    eval_split: str


def run_own_data(options: OwnDataOptions, is_plan_only: bool) -> None:
    """Run all stages, or print the plan. Finished stages are not repeated.

    Args:
        options: Flags of the command.
        is_plan_only: Whether to measure, print the plan and stop.

    Raises:
        HkdError: The data have errors, or a budget is too small.
    """
    with _lock_save_dir(options.save_dir), handle_interrupts():
        source = describe_source(options.data)
        options = replace(options, data=_ensure_val_split(options))
        dataset = _read_own_dataset(options.data)
        write_text(options.save_dir / SOURCE_NAME, f"{source}\n")  # another dataset gets another directory
        plan_file = PlanFile.load(options.save_dir / "plan.json")
        first = _make_first_stages(options, dataset)
        if is_plan_only:
            results: dict[str, Any] = run_stages(first[1:], plan_file, {}, 1, None)
        else:
            results = run_stages(first, plan_file, {}, NUM_STAGES, None)
        candidates, speeds = _parse_measurements(results["measure"])
        plan = plan_training(
            choose_students(candidates, options.max_ms, dataset.counts.train), options, speeds, dataset.counts
        )
        later = _make_later_stages(options, dataset, plan, speeds)
        print(f"\n{format_candidates(candidates, plan, options.max_ms)}\n")
        teacher = f"{plan.teacher}, fine-tuned from {DEFAULT_MODEL}" if plan.teacher else f"{DEFAULT_MODEL} itself"
        print(f"student {plan.model} at {plan.size}x{plan.size}, {plan.epochs} epochs; teacher: {teacher}")
        print(f"\n{format_plan([*first, *later], plan_file, results)}\n", flush=True)
        if is_plan_only:
            return
        results = run_stages(later, plan_file, results, NUM_STAGES, 0.0)
    print(f"\nreport: {options.save_dir / 'report.html'}   deployment: {options.save_dir / 'deploy'}")


@contextmanager
def _lock_save_dir(save_dir: Path) -> Iterator[None]:
    try:
        with lock_run(save_dir, is_main_process=True):
            yield
    except UsageError as error:
        if "trains in this directory" not in str(error):
            raise
        raise UsageError(
            f"--save-dir {save_dir}: another process runs in this directory. Wait for its end, or choose another one."
        ) from None


def _ensure_val_split(options: OwnDataOptions) -> str:
    """Return the dataset, or a data YAML that makes the split val of a part of the training images."""
    data, splits = options.data, list_splits(options.data)
    if "val" in splits or "train" not in splits or not Path(data).exists():
        return data
    content: dict[str, Any] = {"path": str(Path(data).resolve())}
    if data.endswith(YAML_SUFFIXES):
        content = load_data_yaml(Path(data))
        root, parent = locate_path(content.get("path", "."), [Path(data).parent]), Path(data).parent
        content["path"] = str((root if root.is_dir() else parent).resolve())
    path = options.save_dir / "data.yaml"
    write_text(path, yaml.safe_dump({**content, "val_ratio": DEFAULT_VAL_RATIO}, sort_keys=False))
    log_line(f"{data}: no split val. {DEFAULT_VAL_RATIO:.0%} of the training images are the split val of {path}")
    return str(path)


def _read_own_dataset(data: str) -> OwnDataset:
    """Count the images and compute the fingerprint. Errors are left to the check."""
    counts, parts = {}, []
    for split in list_splits(data):
        try:
            samples = load_dataset(data, split, lambda _error: None)
        except HkdError:
            samples = []
        counts[split] = len(samples)
        parts += [f"{split} {sample.image_id} {_describe_sample(sample)}" for sample in samples]
    if not counts.get("train") or not counts.get("val"):
        load_dataset(data, "train")
        load_dataset(data, "val")
    eval_split = "test" if counts.get("test") else "val"
    numbers = DataCounts(counts["train"], counts["val"], sum(counts.values()), counts[eval_split])
    return OwnDataset(numbers, bytes_sha256("\n".join(parts).encode("utf-8", "surrogateescape")), eval_split)


def _describe_sample(sample: Sample) -> str:
    stat, gt = sample.path.stat() if sample.path.exists() else None, sample.ground_truth
    size, mtime_ns = (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)
    return f"{sample.path} {size} {mtime_ns} {gt.boxes_xyxy.tolist()} {gt.ignore.tolist()}"


def _make_first_stages(options: OwnDataOptions, dataset: OwnDataset) -> list[Stage]:
    """Return the stages that the plan depends on."""
    data, directory = options.data, options.save_dir
    bench_sha256 = file_sha256(options.device_bench) if options.device_bench else ""
    measured = {"threads": options.threads, "device": options.device, "device_bench": bench_sha256}

    def check(_: Results) -> dict[str, Any]:
        audit = AuditOptions(models=(resolve_model(DEFAULT_MODEL),))
        json_path = directory / "check" / "check.json"
        if check_dataset(data, directory / "check", audit, json_output=str(json_path)):
            raise DataError(
                f"--data {data}: contains errors. Correct those in {directory / 'check' / 'errors.txt'}, then run the "
                "same command again."
            )
        splits = read_json(directory / "check" / "audit.json")["splits"]
        audits = {name: {key: value for key, value in one.items() if key != "findings"} for name, one in splits.items()}
        return {"splits": read_json(json_path)["splits"], "audit": audits}

    def measure(_: Results) -> dict[str, Any]:
        samples = load_dataset(data, "train")
        candidates, speeds = measure_candidates(options, samples, directory / "candidates")
        return {"candidates": [as_plain(candidate) for candidate in candidates], "speeds": as_plain(speeds)}

    settings = {"data": data, "fingerprint": dataset.fingerprint}
    return [
        Stage("check", "check and audit the data", settings, (), 5 + 0.05 * dataset.counts.total, check),
        Stage("measure", "measure the students on this device", settings | measured, (), 75.0, measure),
    ]


def _parse_measurements(result: Results) -> tuple[list[StudentCandidate], Speeds]:
    candidates = [dataclass_from_dict(StudentCandidate, values) for values in result["candidates"]]
    return candidates, dataclass_from_dict(Speeds, result["speeds"])


def _make_later_stages(options: OwnDataOptions, dataset: OwnDataset, plan: TrainingPlan, speeds: Speeds) -> list[Stage]:
    """Return the stages after the plan."""
    directory, data = options.save_dir, options.data
    base = {"fingerprint": dataset.fingerprint}
    estimates = estimate_stages(plan, speeds, dataset.counts)
    configs = _make_train_configs(options, plan)
    budget = {"max_ms": options.max_ms, "threads": options.threads, "device_bench": str(options.device_bench)}

    def train_stage(name: str, title: str, after: tuple[str, ...]) -> Stage:
        if name not in configs:
            return Stage(name, title, base, after, 0.0, lambda _: {})
        config = configs[name]
        files = (config.save_path / "best.pt",)
        settings = base | {"config": config.as_dict()}
        return Stage(name, title, settings, after, estimates[name], lambda _: _train_or_resume(config), files)

    model, int8 = directory / "deploy" / "model.onnx", directory / "model.int8.onnx"
    bench_json, report = directory / "bench.json", directory / "report.html"
    teacher_title = (
        f"fine-tune the teacher {plan.teacher}" if plan.teacher else f"teacher: {DEFAULT_MODEL}, no training"
    )
    return [
        train_stage("teacher", teacher_title, ()),
        train_stage("control", "train the student without a teacher", ()),
        train_stage("distilled", "train the student with the teacher", ("teacher",)),
        Stage(
            "sizes",
            "measure the trained student at all input sizes",
            base | budget,
            ("control", "distilled"),
            estimates["sizes"],
            lambda results: _measure_sizes(options, plan, results),
        ),
        Stage(
            "export",
            "export FP32 and INT8",
            base,
            ("control", "distilled", "sizes"),
            estimates["export"],
            lambda results: _export_models(data, results, model, int8),
            (model,),
        ),
        Stage(
            "bench",
            "measure the exported models on this device",
            base | {"runs": options.runs, "threads": options.threads},
            ("control", "distilled", "sizes", "export"),
            estimates["bench"],
            lambda results: _run_bench(options, plan, dataset.eval_split, results, model, bench_json),
            (bench_json,),
        ),
        Stage(
            "report",
            "write the report and the deployment folder",
            base | {"options": asdict(options)},
            ("check", "measure", "control", "distilled", "sizes", "export", "bench"),
            estimates["report"],
            lambda results: _write_report(options, dataset, plan, results, report),
            (report, directory / "deploy" / "MODEL_CARD.md"),
        ),
    ]


def _make_train_configs(options: OwnDataOptions, plan: TrainingPlan) -> dict[str, TrainConfig]:
    """Return the configurations of the runs, made from the recipe that fine-tunes the shipped detector."""
    recipe = read_yaml(FINETUNE_RECIPE)
    shipped, directory = str(resolve_model(DEFAULT_MODEL)), options.save_dir
    common = {
        **recipe,
        "data": options.data,
        "weights": shipped,
        "imgsz_hw": [plan.size, plan.size],
        "epochs": plan.epochs,
        "seed": options.seed,
        "device": options.device,
        "workers": min(TrainConfig.workers, len(os.sched_getaffinity(0))),
    }

    def make(name: str, model: str, teacher_model: str, teacher: str) -> TrainConfig:
        distill: dict[str, Any] = {name: dict(method) for name, method in recipe["distill"].items()}
        if model != teacher_model:  # necks of different widths are not compared
            distill["dense"]["features"] = 0.0
        run = {"model": model, "save_dir": str(directory / name), "teacher": teacher, "distill": distill}
        return TrainConfig.from_dict({**common, **run})

    configs = {}
    teacher, teacher_model = shipped, NARROW
    if plan.teacher:
        configs["teacher"] = make("teacher", plan.teacher, NARROW, shipped)
        teacher, teacher_model = str(directory / "teacher" / "best.pt"), plan.teacher
    alone = {"model": plan.model, "save_dir": str(directory / "control"), "teacher": "", "distill": {}}
    configs["control"] = TrainConfig.from_dict({**common, **alone})
    return {**configs, "distilled": make("distilled", plan.model, teacher_model, teacher)}


def _train_or_resume(config: TrainConfig) -> dict[str, Any]:
    """Continue the run in its directory if it has the same settings, otherwise start it again."""
    state_path = config.save_path / "last.pt"
    is_same = state_path.exists() and TrainConfig.from_dict(load_training_state(state_path)["config"]) == config
    if not is_same and config.save_path.exists():
        shutil.rmtree(config.save_path)
    result = train(config, resume=is_same)
    best = load_detector_checkpoint(result.best)
    return {
        "best": str(result.best),
        "sha256": file_sha256(result.best),
        "miss_rate": result.miss_rate,
        "epoch": best.epoch,
        "history": [[record.epoch, record.miss_rate] for record in result.history],
    }


def _measure_sizes(options: OwnDataOptions, plan: TrainingPlan, results: Results) -> dict[str, Any]:
    """Compare both students, measure the better one at all input sizes, and choose the size of the export."""
    samples, directory = load_dataset(options.data, "val"), options.save_dir / "sizes"
    rates = {}
    for name in ("distilled", "control"):
        path = directory / f"{name}-{plan.size}.onnx"
        export_onnx(load_detector_checkpoint(Path(results[name]["best"])), path, ExportOptions((plan.size,) * 2))
        rates[name] = _evaluate_exported(path, samples, options.threads)
    difference = compare_miss_rates(rates["distilled"], rates["control"])
    winner = "control" if difference and difference.conclusion == "worse" else "distilled"
    rows = _measure_curve(options, plan, Path(results[winner]["best"]), samples, rates[winner])
    size, is_within = choose_size(rows, plan.size, options.max_ms)
    if not is_within:
        log_line(f"warning: no input size is within --max-ms {options.max_ms:g}: {size}x{size} is the fastest")
    effect = asdict(difference) if difference else None
    return {"winner": winner, "difference": effect, "rows": rows, "size": size, "is_within": is_within}


def _evaluate_exported(path: Path, samples: Sequence[Sample], threads: int | None) -> MissRateResult:
    """Return the miss rate of an ONNX file in the setup Reasonable."""
    with open_detector(path, threads=threads) as detector:
        return evaluate_detections(samples, predict_exported(detector, samples), [REASONABLE])[REASONABLE.name]


def _measure_curve(
    options: OwnDataOptions, plan: TrainingPlan, best: Path, samples: Sequence[Sample], trained: MissRateResult
) -> list[dict[str, Any]]:
    """Return size, p50_ms (None if the target device was not measured), miss_rate and comparison of each input size."""
    device_ms = read_device_latencies(options.device_bench) if options.device_bench else None
    images = [read_image(sample.path) for sample in select_evenly_spaced(samples, NUM_TIMED_IMAGES)]
    checkpoint, rows = load_detector_checkpoint(best), []
    with Progress(len(STUDENT_SIZES[plan.model]), "input sizes", "size") as progress:
        for size in STUDENT_SIZES[plan.model]:
            path = options.save_dir / "sizes" / f"student-{size}.onnx"
            export_onnx(checkpoint, path, ExportOptions((size, size)))
            with open_detector(path, threads=options.threads) as detector:
                times_ms = measure_latencies_ms(detector, images) if device_ms is None else []
            rate = _evaluate_exported(path, samples, options.threads)
            p50_ms = float(np.median(times_ms)) if device_ms is None else device_ms.get((plan.model, size))
            difference = compare_miss_rates(rate, trained)
            conclusion = difference.conclusion if difference else ""
            rows.append({"size": size, "p50_ms": p50_ms, "miss_rate": rate.value, "conclusion": conclusion})
            progress.update()
    return rows


def _export_models(data: str, results: Results, model: Path, int8: Path) -> dict[str, Any]:
    """Export the chosen student, compare it with torch, and convert it to INT8 with a recommendation."""
    size, winner = results["sizes"]["size"], results["sizes"]["winner"]
    checkpoint, options = load_detector_checkpoint(Path(results[winner]["best"])), ExportOptions((size, size))
    samples = load_dataset(data, "val")
    reference = make_torch_reference(checkpoint, Path(results[winner]["best"]).as_posix(), options)
    image_paths = [sample.path for sample in select_evenly(samples, NUM_PARITY_IMAGES)]
    verification = Verification(reference, image_paths, samples, data)
    parity = export_and_verify(checkpoint, model, options, verification)
    log_line(f"{model}: boxes within {parity.box_error_px:.2g} px, scores within {parity.score_error:.2g} of torch")
    suggested = verification.suggest_conf()
    conf = DEFAULT_CONF if suggested is None else suggested
    flags = argparse.Namespace(
        precision="int8",
        data=data,
        calib_data=None,
        calib_images=CALIB_IMAGES,
        max_mr_increase=MAX_MR_INCREASE,
        conf=min(0.99, max(0.01, conf)),
        eval_device="cpu",
        model_config=None,
        force=True,
    )
    convert_precision(model, int8, flags)
    report = json.loads(read_onnx_file(int8).metadata["hkd.precision_report"])
    delivered = model.with_name("model.int8.onnx")
    delivered.unlink(missing_ok=True)
    if report["recommended"]:
        shutil.copyfile(int8, delivered)
    return {"conf": conf, "is_conf_measured": suggested is not None, "int8": report, "sha256": file_sha256(model)}


def _run_bench(
    options: OwnDataOptions, plan: TrainingPlan, split: str, results: Results, model: Path, json_path: Path
) -> dict[str, Any]:
    """Measure both trained students and the student before training at the exported size."""
    size, winner = results["sizes"]["size"], results["sizes"]["winner"]
    other, directory = ("control" if winner == "distilled" else "distilled"), options.save_dir / "sizes"
    other_path, start_path = directory / f"{other}.onnx", directory / "start.onnx"
    export_onnx(load_detector_checkpoint(Path(results[other]["best"])), other_path, ExportOptions((size, size)))
    export_onnx(make_initial_checkpoint(plan.model, options.data), start_path, ExportOptions((size, size)))
    samples = load_dataset(options.data, split)
    bench_options = BenchOptions(
        data=options.data, split=split, runs=options.runs, threads=options.threads, command=format_command(options)
    )
    titles = {"control": "student alone", "distilled": "student distilled"}
    names = [titles[other], "before training", titles[winner]]
    measured = bench([other_path, start_path, model], samples, bench_options, names)
    write_result(json_path, measured)
    after, before = (_evaluate_exported(path, samples, options.threads) for path in (model, start_path))
    difference = compare_miss_rates(after, before)
    return {"names": names, "date": measured.date, "training_effect": difference.summary() if difference else ""}


def _write_report(
    options: OwnDataOptions, dataset: OwnDataset, plan: TrainingPlan, results: Results, page: Path
) -> dict[str, Any]:
    delivery = Delivery(
        options, plan, dataset.counts, dataset.eval_split, dict(results), read_result(options.save_dir / "bench.json")
    )
    write_delivery(delivery, page, load_dataset(options.data, dataset.eval_split))
    return {"size": results["sizes"]["size"], "default_size": DEFAULT_SIZE}
