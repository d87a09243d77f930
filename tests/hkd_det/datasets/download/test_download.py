"""Tests of the download of datasets by name, from a local web server into ./datasets/."""

import io
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from hkd_det.datasets import catalog, data_yaml, download
from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.train.cli import main

CONTENT = random.Random(3).randbytes(300_000)  # default content of the server
SHIPPED = data_yaml.find_catalog_file()
ANNOTATION = """# Compatible with PASCAL Annotation Version 1.00
Image filename : "PennFudanPed/PNGImages/FudanPed00001.png"
Image size (X x Y x C) : 80 x 60 x 3
# Top left pixel co-ordinates : (1, 1)
Bounding box for object 1 "PASpersonWalking" (Xmin, Ymin) - (Xmax, Ymax) : (10, 5) - (30, 50)
"""
Serve = Callable[..., Any]


def list_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def make_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/a.jpg", b"image")
        archive.writestr("labels/a.txt", "0 .5 .5 .2 .2")
    return buffer.getvalue()


WriteCatalog = Callable[..., None]


@pytest.fixture
def write_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteCatalog:
    """Return a function that writes a datasets.yaml with the entry `walkers`; the working directory is tmp_path."""
    monkeypatch.chdir(tmp_path)

    def write(files: list[dict[str, Any]] | None, **extra: Any) -> None:
        defaults = {"homepage": "https://walkers.example", "license": "be kind", "directory_layout": "images/*.jpg"}
        entry = {"path": "walkers/inner", "names": ["person"], "train": "images", **defaults, **extra}
        entry |= {} if files is None else {"download": files}
        (tmp_path / "datasets.yaml").write_text(yaml.safe_dump({"walkers": entry}))

    monkeypatch.setattr(data_yaml, "find_catalog_file", lambda: tmp_path / "datasets.yaml")
    monkeypatch.setattr(download, "find_catalog_file", lambda: tmp_path / "datasets.yaml")
    return write


def make_entry(site: Any, **changes: Any) -> dict[str, Any]:
    file = site.file()
    return {"url": file.url, "sha256": file.sha256, "bytes": file.size_bytes, **changes}


def test_download_extracts_once(
    tmp_path: Path, serve: Serve, write_catalog: WriteCatalog, capsys: pytest.CaptureFixture[str]
) -> None:
    site, plain = serve(content=make_zip()), serve(content=b"{}")
    write_catalog([make_entry(site, unpack_to="inner"), make_entry(plain, url=f"{plain.address}/notes.json")])
    (tmp_path / "datasets" / "walkers").mkdir(parents=True)  # an empty directory is not a dataset
    assert download.download("walkers") == Path("datasets/walkers")
    root = tmp_path / "datasets" / "walkers"
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert files == {"inner/images/a.jpg", "inner/labels/a.txt", "notes.json", download.RECORD_FILE}
    assert list_names(tmp_path / "datasets" / ".downloads") == {"walkers.lock"}
    out = capsys.readouterr().out
    assert "https://walkers.example; by using it you accept the license: be kind" in out and "verified" in out
    assert download.download("walkers") == Path("datasets/walkers")
    assert "nothing is downloaded" in capsys.readouterr().out and len(site.requests) == len(plain.requests) == 1


def test_download_keeps_files_of_the_user(tmp_path: Path, serve: Serve, write_catalog: WriteCatalog) -> None:
    site = serve(content=make_zip())
    write_catalog([make_entry(site)])
    (tmp_path / "datasets" / "walkers").mkdir(parents=True)
    (tmp_path / "datasets" / "walkers" / "own.txt").write_text("own")
    download.download("walkers")
    assert list_names(tmp_path / "datasets" / "walkers") == {"own.txt"} and not site.requests


def test_download_of_changed_entry_is_an_error(tmp_path: Path, serve: Serve, write_catalog: WriteCatalog) -> None:
    site = serve(content=make_zip())
    write_catalog([make_entry(site)])
    download.download("walkers")
    for record in ("{", json.dumps({"http://old/set.zip": "0" * 64})):
        (tmp_path / "datasets" / "walkers" / download.RECORD_FILE).write_text(record)
        with pytest.raises(DataError, match="Remove it to download it again"):
            download.download("walkers")


