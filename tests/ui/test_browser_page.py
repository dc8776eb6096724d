"""The page that denoises in the visitor's browser, in Chromium: results are the command's, nothing is sent."""

from __future__ import annotations

import functools
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import maximum_filter
from skimage import data
from skimage.metrics import peak_signal_noise_ratio as psnr

import fastden
from fastden.images.samples import crop_windows
from fastden.inference.estimate import UNDECIDED, NoiseEstimate
from fastden.network.level import KNOTS, Cells, levels_of, robust_curve
from fastden.ui.session import in_words
from tests.browser import chromium, drop, opened
from tests.cli.run import works
from tests.image_files import encoded, pixels
from tests.scripts import load

ROOT = Path(__file__).resolve().parents[2]
ZONE = "#fastden-page .drop"
SAVE = "#fastden-page .save:visible"
CONFIG = """
site_name: fastden
docs_dir: docs
theme: {name: material, font: false}
plugins: []
nav: [index.md, browser.md]
"""


def docs_site() -> Any:
    """The module that builds the pages."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    return load(ROOT / "scripts" / "docs_site.py")


def test_a_site_without_npm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hooks = docs_site()
    shutil.copyfile(hooks.PAGE / "package-lock.json", tmp_path / "package-lock.json")
    monkeypatch.setattr(hooks, "PAGE", tmp_path)
    monkeypatch.setenv("PATH", "")
    assert [name for name, _ in hooks._of_page(tmp_path / "page")] == ["compare.js"]
    assert capsys.readouterr().err == "browser.md: npm is not installed: the page is built without its runtime\n"


def test_the_lock_file_names_no_host() -> None:
    assert "http" not in (ROOT / "scripts" / "page" / "package-lock.json").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built page *Denoise here*, with the files that the hook adds."""
    chromium()
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    missing = docs_site()._fetch_runtime()
    if missing is not None:
        pytest.skip(missing)
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs" / "page", folder / "docs" / "page")
    page = (ROOT / "docs" / "browser.md").read_text()
    (folder / "docs" / "browser.md").write_text(re.sub(r"\((command_line|noise)\.md\)", "(index.md)", page))
    (folder / "docs" / "index.md").write_text("# Start\n")
    config = CONFIG + f"hooks: [{json.dumps(str(ROOT / 'scripts' / 'docs_site.py'))}]\n"
    (folder / "mkdocs.yml").write_text(config)
    build(load_config(str(folder / "mkdocs.yml"), site_dir=str(folder / "site")))
    return folder / "site"


def serving(folder: Path, headers: dict[str, str]) -> ThreadingHTTPServer:
    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            for name, value in headers.items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def url(site: Path) -> Iterator[str]:
    """A plain file server: no header beyond the usual ones."""
    server = serving(site, {})
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture
def page(window: Any, url: str) -> Iterator[Any]:
    with opened(window, f"{url}/browser/", seconds=180) as page:
        page.wait_for_selector("#fastden-page .file:not([disabled])", state="attached")
        yield page


def status(page: Any) -> str:
    return str(page.inner_text("#fastden-page .status"))


def test_a_photograph(page: Any, url: str, site: Path, tmp_path: Path) -> None:
    clean = data.astronaut()[:270, 100:400]  # more than one tile each way
    noise = np.random.default_rng(0).normal(0, 1, clean.shape) * (8 + 20 * (1 - clean / 255))
    noisy = np.rint(np.clip(clean + noise, 0, 255)).astype(np.uint8)
    Image.fromarray(noisy).save(tmp_path / "noisy.png")
    works("denoise", tmp_path / "noisy.png", "-o", tmp_path / "wanted.png", "--dtype", "float32")
    wanted = np.asarray(Image.open(tmp_path / "wanted.png"))

    drop(page, ZONE, {"noisy.png": (tmp_path / "noisy.png").read_bytes()})
    page.wait_for_selector(SAVE)
    with page.expect_download() as download:
        page.click(SAVE)
    assert download.value.suggested_filename == "noisy-clean.png"
    result = np.asarray(Image.open(download.value.path()).convert("RGB"))
    figures = [psnr(clean, picture) for picture in (noisy, wanted, result)]
    print(f"noisy {figures[0]:.3f} dB, command {figures[1]:.3f} dB, page {figures[2]:.3f} dB; {status(page)}")
    assert figures[1] > figures[0] + 5
    assert abs(figures[2] - figures[1]) < 0.05
    # With weights in 16 bits, with tiles or without, there is no seam and no shift.
    assert np.abs(result.astype(int) - wanted).max() <= 2
    assert in_words(fastden.estimate_noise(noisy)) in status(page)
    assert "(WebAssembly, 1 thread)" in status(page)
    name = "color" if fastden.estimate_noise(noisy).is_white else "photo"
    assert f" by the model {name} in " in status(page)
    size = {model.stem: model.stat().st_size for model in (site / "page" / "models").iterdir()}
    # A visitor's picture needs the estimator and one of the networks.
    assert size["noise"] + max(size["photo"], size["color"]) < 2.5e6
    assert [asked for asked in page.asked if not asked.startswith((url, "data:", f"blob:{url}"))] == []


