"""The denoiser of Liu et al., "When Image Denoising Meets High-Level Vision Tasks" (IJCAI 2018), as a module."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastden import ops
from fastden.algebra import compose_head, compose_stem
from fastden.hub import PretrainedMixin
from fastden.nn import Bottleneck, ConcatConvBNReLU, ConvBNReLU, Upsample

#: Image height and width behind conv0 must be multiples of this: two stages of stride 2.
ALIGNMENT = 4
#: Padding of the image on each side: half of what conv0 (5x5) and out (3x3), both unpadded, take off.
BORDER = 3


class Denoiser(nn.Module, PretrainedMixin):
    """Image denoiser: ``model(x, sigma) -> y``, all images RGB, float, in [0, 1].

    The network of Liu et al. (section 3.1) as its authors ran it: 1,033,443 parameters with 3 input channels, a
    receptive field of 39 pixels, 220,544 multiply-accumulates a pixel. Any height and width: the module pads by
    reflection and crops.

    Args:
        noise_level_input: take the noise level as a fourth input channel (as FFDNet does), so one network serves all
            levels and the user controls the strength. False is the paper's blind network.
        image_channels: channels of the image, 3. A network for 1-channel images can be built and trained with 1; the
            shipped colour networks take gray images through :func:`fastden.denoise`, which repeats the channel.
        composed: run conv1 o conv0 and out o cat(conv0, up3) as the single convolutions that they equal
            (:mod:`fastden.algebra`), in training and evaluation: the same function up to rounding, 36 % fewer
            multiply-accumulates. The parameters stay those of the factors.
    """

    def __init__(self, noise_level_input: bool = True, image_channels: int = 3, composed: bool = False) -> None:
        super().__init__()
        if image_channels not in (1, 3):
            raise ValueError(f"image_channels: {image_channels}; accepted: 1 or 3")
        self.noise_level_input = noise_level_input
        self.image_channels = image_channels
        self.composed = composed
        in_channels = image_channels + int(noise_level_input)
        self.conv0 = nn.Conv2d(in_channels, 64, 5)
        self.conv1 = ConvBNReLU(64, 128, stride=2)
        self.res1 = Bottleneck(128, 32)
        self.conv2 = ConvBNReLU(128, 128, stride=2)
        self.res2 = Bottleneck(128, 32)
        self.up2 = Upsample(128, 32)
        self.conv3 = ConcatConvBNReLU(128, 32, 256)
        self.res3 = Bottleneck(256, 64)
        self.up3 = Upsample(256, 64)
        self.out = nn.Conv2d(128, image_channels, 3)

    def forward(self, x: Tensor, sigma: float | Tensor | None = None) -> Tensor:
        """Denoise a batch.

        Args:
            x: (N, 3, H, W), float, in [0, 1] (noise may exceed it), any H, W >= 1, any memory format.
            sigma: standard deviation of the noise on the scale of ``x`` (25 of 255 is 25 / 255): a number, a tensor
                (N,), or a map (N, 1, H, W). Needed by a network with ``noise_level_input``, refused by a blind one.

        Returns:
            (N, 3, H, W), not clipped, in the dtype of ``x`` (under autocast: of autocast's result).

        Raises:
            ValueError, TypeError: naming the argument, what it was and what is accepted.
        """
        height, width = check_input(x, self.image_channels)
        dtype = self.conv0.weight.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"x: dtype {x.dtype}; accepted: {dtype}, the network's (convert x or the network, or use autocast)"
            )
        level = noise_level(x, sigma, self.noise_level_input)
        padded = pad_image(x if level is None else torch.cat([x, level], 1))
        y = self.forward_padded(padded)
        # Not a slice: the strides of a view would tie an exported graph to sizes that need cropping, or do not.
        return F.pad(y, (0, width - y.shape[3], 0, height - y.shape[2]))

    def forward_padded(self, x: Tensor) -> Tensor:
        """The network on a padded input: (N, C, H, W) -> (N, 3, H - 6, W - 6), H and W multiples of 4."""
        if self.composed:
            return self._forward_composed(x)
        first = ops.conv_bn_relu(x, self.conv0.weight, self.conv0.bias, relu=False)
        upsampled = self.up3(self._trunk(self.conv1(first)))
        y = ops.concat_conv_bn_relu(first, upsampled, self.out.weight, self.out.bias, relu=False, padding=0)
        return x[:, : self.image_channels, BORDER:-BORDER, BORDER:-BORDER] + y

    def _forward_composed(self, x: Tensor) -> Tensor:
        conv0, conv1, up3, out = self.conv0, self.conv1.conv, self.up3, self.out
        assert conv0.bias is not None
        assert conv1.bias is not None
        assert up3.bias is not None
        assert out.bias is not None
        # Autocast would round the factors before composing them; composing is cheap, so it stays in their dtype.
        with torch.autocast(x.device.type, enabled=False):
            stem = compose_stem(conv0.weight, conv0.bias, conv1.weight, conv1.bias)
            head = compose_head(conv0.weight, conv0.bias, up3.weight, up3.bias, out.weight, out.bias)
        first = ops.stem(x, stem.weight, stem.bias, bn=ops.BatchNorm.of(self.conv1.bn))
        features = self._trunk(first)
        return ops.head(features, x, head.weight, head.image_weight, head.bias, composed=True)

    def _trunk(self, x: Tensor) -> Tensor:
        """res1 to res3: (N, 128, h, w) -> (N, 256, h, w), at half resolution."""
        skip = self.res1(x)
        x = self.res2(self.conv2(skip))
        return self.res3(self.conv3(skip, self.up2(x)))

    def adapt(self, noise_level_input: bool) -> Denoiser:
        """A network with or without noise-level input that starts from this one's weights.

        Dropping the level removes the weights of its channel from conv0; adding one adds zeros, which leaves the
        function as it was.
        """
        if noise_level_input == self.noise_level_input:
            return self
        other = Denoiser(noise_level_input, self.image_channels, self.composed)
        state = self.state_dict()
        weight = state["conv0.weight"][:, : self.image_channels]
        if noise_level_input:
            weight = torch.cat([weight, torch.zeros_like(weight[:, :1])], 1)
        other.load_state_dict({**state, "conv0.weight": weight})
        return other.to(weight.device, weight.dtype).train(self.training)

    def extra_repr(self) -> str:
        return (
            f"noise_level_input={self.noise_level_input}, image_channels={self.image_channels},"
            f" composed={self.composed}"
        )


def check_input(x: Tensor, channels: int) -> tuple[int, int]:
    """Height and width of a valid network input.

    Raises:
        TypeError: ``x`` is not a floating tensor.
        ValueError: ``x`` is not (N, ``channels``, H, W) with H, W >= 1.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: {type(x).__name__}; accepted: a torch.Tensor of shape (N, {channels}, H, W)")
    if not x.is_floating_point():
        raise TypeError(
            f"x: dtype {x.dtype}; accepted: a floating dtype, values in [0, 1] (divide integers by their maximum)"
        )
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x: shape {tuple(x.shape)}; accepted: (N, {channels}, H, W)")
    height, width = x.shape[2], x.shape[3]
    if height < 1 or width < 1:
        raise ValueError(f"x: shape {tuple(x.shape)}; accepted: height and width of at least 1")
    return height, width


def noise_level(x: Tensor, sigma: float | Tensor | None, wanted: bool) -> Tensor | None:
    """``sigma`` as a map (N, 1, H, W) in the dtype and on the device of ``x``; None for a blind network."""
    if not wanted:
        if sigma is not None:
            raise ValueError(
                "sigma: given to a blind network; accepted: None (or a network with noise_level_input=True)"
            )
        return None
    n, _, height, width = x.shape
    if sigma is None:
        raise ValueError(
            "sigma: None, but this network takes the noise level; accepted: a number, a tensor (N,) or a map"
            " (N, 1, H, W), the noise's standard deviation on the scale of x (25 of 255 is 25 / 255)"
        )
    if isinstance(sigma, Tensor):
        if sigma.device.type == "cpu" and not torch.compiler.is_compiling() and sigma.numel():
            low, high = (float(bound) for bound in sigma.detach().aminmax())  # a GPU would have to wait for it
            if not 0.0 <= low <= high <= 1.0:
                raise ValueError(f"sigma: values from {low} to {high}; accepted: 0 to 1, on the scale of x")
        level = sigma.to(device=x.device, dtype=x.dtype)
        if level.dim() == 0 or (level.dim() == 1 and level.shape[0] == n):
            level = level.reshape(-1, 1, 1, 1)
        elif level.dim() != 4 or tuple(level.shape[1:]) != (1, height, width) or level.shape[0] not in (1, n):
            raise ValueError(
                f"sigma: shape {tuple(sigma.shape)}; accepted for x {tuple(x.shape)}: a number, ({n},) or"
                f" ({n}, 1, {height}, {width})"
            )
        return level.expand(n, 1, height, width)
    if not isinstance(sigma, Real) or isinstance(sigma, bool):
        raise TypeError(f"sigma: {type(sigma).__name__}; accepted: a number, a tensor (N,) or a map (N, 1, H, W)")
    if not 0.0 <= sigma <= 1.0:  # also refuses NaN
        raise ValueError(f"sigma: {sigma}; accepted: 0 to 1, on the scale of x (25 of 255 is 25 / 255)")
    return x.new_full((1, 1, 1, 1), float(sigma)).expand(n, 1, height, width)


def padding_for(size: int) -> tuple[int, int]:
    """Pixels to add before and after an axis of ``size`` pixels, so that conv0's output is a multiple of 4."""
    behind_conv0 = size + 2 * BORDER - 4
    # At least two pixels at quarter resolution: batch statistics need them, and oneDNN 3.12's bf16 convolution reads
    # memory that nothing wrote where an output is one column wide.
    aligned = max(behind_conv0 + (-behind_conv0) % ALIGNMENT, 2 * ALIGNMENT)
    return BORDER, BORDER + aligned - behind_conv0


def pad_image(x: Tensor) -> Tensor:
    """Reflect-pad (N, C, H, W) for the network: 3 pixels a side, and up to the next multiple behind conv0."""
    height, width = x.shape[2], x.shape[3]
    (top, bottom), (left, right) = padding_for(height), padding_for(width)
    if height > bottom and width > right:
        return F.pad(x, (left, right, top, bottom), mode="reflect")
    # Smaller than the padding: reflect back and forth, which F.pad refuses.
    rows = reflected_index(-top, height + bottom, height, x.device)
    columns = reflected_index(-left, width + right, width, x.device)
    return x[:, :, rows][:, :, :, columns]


def reflected_index(start: int, stop: int, size: int, device: torch.device) -> Tensor:
    """Indices in [0, size) of the positions [start, stop) of an axis that is mirrored at its end pixels for ever."""
    period = max(2 * (size - 1), 1)
    index = torch.arange(start, stop, device=device) % period
    return torch.minimum(index, period - index) if size > 1 else torch.zeros_like(index)
