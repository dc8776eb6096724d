"""Saving and loading, from folders and by bundled name, without a network connection."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import fastden
import fastden.network.hub
from fastden.network.int8 import fingerprint
from fastden.network.loading import load_network
from fastden.network.model import Denoiser
from tests.helpers import level, max_error, random_network


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An attempt to download or connect fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        pytest.fail(f"reached for the network: {args} {kwargs}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("noise_level_input", [False, True])
@pytest.mark.parametrize("image_channels", [1, 3])
def test_round_trip(tmp_path: Path, noise_level_input: bool, image_channels: int) -> None:
    model = random_network(noise_level_input, image_channels)
    model.save_pretrained(tmp_path / "saved")
    loaded = Denoiser.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded, Denoiser)
    assert not loaded.training
    x = torch.rand(1, image_channels, 9, 12)
    with torch.no_grad():
        assert torch.equal(loaded(x, level(loaded)), model(x, level(model)))
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_config_keeps_the_arguments(tmp_path: Path) -> None:
    Denoiser(False, image_channels=1, composed=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"noise_level_input": False, "image_channels": 1, "composed": True}
    loaded = Denoiser.from_pretrained(tmp_path)
    assert (loaded.noise_level_input, loaded.image_channels, loaded.composed) == (False, 1, True)


def test_saved_files(tmp_path: Path) -> None:
    model = random_network()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    assert huggingface_hub.ModelCard.load(tmp_path / "README.md").data.library_name == "fastden"


def test_adapted_network_saves_its_own_arguments(tmp_path: Path) -> None:
    random_network().adapt(noise_level_input=False).save_pretrained(tmp_path)
    assert Denoiser.from_pretrained(tmp_path).noise_level_input is False


def test_nothing_of_a_model_that_was_there_before_stays(tmp_path: Path) -> None:
    Denoiser.from_pretrained("photo").save_pretrained(tmp_path)
    assert {"noise.safetensors", "int8.safetensors"} < {file.name for file in tmp_path.iterdir()}
    random_network().save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_arguments_given_on_loading_win(tmp_path: Path) -> None:
    random_network().save_pretrained(tmp_path)
    assert Denoiser.from_pretrained(tmp_path, composed=True).composed is True


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder with the bundled models "small" and "blind", and a folder without weights."""
    random_network(seed=1).save_pretrained(tmp_path / "small")
    random_network(noise_level_input=False, seed=2).save_pretrained(tmp_path / "blind")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(fastden.network.hub, "WEIGHTS", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("no_network")
def test_bundled_names(bundled: Path) -> None:
    assert fastden.network.hub.models() == {"blind": bundled / "blind", "small": bundled / "small"}
    assert torch.equal(Denoiser.from_pretrained("small").conv0.weight, random_network(seed=1).conv0.weight)
    assert Denoiser.from_pretrained("blind").noise_level_input is False


@pytest.mark.usefixtures("no_network")
def test_a_bundled_name_wins_over_a_folder(bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = bundled / "elsewhere"
    random_network(seed=3).save_pretrained(elsewhere / "small")
    monkeypatch.chdir(elsewhere)
    assert torch.equal(Denoiser.from_pretrained("small").conv0.weight, random_network(seed=1).conv0.weight)
    assert torch.equal(Denoiser.from_pretrained("./small").conv0.weight, random_network(seed=3).conv0.weight)


@pytest.mark.usefixtures("no_network", "bundled")
@pytest.mark.parametrize("name", ["smal", "/no/such/folder", "a/b/c", ""])
def test_unknown_name(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"model: .*accepted: blind, small, a folder with .*, or a Hugging Face Hub id"
    ):
        Denoiser.from_pretrained(name)


@pytest.mark.usefixtures("bundled")
@pytest.mark.parametrize(
    "name",
    ["models/mine", "./mine", "../mine", "~/mine", "/mine", "a/b/c", "mine/", "owner/not a name", "owner\\x/mine"],
)
def test_a_name_that_is_no_repository_is_not_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network the Hub's answer takes 20 s."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("reached for the network"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    message = f"model: {name!r}, no folder that exists; accepted: blind, small, a folder"
    with pytest.raises(ValueError, match=re.escape(message)):
        Denoiser.from_pretrained(name)


@pytest.mark.usefixtures("bundled")
@pytest.mark.parametrize("name", ["owner/no-such-model", "owner/not a name"])
def test_unreachable_repository(name: str) -> None:
    with pytest.raises(ValueError, match=rf"model: '{name}'.*accepted: blind, small, a folder") as caught:
        Denoiser.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("An error happened, and the files are not in the cache.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(ValueError, match=r"^model: 'a/b': the Hugging Face Hub cannot be reached, and no earlier"):
        Denoiser.from_pretrained("a/b")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_incomplete_folder(tmp_path: Path, file: str) -> None:
    random_network().save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=rf"holds no {file}; accepted"):
        Denoiser.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "int8.safetensors"])
