"""Draw ``docs/figures/ui.webp``: the page of ``fastden ui`` with a photograph of scikit-image, in a headless Chromium.

    pip install ".[ui]" playwright
    python scripts/ui_screenshot.py

Needs Chromium.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

TARGET = Path(__file__).resolve().parent.parent / "docs" / "figures" / "ui.webp"
WIDTH, HEIGHT = 900, 1010


def photograph(path: Path) -> None:
    """A photograph with more noise in the shadows, as a camera has it."""
    clean = data.astronaut() / 255
    noise = np.random.default_rng(0).normal(0, 1, clean.shape) * (0.03 + 0.08 * (1 - clean))
    Image.fromarray(np.rint(255 * np.clip(clean + noise, 0, 1)).astype(np.uint8)).save(path)


def main() -> None:
    """Start the page, drop the photograph, take the picture."""
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "fastden", "ui", "--no-browser", "--port", "0"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
        sync_playwright() as playwright,
    ):
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[0]
            photograph(Path(folder, "astronaut.png"))
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.goto(url)
            page.set_input_files("#drop input[type=file]", str(Path(folder, "astronaut.png")))
            page.wait_for_selector("fastden-compare", timeout=300_000)
            page.wait_for_function("document.querySelector('fastden-compare').after.naturalWidth > 0")
            page.wait_for_timeout(500)
            picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
            picture.convert("RGB").save(TARGET, quality=82, method=6)
            browser.close()
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
