"""Files that are not what they should be: a damaged one is a ValueError that names it and says what it is instead."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    """A known kind of file by its first `HEAD` bytes; None for the kind that is wanted and for all others."""
    found = next((kind for pattern, kind in _KINDS if re.match(pattern, head, re.IGNORECASE)), None)
    return None if found == wanted else found


@contextmanager
def refusing(problem: str) -> Iterator[None]:
    """Make a ValueError that begins with `problem` of whatever damaged content raises in the block.

    Only a file that is not there stays an OSError. Bytes mean anything once they are damaged, so that there is no list
    of what can be raised.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{problem}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What an error says, in one line; without torch's advice to unpickle what it refused."""
    text = str(error).strip() or type(error).__name__
    if "weights_only" in text or "weights only" in text.lower():
        return "it holds more than plain data, or is damaged; nothing in it was executed"
    line = re.sub(r"\s+", " ", text.split("\n", 1)[0])
    return line if len(line) <= 300 else f"{line[:300]}..."


def read_json(path: str | Path) -> dict:
    """A JSON object.

    Raises:
        ValueError: for anything else.
        OSError: for a file that is not there.
    """
    with refusing(f"{str(path)!r} is no JSON object"):
        text = Path(path).read_text(encoding="utf-8")
        if other := other_kind(text[:HEAD].encode()):
            raise ValueError(f"it is {other}")
        content = json.loads(text)
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        return content