def test_broken_files_are_named(tmp_path: Path, file: str) -> None:
    model = random_network()
    model.int8_ranges = ({"up2": torch.ones(32)}, fingerprint(model))
    model.save_pretrained(tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"^model: .*{file} cannot be read \(.*\); accepted: as save_pretrained"):
        Denoiser.from_pretrained(tmp_path)


def test_a_save_that_fails_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_network(seed=1)
    model.int8_ranges = ({"up2": torch.ones(32)}, fingerprint(model))
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("no space left on device")

    for place in ("safetensors.torch.save_model", "pathlib.Path.write_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            with pytest.raises(OSError, match="no space"):
                model.save_pretrained(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("change", ["missing", "renamed"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: str) -> None:
    """Missing weights are never replaced by random ones."""
    random_network().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    weight = state.pop("conv2.conv.weight")
    if change == "renamed":
        state["conv2.weight"] = weight
    save_file(state, path)
    with pytest.raises(RuntimeError, match=r"conv2\.conv\.weight"):
        Denoiser.from_pretrained(tmp_path)


def test_loading_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output belongs to the program that loads."""
    random_network().save_pretrained(tmp_path)
    Denoiser.from_pretrained(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", sorted(fastden.network.hub.models()))
def test_shipped_models_load_and_denoise(name: str) -> None:
    model = Denoiser.from_pretrained(name)
    generator = torch.Generator().manual_seed(1)
    clean = torch.linspace(0.2, 0.8, 48).expand(1, 3, 48, 48)
    noisy = clean + 25 / 255 * torch.randn(clean.shape, generator=generator)
    with torch.no_grad():
        denoised = model(noisy, level(model, 25 / 255))
    assert (denoised - clean).square().mean() < (noisy - clean).square().mean() / 8
    assert (fastden.network.hub.models()[name] / "README.md").is_file()


def test_the_hub_downloads_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the Hub's library does: every file lies in the folder of a revision."""
    model = random_network()
    model.save_pretrained(tmp_path)
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(repository: str, file: str, **settings: Any) -> str:
        asked.append((file, settings))
        if not (tmp_path / file).is_file():
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    loaded = Denoiser.from_pretrained("owner/name", revision="v1", composed=True)
    assert (loaded.composed, loaded.int8_ranges) == (True, None)
    assert torch.equal(loaded.conv0.weight, model.conv0.weight)
    assert [file for file, _ in asked] == ["config.json", "model.safetensors", "int8.safetensors", "noise.safetensors"]
    asked.clear()
    assert fastden.network.hub.files_of("owner/name", {"revision": "v1"}, card=True) == tmp_path
    assert [file for file, _ in asked][-1] == "README.md"
    assert all(settings == {"revision": "v1"} for _, settings in asked)


def test_uploads_what_it_would_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, Any] = {}

    def upload(self: object, *, folder_path: Path, **settings: Any) -> str:
        uploaded.update(settings, files={path.name for path in Path(folder_path).iterdir()})
        return "address"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, **_: huggingface_hub.RepoUrl("me/mine"))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert random_network().push_to_hub("me/mine", private=True) == "address"
    assert uploaded["repo_id"] == "me/mine"
    assert uploaded["files"] == {"config.json", "model.safetensors", "README.md"}
    # An estimator of another model, which was there before, would judge for this one; its ranges would be refused.
    assert uploaded["delete_patterns"] == ["noise.safetensors", "int8.safetensors"]
    assert Denoiser.from_pretrained("color").push_to_hub("me/mine", delete_patterns="*.txt") == "address"
    assert uploaded["files"] == {"config.json", "model.safetensors", "README.md", "int8.safetensors"}
    assert uploaded["delete_patterns"] == ["*.txt", "noise.safetensors"]
    random_network().push_to_hub("me/mine", allow_patterns="README.md")  # a new card: the weights there keep theirs
    assert uploaded["delete_patterns"] is None


def test_an_upload_that_fails_leaves_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, repo_id: str, **settings: Any) -> str:
        raise OSError(f"401 for {repo_id}")

    monkeypatch.setattr(Denoiser, "push_to_hub", refuse)
    with pytest.raises(OSError, match="401 for mine"):
        random_network(seed=1).save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    assert torch.equal(Denoiser.from_pretrained(tmp_path / "mine").conv0.weight, random_network(seed=1).conv0.weight)
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_a_card_grants_no_licence_unasked(tmp_path: Path) -> None:
    random_network().save_pretrained(tmp_path / "mine")
    card = tmp_path / "mine" / "README.md"
    assert huggingface_hub.ModelCard.load(card).data.license is None
    card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\n", 1))
    random_network(seed=1).save_pretrained(tmp_path / "mine")  # a card that is there stays
    assert huggingface_hub.ModelCard.load(card).data.license == "mit"


