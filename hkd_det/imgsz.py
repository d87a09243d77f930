"""The `--imgsz` flag: `640` is a square, `640x512` is width x height, as pictures are named."""

from hkd_det.errors import UsageError

STRIDE = 32  # every model here halves its input five times


def parse_imgsz(text: str) -> tuple[int, int]:
    """`"640"` or `"640x512"` (width x height) to (height, width) pixels, both multiples of 32."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--imgsz {text}: expected pixels as 640 or 640x512 (width x height)")
    width, height = int(parts[0]), int(parts[-1])
    if width % STRIDE or height % STRIDE:
        near = "x".join(str(max(STRIDE, round(int(part) / STRIDE) * STRIDE)) for part in parts)
        raise UsageError(f"--imgsz {text}: width and height must be multiples of {STRIDE}; the nearest is {near}")
    return height, width


def format_imgsz(size_hw: tuple[int, int]) -> str:
    """(height, width) to `"640x512"` (width x height)."""
    return f"{size_hw[1]}x{size_hw[0]}"
