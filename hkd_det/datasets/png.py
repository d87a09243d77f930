"""Whether a PNG file is all there, told before it is decoded."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_END_CHUNK = b"IEND"


def is_truncated_png(raw: bytes) -> bool:
    """Whether a chunk claims more bytes than there are, or the last one is missing; False for another file.

    OpenCV reserves and clears what a chunk claims, up to 2 GiB, before it looks whether it is there.
    """
    if not raw.startswith(PNG_SIGNATURE):
        return False
    at = len(PNG_SIGNATURE)
    while at + 12 <= len(raw):  # length, name, content, checksum
        if raw[at + 4 : at + 8] == PNG_END_CHUNK:
            return False
        at += 12 + int.from_bytes(raw[at : at + 4], "big")
    return True