def test_loading_a_folder_needs_no_hub() -> None:
    """Its library takes 0.3 s to import."""
    code = "import sys; from fastden import Denoiser; Denoiser.from_pretrained('color'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not [name for name in done.stdout.split() if name.split(".")[0] == "huggingface_hub"]


def test_a_path_is_a_folder_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that a user gives as a ``Path`` is that one, even if a bundled model has its name."""
    monkeypatch.chdir(tmp_path)
    mine = random_network()
    mine.save_pretrained("photo")
    x = torch.rand(1, 3, 16, 16)
    wanted = mine(x, 0.1)
    assert torch.equal(Denoiser.from_pretrained(Path("photo"))(x, 0.1), wanted)
    assert not torch.equal(Denoiser.from_pretrained("photo")(x, 0.1), wanted)
    assert max_error(load_network(Path("photo"), None, "float32")(x, 0.1), wanted) < 1e-5
    assert max_error(load_network("photo", None, "float32")(x, 0.1), wanted) > 1e-3
    with pytest.raises(ValueError, match="model: 'none'"):
        Denoiser.from_pretrained(Path("none"))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["runs/model7", "color"])
def test_a_path_that_does_not_exist_is_no_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's repository ``runs/model7`` is downloaded in place of a folder, nor the bundled model taken."""
    monkeypatch.chdir(tmp_path)
    image = np.zeros((16, 16, 3), np.float32)
    for load in (
        Denoiser.from_pretrained,
        lambda path: load_network(path, "cpu"),
        lambda path: fastden.denoise_array(image, 10, model=path),
        lambda path: fastden.export(path, tmp_path / "a.pt2"),
    ):
        with pytest.raises(ValueError, match=rf"model: '.*{name}'.*; accepted"):
            load(Path(name))


def test_arguments_that_loading_does_not_know() -> None:
    with pytest.raises(TypeError, match="model: NoneType; accepted: a bundled name, a folder or"):
        Denoiser.from_pretrained(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="map_location: 'meta', which holds no weights; accepted: another device"):
        Denoiser.from_pretrained("color", map_location="meta")
    for wrong in ({"subfolder": "x"}, {"torch_dtype": "float16"}):
        with pytest.raises(TypeError, match=rf"{next(iter(wrong))}: .*; accepted: revision, .*composed"):
            Denoiser.from_pretrained("color", **wrong)


ANSWER = Mock(status_code=500, headers={})
LOST = LocalEntryNotFoundError("lost")


@pytest.mark.parametrize("failure", [LOST, HfHubHTTPError("500", response=ANSWER)])
def test_a_connection_that_is_lost_drops_no_estimator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """The network would denoise by another estimate, and nothing would tell."""
    random_network().save_pretrained(tmp_path)

    def download(repository: str, file: str, **settings: Any) -> str:
        if file == "int8.safetensors":
            raise EntryNotFoundError(file)
        if file == "noise.safetensors":
            raise failure
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"model: 'owner/name': .*; accepted"):
        Denoiser.from_pretrained("owner/name", cache_dir=tmp_path)
    if failure is not LOST:
        return
    with pytest.raises(ValueError, match=r"noise\.safetensors; local_files_only=True or HF_HUB_OFFLINE=1 loads it"):
        Denoiser.from_pretrained("owner/name")
    # Nobody who asks for no connection, and nobody who knows that the file does not exist, is kept from the network.
    assert Denoiser.from_pretrained("owner/name", local_files_only=True).estimator is None
    absent = huggingface_hub._CACHED_NO_EXIST
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: absent)
    assert Denoiser.from_pretrained("owner/name").estimator is None


@pytest.mark.parametrize("location", [None, {"cuda:0": "cpu"}, "nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_named(location: Any) -> None:
    with pytest.raises(ValueError, match=r"map_location: .*; accepted: .*c(pu|uda)"):
        Denoiser.from_pretrained("color", map_location=location)


def test_arguments_for_weights_of_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"noise_level_input: False; accepted: True.*adapt\(noise_level_input=False\)"):
        Denoiser.from_pretrained("color", noise_level_input=False)
    with pytest.raises(ValueError, match=r"image_channels: 1; accepted: 3, as in .*color$"):
        Denoiser.from_pretrained("color", image_channels=1)
    assert Denoiser.from_pretrained("color", noise_level_input=True, image_channels=3, composed=True).composed


def test_no_name_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_network().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"model: ''; accepted: .*color"):
        Denoiser.from_pretrained("")
    assert isinstance(Denoiser.from_pretrained("."), Denoiser)
