"""What a file is that is not what it should be: said by its first bytes, before a reader calls it damaged."""

import re

HEAD = 512  # bytes that suffice
SAFETENSORS = "a safetensors file; name it .safetensors"

_KINDS = (
    (rb"\s*(<\?xml|<!doctype|<html|<head)", "a page of the web (HTML), not the file itself; download it again"),
    (
        rb"version https://git-lfs",
        "a pointer of git-lfs, not the file itself; fetch it with `git lfs pull` or download it from the Hub",
    ),
    (rb"\x1f\x8b|\xfd7zXZ|BZh|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "a compressed file; unpack it"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"\x93NUMPY", "an array of NumPy"),
    (rb"[\s\S]{257}ustar", "a tar archive; unpack it"),
    (rb"[\s\S]{6}\0\0\{\"", SAFETENSORS),
)


def other_kind(head: bytes, wanted: str | None = None) -> str | None:
    """A known kind of file by its first `HEAD` bytes; None for pickles, text, the kind that is wanted and the unknown.
    """
    found = next((kind for pattern, kind in _KINDS if re.match(pattern, head, re.IGNORECASE)), None)
    return None if found == wanted else found
