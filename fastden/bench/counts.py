"""The least arithmetic and memory traffic of the network and its operators."""

from __future__ import annotations

from typing import NamedTuple

#: A training step does so many times the operations, and moves so many times the values, of a forward pass.
TRAINING = 3


class PerPixel(NamedTuple):
    """A count for each pixel of the image.

    Args:
        channel: for each channel of the network's input.
        fixed: whatever the image.
        colour: for each channel of the image, which the network returns.
        pair: for each pair of an input's channel and one of the image.
    """

    channel: int
    fixed: int
    colour: int = 0
    pair: int = 0

    def of(self, channels: int, colours: int = 3, training: bool = False) -> int:
        """The count for an input of ``channels``, the noise level's among them, and an image of ``colours``, 1 or 3.

        With ``training`` it is that of a step, which does each multiplication three times: forward, for the input's
        gradient and for the weight's. What reads the image does it twice: nobody asks for the image's gradient.
        """
        reading, others = (self.channel + self.pair * colours) * channels, self.fixed + self.colour * colours
        return 2 * reading + TRAINING * others if training else reading + others


class Part(NamedTuple):
    """A part of the network.

    Args:
        own: multiply-accumulates of fastden's operator.
        plain: multiply-accumulates of the layers that it stands for. Where it stands for a chain that begins at the
            image, conv0 is among them: the same function of the same inputs.
        values: values read and written at least: each input and each output once; weights are left out.
    """

    own: PerPixel
    plain: PerPixel
    values: PerPixel


def _same(macs: int, values: int) -> Part:
    return Part(PerPixel(0, macs), PerPixel(0, macs), PerPixel(0, values))


CONV0 = PerPixel(25 * 64, 0)
#: Sizes: conv1 to res1 and up2 to res3 are at half resolution (a quarter of the pixels), conv2 and res2 at a quarter.
#: The head's 4x4 kernels hold nine taps for each phase.
PARTS = {
    "stem": Part(PerPixel(49 * 128 // 4, 0), PerPixel(25 * 64, 9 * 64 * 128 // 4), PerPixel(1, 128 // 4)),
    "res1": _same((2 * 128 * 32 + 9 * 32 * 32) // 4, 2 * 128 // 4),
    "conv2": _same(9 * 128 * 128 // 16, 128 // 4 + 128 // 16),
    "res2": _same((2 * 128 * 32 + 9 * 32 * 32) // 16, 2 * 128 // 16),
    "up2": _same(16 * 128 * 32 // 16, 128 // 16 + 32 // 4),
    "conv3": _same(9 * 160 * 256 // 4, (160 + 256) // 4),
    "res3": _same((2 * 256 * 64 + 9 * 64 * 64) // 4, 2 * 256 // 4),
    "head": Part(
        PerPixel(0, 0, 9 * 256 * 4 // 4, 49),
        PerPixel(25 * 64, 16 * 256 * 64 // 4, 9 * 128),
        PerPixel(1, 256 // 4, 1),
    ),
}
#: The convolutions of res3 one by one: 1x1, 3x3, and 1x1 with the residual.
UNITS = {
    "res3_reduce": _same(256 * 64 // 4, (256 + 64) // 4),
    "res3_conv": _same(9 * 64 * 64 // 4, 2 * 64 // 4),
    "res3_expand": _same(64 * 256 // 4, (64 + 2 * 256) // 4),
}


def _sum(counts: list[PerPixel]) -> PerPixel:
    return PerPixel(*map(sum, zip(*counts, strict=True)))


#: Multiply-accumulates of the composed network and of the plain one, whose conv0 serves both ends; and values moved.
COMPOSED_MACS = _sum([part.own for part in PARTS.values()])
_PLAIN_TWICE = _sum([part.plain for part in PARTS.values()])
PLAIN_MACS = _PLAIN_TWICE._replace(channel=_PLAIN_TWICE.channel - CONV0.channel)
VALUES = _sum([part.values for part in PARTS.values()])
