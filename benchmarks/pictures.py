"""Screenshots for the README: a report and the server's page, in Chromium, from real runs on scikit-learn's digits.

python -m benchmarks.pictures [--out=docs/pictures] [--run_dir=runs/quickstart]

The run is that of `./quickstart`: run it first. Chromium must be installed.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from sklearn.datasets import load_digits

_WIDTH, _HEIGHT = 1200, 900
_BYTES_AT_MOST = 150_000
_SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--run_dir", type=Path, default=Path("runs/quickstart"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        show_report(browser, arguments.run_dir, arguments.out / "report.png")
        show_page(browser, arguments.run_dir, arguments.out / "page.png")
        browser.close()


def show_report(browser: Browser, run_dir: Path, path: Path) -> None:
    page = browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT})
    page.goto((run_dir / "report.html").resolve().as_uri())
    page.wait_for_load_state()
    write_small(page.screenshot(), path)


def show_page(browser: Browser, run_dir: Path, path: Path) -> None:
    command = [sys.executable, "-m", "tl_keras", "serve", f"--classifier={run_dir}", "--port=0", "--grpc_port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = next(match[0] for line in server.stdout if (match := re.search(r"http://[\d.]+:\d+", line)))
            page = browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT})
            page.goto(address)
            page.set_input_files("#files", make_digits())
            page.locator("#results li").nth(_SHOWN - 1).wait_for(timeout=60_000)
            page.wait_for_load_state("networkidle")
            write_small(page.screenshot(), path)
        finally:
            server.terminate()


def make_digits() -> list[dict[str, object]]:
    """Makes image files of digits to upload to the page."""
    data = load_digits()
    files = []
    for number in range(_SHOWN):
        pixels = (data.images[number] * 255 / 16).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC).save(content, "PNG")
        name = f"digit-{data.target[number]}-{number}.png"
        files.append({"name": name, "mimeType": "image/png", "buffer": content.getvalue()})
    return files


def write_small(screenshot: bytes, path: Path) -> None:
    """Writes a screenshot as PNG with the largest number of colors that fits the size limit."""
    image = Image.open(io.BytesIO(screenshot)).convert("RGB")
    for colors in (256, 128, 64, 32):
        content = io.BytesIO()
        image.quantize(colors, method=Image.Quantize.MEDIANCUT).save(content, "PNG", optimize=True)
        if len(content.getvalue()) <= _BYTES_AT_MOST:
            break
    path.write_bytes(content.getvalue())
    print(f"{path}: {len(content.getvalue()):,} bytes")


if __name__ == "__main__":
    main()