@pytest.mark.parametrize(("sigma", "strength"), [(40, 0.5), (75, 2)])
def test_settings(page: Any, tmp_path: Path, sigma: int, strength: float) -> None:
    """Also above the level that the networks know."""
    noisy = pixels(64, 80)
    drop(page, ZONE, {"noisy.png": encoded(noisy, "PNG")})
    page.wait_for_selector(SAVE)
    page.uncheck("#fastden-page .auto")
    page.locator("#fastden-page .sigma").fill(str(sigma))
    page.locator("#fastden-page .strength").fill(str(strength))
    page.click("#fastden-page .again")
    page.wait_for_selector("#fastden-page .save", state="hidden")
    page.wait_for_selector(SAVE)
    with page.expect_download() as download:
        page.click(SAVE)
    result = np.asarray(Image.open(download.value.path()).convert("RGB"))
    wanted = fastden.denoise(noisy, sigma, strength=strength, dtype="float32")
    assert np.abs(result.astype(int) - wanted).max() <= 2
    # As with --sigma, noise of a level set by hand counts as white.
    assert " by the model color in " in status(page)
    assert "A level set by hand is one of white noise" in page.inner_text("#fastden-page .settings")


def test_coarse_grain_goes_to_photo(page: Any) -> None:
    coarse = np.repeat(np.repeat(pixels(40, 40), 2, 0), 2, 1)
    assert not fastden.estimate_noise(coarse).is_white
    drop(page, ZONE, {"coarse.png": encoded(coarse, "PNG")})
    page.wait_for_selector(SAVE)
    assert " by the model photo in " in status(page)


def test_of_several_the_first_is_taken_and_the_page_says_so(page: Any) -> None:
    drop(page, ZONE, {name: encoded(pixels(40, 40), "PNG") for name in ("a.png", "b.png")})
    page.wait_for_selector(SAVE)
    assert status(page).endswith("2 files were dropped: this page took a.png alone. fastden ui takes several.")
    drop(page, ZONE, {"c.png": encoded(pixels(40, 40), "PNG")})
    page.wait_for_selector("#fastden-page .save[download='c-clean.png']")
    assert "were dropped" not in status(page)


def test_the_bar_has_a_name(page: Any) -> None:
    assert page.get_by_role("progressbar", name="Progress", include_hidden=True).count() == 1


def test_threads_where_the_server_allows_them(site: Path, window: Any) -> None:
    allowing = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
    server = serving(site, allowing)
    context = window.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.server_address[1]}/browser/")
    cores = int(page.evaluate("navigator.hardwareConcurrency"))
    page.wait_for_selector("#fastden-page .file:not([disabled])", state="attached")
    drop(page, ZONE, {"noisy.png": encoded(pixels(40, 40), "PNG")})
    page.wait_for_selector(SAVE, timeout=180_000)
    assert f"(WebAssembly, {min(cores, 8)} thread" in status(page)
    context.close()
    server.shutdown()


#: An adapter of WebGPU that promises a device and has none, as a driver that the browser blocks later; and a runtime
#: whose sessions on WebGPU load and then fail, as where the card's memory ends.
NO_DEVICE = """
const adapter = {
  info: {}, features: new Set(), limits: {}, isFallbackAdapter: false,
  requestDevice: async () => { throw new Error("no device"); },
};
Object.defineProperty(self.navigator, "gpu", { value: { requestAdapter: async () => adapter } });
"""
FAILS_LATER = """
  const create = ort.InferenceSession.create;
  ort.InferenceSession.create = async (model, options) => {
    if (options.executionProviders[0] !== "webgpu") return create(model, options);
    return { run: async () => { throw new Error("out of memory"); } };
  };
"""


