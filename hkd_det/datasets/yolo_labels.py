"""Search of YOLO label files, and problems between images and label files."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from hkd_det.datasets.base import DatasetError, ErrorHandler
from hkd_det.datasets.image_files import UNSUPPORTED_SUFFIXES, is_hidden, list_files
from hkd_det.image import IMAGE_SUFFIXES

LABEL_DIRECTORIES = ("labels", "label")
IMAGE_DIRECTORIES = ("images", "image", "imgs", "img", "jpegimages")
LABEL_SUFFIX = ".txt"
MAX_SEARCHED_FILES = 100_000
SPLIT_DIRECTORIES = ("train", "training", "val", "valid", "validation", "test")


def get_label_path(image_path: Path) -> Path:
    """Return the label file of an image as in Ultralytics: the last directory `images` becomes `labels`.

    Args:
        image_path: Image file.
    """
    return _get_label_directory(image_path.parent) / f"{image_path.stem}{LABEL_SUFFIX}"


class LabelSearch:
    """Label files of the images of a split.

    The first directory that has a label file of the image is used: `labels` in place of the last `images`, as in
    Ultralytics; the directory of the image; then `labels` or `label` in any case in place of `images`, in the directory
    of the image, or next to it.

    Args:
        image_paths: Images of the split.
        sources: Image directories that are read completely.
    """

    def __init__(self, image_paths: Sequence[Path], sources: Sequence[Path] = ()) -> None:
        self.image_paths, self.sources = image_paths, sources
        self._indices: dict[Path, dict[str, Path]] = {}
        self._candidates: dict[Path, list[Path]] = {}
        self._resolved: dict[Path, str] = {}

    @cached_property
    def labels(self) -> dict[Path, Path]:
        """Label file by image path; images without a label file are left out."""
        return {path: label for path in self.image_paths if (label := self._find(path))}

    @property
    def unlabeled(self) -> list[Path]:
        """Images without a label file."""
        return [path for path in self.image_paths if path not in self.labels]

    def report_problems(self, where: str, on_error: ErrorHandler) -> None:
        """Report label files of several images, label files without an image, and missing label files.

        Args:
            where: Prefix of messages about the split.
            on_error: Receives the problems.

        Raises:
            DataError: A problem changes what a model learns (with the default `on_error`).
        """
        self._report_shared_labels(on_error)
        orphans = [path for path in self._iterate_unread_files() if is_label_file(path)]
        num_images, num_unlabeled = len(self.image_paths), len(self.unlabeled)
        if num_unlabeled == num_images:
            expected = get_label_path(self.image_paths[0])
            files = orphans or self._search_label_files()
            unread = "".join(f" {len(files)} label files are not read, such as {one}." for one in files[:1])
            on_error(
                DatasetError(
                    f"{where}: no label file for {num_images} of {num_images} images, expected for example {expected}."
                    f"{unread} Add the label files, empty ones for images without persons.",
                    "no_labels",
                    where,
                    num_images,
                )
            )
        elif num_unlabeled:
            on_error(
                DatasetError(
                    f"{where}: {num_unlabeled} of {num_images} images have no label file and count as images without "
                    f"persons, the first is {self.unlabeled[0]}. Add empty label files if this is intended.",
                    "image_without_label",
                    self.unlabeled[0],
                    num_unlabeled,
                    is_error=False,
                    images=self.unlabeled,
                )
            )
        for index, path in enumerate(orphans):
            counts = f" ({len(orphans)} such files; {num_unlabeled} of {num_images} images have no label file)"
            on_error(
                DatasetError(
                    f"{path}: label file without an image{'' if index else counts}. Add or rename the image, or remove "
                    "the file.",
                    "label_without_image",
                    path,
                    is_fatal=num_unlabeled > 0,
                )
            )

    def report_unsupported(self, files: Sequence[Path], on_error: ErrorHandler) -> None:
        """Report image files whose format is not supported: an error with a label file, a warning without.

        Args:
            files: Files of an image directory.
            on_error: Receives the problems.
        """
        for path in files:
            if path.suffix.lower() in UNSUPPORTED_SUFFIXES:
                on_error(
                    DatasetError(
                        f"{path}: this image format is not supported. Convert the image to PNG or JPEG.",
                        "image_format",
                        path,
                        is_error=self._find(path) is not None,
                    )
                )

    def _report_shared_labels(self, on_error: ErrorHandler) -> None:
        images = defaultdict(list)
        for image_path, label_path in self.labels.items():
            images[label_path].append(image_path)
        for label_path, paths in images.items():
            if len(paths) > 1:
                listed = ", ".join(str(path) for path in paths)
                on_error(
                    DatasetError(
                        f"{label_path}: label file of {len(paths)} images: {listed}. Rename the images and give each "
                        "one its own label file.",
                        "shared_label_file",
                        label_path,
                        len(paths),
                        images=paths,
                    )
                )

    def _search_label_files(self) -> list[Path]:
        """Return label files anywhere near the images, to name them in the message that no label file was found."""
        directory = self.image_paths[0].parent.absolute()
        names = [part.casefold() for part in directory.parts]
        levels = [len(names) - index for index, name in enumerate(names) if name in IMAGE_DIRECTORIES]
        root = directory.parents[min([*levels, 2]) - 1] if len(directory.parents) > 1 else directory
        found = []
        for number, path in enumerate(list_files(root, lambda _: None)):
            if number >= MAX_SEARCHED_FILES:
                break
            if path.suffix.lower() == LABEL_SUFFIX and is_label_file(path):
                found.append(path)
        return found

    def _find(self, image_path: Path) -> Path | None:
        names = (f"{image_path.stem}{LABEL_SUFFIX}", f"{image_path.name}{LABEL_SUFFIX}")
        for directory in self._list_candidates(image_path.parent):
            index = self._index(directory)
            for name in names:
                if label := index.get(name) or index.get(name.casefold()):
                    return label
        return None

    def _list_candidates(self, directory: Path) -> list[Path]:
        if directory not in self._candidates:
            self._candidates[directory] = _list_label_directories(directory)
        return self._candidates[directory]

    def _index(self, directory: Path) -> dict[str, Path]:
        """Return the text files of a directory by name, and by name in lower case."""
        if directory not in self._indices:
            paths = [path for path in _list_directory(directory) if path.suffix.lower() == LABEL_SUFFIX]
            self._indices[directory] = {path.name.casefold(): path for path in paths} | {p.name: p for p in paths}
        return self._indices[directory]

    def _iterate_unread_files(self) -> Iterable[Path]:
        """Yield text files of the label directories that are not the label file of an image file."""
        directories: dict[Path, set[str]] = defaultdict(set)  # label directory -> stems of the images on the disk
        for directory in dict.fromkeys(path.parent for path in self.image_paths):
            stems = _list_image_stems(directory)
            for candidate in self._list_candidates(directory):
                directories[candidate] |= stems
        for source in self.sources:
            for root in dict.fromkeys(directory.resolve() for directory in _list_label_directories(source)):
                if root.is_dir():
                    for path in list_files(root, lambda _: None):
                        if path.suffix.lower() == LABEL_SUFFIX:
                            directories.setdefault(path.parent, set())
        seen = {self._make_key(label) for label in self.labels.values()}
        for directory, stems in directories.items():
            known = stems | _list_image_stems(directory)
            for path in dict.fromkeys(self._index(directory).values()):
                key = self._make_key(path)
                names = {path.stem.casefold(), Path(path.stem).stem.casefold()}
                if key not in seen and not names & known:
                    yield path
                seen.add(key)

    def _make_key(self, path: Path) -> str:
        """Return the path of a file whose directory is resolved once."""
        if path.parent not in self._resolved:
            self._resolved[path.parent] = str(path.parent.resolve())
        return f"{self._resolved[path.parent]}/{path.name}"


def is_label_file(path: Path) -> bool:
    """Return whether a text file has the content of a label file: the first line is a class id and a box.

    Args:
        path: Text file.
    """
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            words = file.read(4096).strip().partition("\n")[0].split()
    except OSError:
        return False
    try:
        return len([float(word) for word in words]) >= 5
    except ValueError:
        return False


def _get_label_directory(directory: Path) -> Path:
    parts = list(directory.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def _list_label_directories(directory: Path) -> list[Path]:
    """Return the directories that can contain the label files of an image directory, in the order of the search."""
    candidates = []
    for base in (directory, directory.resolve()):
        candidates += [_get_label_directory(base), base]
    for base in (directory.absolute(), directory.resolve()):
        parts = base.parts
        for index in range(len(parts) - 1, 0, -1):
            if parts[index].casefold() in IMAGE_DIRECTORIES:
                for labels in _list_named_directories(Path(*parts[:index]), LABEL_DIRECTORIES):
                    candidates += _match_directory(labels, parts[index + 1 :])
        candidates += _list_named_directories(base, LABEL_DIRECTORIES)
        for labels in _list_named_directories(base.parent, LABEL_DIRECTORIES):
            candidates += _match_directory(labels, (base.name,))
            candidates += [labels] if base.name.casefold() not in SPLIT_DIRECTORIES else []
    return list(dict.fromkeys(candidates))


def _match_directory(directory: Path, parts: Sequence[str]) -> list[Path]:
    """Return the subdirectories whose names equal `parts` in any case."""
    matches = [directory]
    for part in parts:
        matches = [found for match in matches for found in _list_named_directories(match, (part.casefold(),))]
    return matches


def _list_named_directories(directory: Path, names: Sequence[str]) -> list[Path]:
    try:
        found = [path for path in directory.iterdir() if path.name.casefold() in names and path.is_dir()]
    except OSError:
        return []
    return sorted(found, key=lambda path: (names.index(path.name.casefold()), path.name.casefold() != path.name, path))


def _list_directory(directory: Path) -> list[Path]:
    try:
        return [directory / name for name in sorted(os.listdir(directory)) if not is_hidden(name)]  # noqa: PTH208 - fast
    except OSError:
        return []


def _list_image_stems(directory: Path) -> set[str]:
    suffixes = IMAGE_SUFFIXES | UNSUPPORTED_SUFFIXES
    return {path.stem.casefold() for path in _list_directory(directory) if path.suffix.lower() in suffixes}
