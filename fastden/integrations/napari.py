"""A dock widget for napari: choose a layer, press *Denoise*, get another. ``napari.yaml`` announces it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from fastden.api import denoise
from fastden.errors import FAILURES, in_one_line
from fastden.images.pixels import Array
from fastden.images.ranges import FEW_VALUES
from fastden.images.samples import MAX_SIGMA
from fastden.integrations._missing import import_failure

try:
    import napari
    from magicgui.widgets import Container, Label, ProgressBar, PushButton, create_widget
    from napari.qt.threading import create_worker
    from superqt.utils import ensure_main_thread
except (ModuleNotFoundError, RuntimeError) as error:
    raise import_failure(error, "napari") from error

#: Side of the tiles, pixels; the result is the same.
TILES = ("automatic", "256", "512", "1024")


class Cancelled(Exception):
    """*Cancel* was pressed."""


def denoise_layer(
    data: Array, *, rgb: bool, sigma: Any, strength: float, tile: Any, progress: Callable[[float], None]
) -> Array:
    """Denoise a layer's pixels, plane by plane.

    8 bits are denoised as they are. Other values are scaled by the layer's own range, and back: a microscope's 12 bits
    fill a part of 16, and its noise is judged against that part. The range is that of the colours of all planes,
    without the darkest and the brightest 0.1 % of each plane, so that a hot pixel does not change it.

    Args:
        data: (..., H, W), or (..., H, W, 3 or 4) where ``rgb``; integers or floating, not empty. Alpha is not touched.
        rgb: whether the last axis holds colours.
        sigma: ``"auto"``, estimated from each plane, or a number on a scale where 255 is the length of that range; of
            uint8, 255 is white.
        strength, tile: as in :func:`fastden.denoise`.
        progress: called with the part that is done, 0 to 1; what it raises ends the work.

    Returns:
        As ``data``.

    Raises:
        TypeError: complex values.
        ValueError: an empty layer; values that are not finite; what :func:`fastden.denoise` raises.
    """
    values = np.asarray(data)
    if values.dtype.kind not in "biuf":
        raise TypeError(f"layer: dtype {values.dtype}; accepted: integers or floating")
    if 0 in values.shape:
        raise ValueError(f"layer: shape {values.shape}; accepted: no empty dimension")
    planes = values.reshape(-1, *values.shape[-3 if rgb else -2 :])
    colours = planes[..., :3] if rgb else planes
    lowest, highest = float(colours.min()), float(colours.max())
    if not math.isfinite(highest - lowest):
        raise ValueError("layer: holds NaN or infinity; accepted: finite values")
    has_own_range = values.dtype != np.uint8
    if strength == 0 or (has_own_range and highest == lowest):
        return values.copy()
    low, high = _range_without_outliers(colours) if has_own_range else (lowest, highest)
    results = planes.copy()
    cleaned = results[..., :3] if rgb else results
    for index, plane in enumerate(colours):

        def part(done: int, total: int, index: int = index) -> None:
            progress((index + done / max(total, 1)) / len(planes))

        image = ((plane.astype(np.float64) - low) / (high - low)).astype(np.float32) if has_own_range else plane
        clean = denoise(image, sigma, strength=strength, tile=tile, progress=part)
        if has_own_range:
            clean = np.clip(clean.astype(np.float64) * (high - low) + low, lowest, highest)
            clean = np.rint(clean) if values.dtype.kind in "biu" else clean
        cleaned[index] = clean
    return results.reshape(values.shape)


def _range_without_outliers(planes: Array) -> tuple[float, float]:
    """The lowest and the highest value, without a share :data:`FEW_VALUES` of each plane at both ends.

    Where all others are equal the outliers are the picture, and count.
    """
    ends = []
    for plane in planes:  # one by one: sorting copies
        flat = plane.reshape(-1)
        few = int(FEW_VALUES * flat.size)
        ordered = np.partition(flat, (few, flat.size - 1 - few))
        ends.append((float(ordered[few]), float(ordered[flat.size - 1 - few])))
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return (low, high) if low < high else (float(planes.min()), float(planes.max()))


def _work(*arguments: Any, **options: Any) -> Array | str:
    """:func:`denoise_layer`, or why there is no result."""
    try:
        return denoise_layer(*arguments, **options)
    except Cancelled:
        return "cancelled"
    except FAILURES as error:
        return in_one_line(error)


class DenoiseWidget(Container):
    """The dock widget.

    Args:
        napari_viewer: the viewer that shows it; napari gives it by this name.
    """

    def __init__(self, napari_viewer: napari.Viewer) -> None:
        self._viewer = napari_viewer
        self._stop = threading.Event()
        self.layer = create_widget(annotation=napari.layers.Image, label="layer")
        self.automatic = create_widget(True, label="find sigma by itself")
        self.sigma = create_widget(10.0, label="sigma", options={"min": 0.0, "max": MAX_SIGMA, "enabled": False})
        slider = {"min": 0.0, "max": 2.0, "step": 0.05}
        self.strength = create_widget(1.0, label="strength", widget_type="FloatSlider", options=slider)
        self.tile = create_widget("automatic", label="tiles", widget_type="ComboBox", options={"choices": TILES})
        self.start, self.cancel = PushButton(text="Denoise"), PushButton(text="Cancel", enabled=False)
        self.progress, self.message = ProgressBar(min=0, max=100, value=0), Label(value="")
        parts = [self.layer, self.automatic, self.sigma, self.strength, self.tile, self.start, self.cancel]
        super().__init__(widgets=[*parts, self.progress, self.message])
        self.automatic.changed.connect(lambda automatic: setattr(self.sigma, "enabled", not automatic))
        self.start.changed.connect(self._start)
        self.cancel.changed.connect(self._stop.set)

    def _start(self) -> None:
        layer = self.layer.value
        if layer is None:
            self.message.value = "no image layer; open a picture first"
            return
        if layer.multiscale:
            self.message.value = "a layer of several scales; accepted: one scale"
            return
        self._stop.clear()
        self._busy(True)
        # All but its pixels: place, units, metadata, colours, blending.
        state = {**layer.as_layer_data_tuple()[1], "name": f"{layer.name} denoised", "visible": True}
        worker = create_worker(
            _work,
            layer.data,
            rgb=layer.rgb,
            sigma="auto" if self.automatic.value else self.sigma.value,
            strength=self.strength.value,
            tile="auto" if self.tile.value == "automatic" else int(self.tile.value),
            progress=self._report,
        )
        worker.returned.connect(lambda result: self._returned(result, state))
        worker.finished.connect(lambda: self._busy(False))
        worker.start()

    def _report(self, part: float) -> None:
        """Report progress; runs in the worker's thread."""
        if self._stop.is_set():
            raise Cancelled
        self._show(round(100 * part))

    @ensure_main_thread  # type: ignore[untyped-decorator,unused-ignore]
    def _show(self, percent: int) -> None:
        self.progress.value = percent

    def _returned(self, result: Array | str, state: dict[str, Any]) -> None:
        if isinstance(result, str):
            self.message.value = result
        else:
            self._viewer.add_layer(napari.layers.Layer.create(result, state, "image"))

    def _busy(self, busy: bool) -> None:
        self.start.enabled, self.cancel.enabled = not busy, busy
        self.progress.value = 0
        if busy:
            self.message.value = ""