@pytest.mark.parametrize("fault", ["", FAILS_LATER], ids=["no device", "fails later"])
def test_the_processor_takes_over_from_webgpu(site: Path, window: Any, tmp_path: Path, fault: str) -> None:
    shutil.copytree(site, tmp_path / "site")
    worker = tmp_path / "site" / "page" / "worker.js"
    start = "  ort.env.wasm.wasmPaths"
    assert worker.read_text().count(start) == 1
    worker.write_text(NO_DEVICE + worker.read_text().replace(start, fault + start))
    server = serving(tmp_path / "site", {})
    noisy = pixels(48, 64)
    with opened(window, f"http://127.0.0.1:{server.server_address[1]}/browser/", seconds=60) as page:
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.wait_for_selector("#fastden-page .file:not([disabled])", state="attached")
        for _ in range(2):
            drop(page, ZONE, {"noisy.png": encoded(noisy, "PNG")})
            page.wait_for_selector(SAVE)
            assert "(WebAssembly, 1 thread)" in status(page)
        with page.expect_download() as download:
            page.click(SAVE)
        result = np.asarray(Image.open(download.value.path()).convert("RGB"))
    server.shutdown()
    wanted = fastden.denoise(noisy, dtype="float32")
    assert np.abs(result.astype(int) - wanted).max() <= 2
    # Once: the second picture goes to the processor at once.
    assert len([line for line in said if line.startswith("WebGPU does not run the network")]) == 1, said


def test_gray_stays_gray(page: Any) -> None:
    gray = pixels(64, 80, channels=0)
    drop(page, ZONE, {"gray.png": encoded(gray, "PNG")})
    page.wait_for_selector(SAVE)
    with page.expect_download() as download:
        page.click(SAVE)
    result = np.asarray(Image.open(download.value.path()).convert("RGB")).astype(int)
    assert np.abs(result - result[..., :1]).max() == 0
    assert np.abs(result[..., 0] - fastden.denoise(gray, dtype="float32")).max() <= 2


def test_gray_parts_of_a_colour_picture_stay_gray(page: Any) -> None:
    """Each pixel whose neighbours are gray, as the command does; also where tiles meet and at the borders."""
    picture = np.repeat(pixels(300, 320, channels=0)[..., None], 3, -1)
    picture[100:140, 200:270] = pixels(40, 70)
    picture[0, 0] = picture[297, 9] = (200, 40, 40)
    drop(page, ZONE, {"stamped.png": encoded(picture, "PNG")})
    page.wait_for_selector(SAVE)
    with page.expect_download() as download:
        page.click(SAVE)
    result = np.asarray(Image.open(download.value.path()).convert("RGB")).astype(int)
    wanted = fastden.denoise(picture, dtype="float32").astype(int)
    assert np.abs(result - wanted).max() <= 2
    coloured = (picture != picture[..., :1]).any(-1)
    far = ~maximum_filter(coloured, 7, mode="constant")
    assert far.mean() > 0.9
    assert np.abs(result - result[..., :1])[far].max() == 0
    assert np.abs(result - result[..., :1])[~far].max() > 0


def test_the_runtime_and_networks_are_loaded_once(page: Any) -> None:
    def loaded() -> list[str]:
        return [asked for asked in page.asked if re.search(r"worker\.js|runtime/|noise\.onnx", asked)]

    drop(page, ZONE, {"a.png": encoded(pixels(40, 48), "PNG")})
    page.wait_for_selector(SAVE)
    first = loaded()
    assert first
    page.click("#fastden-page .again")
    page.wait_for_selector("#fastden-page .save", state="hidden")
    page.wait_for_selector(SAVE)
    drop(page, ZONE, {"b.png": encoded(pixels(48, 64), "PNG")})
    page.wait_for_selector("#fastden-page .save[download='b-clean.png']")
    page.wait_for_function("document.querySelector('fastden-compare').after.naturalWidth === 64")
    assert loaded() == first
    drop(page, ZONE, {"large.png": encoded(pixels(300, 520), "PNG")})
    page.wait_for_selector("text=Denoising ...")
    page.click("#fastden-page .cancel")  # ends the worker, and the pixels that it had
    page.click("#fastden-page .again")
    page.wait_for_selector("#fastden-page .save[download='large-clean.png']")


