"""Tests of `hkd-bench` on a model whose detections are known: metrics, files, report, invalid input."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import pytest
import yaml

from hkd_bench import worker
from hkd_bench.bench import BenchOptions, assign_model_configs, bench
from hkd_bench.cli import main
from hkd_bench.detection_files import list_detection_files
from hkd_bench.host import read_host_fields
from hkd_bench.report import write_bench_report
from hkd_bench.result import BenchResult, measure_accuracy, read_result, write_result
from hkd_bench.table import format_markdown_table, format_text_table
from hkd_bench.worker import read_resident_mib
from hkd_deploy import Detector, open_detector
from hkd_deploy.backends.openvino import export_openvino
from hkd_deploy.process_memory import read_peak_mib, reset_peak
from hkd_det.datasets.catalog import load_dataset
from hkd_det.errors import DataError, UsageError
from hkd_det.structures import Detections

WITHOUT_TERMINAL = """
import sys
from hkd_det import console
from hkd_bench.cli import main
console.LINE_INTERVAL_S = 0.0
sys.exit(main(sys.argv[1:]))
"""
TIME_STAMPED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.+)")

SCHEMA = Path(__file__).parents[2] / "docs/reference/bench-result.schema.json"


@pytest.fixture(scope="module")
def model(write_tiny_onnx: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_onnx(tmp_path_factory.mktemp("model") / "tiny.onnx")


@pytest.fixture(scope="module")
def result(model: Path, half_right: Path) -> BenchResult:
    options = BenchOptions(
        runs=8,
        rounds=2,
        warmup=1,
        warmup_s=0.05,
        stage_runs=3,
        data=str(half_right),
        split="val",
        command="hkd-bench x",
    )
    return bench([model, model], load_dataset(str(half_right), "val"), options, names=["one", "two"])


def test_bench_miss_rate_is_half(result: BenchResult) -> None:
    """One of two persons is detected: the miss rate is 0.5 at every point of the curve."""
    for model_result in result.models:
        assert model_result.miss_rates["Reasonable"] == pytest.approx(0.5, abs=1e-12)
        assert model_result.num_gt["Reasonable"] == 2 and result.num_images == 2
        assert model_result.miss_rates["heavy"] is None and model_result.num_gt["heavy"] == 0


def test_bench_has_ap_and_recall_next_to_the_miss_rate(result: BenchResult, half_right: Path) -> None:
    """One exact box in two images: precision 1 up to recall 0.5, which are 51 of COCO's 101 recall points."""
    (accuracy,) = result.models[0].accuracy
    assert (accuracy.ap, accuracy.ap50) == (pytest.approx(51 / 101), pytest.approx(51 / 101))
    score = 32 * 70 / (96 * 160)
    assert (accuracy.recall, accuracy.threshold_source) == (0.5, "images")
    assert accuracy.threshold == pytest.approx(score, abs=1e-4)
    text = format_text_table(result)
    assert "AP50" in text.splitlines()[0] and "recall" in text.splitlines()[0] and " 50.5 " in text
    assert "Recall of Reasonable at a score of 0.146 (one), 0.146 (two), with the highest F1 score on these" in text
    assert "Fewer than 50 images or 50 persons of Reasonable" in text
    assert "(+0.0 to +0.0): no conclusion: fewer than 50 images or 50 persons" in text
    samples = load_dataset(str(half_right), "val")
    detections = [Detections(sample.ground_truth.boxes_xyxy, np.array([0.6])) for sample in samples]
    ((low,), (high,)) = measure_accuracy({"data": samples}, [detections] * 2, [0.5, 0.7])
    assert (low.recall, low.threshold, low.threshold_source, high.recall) == (1, 0.5, "model", 0)


def test_report_of_gpu_has_its_memory(result: BenchResult, tmp_path: Path) -> None:
    one = replace(result.models[0], gpu_memory_mib=512.0, gpu_memory_reason="", context_mib=31.6)
    for device, shown in (("cuda", True), ("cpu", False)):
        write_bench_report(tmp_path / "r.html", replace(result, device=device, models=(one,)), title="GPU")
        page = (tmp_path / "r.html").read_text()
        assert ("GPU memory of the process" in page and "<td>31.6</td>" in page and "<td>512</td>" in page) == shown


