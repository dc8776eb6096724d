"""Noise as cameras make it: a clean picture goes back to the sensor, gets noise there, and goes through the camera.

Clean picture -> inverse tone curve, colour matrix and white balance -> colour filter array -> shot, read and row noise,
quantisation -> white balance -> demosaicing -> colour matrix -> tone curve -> the camera's own denoising -> sharpening.
The target goes through the same steps without noise. :mod:`fastden.training.photo_noise` adds what happens to files
afterwards: resizing, 8 bits, JPEG.

The steps back to the sensor follow Brooks et al., "Unprocessing Images for Learned Raw Denoising" (CVPR 2019): its
noise levels, colour matrices (Adobe's DNG matrices of four cameras), gains and tone curve, with wider ranges where a
comment says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastden.training import demosaic

#: XYZ to camera colours, from the DNG profiles of four cameras (Brooks et al. 2019, supplement).
XYZ_TO_CAMERA = np.array(
    [
        [[1.0234, -0.2969, -0.2266], [-0.5625, 1.6328, -0.0469], [-0.0703, 0.2188, 0.6406]],
        [[0.4913, -0.0541, -0.0202], [-0.6130, 1.3513, 0.2906], [-0.1564, 0.2151, 0.7183]],
        [[0.8380, -0.2630, -0.0639], [-0.2887, 1.0725, 0.2496], [-0.0627, 0.1427, 0.5438]],
        [[0.6596, -0.2079, -0.0562], [-0.4782, 1.3016, 0.1933], [-0.0970, 0.1581, 0.5181]],
    ]
)
#: Linear sRGB to XYZ (IEC 61966-2-1, D65).
RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
#: Full-range YCbCr of JPEG (ITU-T T.871).
RGB_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


#: Deviation of the Gaussian that cuts off the finest band of frequency, pixels.
FINEST_BAND = 0.7


@dataclass(frozen=True)
class CameraRanges:
    """Ranges of a shot's parameters; a pair is a uniform distribution between its numbers.

    Args:
        shot: variance of the shot noise at white, raw values in [0, 1], log-uniform. Brooks et al.: 1e-4 to 1.2e-2;
            here up to 0.05, because a picture that was brightened has the noise of a shorter exposure.
        read: the read noise's log variance is ``slope * log(shot) + offset`` plus a normal number of this deviation.
            Brooks et al.: (2.18, 1.20, 0.26), fitted to the Darmstadt data set; here the deviation is twice as large.
        row: standard deviation of a normal offset that a whole row shares (Wei et al., "A Physics-based Noise Formation
            Model", CVPR 2020), as a multiple of the read noise's. Chosen by eye: banding is just visible.
        red_gain, blue_gain: white balance (Brooks et al.: 1.9 to 2.4 and 1.5 to 1.9); wider here, for tungsten light
            and shade.
        bits: resolution of the analog-digital converter, whole numbers.
        tone: share of the smoothstep tone curve in the mixture with none (Brooks et al.: always 1).
        luma_filter, chroma_filter: probabilities of the camera's own denoising of luma and chroma.
        bands: probability that the camera shrinks bands of frequency instead, fine ones most (:func:`shrink_bands`).
            This leaves coarse noise: 0.47 of its deviation, the median, outlives an average over 8 x 8 pixels. Without
            it 0.28 does, of white noise 0.125. JPEGs of single-lens reflex cameras have 0.4 to 0.6.
        sharpen: probability of sharpening by an unsharp mask.
    """

    shot: tuple[float, float] = (1e-4, 5e-2)
    read: tuple[float, float, float] = (2.18, 1.20, 0.52)
    row: tuple[float, float] = (0.0, 0.4)
    red_gain: tuple[float, float] = (1.2, 2.6)
    blue_gain: tuple[float, float] = (1.2, 2.6)
    bits: tuple[int, int] = (10, 14)
    tone: tuple[float, float] = (0.0, 1.0)
    luma_filter: float = 0.4
    chroma_filter: float = 0.6
    bands: float = 0.45
    sharpen: float = 0.5


class CameraNoise:
    """Makes a target and a noisy picture as one camera would have taken them.

    Args:
        ranges: ranges of its parameters; None for the defaults.
    """

    def __init__(self, ranges: CameraRanges | None = None) -> None:
        self.ranges = ranges or CameraRanges()

    def __call__(self, clean: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Take one shot.

        Args:
            clean: (3, H, W), sRGB in [0, 1], H and W at least 8, on any device.
            random: source of all randomness; the noise itself is drawn on the CPU, so that all devices get the same.

        Returns:
            The target and the noisy picture, (3, H, W) each, in about [0, 1], not yet rounded to 8 bits.
        """
        ranges = self.ranges
        share = random.uniform(*ranges.tone)
        gains = clean.new_tensor([random.uniform(*ranges.red_gain), 1.0, random.uniform(*ranges.blue_gain)])
        gains = gains.view(1, 3, 1, 1)
        matrix = torch.from_numpy(camera_to_srgb(random)).to(clean)

        linear = srgb_to_linear(inverse_tone(clean[None].clamp(0, 1), share))
        sensor = (_mix(linear, torch.linalg.inv(matrix)) / gains).clamp(min=0)
        process = _demosaicing(random, sensor.shape[2], sensor.shape[3], clean.device)
        shot = log_uniform(random, ranges.shot)
        slope, offset, spread = ranges.read
        read = math.exp(slope * math.log(shot) + offset + random.normal(0, spread))
        row = math.sqrt(read) * random.uniform(*ranges.row)
        steps = 2 ** int(random.integers(ranges.bits[0], ranges.bits[1] + 1)) - 1
        noisy_sensor = _expose(sensor, process, shot, read, row, steps, random)

        def develop(values: Tensor) -> Tensor:
            balanced = process.demosaic(values * gains if process.masks is None else values * _spread(gains, process))
            return tone(linear_to_srgb(_mix(balanced, matrix).clamp(0, 1)), share)

        pair = torch.cat([develop(process.sample(sensor)), develop(noisy_sensor)])
        pair = self._own_denoising(pair, random)
        if random.random() < ranges.sharpen:
            pair = sharpen(pair, random.uniform(0.5, 1.5), random.uniform(0.1, 1.0))
        return pair[0], pair[1]

    def _own_denoising(self, pair: Tensor, random: np.random.Generator) -> Tensor:
        """Guided filters of luma and chroma (He et al., ECCV 2010), or shrunk bands. Edges stay.

        Target and noisy picture are filtered alike, so that the target asks for no detail that the camera erased.
        """
        ranges = self.ranges
        noise = float((pair[1] - pair[0]).std())
        ycc = _mix(pair, pair.new_tensor(RGB_TO_YCBCR))
        to_rgb = torch.linalg.inv(pair.new_tensor(RGB_TO_YCBCR))
        if random.random() < ranges.bands:
            return _mix(self._shrunk(ycc, random), to_rgb)
        luma, chroma = ycc[:, :1], ycc[:, 1:]
        if random.random() < ranges.luma_filter:
            smooth = guided_filter(luma, luma, int(random.integers(1, 4)), (random.uniform(0.5, 2.0) * noise) ** 2)
            luma = torch.lerp(luma, smooth, random.uniform(0.3, 0.9))
        if random.random() < ranges.chroma_filter:
            smooth = guided_filter(luma, chroma, int(random.integers(1, 7)), (random.uniform(1.0, 4.0) * noise) ** 2)
            chroma = torch.lerp(chroma, smooth, random.uniform(0.3, 1.0))
        return _mix(torch.cat([luma, chroma], 1), to_rgb)

    def _shrunk(self, ycc: Tensor, random: np.random.Generator) -> Tensor:
        """Luma and chroma with their bands shrunk; chroma more, because the eye misses less there."""
        first = random.uniform(1.5, 4.0)
        second = first * random.uniform(0.3, 1.0)
        luma = (first, second, second * random.uniform(0.0, 0.6))
        more = random.uniform(1.0, 2.5)
        chroma = tuple(more * max(strength, first * random.uniform(0.3, 1.0)) for strength in luma)
        parts = []
        for part, strengths in ((ycc[:, :1], luma), (ycc[:, 1:], chroma)):
            smooth = shrink_bands(part, part[1:] - part[:1], strengths)
            parts.append(torch.lerp(part, smooth, random.uniform(0.7, 1.0)))
        return torch.cat(parts, 1)


@dataclass(frozen=True)
class _Process:
    """A colour filter array and its demosaicing; without masks every pixel measures all colours."""

    masks: Tensor | None
    method: str

    def sample(self, image: Tensor) -> Tensor:
        return image if self.masks is None else (image * self.masks).sum(1, keepdim=True)

    def demosaic(self, raw: Tensor) -> Tensor:
        if self.masks is None:
            return raw
        result: Tensor = getattr(demosaic, self.method)(raw, self.masks)
        return result


#: Demosaicing methods and their probabilities. "none" stands for binned pixels and for cameras with three sensors.
#: Few cameras have X-Trans.
METHODS = {"bilinear": 0.2, "malvar": 0.3, "edge_directed": 0.3, "x_trans": 0.1, "none": 0.1}


def _demosaicing(random: np.random.Generator, height: int, width: int, device: torch.device) -> _Process:
    method = str(random.choice(list(METHODS), p=list(METHODS.values())))
    if method == "none":
        return _Process(None, method)
    pattern = demosaic.X_TRANS if method == "x_trans" else demosaic.BAYER
    shift = (int(random.integers(len(pattern))), int(random.integers(len(pattern))))
    return _Process(demosaic.color_masks(pattern, height, width, shift).to(device), method)


def _expose(
    sensor: Tensor, process: _Process, shot: float, read: float, row: float, steps: int, random: np.random.Generator
) -> Tensor:
    """Raw values with noise of variance ``shot * value + read``, row offsets, clipped and quantised."""
    ideal = process.sample(sensor)
    generator = torch.Generator().manual_seed(int(random.integers(2**63)))
    noise = torch.randn(ideal.shape, generator=generator).to(ideal)
    rows = torch.randn(*ideal.shape[:3], 1, generator=generator).to(ideal)
    raw = ideal + (shot * ideal + read).sqrt() * noise + row * rows
    # A black level keeps negative values: clipping them would brighten the shadows.
    return (raw.clamp(max=1.0) * steps).round() / steps


def camera_to_srgb(random: np.random.Generator) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """A colour matrix (3, 3) from a random mixture of cameras; its rows sum to 1, so white stays white."""
    weights = random.random(len(XYZ_TO_CAMERA)) + 1e-8
    mixture = np.tensordot(weights / weights.sum(), XYZ_TO_CAMERA, 1)
    to_camera = mixture @ RGB_TO_XYZ
    to_camera = to_camera / to_camera.sum(1, keepdims=True)
    return np.linalg.inv(to_camera).astype(np.float32)


def _spread(gains: Tensor, process: _Process) -> Tensor:
    """White-balance gains (1, 3, 1, 1) as a map for the pixels of the array, (1, 1, H, W)."""
    assert process.masks is not None
    return (gains * process.masks).sum(1, keepdim=True)


def _mix(image: Tensor, matrix: Tensor) -> Tensor:
    """Apply a colour matrix (3, 3) to the channels of (N, 3, H, W)."""
    return torch.einsum("oc,nchw->nohw", matrix, image)


def srgb_to_linear(x: Tensor) -> Tensor:
    """The inverse of :func:`linear_to_srgb`."""
    return torch.where(x <= 0.04045, x / 12.92, ((x.clamp(min=0.04) + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(x: Tensor) -> Tensor:
    """Linear light in [0, 1] to sRGB (IEC 61966-2-1)."""
    return torch.where(x <= 0.0031308, x * 12.92, 1.055 * x.clamp(min=0.003) ** (1 / 2.4) - 0.055)


def tone(x: Tensor, share: float) -> Tensor:
    """A tone curve with contrast: ``share`` of smoothstep (Brooks et al. 2019, section 3.5), the rest x itself."""
    return torch.lerp(x, x * x * (3 - 2 * x), share)


def inverse_tone(y: Tensor, share: float) -> Tensor:
    """The inverse of :func:`tone` on [0, 1], by a table of 4096 values; errors are below 1e-4 inside."""
    x = np.linspace(0, 1, 4096)
    table = np.interp(np.linspace(0, 1, 4096), x + share * (x * x * (3 - 2 * x) - x), x)
    lookup = torch.from_numpy(table.astype(np.float32)).to(y)
    position = y * 4095
    below = position.floor().clamp(max=4094)
    index = below.long()
    return torch.lerp(lookup[index], lookup[index + 1], position - below)


def box(x: Tensor, radius: int) -> Tensor:
    """Mean over (2 r + 1) x (2 r + 1) pixels of (N, C, H, W), the image mirrored at its edges."""
    return _filtered(x, x.new_full((2 * radius + 1,), 1 / (2 * radius + 1)))


def guided_filter(guide: Tensor, x: Tensor, radius: int, epsilon: float) -> Tensor:
    """The guided filter (He, Sun and Tang, ECCV 2010).

    Args:
        guide: (N, 1, H, W).
        x: (N, C, H, W), the images to filter.
        radius: radius of the windows, pixels.
        epsilon: variance of the guide up to which an area counts as flat.
    """
    mean_guide, mean_x = box(guide, radius), box(x, radius)
    variance = box(guide * guide, radius) - mean_guide**2
    slope = (box(guide * x, radius) - mean_guide * mean_x) / (variance.clamp(min=0) + epsilon + 1e-8)
    return box(slope, radius) * guide + box(mean_x - slope * mean_guide, radius)


def shrink_bands(x: Tensor, noise: Tensor, strengths: Sequence[float]) -> Tensor:
    """Soft thresholds on bands of frequency, as denoising in a wavelet basis has them (Donoho, 1995).

    Fine noise goes, coarse noise and what exceeds a threshold stays. Bands are differences of Gaussian blurs whose
    deviations double from :data:`FINEST_BAND` pixels on.

    Args:
        x: (N, C, H, W).
        noise: its noise, (1, C, H, W): a camera knows how noisy it is.
        strengths: thresholds of the bands, the finest first, as multiples of the noise's deviation in the band.
    """
    result = torch.zeros_like(x)
    for band, strength in enumerate(strengths):
        both = torch.cat([x, noise])
        smooth = blur(both, FINEST_BAND * 2**band)
        detail = both - smooth
        threshold = strength * float(detail[len(x) :].std())
        result += detail[: len(x)] - detail[: len(x)].clamp(-threshold, threshold)
        x, noise = smooth[: len(x)], smooth[len(x) :]
    return result + x


def log_uniform(random: np.random.Generator, bounds: tuple[float, float]) -> float:
    """A number between the bounds whose logarithm is uniform."""
    return math.exp(random.uniform(math.log(bounds[0]), math.log(bounds[1])))


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (N, C, H, W), ``sigma`` in pixels; the image is mirrored at its edges."""
    radius = min(max(math.ceil(2.5 * sigma), 1), min(x.shape[2:]) - 1)
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype) / sigma) ** 2)
    return _filtered(x, line / line.sum())


def _filtered(x: Tensor, taps: Tensor) -> Tensor:
    """Rows and columns of (N, C, H, W) convolved with ``taps`` (2 r + 1,), the image mirrored at its edges, r < H, W.

    As two products of matrices, which are faster than a convolution with many taps.
    """
    return _mirrored(taps, x.shape[2]) @ x @ _mirrored(taps, x.shape[3]).T


def _mirrored(taps: Tensor, size: int) -> Tensor:
    """The matrix (size, size) of that convolution along one axis."""
    reach = len(taps) // 2
    places = torch.arange(size, device=taps.device)[:, None] + torch.arange(-reach, reach + 1, device=taps.device)
    places = places.abs()
    places = torch.where(places < size, places, 2 * (size - 1) - places)
    return taps.new_zeros(size, size).scatter_add_(1, places, taps.expand(size, -1))


def sharpen(x: Tensor, radius: float, amount: float) -> Tensor:
    """Unsharp mask: add ``amount`` times the difference to a Gaussian blur of ``radius`` pixels."""
    return x + amount * (x - blur(x, radius))