@pytest.mark.parametrize("then", ["another", "cancel"])
def test_a_result_that_came_too_late(page: Any, then: str) -> None:
    """The picture is encoded for seconds. What the visitor does meanwhile counts."""
    page.evaluate(
        """() => {
            const encode = OffscreenCanvas.prototype.convertToBlob;
            OffscreenCanvas.prototype.convertToBlob = async function (...options) {
                window.encoding = true;
                await new Promise((resolve) => setTimeout(resolve, 2000));
                return encode.apply(this, options);
            };
        }"""
    )
    drop(page, ZONE, {"first.png": encoded(pixels(48, 48), "PNG")})
    page.wait_for_function("window.encoding")
    if then == "cancel":
        page.click("#fastden-page .cancel")
    else:
        drop(page, ZONE, {"large.png": encoded(Image.new("1", (8000, 5500)), "PNG")})
        page.wait_for_selector("text=large.png: 8000 x 5500 pixels")
    said = status(page)
    page.wait_for_timeout(3000)
    assert status(page) == said
    assert not page.is_visible("#fastden-page .save")
    assert not page.query_selector("#fastden-page fastden-compare")


def animation(kind: str, frames: int) -> bytes:
    first, *others = (Image.fromarray(pixels(40, 40, seed=seed)) for seed in range(frames))
    return encoded(first, kind, save_all=True, append_images=others)


@pytest.mark.parametrize(("kind", "suffix"), [("GIF", "gif"), ("WEBP", "webp"), ("AVIF", "avif")])
def test_one_frame_is_no_animation(page: Any, kind: str, suffix: str) -> None:
    drop(page, ZONE, {f"a.{suffix}": animation(kind, 1)})
    page.wait_for_selector(SAVE)


def test_the_first_frame_where_the_browser_cannot_count_them(page: Any) -> None:
    page.evaluate("delete self.ImageDecoder")
    drop(page, ZONE, {"moving.gif": animation("GIF", 3)})
    page.wait_for_selector(SAVE)


def test_what_is_refused(page: Any) -> None:
    drop(page, ZONE, {"broken.png": encoded(pixels(), "PNG")[:60]})
    page.wait_for_selector("text=broken.png: not a picture that this browser reads; accepted: JPEG, PNG, WebP, AVIF")
    drop(page, ZONE, {"large.png": encoded(Image.new("1", (8000, 5500)), "PNG")})
    page.wait_for_selector("text=large.png: 8000 x 5500 pixels; accepted here: at most 40 megapixels")
    kinds = {"PNG": "png", "GIF": "gif", "WEBP": "webp", "AVIF": "avif"}
    for kind, suffix in kinds.items():
        drop(page, ZONE, {f"moving.{suffix}": animation(kind, 3)})
        page.wait_for_selector(f"text=moving.{suffix}: an animation of 3 frames; accepted: one picture")
    drop(page, ZONE, {"renamed.png": animation("GIF", 2)})
    page.wait_for_selector("text=renamed.png: an animation of 2 frames; accepted: one picture")
    assert not page.is_visible("#fastden-page .save")
    assert not page.is_visible("#fastden-page .bar")


#: What is left in the page of the pixels that a worker was sent, in bytes, and how many decoded pictures were freed.
COUNTS = """() => {
    const { postMessage } = Worker.prototype;
    Worker.prototype.postMessage = function (message, ...rest) {
        postMessage.call(this, message, ...rest);
        if (message.picture) window.left = message.picture.pixels.byteLength;
    };
    const { close } = ImageBitmap.prototype;
    window.freed = 0;
    ImageBitmap.prototype.close = function () { window.freed += 1; close.call(this); };
}"""


