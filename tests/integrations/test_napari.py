"""napari's dock widget, in a viewer without a screen."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastden
from tests.integrations.installed import package

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
napari = package("napari")

from npe2 import PluginManager, PluginManifest  # noqa: E402
from qtpy.QtWidgets import QApplication  # noqa: E402

from fastden.integrations import napari as ours  # noqa: E402

MANIFEST = Path(ours.__file__).with_name("napari.yaml")


@pytest.fixture(scope="module")
def viewer() -> Iterator[Any]:
    # Qt without a screen has no OpenGL; the drawing does not matter here.
    with pytest.MonkeyPatch.context() as patch:
        from vispy.gloo import gl

        known = {gl.GL_EXTENSIONS: "", gl.GL_MAX_TEXTURE_SIZE: 4096}
        patch.setattr(gl, "glGetParameter", lambda name: known.get(name, 2048))
        yield from _viewer()


def _viewer() -> Iterator[Any]:
    manager = PluginManager.instance()
    manager.discover()
    if "fastden" not in manager:  # not installed, but run from a checkout
        manager.register(PluginManifest.from_file(MANIFEST))
    viewer = napari.Viewer(show=False)
    yield viewer
    viewer.close()


@pytest.fixture
def widget(viewer: Any) -> Iterator[Any]:
    """The widget as napari's menu opens it."""
    viewer.layers.clear()
    dock, widget = viewer.window.add_plugin_dock_widget("fastden", "Denoise")
    yield widget
    viewer.window.remove_dock_widget(dock)


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not until() and time.monotonic() < deadline:
        QApplication.processEvents()
        time.sleep(0.01)
    assert until()


def press(widget: Any) -> None:
    widget.start.native.click()
    wait(lambda: bool(widget.start.enabled))


def noisy(shape: tuple[int, ...]) -> Any:
    ramp = np.broadcast_to(np.linspace(0.2, 0.8, shape[-1]), shape)
    return np.clip(ramp + np.random.default_rng(0).normal(0, 0.1, shape), 0, 1)


def test_the_manifest_is_valid() -> None:
    manifest = PluginManifest.from_file(MANIFEST)
    manifest.validate_imports()
    assert manifest.name == "fastden"


def test_a_photograph(viewer: Any, widget: Any) -> None:
    picture = np.rint(255 * noisy((40, 3, 48)).transpose(0, 2, 1)).astype(np.uint8)
    viewer.add_image(picture, name="photo", rgb=True)
    press(widget)
    layer = viewer.layers["photo denoised"]
    assert layer.rgb
    assert np.array_equal(layer.data, fastden.denoise(picture))


def test_a_stack_of_twelve_bits(viewer: Any, widget: Any) -> None:
    stack = np.rint(4095 * noisy((2, 40, 48))).astype(np.uint16)
    viewer.add_image(stack, name="stack", scale=(2, 1, 1), colormap="magma")
    widget.automatic.value, widget.sigma.value, widget.strength.value = False, 25.0, 1.0
    assert widget.sigma.enabled
    widget.tile.value = "256"
    press(widget)
    layer = viewer.layers["stack denoised"]
    assert (layer.data.dtype, layer.data.shape) == (np.uint16, stack.shape)
    assert tuple(layer.scale) == (2, 1, 1)
    assert layer.colormap.name == "magma"
    clean = 4095 * np.linspace(0.2, 0.8, 48)
    assert np.mean((layer.data - clean) ** 2) < 0.1 * np.mean((stack - clean) ** 2)


def test_the_result_lies_where_the_layer_does(viewer: Any, widget: Any) -> None:
    affine = np.array([[1.0, 0.2, 5.0], [0.0, 2.0, -3.0], [0.0, 0.0, 1.0]])
    placement: dict[str, Any] = {"scale": (2, 3), "translate": (10, 20), "rotate": 30, "shear": [0.3], "affine": affine}
    layer = viewer.add_image(noisy((40, 48)), name="turned", **placement)
    press(widget)
    result = viewer.layers["turned denoised"]
    for corner in ((0, 0), (0, 47), (39, 0)):
        np.testing.assert_allclose(result.data_to_world(corner), layer.data_to_world(corner))


def test_the_result_keeps_what_the_layer_says(viewer: Any, widget: Any) -> None:
    kept: dict[str, Any] = {"axis_labels": ("y", "x"), "metadata": {"channel": "GFP"}, "blending": "additive"}
    kept |= {"gamma": 0.5, "contrast_limits": [0.1, 0.7]}
    layer = viewer.add_image(noisy((40, 48)), name="cells", units=("um", "um"), visible=False, **kept)
    press(widget)
    result = viewer.layers["cells denoised"]
    assert result.units == layer.units
    assert {name: getattr(result, name) for name in kept} == kept
    assert result.metadata is not layer.metadata
    assert result.visible


