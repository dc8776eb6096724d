"""Folders for the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import ModelCard

import fastden
from fastden.exports.cards import license_of
from fastden.exports.hub_cards import hub_card
from fastden.network.model import Denoiser
from tests.cli.run import fails, works


def test_every_model(tmp_path: Path) -> None:
    assert f"color -> {tmp_path / 'hub' / 'color'}" in works("models", "--export-cards", tmp_path / "hub")
    for name, source in fastden.models().items():
        folder = tmp_path / "hub" / name
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in source.iterdir())
        card = ModelCard.load(folder / "README.md")
        # ImageNet's terms forbid commercial use.
        wanted = "other" if name == "color-classify" else "apache-2.0"
        assert (card.data.license, card.data.library_name) == (wanted, "fastden")
        if wanted == "other":
            assert card.data.license_name == "apache-2.0-within-the-terms-of-imagenet"
            assert card.data.license_link == "https://www.image-net.org/download.php"
        assert card.data.pipeline_tag == "image-to-image"
        # It says all that the shipped card says, with the licences of the data.
        assert (source / "README.md").read_text().split("---", 2)[2].strip() in card.text
        assert f'model="{name}"' in card.text
        state = Denoiser.from_pretrained(folder).state_dict()
        assert all(torch.equal(state[key], value) for key, value in Denoiser.from_pretrained(name).state_dict().items())


def test_figures_are_the_cards_own() -> None:
    card = (fastden.models()["color"] / "README.md").read_text()
    header = ModelCard(hub_card("color", card)).data
    found = {(entry.dataset_name, entry.metric_type): entry.metric_value for entry in header.eval_results}
    assert len(found) == 20
    for (dataset, metric), value in found.items():
        name, level = dataset.split(", ")
        (row,) = (line for line in card.splitlines() if line.startswith(f"| {name} |"))
        column = ["sigma 15", "sigma 25", "sigma 35", "sigma 50", "sigma 75"].index(level) + 2
        cell = row.split("|")[column].strip().strip(")").split(" (")
        assert value == float(cell[metric == "ssim"])


def test_the_licence_of_a_card() -> None:
    assert license_of("---\nlicense: mit\n---\n# A\n") == "MIT"
    assert license_of("---\nlicense: other\nlicense_name: mine\n---\n# A\n") == "mine"
    assert license_of("---\nlicense: other\n---\n# A\n") == "other"
    assert license_of("# A\n\nlicense: mit\n") is None


def test_a_card_that_states_nothing() -> None:
    header = ModelCard(hub_card("mine", "# mine\n\nA network.\n")).data
    assert header.license == "unknown"
    assert not header.eval_results


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails("models", "--export-cards", tmp_path / "file", saying="file")


def test_existing_files_are_replaced_on_request_alone(tmp_path: Path) -> None:
    mine = tmp_path / "photo" / "model.safetensors"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    fails("models", "--export-cards", tmp_path, saying=r"photo[/\\]model\.safetensors: exists already; .*--overwrite")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    assert mine.read_bytes() == b"mine"
    works("models", "--export-cards", tmp_path, "--overwrite")
    assert mine.read_bytes() == (fastden.models()["photo"] / "model.safetensors").read_bytes()
    fails("models", "--overwrite", saying="overwrite: given without --export-cards")