def test_the_page_keeps_no_copy_of_the_pixels(page: Any) -> None:
    page.evaluate(COUNTS)
    drop(page, ZONE, {"noisy.png": encoded(pixels(40, 48), "PNG")})
    page.wait_for_selector(SAVE)
    assert page.evaluate("[window.left, window.freed]") == [0, 1]
    page.click("#fastden-page .again")
    page.wait_for_selector("#fastden-page .save", state="hidden")
    page.wait_for_selector(SAVE)
    assert page.evaluate("[window.left, window.freed]") == [0, 1]  # the worker had the pixels
    sizes = "['before', 'after'].map(name => document.querySelector('fastden-compare')[name].naturalWidth)"
    page.wait_for_function(f"{sizes}.every(width => width === 48)")
    drop(page, ZONE, {"large.png": encoded(Image.new("1", (8000, 5500)), "PNG")})
    page.wait_for_selector("text=large.png: 8000 x 5500 pixels")
    assert page.evaluate("window.freed") == 2


def test_cancel(page: Any) -> None:
    drop(page, ZONE, {"noisy.png": encoded(pixels(300, 520), "PNG")})
    page.wait_for_selector("text=Denoising ...")
    page.click("#fastden-page .cancel")
    assert status(page) == "Cancelled."
    assert not page.is_visible("#fastden-page .save")
    drop(page, ZONE, {"noisy.png": encoded(pixels(), "PNG")})  # and it goes on with another
    page.wait_for_selector(SAVE)


def test_pages_that_were_built_without_the_network(window: Any, url: str) -> None:
    page = window.new_page()
    page.route("**/models/*", lambda route: route.fulfill(status=404))
    page.goto(f"{url}/browser/")
    page.wait_for_selector("text=This copy of the pages was built without the network: make docs, with npm installed")
    assert page.is_disabled("#fastden-page .file")
    page.close()


def in_browser(page: Any, url: str, expression: str, argument: Any = None) -> Any:
    code = f"argument => import('{url}/page/estimate.js').then(module => ({expression}))"
    return page.evaluate(code, argument)


def test_the_curve_is_that_of_python(page: Any, url: str) -> None:
    random = np.random.default_rng(0)
    for count in (3, 5, 400):
        brightness = random.uniform(0, 1, count) ** 2
        log_level = np.log(0.02 + 0.1 * (1 - brightness)) + random.normal(0, 0.1, count)
        log_level[::7] += 1.5  # texture
        fields = [log_level, random.uniform(-3, 1, count), random.normal(-0.6, 0.1, count), brightness]
        usable = random.uniform(size=count) > 0.1
        cells = Cells(
            *(torch.tensor(field, dtype=torch.float32)[None, None] for field in fields),
            torch.tensor(usable)[None, None],
        )
        names = ("logLevel", "logVariance", "coarseness", "brightness", "usable")
        rows = [dict(zip(names, map(float, row), strict=True)) for row in zip(*fields, usable, strict=True)]
        seen = in_browser(page, url, "module.estimate(argument)", rows)
        if usable.sum() < 4:
            assert not seen["decided"]
            continue
        wanted = 255 * levels_of(robust_curve(cells))[0].clamp(max=75 / 255).numpy()
        np.testing.assert_allclose(seen["sigmas"], wanted, rtol=1e-3)
        sigma = np.interp(brightness[usable] * (KNOTS - 1), range(KNOTS), wanted).mean()
        assert abs(seen["sigma"] - sigma) < 1e-3 * sigma


def test_words_and_windows_are_those_of_python(page: Any, url: str) -> None:
    estimates = [UNDECIDED]
    for low, high, coarseness in ((0.3, 0.9, 0.5), (3, 3, 0.7), (5, 20, 0.5), (40, 10, 0.7), (70, 60, 0.5)):
        levels = np.linspace(low, high, KNOTS)
        for uncertainty in (0.1, 0.6):
            estimate = NoiseEstimate(tuple(levels.tolist()), float(levels.mean()), coarseness, uncertainty=uncertainty)
            estimates.append(estimate)
    names = ("sigma", "coarseness", "uncertainty", "decided")
    seen = [{"sigmas": list(one.sigmas), **{name: getattr(one, name) for name in names}} for one in estimates]
    curves = in_browser(page, url, "argument.map(module.curveOf)", seen)
    np.testing.assert_allclose(curves, [one.curve[0].numpy() for one in estimates], rtol=1e-5)
    words = in_browser(page, url, "argument.map(module.inWords)", seen)
    assert words == [in_words(one) for one in estimates]
    sizes = [8, 1024, 1025, 3000, 6001]
    windows = in_browser(page, url, "argument.map(module.windows)", sizes)
    assert windows == [[[part.start, part.stop] for part in crop_windows(size)] for size in sizes]