#: What :func:`denoise_layer` is asked for beside the pixels.
OPTIONS: dict[str, Any] = {
    "rgb": False,
    "sigma": 25.0,
    "strength": 1.0,
    "tile": "auto",
    "progress": lambda part: None,
}


@pytest.mark.parametrize("sigma", [25.0, "auto"])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_alpha_does_not_change_the_range(dtype: Any, sigma: Any) -> None:
    """12 bits of colour beside 16 bits of alpha."""
    colours = np.rint(4095 * noisy((40, 3, 48)).transpose(0, 2, 1)).astype(dtype)
    alpha = np.random.default_rng(1).integers(0, 65536, (40, 48, 1)).astype(dtype)
    options = {**OPTIONS, "rgb": True, "sigma": sigma}
    result = ours.denoise_layer(np.concatenate([colours, alpha], -1), **options)
    assert np.array_equal(result[..., :3], ours.denoise_layer(colours, **options))
    assert np.array_equal(result[..., 3:], alpha)
    assert np.std(result[..., :3] / 4095 - np.linspace(0.2, 0.8, 48)[:, None]) < 0.05


@pytest.mark.parametrize("sigma", [25.0, "auto"])
def test_outliers_do_not_change_what_sigma_means(sigma: Any) -> None:
    picture = np.rint(4095 * noisy((2, 64, 64))).astype(np.uint16)
    flawed = picture.copy()
    flawed[0, 40, 40], flawed[1, 41, 41] = 65535, 0
    options = {**OPTIONS, "sigma": sigma}
    wanted, result = (ours.denoise_layer(stack, **options)[:, :16].astype(float) for stack in (picture, flawed))
    assert np.abs(result - wanted).max() < 0.01 * 4095
    lone = np.zeros((64, 64), np.uint16)
    lone[3, 3] = 9
    assert ours.denoise_layer(lone, **options).shape == lone.shape


def test_strength_0_and_what_is_refused() -> None:
    wide = np.random.default_rng(0).integers(0, 2**32, (20, 20), np.uint32)
    result = ours.denoise_layer(wide, **{**OPTIONS, "strength": 0.0})
    assert np.array_equal(result, wide)
    assert not np.shares_memory(result, wide)
    with pytest.raises(TypeError, match="layer: dtype complex64; accepted: integers or floating"):
        ours.denoise_layer(np.ones((4, 4), np.complex64), **OPTIONS)
    for dtype in (np.uint8, np.uint16):
        for shape in ((0, 4, 4), (3, 0, 4)):
            with pytest.raises(ValueError, match=r"layer: shape .*; accepted: no empty dimension"):
                ours.denoise_layer(np.ones(shape, dtype), **OPTIONS)


def test_values_on_any_scale_and_flat_ones() -> None:
    options = OPTIONS
    picture = noisy((40, 48)).astype(np.float32)
    low, high = picture.min(), picture.max()
    wanted = fastden.denoise((picture - low) / (high - low), 25) * (high - low) + low
    for factor, offset in ((1.0, 0.0), (2000.0, -300.0)):
        result = ours.denoise_layer(factor * picture + np.float32(offset), **options)
        assert result.dtype == np.float32
        np.testing.assert_allclose((result - offset) / factor, np.clip(wanted, low, high), atol=1e-4)
    half = (100_000 * picture - 50_000).astype(np.float16)  # wider than the largest number of 16 bits
    result = (ours.denoise_layer(half, **options).astype(np.float32) + 50_000) / 100_000
    np.testing.assert_allclose(result, np.clip(wanted, low, high), atol=1e-3)
    mask = picture > 0.5
    result = ours.denoise_layer(mask, **options)
    assert result.dtype == np.bool_
    assert np.array_equal(result, fastden.denoise(mask.astype(np.float32), 25) > 0.5)
    flat = np.full((9, 9), 7, np.int32)
    assert np.array_equal(ours.denoise_layer(flat, **options), flat)


def test_cancel_and_mistakes(viewer: Any, widget: Any) -> None:
    press(widget)
    assert widget.message.value == "no image layer; open a picture first"
    viewer.add_image(noisy((6, 200, 200)), name="stack")
    widget.start.native.click()
    assert widget.cancel.enabled
    widget.cancel.native.click()
    wait(lambda: bool(widget.start.enabled))
    assert widget.message.value == "cancelled"
    assert [layer.name for layer in viewer.layers] == ["stack"]
    viewer.layers.clear()
    viewer.add_image(noisy((40, 48)), name="flawed")
    viewer.layers["flawed"].data[3, 3] = np.nan
    press(widget)
    assert "NaN" in widget.message.value
    assert [layer.name for layer in viewer.layers] == ["flawed"]
