"""Data sets by name, from a web server on this machine into ./datasets/."""

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

from hkd_det.datasets import catalog as catalogue
from hkd_det.datasets import download
from hkd_det.errors import DataError, UnavailableError, UsageError
from hkd_det.train.cli import main

CONTENT = random.Random(3).randbytes(300_000)  # what the server has, unless it is told
SHIPPED = catalogue.find_catalog_file()
ANNOTATION = """# Compatible with PASCAL Annotation Version 1.00
Image filename : "PennFudanPed/PNGImages/FudanPed00001.png"
Image size (X x Y x C) : 80 x 60 x 3
# Top left pixel co-ordinates : (1, 1)
Bounding box for object 1 "PASpersonWalking" (Xmin, Ymin) - (Xmax, Ymax) : (10, 5) - (30, 50)
"""
Serve = Callable[..., Any]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def people_zip() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/a.jpg", b"picture")
        archive.writestr("labels/a.txt", "0 .5 .5 .2 .2")
    return held.getvalue()


Known = Callable[..., None]


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Known:
    """Writes a datasets.yaml with one set, `walkers`, whose files these are; works in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def write(files: list[dict[str, Any]] | None, **more: Any) -> None:
        about = {"homepage": "https://people.example", "license": "be kind", "directory_layout": "images/*.jpg"}
        entry = {"path": "walkers/inner", "names": ["person"], "train": "images", **about, **more}
        entry |= {} if files is None else {"download": files}
        (tmp_path / "datasets.yaml").write_text(yaml.safe_dump({"walkers": entry}))

    monkeypatch.setattr(catalogue, "catalogue_file", lambda: tmp_path / "datasets.yaml")
    monkeypatch.setattr(download, "catalogue_file", lambda: tmp_path / "datasets.yaml")
    return write


def said(site: Any, **changes: Any) -> dict[str, Any]:
    file = site.file()
    return {"url": file.url, "sha256": file.sha256, "bytes": file.size_bytes, **changes}


def test_a_set_is_fetched_unpacked_and_not_fetched_again(
    tmp_path: Path, serve: Serve, known: Known, capsys: pytest.CaptureFixture[str]
) -> None:
    site, plain = serve(content=people_zip()), serve(content=b"{}")
    known([said(site, unpack_to="inner"), said(plain, url=f"{plain.address}/notes.json")])
    (tmp_path / "datasets" / "walkers").mkdir(parents=True)  # an empty folder is no data
    assert download.download("walkers") == Path("datasets/walkers")
    root = tmp_path / "datasets" / "walkers"
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert files == {"inner/images/a.jpg", "inner/labels/a.txt", "notes.json", download.RECORD_FILE}
    assert left(tmp_path / "datasets" / ".downloads") == {"walkers.lock"}
    out = capsys.readouterr().out
    assert "https://people.example; by using it you accept: be kind" in out and "verified" in out
    assert download.download("walkers") == Path("datasets/walkers")
    assert "nothing is fetched" in capsys.readouterr().out and len(site.asked) == len(plain.asked) == 1


def test_what_the_user_has_put_there_stays(tmp_path: Path, serve: Serve, known: Known) -> None:
    site = serve(content=people_zip())
    known([said(site)])
    (tmp_path / "datasets" / "walkers").mkdir(parents=True)
    (tmp_path / "datasets" / "walkers" / "mine.txt").write_text("mine")
    download.download("walkers")
    assert left(tmp_path / "datasets" / "walkers") == {"mine.txt"} and not site.asked


def test_other_files_than_now_are_not_taken_for_them(tmp_path: Path, serve: Serve, known: Known) -> None:
    site = serve(content=people_zip())
    known([said(site)])
    download.download("walkers")
    for record in ("{", json.dumps({"http://old/set.zip": "0" * 64})):
        (tmp_path / "datasets" / "walkers" / download.RECORD_FILE).write_text(record)
        with pytest.raises(DataError, match="remove it to fetch those"):
            download.download("walkers")


def test_a_set_that_breaks_in_the_second_file_goes_on_there(tmp_path: Path, serve: Serve, known: Known) -> None:
    first, second = serve(content=people_zip()), serve(breaks=[1000] + [0] * 4)
    known([said(first), said(second, url=f"{second.address}/more.bin")])
    with pytest.raises(UnavailableError, match="kept"):
        download.download("walkers")
    assert not (tmp_path / "datasets" / "walkers").exists()
    download.download("walkers")
    assert len(first.asked) == 1 and second.asked[-1]["range"] == "bytes=1000-"
    assert (tmp_path / "datasets" / "walkers" / "more.bin").read_bytes() == CONTENT


def test_a_set_is_never_half_there(tmp_path: Path, serve: Serve, known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    site = serve(content=people_zip())
    known([said(site), said(site, unpack_to="again")])
    real, calls = download.extract_archive, []

    def stopped(archive: Path, folder: Path) -> None:
        real(archive, folder)
        calls.append(archive)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(download, "unpack", stopped)
    with pytest.raises(KeyboardInterrupt):
        download.download("walkers")
    assert left(tmp_path / "datasets") == {".downloads"}
    assert left(tmp_path / "datasets/.downloads/walkers") == {"0-set.zip", "1-set.zip"}
    download.download("walkers")
    assert len(site.asked) == 2 and (tmp_path / "datasets/walkers/again/images/a.jpg").exists()


def test_an_evil_archive_leaves_nothing(tmp_path: Path, serve: Serve, known: Known) -> None:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("images/a.jpg", b"picture")
        archive.writestr("../../../evil.txt", b"evil")
    known([said(serve(content=held.getvalue()))])
    with pytest.raises(DataError, match=r"'\.\./\.\./\.\./evil\.txt' would lie outside"):
        download.download("walkers")
    assert left(tmp_path / "datasets/.downloads/walkers") == {"0-set.zip"}
    assert left(tmp_path) == {"datasets", "datasets.yaml"} and left(tmp_path / "datasets") == {".downloads"}


def test_what_cannot_be_downloaded_says_how_to_get_it(tmp_path: Path, known: Known) -> None:
    known(None)
    with pytest.raises(UnavailableError, match=r"https://people\.example.*be kind.*datasets/walkers as images/\*\.jpg"):
        download.download("walkers")
    with pytest.raises(UsageError, match="walkers"):
        download.download("walker")
    with pytest.raises(UsageError, match="by their names"):
        download.download("mine.yaml")
    assert left(tmp_path) == {"datasets.yaml"}


def test_no_room(serve: Serve, known: Known) -> None:
    site = serve()
    known([said(site, bytes=1 << 60)])
    with pytest.raises(UnavailableError, match=r"1,152,921,504,606,846,976 bytes needed, [\d,]+ free"):
        download.download("walkers")
    assert not site.asked


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("https://ultralytics.com/set.zip", "expected a list"),
        (["https://a.b/set.zip"], "expected a list"),
        ([{"url": "ftp://a.b/set.zip"}], "https"),
        ([{"url": "file:///etc/passwd"}], "https"),
        ([{"url": "https://a.b/set.zip", "bytes": 3}], "sha256 None"),
        ([{"url": "https://a.b/set.zip", "bytes": 3, "sha256": None}], "no file without one"),
        ([{"url": "https://a.b/set.zip", "bytes": 3, "sha256": "A" * 64}], "sha256"),
        ([{"url": "https://a.b/set.zip", "bytes": True, "sha256": "a" * 64}], "bytes True"),
        ([{"url": "https://a.b/set.zip", "bytes": 0, "sha256": "a" * 64}], "bytes 0"),
        ([{"url": "https://a.b/", "bytes": 3, "sha256": "a" * 64}], "file's name"),
        ([{"url": "https://a.b/s", "bytes": 3, "sha256": "a" * 64, "unpack_to": "../x"}], "inside the data set"),
        ([{"url": "https://a.b/s", "bytes": 3, "sha256": "a" * 64, "unpack_to": "/x"}], "inside the data set"),
        ([{"url": "https://a.b/s", "bytes": 3, "sha256": "a" * 64, "md5": "x"}], "unknown key 'md5'"),
    ],
)
def test_a_wrong_catalogue_is_one_line(known: Known, files: Any, message: str) -> None:
    known(files)
    with pytest.raises(DataError, match=message):
        download.download("walkers")


def test_what_is_fetched_can_be_read(serve: Serve, known: Known) -> None:
    """An archive laid out as PennFudanPed.zip, and the entry that is shipped, but for the address."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for number in range(1, 11):
            name, picture = f"FudanPed{number:05}", cv2.imencode(".png", np.zeros((60, 80, 3), np.uint8))[1]
            archive.writestr(f"PennFudanPed/PNGImages/{name}.png", picture.tobytes())
            archive.writestr(f"PennFudanPed/Annotation/{name}.txt", ANNOTATION)
        archive.writestr("PennFudanPed/readme.txt", "The copyright is ours.")
    shipped = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))["pennfudan"]
    known([said(serve(content=held.getvalue()))], **{key: shipped[key] for key in ("format", "train", "val")})
    content = yaml.safe_load(Path("datasets.yaml").read_text())["walkers"]
    del content["names"]
    Path("datasets.yaml").write_text(yaml.safe_dump({"pennfudan": {**content, "path": shipped["path"]}}))
    download.download("pennfudan")
    train, val = (catalogue.load_dataset("pennfudan", split) for split in ("train", "val"))
    assert [len(train), len(val)] == [8, 2] and train[0].ground_truth.boxes_xyxy.tolist() == [[9, 4, 30, 50]]
    assert all(sample.path.is_file() for sample in train + val)


