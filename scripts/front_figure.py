"""Draw ``docs/comparison.png``: details of a real noisy photograph, and what ``fastden denoise`` makes of them.

The photograph is one of ``examples/photographs/``; nothing was added to it. It is denoised as a whole by the command,
without a parameter. Details of it are shown before and after, enlarged without interpolation.

    python scripts/front_figure.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
FIGURE = ROOT / "docs" / "comparison.png"
#: Left, top, width and height of the details in pixels of the photograph, and how much they are enlarged.
PHOTOGRAPH, DETAILS, ZOOM = "hopper.jpg", ((276, 104, 136, 100), (100, 40, 136, 100)), 3
HEADER, MARGIN = 28, 8


def draw(photograph: Path, details: Sequence[tuple[int, int, int, int]], figure: Path) -> None:
    """Denoise ``photograph``, and write its ``details``, all of one size, before and after to ``figure``."""
    width, height = details[0][2] * ZOOM, details[0][3] * ZOOM
    sheet = Image.new("RGB", (2 * width + MARGIN, HEADER + len(details) * (height + MARGIN) - MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / "clean.png"
        subprocess.run([sys.executable, "-m", "fastden", "denoise", photograph, "-o", clean], check=True)
        for column, (label, file) in enumerate((("photograph", photograph), ("fastden denoise", clean))):
            draw.text((column * (width + MARGIN) + width / 2, HEADER / 2), label, "black", font, anchor="mm")
            picture = Image.open(file).convert("RGB")
            for row, (left, top, across, down) in enumerate(details):
                detail = picture.crop((left, top, left + across, top + down))
                enlarged = detail.resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (column * (width + MARGIN), HEADER + row * (height + MARGIN)))
    sheet.save(figure, optimize=True)


if __name__ == "__main__":
    draw(ROOT / "examples" / "photographs" / PHOTOGRAPH, DETAILS, FIGURE)
