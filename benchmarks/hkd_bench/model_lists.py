"""Lists of models in the sentences below tables: at most four models are named one by one."""

import re
from collections.abc import Sequence
from pathlib import Path

from hkd_bench.result import ModelResult

MAX_NAMED = 4  # a sentence with more models is not read; the JSON file has all values


def format_names(names: Sequence[str]) -> str:
    """List names, of more than `MAX_NAMED` only the first ones.

    Args:
        names: At least one name.

    Returns:
        For example "a, b", or "a, b, c, d and 17 more".
    """
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def format_values(values: Sequence[tuple[str, float]], template: str) -> str:
    """List one value per model, of more than `MAX_NAMED` models only the smallest and the largest value.

    Args:
        values: Name and value of each model; at least one.
        template: Format of a value, for example "{:.1f} ms".

    Returns:
        For example "1.0 ms (a), 2.5 ms (b)", or "1.0 ms (a) to 9.3 ms (g) for 7 models".
    """
    texts = [(name, template.format(value)) for name, value in values]
    if len(texts) <= MAX_NAMED:
        return ", ".join(f"{text} ({name})" for name, text in texts)
    if len({text for _, text in texts}) == 1:
        return f"{texts[0][1]} for {len(texts)} models"
    order = sorted(range(len(values)), key=lambda index: values[index][1])
    (low_name, low), (high_name, high) = texts[order[0]], texts[order[-1]]
    return f"{low} ({low_name}) to {high} ({high_name}) for {len(texts)} models"


def format_licenses(models: Sequence[ModelResult]) -> str:
    """List the licenses, with the models of each unless there is only one license.

    A file that several backends or input sizes measure is named once, by its stem. The license of most files names none
    of them if it has more than `MAX_NAMED`.

    Args:
        models: Measurements of all models.

    Returns:
        For example "Apache-2.0 (all other files); AGPL-3.0 (yolo11n)".
    """
    rows_by_path: dict[str, list[ModelResult]] = {}
    for model in models:
        rows_by_path.setdefault(model.path, []).append(model)
    files: dict[str, list[str]] = {}
    for path, rows in rows_by_path.items():
        files.setdefault(rows[0].license, []).append(rows[0].name if len(rows) == 1 else Path(path).stem)
    if len(files) == 1:
        return next(iter(files))
    most = max(files, key=lambda text: len(files[text]))
    return "; ".join(
        f"{text} ({'all other files' if text == most and len(names) > MAX_NAMED else ', '.join(names)})"
        for text, names in files.items()
    )


def format_backends(models: Sequence[ModelResult]) -> str:
    """List the backends, with the names of their models if these do not contain the backend.

    Args:
        models: Measurements of all models.

    Returns:
        For example "onnxruntime", or "onnxruntime (a, b), openvino (c)".
    """
    names: dict[str, list[str]] = {}
    for model in models:
        names.setdefault(model.backend, []).append(model.name)
    if len(names) == 1 or all(model.backend in model.name for model in models):
        return ", ".join(names)
    return ", ".join(f"{backend} ({format_names(listed)})" for backend, listed in names.items())


def format_marks(models: Sequence[ModelResult], mark: str) -> list[str]:
    """Return what makes the runs of marked models incomparable: one sentence per model, or per kind for many models.

    Args:
        models: Measurements of all models.
        mark: Sign at the start of each sentence.

    Returns:
        For example "[!] a: throttled: core 0, 3 events.", or "[!] throttled: core 0, 3 events (a), similarly 20 more
        models."
    """
    marked = [model for model in models if model.conditions.marks]
    if len(marked) <= MAX_NAMED:
        return [f"{mark} {model.name}: {'; '.join(model.conditions.marks)}." for model in marked]
    kinds: dict[str, dict[str, str]] = {}  # kind, such as "other processes use", to model and text
    for model in marked:
        for text in model.conditions.marks:
            kinds.setdefault(re.split(r"[:\d]", text)[0].strip(), {}).setdefault(model.name, text)
    notes = []
    for texts in kinds.values():
        name, text = next(iter(texts.items()))
        more = f", similarly {len(texts) - 1} more models" if len(texts) > 1 else ""
        notes.append(f"{mark} {text} ({name}){more}.")
    return notes
