"""The network: its size, its interface, and the ways in which it may be called."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fastden.network.model import Denoiser
from fastden.network.padding import pad_image, padding_for
from tests.helpers import level, max_error, random_network

NAMES = ["conv0", "conv1", "res1", "conv2", "res2", "up2", "conv3", "res3", "up3", "out"]


def macs(model: Denoiser, side: int) -> int:
    """Multiply-accumulates of a network whose features after conv0 are ``side`` x ``side``."""
    x = torch.rand(1, model.conv0.in_channels, side + 4, side + 4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.forward_padded(x)
    return counter.get_total_flops() // 2


def test_parameter_count() -> None:
    assert sum(p.numel() for p in Denoiser(noise_level_input=False).parameters()) == 1_033_443
    # The noise level adds one channel of 5x5 taps to conv0's 64 filters.
    assert sum(p.numel() for p in Denoiser().parameters()) == 1_033_443 + 64 * 25


def test_device_and_dtype() -> None:
    model = Denoiser().half()
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float16)
    assert pickle.loads(pickle.dumps(model)).dtype == copy.deepcopy(model).dtype == torch.float16
    assert model.to("meta").device == torch.device("meta")
    model.conv0 = torch.nn.Sequential(model.conv0)  # type: ignore[assignment]
    assert model.dtype == torch.float16


@pytest.mark.parametrize("side", [16, 64])
def test_multiply_accumulates_per_pixel(side: int) -> None:
    # out is unpadded: its result is two pixels smaller than the features that all other layers are counted on.
    missing = 128 * 3 * 9 * (side**2 - (side - 2) ** 2)
    assert macs(Denoiser(noise_level_input=False), side) + missing == 220_544 * side**2


def test_composed_form_does_a_third_less_arithmetic() -> None:
    composed = macs(Denoiser(noise_level_input=False, composed=True), 128) / 128**2
    assert 140_000 < composed < 150_000


def test_state_dict_order() -> None:
    keys = list(Denoiser().state_dict())
    assert list(dict.fromkeys(key.split(".")[0] for key in keys)) == NAMES
    assert all(
        key in keys for key in ("conv0.weight", "conv0.bias", "up2.weight", "up3.bias", "out.weight", "out.bias")
    )


def test_layers_without_bias_or_normalisation() -> None:
    keys = set(Denoiser().state_dict())
    for name in ("conv0", "up2", "up3", "out"):
        assert {key for key in keys if key.startswith(f"{name}.")} == {f"{name}.weight", f"{name}.bias"}
    biases = {key for key in keys if key.startswith("res") and "bn" not in key and key.endswith("bias")}
    assert biases == set()


@pytest.mark.parametrize("composed", [False, True])
def test_locality(composed: bool) -> None:
    """An output pixel depends on inputs up to 22 px away and on none farther, in every phase of the two strides."""
    model = random_network(composed=composed, dtype=torch.float64)
    reach = 0
    for phase in range(4):
        row, column = 26 + phase, 29 - phase
        x = torch.rand(1, 3, 56, 56, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(x, 0.1)[0, :, row, column].sum(), x)
        rows, columns = gradient[0].abs().sum(0).nonzero(as_tuple=True)
        reach = max(reach, int((rows - row).abs().max()), int((columns - column).abs().max()))
    assert 19 <= reach <= 22


@settings(max_examples=40)
@given(
    height=st.integers(1, 37),
    width=st.integers(1, 37),
    batch=st.integers(1, 3),
    blind=st.booleans(),
    channels=st.sampled_from([1, 3]),
    composed=st.booleans(),
)
@example(height=1, width=1, batch=1, blind=False, channels=3, composed=True)
@example(height=1, width=37, batch=2, blind=True, channels=1, composed=False)
@example(height=31, width=2, batch=1, blind=False, channels=3, composed=False)
@example(height=17, width=13, batch=2, blind=False, channels=3, composed=True)
def test_any_size(height: int, width: int, batch: int, blind: bool, channels: int, composed: bool) -> None:
    model = random_network(not blind, channels, composed=composed)
    x = torch.rand(batch, channels, height, width)
    with torch.no_grad():
        y = model(x, level(model))
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert bool(y.isfinite().all())


@given(size=st.integers(1, 10_000))
def test_padding_is_aligned_and_smallest(size: int) -> None:
    before, after = padding_for(size)
    behind_conv0 = before + size + after - 4
    assert before == 3
    assert behind_conv0 % 4 == 0
    assert behind_conv0 >= max(size + 2, 8)
    assert behind_conv0 - 4 < max(size + 2, 8)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (5, 4), (7, 30)])
def test_padding_mirrors_at_the_border_pixels(size: tuple[int, int]) -> None:
    x = torch.rand(1, 2, *size)
    padded = pad_image(x)

    def mirrored(position: int, length: int) -> int:
        while not 0 <= position < length:
            position = -position if position < 0 else 2 * (length - 1) - position
        return position

    for i in range(padded.shape[2]):
        for j in range(padded.shape[3]):
            expected = x[
                ..., mirrored(i - 3, size[0]) if size[0] > 1 else 0, mirrored(j - 3, size[1]) if size[1] > 1 else 0
            ]
            assert torch.equal(padded[..., i, j], expected)


def test_noise_level_as_number_tensor_and_map() -> None:
    model = random_network()
    x = torch.rand(2, 3, 11, 14)
    with torch.no_grad():
        y = model(x, 0.25)
        for sigma in (
            torch.tensor(0.25),
            torch.tensor([0.25]).expand(2),
            torch.full((2, 1, 11, 14), 0.25),
            torch.full((1, 1, 11, 14), 0.25),
            torch.tensor([0.25, 0.25], dtype=torch.float64),
        ):
            assert torch.equal(model(x, sigma), y)
        assert torch.equal(model(x, 1), model(x, 1.0))


def test_noise_level_belongs_to_its_image() -> None:
    model = random_network(dtype=torch.float64)
    x = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        both = model(x, torch.tensor([0.1, 0.3], dtype=torch.float64))
        assert max_error(both[:1], model(x[:1], 0.1)) < 1e-12
        assert max_error(both[1:], model(x[1:], 0.3)) < 1e-12
        assert max_error(both[1:], model(x[1:], 0.1)) > 1e-4


def test_noise_map_acts_locally() -> None:
    model = random_network(dtype=torch.float64)
    x = torch.rand(1, 3, 8, 64, dtype=torch.float64)
    sigma = torch.full((1, 1, 8, 64), 0.1, dtype=torch.float64)
    other = sigma.clone()
    other[..., 60:] = 0.3
    with torch.no_grad():
        change = (model(x, other) - model(x, sigma)).abs().amax((0, 1, 2))
    assert change[:38].max() == 0
    assert change[60:].min() > 0


def test_gray_network() -> None:
    for noise_level_input in (False, True):
        model = random_network(noise_level_input, image_channels=1)
        assert model.conv0.in_channels == 1 + noise_level_input
        assert model.out.out_channels == 1
        assert model(torch.rand(2, 1, 9, 10), level(model)).shape == (2, 1, 9, 10)


def test_untrained_network_nearly_returns_its_input() -> None:
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert (Denoiser().eval()(x, 0.1) - x).abs().mean() < 0.3


@pytest.mark.parametrize("composed", [False, True])
def test_training_mode_uses_and_updates_batch_statistics(composed: bool) -> None:
    model = random_network(composed=composed)
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(2, 3, 12, 12)
    evaluated = model(x, 0.1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.train()
    trained = model(x, 0.1)
    assert max_error(trained, evaluated) > 1e-2
    for key, value in model.state_dict().items():
        changes = "running" in key or "num_batches" in key
        assert torch.equal(value, before[key]) != changes, key
    model.eval()
    assert max_error(model(x, 0.1), evaluated) > 1e-4


def test_one_pixel_trains() -> None:
    model = Denoiser().train()
    model(torch.rand(1, 3, 1, 1), 0.1).sum().backward()
    assert model.conv2.conv.weight.grad is not None


def test_copies_are_equal_and_apart() -> None:
    model = random_network(noise_level_input=False, composed=True)
    x = torch.rand(1, 3, 9, 9)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert (other.noise_level_input, other.image_channels, other.composed) == (False, 3, True)
            assert torch.equal(other(x), expected)
            other.conv0.weight.zero_()
            assert torch.equal(model(x), expected)


def test_memory_layouts_of_the_input() -> None:
    model = random_network(dtype=torch.float64)
    x = torch.rand(2, 3, 13, 10, dtype=torch.float64)
    wide = torch.rand(2, 5, 26, 10, dtype=torch.float64)
    plane = torch.rand(2, 1, 13, 10, dtype=torch.float64)
    inputs = {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "strided": wide[:, 1:4, ::2],
        "expanded": plane.expand(2, 3, 13, 10),
        "flipped": x.flip(3),
    }
    with torch.no_grad():
        for name, value in inputs.items():
            before = value.clone()
            y = model(value, 0.1)
            assert max_error(y, model(value.clone(memory_format=torch.contiguous_format), 0.1)) < 1e-12, name
            assert torch.equal(value, before), name
        model = model.to(memory_format=torch.channels_last)
        assert max_error(model(x, 0.1), model(inputs["channels last"], 0.1)) < 1e-12


def test_result_keeps_no_padding_alive() -> None:
    x = torch.rand(1, 3, 11, 11)
    y = random_network()(x, 0.1)
    assert y.untyped_storage().nbytes() == y.numel() * y.element_size()


def test_float64() -> None:
    y = random_network(dtype=torch.float64)(torch.rand(1, 3, 8, 8, dtype=torch.float64), 0.1)
    assert y.dtype == torch.float64


def test_gradient_of_the_input() -> None:
    model = random_network(dtype=torch.float64)
    x = torch.rand(1, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    sigma = torch.rand(1, dtype=torch.float64).mul_(0.2).requires_grad_()
    assert torch.autograd.gradcheck(model, (x, sigma), fast_mode=True)


WRONG: dict[str, tuple[bool, object, object, type[Exception], str]] = {
    "list": (True, [[0.5]], 0.1, TypeError, r"x: list; accepted: a torch\.Tensor"),
    "integers": (True, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 0.1, TypeError, r"x: dtype torch\.uint8; accepted"),
    "other dtype": (
        True,
        torch.zeros(1, 3, 4, 4).double(),
        0.1,
        TypeError,
        r"x: dtype torch\.float64; accepted: torch\.float32",
    ),
    "sparse": (True, torch.zeros(1, 3, 4, 4).to_sparse(), 0.1, TypeError, r"x: layout torch\.sparse_coo; accepted"),
    "another device": (
        True,
        torch.zeros(1, 3, 4, 4, device="meta"),
        0.1,
        ValueError,
        r"x: on meta; accepted: cpu",
    ),
    "three axes": (True, torch.zeros(3, 4, 4), 0.1, ValueError, r"x: shape \(3, 4, 4\); accepted: \(N, 3, H, W\)"),
    "four channels": (True, torch.zeros(1, 4, 4, 4), 0.1, ValueError, r"x: shape \(1, 4, 4, 4\); accepted"),
    "channels last axis": (True, torch.zeros(1, 4, 4, 3), 0.1, ValueError, r"x: shape \(1, 4, 4, 3\); accepted"),
    "no rows": (True, torch.zeros(1, 3, 0, 4), 0.1, ValueError, r"x: shape .*at least 1"),
    "no columns": (True, torch.zeros(1, 3, 4, 0), 0.1, ValueError, r"x: shape .*at least 1"),
    "no sigma": (True, torch.zeros(1, 3, 4, 4), None, ValueError, r"sigma: None.*accepted"),
    "sigma for a blind network": (False, torch.zeros(1, 3, 4, 4), 0.1, ValueError, r"sigma: given to a blind network"),
    "sigma on the scale of bytes": (True, torch.zeros(1, 3, 4, 4), 25, ValueError, r"sigma: 25; accepted: 0 to 1"),
    "negative sigma": (True, torch.zeros(1, 3, 4, 4), -0.1, ValueError, r"sigma: -0\.1; accepted: 0 to 1"),
    "negative map": (
        True,
        torch.zeros(1, 3, 4, 4),
        torch.full((1, 1, 4, 4), -0.1),
        ValueError,
        r"sigma: values from -0\.1",
    ),
    "NaN map": (
        True,
        torch.zeros(1, 3, 4, 4),
        torch.full((1, 1, 4, 4), torch.nan),
        ValueError,
        r"sigma: values from nan",
    ),
    "true": (True, torch.zeros(1, 3, 4, 4), True, TypeError, r"sigma: bool; accepted"),
    "sigma is NaN": (True, torch.zeros(1, 3, 4, 4), float("nan"), ValueError, r"sigma: nan; accepted: 0 to 1"),
    "sigma is infinite": (True, torch.zeros(1, 3, 4, 4), float("inf"), ValueError, r"sigma: inf; accepted: 0 to 1"),
    "sigma is text": (True, torch.zeros(1, 3, 4, 4), "25", TypeError, r"sigma: str; accepted"),
    "sigma for two images": (
        True,
        torch.zeros(1, 3, 4, 4),
        torch.zeros(2),
        ValueError,
        r"sigma: shape \(2,\); accepted",
    ),
    "sigma as a matrix": (
        True,
        torch.zeros(1, 3, 4, 4),
        torch.zeros(4, 4),
        ValueError,
        r"sigma: shape \(4, 4\); accepted",
    ),
    "map of another size": (
        True,
        torch.zeros(1, 3, 4, 4),
        torch.zeros(1, 1, 4, 5),
        ValueError,
        r"sigma: shape .*accepted",
    ),
    "map of three channels": (
        True,
        torch.zeros(1, 3, 4, 4),
        torch.zeros(1, 3, 4, 4),
        ValueError,
        r"sigma: shape .*accepted",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str) -> None:
    noise_level_input, x, sigma, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        Denoiser(noise_level_input).eval()(x, sigma)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_wrong_channel_count(channels: int) -> None:
    with pytest.raises(ValueError, match=rf"image_channels: {channels}; accepted: 1 or 3"):
        Denoiser(image_channels=channels)


def test_printed_form_names_the_arguments() -> None:
    assert "noise_level_input=True, image_channels=3, composed=False" in repr(Denoiser())


def test_untrained_network_has_the_default_initialisation() -> None:
    """It has PyTorch's: BN removes the weights' scale, and larger weights learn more slowly at the same rate."""
    torch.manual_seed(0)
    weight = Denoiser().conv3.conv.weight
    assert weight.abs().max() <= (1 / (160 * 9)) ** 0.5 + 1e-7


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_on_the_first_layer_leave_the_check_of_the_input(kind: str) -> None:
    model = random_network()
    getattr(model.conv0, kind)(lambda *_: None)
    with pytest.raises(TypeError, match=r"x: dtype torch.float64; accepted: torch.float32, the network's"):
        model(torch.rand(1, 3, 8, 8, dtype=torch.float64), 0.1)
    with pytest.raises(ValueError, match=r"x: on meta; accepted: cpu, where the network is"):
        model(torch.rand(1, 3, 8, 8, device="meta"), 0.1)


def test_a_hook_before_the_first_layer_may_convert_the_input() -> None:
    model = random_network()
    model.conv0.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    assert max_error(model(x, 0.1), random_network()(x.float(), 0.1)) < 1e-6