def test_the_catalogue_that_is_shipped() -> None:
    shipped = yaml.safe_load(catalogue.find_catalog_file().read_text(encoding="utf-8"))
    fetched = {name: download._parse_items(entry.get("download"), name) for name, entry in shipped.items()}
    assert {name: len(parts) for name, parts in fetched.items() if parts} == {"coco-person": 3, "pennfudan": 1}
    for name, entry in shipped.items():
        assert len(Path(entry["path"]).parts) >= 1 and not Path(entry["path"]).is_absolute(), name


def test_two_processes_fetch_it_once(tmp_path: Path, serve: Serve, known: Known) -> None:
    site = serve(content=people_zip())
    known([said(site)])
    code = (
        "import sys; from pathlib import Path; from hkd_det.datasets import catalogue, download\n"
        "catalogue.catalogue_file = download.catalogue_file = lambda: Path('datasets.yaml')\n"
        "download.download('walkers')"
    )
    started = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(2)]
    for process in started:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error.decode()
    assert len(site.asked) == 1 and (tmp_path / "datasets/walkers/images/a.jpg").exists()


def test_the_command_fetches_and_says_what_is_next(
    serve: Serve, known: Known, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known([said(serve(content=people_zip()), unpack_to="inner")])
    assert main(["--data", "walkers", "--download"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("Next: hkd-train --data walkers")
    monkeypatch.setattr("hkd_det.datasets.check.check", lambda data, _: len(data))
    assert main(["--data", "walkers", "--download", "--check"]) == len("walkers")  # goes on to check


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--download"], 2, "--data NAME"),
        (["--download", "--data", "walker"], 2, "did you mean walkers"),
        (["--download", "--data", "mine.yaml"], 2, "by their names"),
        (["--download", "--data", "walkers"], 1, "https://people.example"),
        (["--download", "--data", "walkers", "--model", "mini-student"], 1, "https://people.example"),
    ],
)
def test_the_command_says_mistakes_in_one_line(
    known: Known, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, message: str
) -> None:
    known(None)
    assert main(flags) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("hkd-train: ") and message in error and len(error.splitlines()) == 1