def test_download_resumes_in_the_second_file(tmp_path: Path, serve: Serve, write_catalog: WriteCatalog) -> None:
    first, second = serve(content=make_zip()), serve(breaks=[1000] + [0] * 4)
    write_catalog([make_entry(first), make_entry(second, url=f"{second.address}/more.bin")])
    with pytest.raises(UnavailableError, match="kept"):
        download.download("walkers")
    assert not (tmp_path / "datasets" / "walkers").exists()
    download.download("walkers")
    assert len(first.requests) == 1 and second.requests[-1]["range"] == "bytes=1000-"
    assert (tmp_path / "datasets" / "walkers" / "more.bin").read_bytes() == CONTENT


def test_interrupted_download_leaves_no_directory(
    tmp_path: Path, serve: Serve, write_catalog: WriteCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = serve(content=make_zip())
    write_catalog([make_entry(site), make_entry(site, unpack_to="again")])
    extract, calls = download.extract_archive, []

    def interrupt(archive: Path, folder: Path) -> None:
        extract(archive, folder)
        calls.append(archive)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(download, "extract_archive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download.download("walkers")
    assert list_names(tmp_path / "datasets") == {".downloads"}
    assert list_names(tmp_path / "datasets/.downloads/walkers") == {"0-set.zip", "1-set.zip"}
    download.download("walkers")
    assert len(site.requests) == 2 and (tmp_path / "datasets/walkers/again/images/a.jpg").exists()


def test_malicious_archive_leaves_nothing(tmp_path: Path, serve: Serve, write_catalog: WriteCatalog) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("images/a.jpg", b"image")
        archive.writestr("../../../evil.txt", b"evil")
    write_catalog([make_entry(serve(content=buffer.getvalue()))])
    with pytest.raises(DataError, match=r"'\.\./\.\./\.\./evil\.txt' is outside"):
        download.download("walkers")
    assert list_names(tmp_path / "datasets/.downloads/walkers") == {"0-set.zip"}
    assert list_names(tmp_path) == {"datasets", "datasets.yaml"} and list_names(tmp_path / "datasets") == {".downloads"}


def test_manual_download_is_described(tmp_path: Path, write_catalog: WriteCatalog) -> None:
    write_catalog(None)
    with pytest.raises(
        UnavailableError, match=r"https://walkers\.example.*be kind.*datasets/walkers as images/\*\.jpg"
    ):
        download.download("walkers")
    with pytest.raises(UsageError, match="walkers"):
        download.download("walker")
    with pytest.raises(UsageError, match="requires a name in"):
        download.download("own.yaml")
    assert list_names(tmp_path) == {"datasets.yaml"}


def test_download_without_disk_space(serve: Serve, write_catalog: WriteCatalog) -> None:
    site = serve()
    write_catalog([make_entry(site, bytes=1 << 60)])
    with pytest.raises(UnavailableError, match=r"1,152,921,504,606,846,976 bytes needed, [\d,]+ free"):
        download.download("walkers")
    assert not site.requests


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("https://ultralytics.com/set.zip", "expected a list"),
        (["https://a.b/set.zip"], "expected a list"),
        ([{"url": "ftp://a.b/set.zip"}], "https"),
        ([{"url": "file:///etc/passwd"}], "https"),
        ([{"url": "https://a.b/set.zip", "bytes": 3}], "sha256: expected .* got None"),
        ([{"url": "https://a.b/set.zip", "bytes": 3, "sha256": None}], "64 lower-case hexadecimal digits"),
        ([{"url": "https://a.b/set.zip", "bytes": 3, "sha256": "A" * 64}], "sha256"),
        ([{"url": "https://a.b/set.zip", "bytes": True, "sha256": "a" * 64}], "bytes: expected .* got True"),
        ([{"url": "https://a.b/set.zip", "bytes": 0, "sha256": "a" * 64}], "bytes: expected .* got 0"),
        ([{"url": "https://a.b/", "bytes": 3, "sha256": "a" * 64}], "a file name"),
        ([{"url": "https://a.b/s", "bytes": 3, "sha256": "a" * 64, "unpack_to": "../x"}], "inside the dataset"),
        ([{"url": "https://a.b/s", "bytes": 3, "sha256": "a" * 64, "unpack_to": "/x"}], "inside the dataset"),
        ([{"url": "https://a.b/s", "bytes": 3, "sha256": "a" * 64, "md5": "x"}], "expected the keys .*, got 'md5'"),
    ],
)
def test_wrong_catalog_entry_is_an_error(write_catalog: WriteCatalog, files: Any, message: str) -> None:
    write_catalog(files)
    with pytest.raises(DataError, match=message):
        download.download("walkers")


