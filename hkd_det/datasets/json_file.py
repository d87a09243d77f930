"""A JSON file as Python values, or one line about what is wrong with it."""

import json
from pathlib import Path
from typing import Any

from hkd_det.errors import DataError


def read_json(path: Path) -> Any:
    """The content of an annotation file; raises DataError, naming the file and, where it can, the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder, expected an annotation file") from None
    except RecursionError:
        raise DataError(f"{path}: not an annotation file: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and a number of thousands of digits
        raise DataError(f"{path}: not JSON ({error})") from None