def test_bench_names_model_that_detects_no_person(result: BenchResult) -> None:
    assert "detects no person" not in format_text_table(result)
    one, two = result.models
    accuracy = replace(two.accuracy[0], miss_rates={"Reasonable": 1.0, "heavy": None, "All": 1.0})
    blind = replace(result, models=(one, replace(two, accuracy=(accuracy,))))
    assert f"two detects no person of {result.data}: check its input" in format_text_table(blind)


def test_bench_counts_runs_and_reads_metadata(result: BenchResult, model: Path) -> None:
    for model_result in result.models:
        assert len(model_result.e2e_ms) == 8 and min(model_result.e2e_ms) > 0
        assert len(model_result.stages.inference_ms) == 6 and len(model_result.load_ms) == 2
        assert (model_result.parameters, model_result.flops, model_result.imgsz_hw) == (12, 3456, (96, 160))
        assert model_result.file_mib == model.stat().st_size / 2**20
        assert 0 < model_result.baseline_mib < model_result.peak_memory_mib


def test_memory_at_the_build_has_what_opening_needs(
    model: Path, half_right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening takes 200 MiB that are free before the first run."""

    def open_with_workspace(*args: object, **kwargs: object) -> Detector:
        workspace = np.ones(200 * 2**20, np.uint8)
        assert workspace[-1] == 1
        return open_detector(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "open_detector", open_with_workspace)
    image = str(load_dataset(str(half_right), "val")[0].path)
    job = worker.WorkerJob(
        str(model), "cpu", "onnxruntime", None, (image,), 1, 0.0, 1, 1, None, (), str(tmp_path / "d.npz")
    )
    measured = worker.measure_model(job)
    assert 190 <= measured.build_memory_mib - measured.baseline_mib < 300  # some of it was free memory of the process
    assert measured.build_memory_mib <= measured.peak_memory_mib and measured.gpu_build_memory_mib is None


def test_memory_at_the_build_is_in_table_and_page(result: BenchResult, tmp_path: Path) -> None:
    one = result.models[0]
    assert one.build_memory_mib is not None and one.baseline_mib < one.build_memory_mib <= one.peak_memory_mib
    assert (one.context_mib, one.context_reason) == (None, "ONNX Runtime states it in its C interface only")
    assert "Peak memory while the engine or session was built: 1234 MiB (one)" in format_text_table(
        replace(result, models=(replace(one, build_memory_mib=1234.0),))
    )
    gpu = replace(result, device="cuda", models=(replace(one, build_memory_mib=1234.0, gpu_build_memory_mib=567.0),))
    write_bench_report(tmp_path / "r.html", gpu, title="build")
    page = (tmp_path / "r.html").read_text()
    assert "<td>1234</td>" in page and "<td>567</td>" in page and one.context_reason in page


@pytest.mark.slow
def test_bench_one_file_on_two_backends(model: Path, half_right: Path, tmp_path: Path) -> None:
    folder = export_openvino(model)
    options = BenchOptions(runs=2, rounds=1, warmup=1, warmup_s=0, stage_runs=1, data=str(half_right), split="val")
    samples = load_dataset(str(half_right), "val")
    both = bench([model], samples, replace(options, backends=("onnxruntime", "openvino")))
    assert [(one.name, one.backend) for one in both.models] == [
        ("tiny onnxruntime", "onnxruntime"),
        ("tiny openvino", "openvino"),
    ]
    assert [one.miss_rates["Reasonable"] for one in both.models] == pytest.approx([0.5, 0.5])
    assert "by onnxruntime, openvino:" in format_text_table(both)
    renamed = replace(both, models=tuple(replace(one, name=f"m{place}") for place, one in enumerate(both.models)))
    assert "by onnxruntime (m0), openvino (m1):" in format_text_table(renamed)
    write_result(tmp_path / "r.json", both)
    assert read_result(tmp_path / "r.json") == both
    from_dir = bench([folder], samples, options)
    assert from_dir.models[0].backend == "openvino" and "by openvino:" in format_text_table(from_dir)
    assert from_dir.models[0].file_mib == sum(path.stat().st_size for path in folder.iterdir()) / 2**20


def test_result_round_trip_and_wrong_json(result: BenchResult, tmp_path: Path) -> None:
    write_result(tmp_path / "r.json", result)
    assert read_result(tmp_path / "r.json") == result
    content = json.loads((tmp_path / "r.json").read_text())
    jsonschema.validate(content, json.loads(SCHEMA.read_text()))
    for key, value in (("schema", 99), ("models", "none"), ("runs", "many")):
        (tmp_path / "r.json").write_text(json.dumps({**content, key: value}))
        with pytest.raises(DataError, match=r"r\.json"):
            read_result(tmp_path / "r.json")
    for schema, hint in ((2, "Measure again with hkd-bench --json"), (99, "Update hkd-det"), (None, "Measure again")):
        (tmp_path / "r.json").write_text(json.dumps({**content, "schema": schema}))
        with pytest.raises(DataError, match=f"schema 3, 4 or 5, got {schema}. {hint}"):
            read_result(tmp_path / "r.json")
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_result(tmp_path / "r.json")


def test_tables_contain_models_and_miss_rate(result: BenchResult) -> None:
    lines = format_text_table(result).splitlines()
    assert any(line.startswith("one ") and "50.00" in line for line in lines)
    assert "| one " in format_markdown_table(result) and "50.00" in format_markdown_table(result)


class Page(HTMLParser):
    """Collects external references and images without alternative text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.without_alt = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.fetched += [
            v for k, v in values.items() if k in ("src", "href") and v and not v.startswith(("data:", "#"))
        ]
        self.without_alt += tag == "img" and not values.get("alt")


def test_report_is_self_contained(result: BenchResult, tmp_path: Path) -> None:
    write_bench_report(tmp_path / "page.html", result, title="A <title> & more")
    text = (tmp_path / "page.html").read_text()
    page = Page()
    page.feed(text)
    assert page.fetched == [] and page.without_alt == 0 and "<script" not in text
    assert not re.findall(r"url\((?!['\"]?(?:data:|#))", text)
    assert "A &lt;title&gt; &amp; more" in text and "50.00" in text and "hkd-bench x" in text
    assert f"{result.models[0].latency.p50_ms:.1f}" in text


@pytest.mark.slow
def test_command_writes_json_and_html(
    model: Path, half_right: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "r.json"
    flags = [str(model), "--data", str(half_right), "--runs", "3", "--names", "tiny-a", "--json", str(out)]
    assert main([*flags, "--html", str(tmp_path / "r.html")]) == 0
    printed = capsys.readouterr().out
    assert "tiny-a" in printed and "50.00" in printed
    assert read_result(out).models[0].name == "tiny-a" and (tmp_path / "r.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.usefixtures("one_round")
def test_second_ground_truth_has_its_own_miss_rate(
    model: Path, half_right: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second ground truth, the person that the model misses is an ignore region."""
    content = json.loads((half_right.parent / "all.json").read_text())
    content["annotations"][1]["iscrowd"] = 1
    content["images"].reverse()
    (tmp_path / "audited.json").write_text(json.dumps(content))
    annotations = {"images": str(half_right.parent), "annotations": str(tmp_path / "audited.json")}
    audited, out = tmp_path / "audited.yaml", tmp_path / "r.json"
    audited.write_text(yaml.safe_dump({"format": "coco", "val": annotations}))
    flags = ["--runs", "3", "--json", str(out), "--html", str(tmp_path / "r.html")]
    assert main([str(model), "--data", f"{half_right},{audited}", *flags]) == 0
    first, second = read_result(out).models[0].accuracy
    assert (first.miss_rates["All"], first.num_gt["All"]) == (pytest.approx(0.5), 2)
    assert (second.miss_rates["All"], second.num_gt["All"]) == (0, 1)
    printed = capsys.readouterr().out
    assert "All (data) " in printed and "All (audited) " in printed
    assert "Ground truth audited" in (tmp_path / "r.html").read_text()
    content["images"].pop()
    content["annotations"].pop(0)
    content["annotations"][0]["iscrowd"] = 0
    (tmp_path / "audited.json").write_text(json.dumps(content))
    assert main([str(model), "--data", f"{half_right},{audited}", *flags]) == 1
    assert "audited.yaml: lacks 1 of 2 images of the first dataset" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("one_round")
def test_images_are_timed_without_miss_rate(
    model: Path, half_right: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "r.json", tmp_path / "r.html"
    flags = [str(model), "--images", str(half_right.parent), "--runs", "3", "--json", str(out), "--html", str(page)]
    assert main(flags) == 0
    result = read_result(out)
    assert result.num_images == 0 and result.num_timed_images == 2 and result.split == ""
    assert result.models[0].miss_rates["Reasonable"] is None and len(result.models[0].e2e_ms) == 3
    assert "Miss rate was not measured" in page.read_text()
    assert "50.00" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def external_model(write_tiny_onnx: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny model as a file of another tool: metadata of hkd-export removed, float scores, YAML elsewhere."""
    folder = tmp_path_factory.mktemp("external")
    path = write_tiny_onnx(folder / "other.onnx", changes={"hkd.format": None})
    config = {"output_format": "boxes-scores", "layout": "NHWC", "name": "Other", "license": "BSD-3-Clause"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return path, folder / "config.yaml"


@pytest.mark.slow
@pytest.mark.usefixtures("one_round")
def test_external_model_equals_the_exported_one(
    model: Path, external_model: tuple[Path, Path], half_right: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, config = external_model
    out = tmp_path / "r.json"
    flags = ["--data", str(half_right), "--runs", "3", "--json", str(out), "--html", str(tmp_path / "r.html")]
    assert main([str(model), str(other), "--model-config", str(config), *flags]) == 0
    exported, external = read_result(out).models
    assert replace(external.accuracy[0], differences={}) == exported.accuracy[0]
    assert external.accuracy[0].differences["All"].conclusion == "too few images or persons"
    assert (external.model, external.license, external.flops) == ("Other", "BSD-3-Clause", None)
    assert "License of the weights: Apache-2.0 (tiny); BSD-3-Clause (other)." in capsys.readouterr().out
    assert "BSD-3-Clause (other)" in (tmp_path / "r.html").read_text()


def test_model_configs_are_assigned_to_external_models(model: Path, external_model: tuple[Path, Path]) -> None:
    other, config = external_model
    second = config.with_name("second.yaml")
    copy = other.with_name("copy.onnx")
    copy.write_bytes(other.read_bytes())
    assert assign_model_configs([other, model, copy, other], [config]) == {other: config, copy: config}
    assert assign_model_configs([other, model, copy], [config, second]) == {other: config, copy: second}
    assert assign_model_configs([other, model], []) == {}
    with pytest.raises(UsageError, match=r"expected one file, or 1 \(one per model"):
        assign_model_configs([other, model], [config, second])
    with pytest.raises(UsageError, match="has no effect"):
        assign_model_configs([model], [config])


def test_memory_excludes_the_runtime(result: BenchResult) -> None:
    """A model of twelve weights adds its session and not the 20 MiB of the imported runtime."""
    assert max(model_result.memory_mib for model_result in result.models) < 15


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["MODEL"], 2, "--data"),
        (["MODEL", "--data", "none.yaml"], 1, "none.yaml"),
        (["none.onnx", "--data", "DATA"], 1, "none.onnx"),
        (["DATA", "--data", "DATA"], 1, "data.yaml"),
        (["MODEL", "--data", "DATA", "--split", "test"], 2, "test"),
        (["MODEL", "--data", "DATA", "--device", "tpu"], 2, "tpu"),
        (["MODEL", "--data", "DATA", "--backend", "onnx"], 2, "--backend: expected one of onnxruntime, openvino"),
        (["MODEL", "--data", "DATA", "--backend", "openvino,"], 2, "--backend: expected one of"),
        (["MODEL", "--data", "DATA", "--device", "cuda"], 1, "cuda"),
        (["MODEL", "--data", "DATA", "--max-images", "0"], 2, "--max-images"),
        (["MODEL", "--data", "DATA", "--save-detections", "."], 2, "--save-detections .: expected a file"),
        (["MODEL", "--data", "DATA", "--names", "a,b"], 2, "--names"),
        (["MODEL", "--data", "DATA", "--names", " "], 2, "--names"),
        (["MODEL", "--data", "DATA", "--images", "."], 2, "exactly one of them"),
        (["MODEL", "--images", "nowhere"], 2, "nowhere"),
        (["MODEL", "--data", "DATA", "--json", "FOLDER"], 2, "--json"),
        (["MODEL", "--data", "DATA", "--html", "FOLDER"], 2, "--html"),
    ],
)
def test_wrong_flag_gives_one_line(
    flags: list[str], code: int, message: str, model: Path, half_right: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"MODEL": str(model), "DATA": str(half_right), "FOLDER": str(half_right.parent)}
    assert main([paths.get(flag, flag) for flag in flags]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hkd-bench: ")]
    assert len(lines) == 1 and message in lines[0]


def test_read_peak_includes_freed_memory() -> None:
    reset_peak()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert read_peak_mib() - read_resident_mib() > 40


def test_host_fields_have_value_or_reason() -> None:
    fields = read_host_fields()
    assert {field.name for field in fields} >= {"CPU", "cores", "memory"}
    assert all((field.value is None) == bool(field.reason) for field in fields)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "packages"), [("worker", {"torch", "matplotlib"}), ("report", {"torch"})])
def test_module_does_not_import(module: str, packages: set[str]) -> None:
    code = f"import sys, hkd_bench.{module}; sys.exit(bool({packages} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_package_gives_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tabulate" else object())
    assert main(["x.onnx"]) == 1
    assert capsys.readouterr().err == "hkd-bench: tabulate: not installed. Run pip install 'hkd-det[bench]'.\n"


def write_coco_data(directory: Path, half_right: Path, person_id: int) -> Path:
    """Write the annotations of `half_right` with other ids: of the images, and of the category after a car."""
    content = json.loads((half_right.parent / "all.json").read_text())
    for image in content["images"]:
        image["id"] += 70
    for annotation in content["annotations"]:
        annotation |= {"image_id": annotation["image_id"] + 70, "category_id": person_id}
    content["categories"] = [{"id": 1, "name": "car"}, {"id": person_id, "name": "Pedestrian"}]
    (directory / "val.json").write_text(json.dumps(content))
    source = {"images": str(half_right.parent), "annotations": "val.json"}
    (directory / "data.yaml").write_text(yaml.safe_dump({"format": "coco", "val": source}))
    return directory / "data.yaml"


@pytest.mark.slow
@pytest.mark.usefixtures("one_round")
def test_saved_detections_have_the_miss_rate_of_bench(
    model: Path, half_right: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`hkd-bench score` and pycocotools read the file."""
    data = write_coco_data(tmp_path, half_right, person_id=5)
    saved, out = tmp_path / "new" / "detections.json", tmp_path / "bench.json"
    flags = [str(model), "--data", str(data), "--runs", "3", "--json", str(out), "--save-detections", str(saved)]
    assert main(flags) == 0
    assert f"saved {saved}" in capsys.readouterr().out
    records = json.loads(saved.read_text())
    assert [{**record, "score": round(record["score"], 4)} for record in records] == [
        {"image_id": image_id, "category_id": 5, "bbox": [40, 10, 32, 70], "score": round(32 * 70 / (96 * 160), 4)}
        for image_id in (71, 72)
    ]
    scores = tmp_path / "scores.json"
    files = ["--annotations", str(tmp_path / "val.json"), "--detections", str(saved), "--json", str(scores)]
    assert main(["score", *files, "--protocol", "citypersons"]) == 0
    assert json.loads(scores.read_text())["miss_rate"]["Reasonable"] == pytest.approx(0.5)
    assert read_result(out).models[0].miss_rates["Reasonable"] == pytest.approx(0.5)
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = pycocotools.coco.COCO(str(tmp_path / "val.json"))
        for annotation in ground_truth.anns.values():
            annotation |= {"area": annotation["bbox"][2] * annotation["bbox"][3], "iscrowd": 0}
        evaluation = pycocotools.cocoeval.COCOeval(ground_truth, ground_truth.loadRes(str(saved)), "bbox")
        evaluation.params.catIds = [5]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[8] == pytest.approx(0.5)  # one of two people is found: recall 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("one_round")
def test_saved_detections_of_several_models_and_of_images(
    model: Path, half_right: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "detections.json"
    flags = [str(model), str(model), "--names", "one,two/b", "--images", str(half_right.parent), "--runs", "3"]
    assert main([*flags, "--save-detections", str(saved)]) == 0
    files = [tmp_path / "detections-one.json", tmp_path / "detections-two_b.json"]
    printed = capsys.readouterr().out
    assert not saved.exists() and all(f"saved {file}" in printed for file in files)
    contents = [json.loads(file.read_text()) for file in files]
    assert [[record["image_id"] for record in content] for content in contents] == [["1.png", "2.png"]] * 2
    assert contents[0][0]["category_id"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("one_round")
def test_saved_detections_of_other_formats_have_file_names(model: Path, half_right: Path, tmp_path: Path) -> None:
    """The official file of CityPersons names an image `im_name`; its ids are not in the .mat file of the split."""
    for folder in ("images", "labels"):
        (tmp_path / folder / "val").mkdir(parents=True)
    for number in (1, 2):
        shutil.copy(half_right.parent / f"{number}.png", tmp_path / "images" / "val" / f"{number}_leftImg8bit.png")
        (tmp_path / "labels" / "val" / f"{number}_leftImg8bit.txt").write_text("0 0.35 0.46875 0.2 0.729166667\n")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images/val\nval: images/val\nnames: {0: person}\n")
    saved, scores = tmp_path / "detections.json", tmp_path / "scores.json"
    assert (
        main([str(model), "--data", str(tmp_path / "data.yaml"), "--runs", "3", "--save-detections", str(saved)]) == 0
    )
    records = json.loads(saved.read_text())
    assert [record["image_id"] for record in records] == ["1_leftImg8bit.png", "2_leftImg8bit.png"]
    content = json.loads((half_right.parent / "all.json").read_text())
    for image in content["images"]:
        image["im_name"] = f"{Path(image.pop('file_name')).stem}_leftImg8bit.png"
    (tmp_path / "val_gt.json").write_text(json.dumps(content))
    files = ["--annotations", str(tmp_path / "val_gt.json"), "--detections", str(saved), "--json", str(scores)]
    assert main(["score", *files, "--protocol", "citypersons"]) == 0
    assert json.loads(scores.read_text())["miss_rate"]["Reasonable"] == pytest.approx(0.5)


def test_detection_files_have_unique_names(tmp_path: Path) -> None:
    names = [file.name for file in list_detection_files(tmp_path / "d.json", ["a/b", "a_b", "c"])]
    assert names == ["d-1-a_b.json", "d-2-a_b.json", "d-3-c.json"]
    assert list_detection_files(tmp_path / "d.json", ["a/b"]) == [tmp_path / "d.json"]


@pytest.mark.slow
def test_bench_without_terminal_prints_stages(model: Path, half_right: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TERMINAL, str(model), "--data", str(half_right), "--runs", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    lines = [match[1] for match in map(TIME_STAMPED.fullmatch, done.stdout.splitlines()) if match]
    assert lines[0] == "round 1/3 tiny: measure latency, detect on 2 images"
    assert re.match(r"round 1/3 tiny: \d+/\d+ runs, \d+:\d\d left", lines[1])
    assert "round 3/3 tiny: measure latency" in lines
