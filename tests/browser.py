"""A look at a page with the Chromium of this machine, without a library for it."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser on PATH; looked for {', '.join(NAMES)}")

# The page lies in frames of the widths asked for, which a window of the browser does not go down to.
HARNESS = """<!DOCTYPE html><body><pre id="seen"></pre><script>
const page = PAGE, widths = WIDTHS, seen = [];
const look = (frame) => {
  const page = frame.contentDocument, root = page.documentElement, images = [...page.images];
  return {
    width: frame.contentWindow.innerWidth,
    scrolled: root.scrollWidth,
    images: images.length,
    broken: images.filter((image) => !image.complete || !image.naturalWidth).length,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name),
    background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
    charts: [...page.querySelectorAll("svg.chart")].filter((chart) => chart.clientWidth > 100).length,
  };
};
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.srcdoc = page;
  frame.onload = async () => {
    await Promise.all([...frame.contentDocument.images].map((image) => image.decode().catch(() => null)));
    seen.push(look(frame));
    if (seen.length === widths.length) document.getElementById("seen").textContent = JSON.stringify(seen);
  };
  document.body.append(frame);
}
</script></body>
"""


def look_at(page: str, folder: Path, widths: tuple[int, ...] = (390, 1280), dark: bool = False) -> tuple[list, list]:
    """What is seen at each width, narrow first, and the messages on the console."""
    text = json.dumps(page).replace("</", "<\\/")
    harness = folder / "harness.html"
    harness.write_text(HARNESS.replace("WIDTHS", json.dumps(widths)).replace("PAGE", text), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom", harness.as_uri(),
    ]  # fmt: skip
    for _ in range(3):  # its virtual time may pass before a busy machine has drawn anything
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
        if found and found[1]:
            break
    assert found and found[1], f"nothing was seen: {done.stderr[-2000:]}"
    seen = sorted(json.loads(unescape(found[1])), key=lambda view: view["width"])
    return seen, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
