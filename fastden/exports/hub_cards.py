"""Folders that are ready for the Hugging Face Hub: a model's files, and its card with a header that the Hub reads."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fastden.exports.cards import body, section, stated
from fastden.network.hub import models
from fastden.whole_files import check_target, write_bytes

#: The Hub's name of the task, and tags.
TASK = "image-to-image"
TAGS = ("image-denoising", "denoising", "image-restoration", "pytorch")
_FIGURE = re.compile(r"(\d+(?:\.\d+)?)(?: \((\d+(?:\.\d+)?)\))?")


def export_cards(folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Write a folder for each bundled model, to be uploaded as it stands.

    Each holds the model's files, and the card with a header for the Hub: library, licence of the weights, task, tags,
    and the card's own figures as results (the Hub's model index). The licences of the data, source
    by source, stay in the card's text.

    Args:
        folder: where; folders of the models' names appear in it.
        overwrite: replace existing files; a folder's other files stay.

    Returns:
        The models' folders.

    Raises:
        UserError: a file exists, which is found out before anything is written; or it cannot be written.
    """
    made = []
    files = {name: [file for file in sorted(source.iterdir()) if file.is_file()] for name, source in models().items()}
    for target in (folder / name / file.name for name, inside in files.items() for file in inside):
        if os.path.lexists(target):
            check_target(target, overwrite)
    for name, source in models().items():
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for file in files[name]:
            if file.name != "README.md":
                write_bytes(target / file.name, file.read_bytes(), overwrite=overwrite)
        card = (source / "README.md").read_text(encoding="utf-8")
        write_bytes(target / "README.md", hub_card(name, card).encode(), overwrite=overwrite)
        made.append(target)
    return made


def hub_card(name: str, card: str) -> str:
    """A model card with a header for the Hub, and how to use the model.

    Args:
        name: of the model.
        card: as the package ships it.
    """
    data = ModelCardData(
        license=(stated(card, "license") or "unknown").lower(),
        license_name=stated(card, "license_name"),
        license_link=stated(card, "license_link"),
        library_name="fastden",
        pipeline_tag=TASK,
        tags=list(TAGS),
        model_name=name,
        eval_results=results(card) or None,
    )
    use = f'## Use\n\n```python\nimport fastden\n\nclean = fastden.denoise("photo.jpg", model="{name}")\n```\n'
    content = f"---\n{data.to_yaml()}\n---\n{body(card).rstrip()}\n\n{use}"
    return str(ModelCard(content))


def results(card: str) -> list[EvalResult]:
    """The figures of a card's tables of PSNR and SSIM by data set and sigma, as the Hub's model index has them."""
    entries = []
    for header, rows in _tables(section(card, "Quality")):
        if header[0] != "PSNR in dB (SSIM)":
            continue
        for row in rows:
            for column, cell in zip(header[1:], row[1:], strict=True):
                figure = _FIGURE.fullmatch(cell)
                if figure is None:
                    continue
                for metric, value in (("psnr", figure[1]), ("ssim", figure[2])):
                    if value is not None:
                        entries.append(_result(row[0], column, metric, float(value)))
    return entries


def _result(dataset: str, column: str, metric: str, value: float) -> EvalResult:
    named: dict[str, Any] = {"metric_name": {"psnr": "PSNR (dB)", "ssim": "SSIM"}[metric]}
    return EvalResult(
        task_type=TASK,
        task_name="Image denoising",
        dataset_type=re.sub(r"\W+", "-", dataset.lower()),
        dataset_name=f"{dataset}, {column}",
        metric_type=metric,
        metric_value=value,
        # Results of one data set in several columns would be merged without a configuration of their own.
        dataset_config=column,
        **named,
    )


def _tables(text: str) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of the tables of a Markdown text."""
    made = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.strip().splitlines()]
        if len(lines) > 2:
            made.append((lines[0], lines[2:]))
    return made
