"""Draw ``docs/comparison.png``: two real noisy photographs, and what ``fastden denoise`` makes of them.

The photographs are those of ``examples/photographs/``; nothing was added to them. Each is denoised as a whole by the
command, without a parameter. A detail of it is shown before and after, enlarged without interpolation.

    python scripts/front_figure.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
FIGURE = ROOT / "docs" / "comparison.png"
#: Left, top, width and height of the detail in pixels of the photograph, and how much it is enlarged.
DETAILS = {"tesla": (22, 16, 204, 150, 2), "hopper": (276, 104, 136, 100, 3)}
HEADER, MARGIN = 28, 8


def draw(details: dict[str, tuple[int, int, int, int, int]], figure: Path) -> None:
    """Denoise the photographs named in ``details``, and write their details before and after to ``figure``."""
    _, _, width, height, zoom = next(iter(details.values()))
    width, height = width * zoom, height * zoom
    sheet = Image.new("RGB", (2 * width + MARGIN, HEADER + len(details) * (height + MARGIN) - MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    for column, label in enumerate(("photograph", "fastden denoise")):
        draw.text((column * (width + MARGIN) + width / 2, HEADER / 2), label, "black", font, anchor="mm")
    with tempfile.TemporaryDirectory() as folder:
        for row, (name, (left, top, across, down, zoom)) in enumerate(details.items()):
            noisy, clean = ROOT / "examples" / "photographs" / f"{name}.jpg", Path(folder) / f"{name}.png"
            subprocess.run([sys.executable, "-m", "fastden", "denoise", noisy, "-o", clean], check=True)
            for column, file in enumerate((noisy, clean)):
                detail = Image.open(file).convert("RGB").crop((left, top, left + across, top + down))
                enlarged = detail.resize((across * zoom, down * zoom), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (column * (width + MARGIN), HEADER + row * (height + MARGIN)))
    sheet.save(figure, optimize=True)


if __name__ == "__main__":
    draw(DETAILS, FIGURE)
