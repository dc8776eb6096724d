"""The transform of torchvision: every kind of image, samples with labels, DataLoader workers."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastden
from fastden.inference.estimate import median_estimate
from tests.integrations.installed import torchvision

torchvision()

from torchvision import tv_tensors  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from fastden.integrations.transforms import Denoise  # noqa: E402


class Pictures(Dataset[Tensor]):
    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(picture(index))


def picture(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 20, 28), dtype=torch.uint8, generator=generator)


def test_kinds_of_images() -> None:
    transform = Denoise(25)
    wanted = fastden.denoise(picture(), 25)
    for dtype in (torch.uint8, torch.float32):
        image = picture() if dtype == torch.uint8 else picture() / 255
        plain, image_tensor = transform(image), transform(tv_tensors.Image(image))
        assert type(plain) is Tensor
        assert isinstance(image_tensor, tv_tensors.Image)
        assert plain.dtype == image_tensor.dtype == dtype
        assert torch.equal(plain, image_tensor.as_subclass(Tensor))
        assert torch.equal(plain, wanted if dtype == torch.uint8 else fastden.denoise(image, 25))
    video = transform(tv_tensors.Video(torch.stack([picture(0), picture(1)])))
    assert isinstance(video, tv_tensors.Video)
    assert torch.equal(video[0].as_subclass(Tensor), wanted)
    pil = transform(PIL.Image.fromarray(picture().permute(1, 2, 0).numpy()))
    assert np.array_equal(np.array(pil), wanted.permute(1, 2, 0).numpy())


def test_a_video_has_one_level() -> None:
    """Levels that are estimated from each frame, and models with them, would make it flicker."""
    clean = torch.linspace(0.2, 0.8, 64).expand(3, 48, 64)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((5, 3, 48, 64), generator=generator) * torch.tensor([0.02, 0.06, 0.08, 0.1, 0.2]).view(
        5, 1, 1, 1
    )
    clip = ((clean + noise).clamp(0, 1) * 255).round().byte()
    estimates = [fastden.estimate_noise(frame) for frame in clip]
    shared = median_estimate(estimates)
    assert len({estimate.sigma for estimate in estimates}) == 5
    video = tv_tensors.Video(torch.stack([clip, clip.flip(0)]))
    for model in (None, "photo"):
        result = Denoise(model=model)(video).as_subclass(Tensor)
        assert torch.equal(result[0], fastden.denoise(clip, shared, model=model))
        assert torch.equal(result[1], result[0].flip(0))
    blind = Denoise(model="color-blind")(video).as_subclass(Tensor)
    assert torch.equal(blind[0], fastden.denoise(clip, model="color-blind"))
    dark = tv_tensors.Video(clip / 2550)  # floating values that are denoised on a range of their own
    assert torch.equal(Denoise()(dark).as_subclass(Tensor), fastden.denoise(clip / 2550))


def test_the_rest_of_a_sample_passes() -> None:
    boxes = tv_tensors.BoundingBoxes([[1, 2, 3, 4]], format="XYXY", canvas_size=(20, 28))
    mask = tv_tensors.Mask(torch.ones(20, 28, dtype=torch.uint8))
    sample = {"image": tv_tensors.Image(picture()), "boxes": boxes, "mask": mask, "label": 3, "extra": torch.rand(2)}
    result = v2.Compose([Denoise(25), v2.ToDtype(torch.float32, scale=True)])(sample)
    assert not torch.equal(result["image"], sample["image"] / 255)
    for name in ("boxes", "mask", "label", "extra"):
        assert result[name] is sample[name] or torch.equal(result[name], sample[name])


def test_it_is_small_to_pickle() -> None:
    transform = Denoise(25, strength=0.5)
    transform(picture())
    pickled = pickle.dumps(transform)
    assert len(pickled) < 2000
    assert torch.equal(pickle.loads(pickled)(picture()), transform(picture()))
    assert "sigma=25" in repr(transform)
    with pytest.raises(ValueError, match="strength: 3"):
        Denoise(25, strength=3)


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers(start: str) -> None:
    transform = Denoise(25)
    wanted = torch.stack([transform(picture(index)) for index in range(4)])
    loader = DataLoader(Pictures(transform), batch_size=2, num_workers=1, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), wanted)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"sigma": 300}, ValueError, "sigma: 300; accepted: 'auto', a number from 0 to 255"),
        ({"sigma": "none"}, ValueError, "sigma: 'none'; accepted"),
        ({"sigma": True}, TypeError, "sigma: True; accepted"),
        ({"sigma": None}, TypeError, "sigma: None; accepted"),
        ({"model": "nope"}, ValueError, "model: 'nope'; accepted: .*color"),
        ({"model": 3}, TypeError, "model: int; accepted"),
        ({"device": "gpu"}, ValueError, "device: 'gpu'; accepted: cpu"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    """They were told at the first sample, in a worker."""
    with pytest.raises(kind, match=message):
        Denoise(**settings)
