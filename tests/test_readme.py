"""The README's Python blocks run as written; those that need a download are marked no-run and must parse."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_blocks_run(tmp_path):
    runnable = blocks("python")
    assert runnable
    for block in runnable:
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_blocks_that_need_a_download_parse():
    for block in blocks("python no-run"):
        ast.parse(block)


def test_links_to_files_exist():
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
