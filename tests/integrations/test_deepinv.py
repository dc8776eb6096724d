"""The denoiser of deepinv: its conventions, and a picture deblurred by plug-and-play."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from skimage import data
from torch import Tensor

from fastden.network.fused import fuse
from fastden.network.model import Denoiser
from tests.helpers import random_network
from tests.integrations.installed import package

deepinv = package("deepinv", needs_torchvision=True)

from fastden.integrations.deepinv import FastdenDenoiser  # noqa: E402


@pytest.fixture(scope="module")
def denoiser() -> FastdenDenoiser:
    return FastdenDenoiser()


@pytest.fixture(scope="module")
def picture() -> Tensor:
    return torch.from_numpy(data.astronaut()[80:176, 170:266] / 255).permute(2, 0, 1)[None].float()


def psnr(x: Tensor, y: Tensor) -> float:
    return float(deepinv.metric.PSNR()(x, y).mean())


def test_forms_of_sigma(denoiser: FastdenDenoiser, picture: Tensor) -> None:
    x = 0.2 + 0.6 * picture.repeat(2, 1, 1, 1)
    wanted = Denoiser.from_pretrained("color")(x, 0.1).detach()
    for sigma in (
        0.1,
        [0.1, 0.1],
        torch.full((2,), 0.1),
        torch.full((2, 1, 1, 1), 0.1),
        torch.full((2, 1, 96, 96), 0.1),
    ):
        assert (denoiser(x, sigma) - wanted).abs().max() < 1e-5
    with pytest.raises(TypeError, match="sigma: None; accepted: a number"):
        denoiser(x, None)
    with pytest.raises(ValueError, match=r"x: shape \(3, 96, 96\); accepted: \(N, 3, H, W\)"):
        denoiser(x[0], 0.1)
    for wrong in (torch.full((3,), 0.1), torch.full((2, 3, 1, 1), 0.1), torch.full((1, 1, 5, 5), 0.1)):
        with pytest.raises(ValueError, match="sigma: shape"):
            denoiser(x, wrong)
    with pytest.raises(ValueError, match="takes no noise level"):
        FastdenDenoiser(random_network(noise_level_input=False))


def test_networks_that_are_fused_already(denoiser: FastdenDenoiser, picture: Tensor) -> None:
    network = fuse(Denoiser.from_pretrained("color"))
    assert torch.equal(FastdenDenoiser(network)(picture, 0.1), denoiser(picture, 0.1))
    with pytest.raises(ValueError, match="trainable: True, with a FusedDenoiser"):
        FastdenDenoiser(network, trainable=True)
    with pytest.raises(TypeError, match="model: int; accepted: a name, folder, Hub id, Denoiser or FusedDenoiser"):
        FastdenDenoiser(3)


def test_gray_and_gradients(denoiser: FastdenDenoiser, picture: Tensor) -> None:
    x = picture.mean(1, keepdim=True).requires_grad_()
    y = denoiser(x, 0.1)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    trainable = FastdenDenoiser(random_network(), trainable=True)
    trainable(picture, 0.1).sum().backward()
    assert all(parameter.grad is not None for parameter in trainable.parameters())
    assert not list(denoiser.parameters())


@pytest.mark.parametrize(("scale", "sigma"), [(1.0, 0.1), (3.0, 0.05), (3.0, 1.5), (0.1, 0.01), (0.7, 0.01)])
@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_are_exact_where_images_are_scaled(channels: int, scale: float, sigma: float) -> None:
    """The scale depends on the darkest and the brightest pixel, and on the noise level."""
    torch.manual_seed(0)
    exact = FastdenDenoiser().double()
    x = (torch.rand(2, channels, 6, 7, dtype=torch.float64) - 0.3) * scale
    level = torch.tensor([sigma, 0.5 * sigma], dtype=torch.float64)
    assert torch.autograd.gradcheck(exact, (x.requires_grad_(), level.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("fused", [False, True])
def test_a_network_that_is_passed_stays_on_its_device(fused: bool) -> None:
    network = fuse(random_network()) if fused else random_network()
    elsewhere = FastdenDenoiser(network, trainable=not fused, device="meta")
    assert elsewhere.network.device.type == "meta"
    assert network.device.type == "cpu"
    far = network.to("meta")
    for device in (None, "meta"):
        assert FastdenDenoiser(far, trainable=not fused, device=device).network is far
    assert far.device.type == "meta"
    with pytest.raises(ValueError, match="device: 'gpu'; accepted: cpu"):
        FastdenDenoiser(network, device="gpu")


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (3.0, -1.0), (20.0, 5.0)])
def test_images_outside_the_range(denoiser: FastdenDenoiser, picture: Tensor, scale: float, shift: float) -> None:
    """An iterate that leaves [0, 1] is denoised about as well as the picture in it."""
    x = scale * picture + shift
    noisy = x + 0.1 * scale * torch.randn(x.shape)
    gains = [
        10 * torch.log10((noisy - x).square().mean() / (clean - x).square().mean())
        for clean in (denoiser(noisy, 0.1 * scale), scale * denoiser((noisy - shift) / scale, 0.1) + shift)
    ]
    assert gains[1] > 7
    assert gains[0] > gains[1] - 0.5


@pytest.mark.parametrize("sigma", [15 / 255, 50 / 255])
@pytest.mark.parametrize("factor", [0.01, 0.1, 3.0, 20.0])
def test_a_factor_changes_next_to_nothing(
    denoiser: FastdenDenoiser, picture: Tensor, factor: float, sigma: float
) -> None:
    noisy = picture + sigma * torch.randn(picture.shape)
    result = denoiser(factor * noisy, factor * sigma) / factor
    assert abs(psnr(result, picture) - psnr(denoiser(noisy, sigma), picture)) < 0.1


def test_dark_flat_and_clean_images(denoiser: FastdenDenoiser, picture: Tensor) -> None:
    black = torch.zeros(1, 3, 24, 24)
    for sigma in (0.0, 1e-6, 0.1, 2.0):
        for x in (black, black + 1e-7, black + 0.05, black - 0.05, black + 0.5, 1e-3 * picture):
            image = x.clone().requires_grad_()
            result = denoiser(image, sigma)
            result.sum().backward()
            assert image.grad is not None
            assert image.grad.isfinite().all()
            assert (result - image).abs().max() <= 1e-6 + 0.1 * float(x.abs().max()) + 0.2 * sigma
    for brightest in (0.3, 0.6):  # no jump of the scale
        scaled = picture / picture.max()
        below, above = (denoiser((brightest + 0.02 + step) * scaled, 0.02) for step in (-1e-5, 1e-5))
        assert (below - above).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trainable", [False, True])
def test_images_of_any_dtype(picture: Tensor, dtype: torch.dtype, trainable: bool) -> None:
    model = FastdenDenoiser(trainable=trainable)
    result = model(picture.to(dtype), 0.1)
    assert result.dtype == dtype
    # bfloat16 has 8 bits
    assert (result.float() - model(picture, 0.1)).abs().max() < 2**-6


def test_mistakes_are_told_in_what_was_passed(
    denoiser: FastdenDenoiser, picture: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        ((255 * picture).byte(), 25, TypeError, r"x: dtype torch.uint8; accepted: a floating dtype"),
        ([1], 0.1, TypeError, r"x: list; accepted"),
        (picture[..., :0], 0.1, ValueError, r"x: shape \(1, 3, 96, 0\); accepted: height and width of at least 1"),
        (picture[:, :2], 0.1, ValueError, r"x: shape \(1, 2, 96, 96\); accepted: \(N, 3, H, W\)"),
        (picture * torch.nan, 0.1, ValueError, r"x: NaN or infinity"),
        (picture, {"sigma": 0.1}, TypeError, r"sigma: dict; accepted: a number"),
        (picture, True, TypeError, r"sigma: True; accepted: a number"),
        (picture, 1j, TypeError, r"sigma: complex; accepted: a number"),
        (20 * picture, -2.0, ValueError, r"sigma: -2; accepted: finite numbers of at least 0, on the scale of x"),
        (20 * picture, torch.nan, ValueError, r"sigma: nan; accepted"),
        (20 * picture.repeat(2, 1, 1, 1), [3.0, -2.0], ValueError, r"sigma: values from -2 to 3; accepted"),
    ]
    for x, sigma, kind, message in wrong:
        with pytest.raises(kind, match=message):
            denoiser(x, sigma)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: 'cuda', but PyTorch finds no CUDA device"):
        FastdenDenoiser(device="cuda")


def test_levels_above_the_trained_ones(denoiser: FastdenDenoiser, picture: Tensor) -> None:
    noisy = picture + 0.5 * torch.randn(picture.shape)
    plain = Denoiser.from_pretrained("color")(noisy, 0.5).detach()
    assert psnr(denoiser(noisy, 0.5), picture) > max(psnr(plain, picture), psnr(noisy, picture) + 8)


def test_deblurring(denoiser: FastdenDenoiser, picture: Tensor) -> None:
    """Plug-and-play by half-quadratic splitting beats the blurred picture, and total variation in the same loop."""
    blur = deepinv.physics.blur.gaussian_blur(sigma=(1.6, 1.6))
    noise = deepinv.physics.GaussianNoise(sigma=0.02)
    physics = deepinv.physics.BlurFFT(img_size=picture.shape[1:], filter=blur, noise_model=noise)
    with torch.no_grad():
        measured = physics(picture)
        results = {
            name: psnr(deepinv.optim.DPIR(sigma=0.02, denoiser=prior)(measured, physics), picture)
            for name, prior in (("fastden", denoiser), ("tv", deepinv.models.TVDenoiser(n_it_max=50)))
        }
    # 29.5 dB, 27.5 for total variation, 24.1 for the blurred picture.
    assert results["fastden"] > psnr(measured, picture) + 4
    assert results["fastden"] > results["tv"] + 1