def test_downloaded_data_can_be_loaded(serve: Serve, write_catalog: WriteCatalog) -> None:
    """An archive in the layout of PennFudanPed.zip, with the entry of datasets.yaml except for the address."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(1, 11):
            name, image = f"FudanPed{number:05}", cv2.imencode(".png", np.zeros((60, 80, 3), np.uint8))[1]
            archive.writestr(f"PennFudanPed/PNGImages/{name}.png", image.tobytes())
            archive.writestr(f"PennFudanPed/Annotation/{name}.txt", ANNOTATION)
        archive.writestr("PennFudanPed/readme.txt", "The copyright is ours.")
    shipped = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))["pennfudan"]
    write_catalog(
        [make_entry(serve(content=buffer.getvalue()))], **{key: shipped[key] for key in ("format", "train", "val")}
    )
    content = yaml.safe_load(Path("datasets.yaml").read_text())["walkers"]
    del content["names"]
    Path("datasets.yaml").write_text(yaml.safe_dump({"pennfudan": {**content, "path": shipped["path"]}}))
    download.download("pennfudan")
    train, val = (catalog.load_dataset("pennfudan", split) for split in ("train", "val"))
    assert [len(train), len(val)] == [8, 2] and train[0].ground_truth.boxes_xyxy.tolist() == [[9, 4, 30, 50]]
    assert all(sample.path.is_file() for sample in train + val)


def test_catalog_of_the_project() -> None:
    shipped = yaml.safe_load(data_yaml.find_catalog_file().read_text(encoding="utf-8"))
    downloads = {name: download._parse_items(entry.get("download"), name) for name, entry in shipped.items()}
    assert {name: len(items) for name, items in downloads.items() if items} == {"coco-person": 3, "pennfudan": 1}
    for name, entry in shipped.items():
        assert len(Path(entry["path"]).parts) >= 1 and not Path(entry["path"]).is_absolute(), name


@pytest.mark.slow
def test_two_processes_download_once(tmp_path: Path, serve: Serve, write_catalog: WriteCatalog) -> None:
    site = serve(content=make_zip())
    write_catalog([make_entry(site)])
    code = (
        "import sys; from pathlib import Path; from hkd_det.datasets import data_yaml, download\n"
        "data_yaml.find_catalog_file = download.find_catalog_file = lambda: Path('datasets.yaml')\n"
        "download.download('walkers')"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error.decode()
    assert len(site.requests) == 1 and (tmp_path / "datasets/walkers/images/a.jpg").exists()


def test_command_downloads_and_continues(
    serve: Serve, write_catalog: WriteCatalog, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_catalog([make_entry(serve(content=make_zip()), unpack_to="inner")])
    assert main(["--data", "walkers", "--download"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("Next: hkd-train --data walkers")
    monkeypatch.setattr("hkd_det.datasets.check.check_dataset", lambda data, *_options: len(data))
    assert main(["--data", "walkers", "--download", "--check"]) == len("walkers")  # continues with the check


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--download"], 2, "--data NAME"),
        (["--download", "--data", "walker"], 2, "Did you mean walkers"),
        (["--download", "--data", "own.yaml"], 2, "requires a name in"),
        (["--download", "--data", "walkers"], 1, "https://walkers.example"),
        (["--download", "--data", "walkers", "--model", "mini-student"], 1, "https://walkers.example"),
    ],
)
def test_command_wrong_flag_gives_one_line(
    write_catalog: WriteCatalog, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, message: str
) -> None:
    write_catalog(None)
    assert main(flags) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("hkd-train: ") and message in error and len(error.splitlines()) == 1
