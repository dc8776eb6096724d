"""A visitor's session: results are the command's, no file is left, messages name no path of the machine."""

from __future__ import annotations

import errno
import io
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from fastden.errors import UserError
from fastden.images.codec import read_image
from fastden.images.libvips import load_vips
from fastden.inference.estimate import UNDECIDED, NoiseEstimate
from fastden.training.data import load_rgb
from fastden.ui.session import Cancelled, Choice, Limits, Session, Superseded, in_words
from tests.cli.run import works
from tests.image_files import encoded, exif, pixels, png_claiming
from tests.images.test_formats import dng, heic, jxl


@pytest.fixture
def session(tmp_path: Path) -> Session:
    root = tmp_path / "root"
    root.mkdir()
    return Session(root, Limits(files=3, pixels=50_000))


def test_a_file_that_was_not_uploaded_stays_where_it_is(session: Session, tmp_path: Path) -> None:
    (file,) = upload(tmp_path, a_jpg=jpeg())
    with pytest.raises(UserError, match="not uploaded"):
        session.take([file])
    assert file.exists()
    assert not list(session.folder.iterdir())


def upload(folder: Path, **files: bytes) -> list[Path]:
    """Files as Gradio hands them over; ``a_jpg`` is named ``a.jpg``."""
    paths = []
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(data)
        paths.append(path)
    return paths


def named(folder: Path, name: str, data: bytes) -> Path:
    """A file whose name :func:`upload` cannot make."""
    path = folder / name
    path.write_bytes(data)
    return path


def jpeg(seed: int = 0) -> bytes:
    return encoded(pixels(40, 56, seed=seed), "JPEG", exif=exif(6), quality=90)


@pytest.mark.parametrize(
    ("choice", "options"),
    [
        (Choice(), []),
        (Choice(sigma=20.0, strength=1.5), ["--sigma", 20, "--strength", 1.5]),
        (Choice("color-blind", strength=0.5), ["--model", "color-blind", "--strength", 0.5]),
    ],
)
def test_the_bytes_are_the_commands(session: Session, tmp_path: Path, choice: Choice, options: list[Any]) -> None:
    session.take(upload(tmp_path / "root", photo_jpg=jpeg()))
    assert not (tmp_path / "root" / "photo.jpg").exists()
    session.run(choice)
    path = session.download()
    assert path is not None
    assert path.name == "photo-clean.jpg"
    (tmp_path / "photo.jpg").write_bytes(jpeg())
    works("denoise", tmp_path / "photo.jpg", "-o", tmp_path / "wanted.jpg", *options)
    assert path.read_bytes() == (tmp_path / "wanted.jpg").read_bytes()
    assert session.pictures[0].model == (choice.model or "color")  # white noise, or a level that is given


def test_several_come_as_a_zip(session: Session, tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    sixteen = encoded(pixels(40, 50, 0, np.uint16), "TIFF")
    session.take(
        upload(tmp_path / "root", a_jpg=jpeg(1), b_tif=sixteen) + upload(tmp_path / "root" / "deep", a_jpg=jpeg(2))
    )
    session.run(Choice())
    path = session.download()
    assert path is not None
    assert path.suffix == ".zip"
    upload(tmp_path, a_jpg=jpeg(1), b_tif=sixteen)
    upload(deep, a_jpg=jpeg(2))
    with ZipFile(path) as archive:
        assert archive.namelist() == ["a-clean.jpg", "b-clean.tif", "a-clean (2).jpg"]
        for name, source in zip(archive.namelist(), ("a.jpg", "b.tif", "deep/a.jpg"), strict=True):
            wanted = tmp_path / f"wanted{Path(name).suffix}"
            works("denoise", tmp_path / source, "-o", wanted, "--overwrite")
            assert archive.read(name) == wanted.read_bytes()
    for picture in session.pictures:
        for preview in session.previews(picture):
            assert preview.read_bytes().startswith(b"\x89PNG")


def test_previews_are_upright_and_of_the_present_result(session: Session, tmp_path: Path) -> None:
    session.take(upload(tmp_path / "root", a_jpg=jpeg()))
    session.run(Choice(sigma=10.0))
    before, first = session.previews(session.pictures[0])
    assert Image.open(before).size == (40, 56)  # stored 56 x 40, turned by a quarter
    old = first.read_bytes()
    session.run(Choice(sigma=60.0))
    _, second = session.previews(session.pictures[0])
    assert second.read_bytes() != old
    assert not first.exists()


def test_no_part_of_a_preview_is_shown(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session.take(upload(tmp_path / "root", a_jpg=jpeg()))
    session.run(Choice(sigma=10.0))
    vips = load_vips()
    with monkeypatch.context() as context:

        def full(image: Any, path: str, **_: Any) -> None:
            Path(path).write_bytes(b"half")
            raise vips.Error("unable to call pngsave", "unix error: No space left on device")

        context.setattr(vips.Image, "pngsave", full, raising=False)
        with pytest.raises(UserError, match=r"^unix error: No space left on device$"):
            session.previews(session.pictures[0])
    assert not list(session.folder.glob("*/*.png"))
    assert not list(session.folder.glob("*/.*"))
    assert all(Image.open(path).size == (40, 56) for path in session.previews(session.pictures[0]))


def test_a_preview_of_a_gray_file_with_a_profile_of_colours(session: Session, tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    file = io.BytesIO()
    Image.fromarray(pixels(40, 56)[:, :, 0]).save(file, "JPEG", icc_profile=profile)
    session.take(upload(tmp_path / "root", a_jpg=file.getvalue()))
    session.run(Choice(sigma=10.0))
    assert all(path.exists() for path in session.previews(session.pictures[0]))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [3, 4])
def test_previews_of_colours_that_are_not_declared(
    session: Session, tmp_path: Path, dtype: type[np.unsignedinteger[Any]], channels: int
) -> None:
    """Three channels that a TIFF calls gray are read as RGB, and shown so."""
    colours = pixels(40, 56, channels, dtype)
    path = tmp_path / "root" / "a.tif"
    tifffile.imwrite(path, colours, photometric="minisblack", planarconfig="contig")
    session.take([path])
    session.run(Choice(sigma=10.0, strength=0.0))
    wanted = colours.astype(float) * 255 / np.iinfo(dtype).max
    for preview in session.previews(session.pictures[0]):
        assert np.abs(np.asarray(Image.open(preview)) - wanted).max() <= 1


@pytest.mark.parametrize(
    ("dtype", "black", "white"),
    [
        (np.float32, 0, 4.0),
        (np.float32, -2.0, 2.0),
        (np.float32, 0, 0.02),
        (np.float32, 0, 1.0),
        (np.uint16, 0, 4095),
        (np.uint16, 0, 65535),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_previews_show_the_pictures_own_range(
    session: Session, tmp_path: Path, dtype: type[np.number[Any]], black: float, white: float, channels: int
) -> None:
    """Linear light beyond 1 was white, 12 bits in 16 were black; the result stays the command's."""
    row = np.linspace(black, white, 96)[:, None] * np.ones((64, 96, min(channels, 3)))
    if channels == 4:
        opaque = np.full((64, 96, 1), 65535 if dtype is np.uint16 else 1.0)
        row = np.concatenate([row, opaque], 2)
    data = io.BytesIO()
    photometric = "minisblack" if channels == 1 else "rgb"
    extra = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    tifffile.imwrite(data, np.squeeze(row).astype(dtype), photometric=photometric, **extra)
    session.take([named(tmp_path / "root", "a.tif", data.getvalue())])
    session.run(Choice(strength=0.0))
    (picture,) = session.pictures
    assert picture.error is None
    assert picture.estimate is not None
    most = 65535 if dtype is np.uint16 else 1
    first, last = picture.estimate.black * most, picture.estimate.white * most
    assert abs(first - black) <= 0.1 * (white - black)  # by medians of blocks, in steps of 3 %
    assert abs(last - white) <= 0.1 * (white - black)
    wanted = np.clip(255 * (np.linspace(black, white, 96)[:, None] - first) / (last - first), 0, 255)
    for preview in session.previews(picture):
        shown = np.asarray(Image.open(preview).convert("RGBA")).astype(float)
        assert np.abs(shown[..., :3] - wanted).max() <= 1
        assert (shown[..., 3] == 255).all()
    works("denoise", named(tmp_path, "a.tif", data.getvalue()), "-o", tmp_path / "wanted.tif", "--strength", 0)
    assert picture.target.read_bytes() == (tmp_path / "wanted.tif").read_bytes()


@pytest.mark.parametrize(
    ("name", "make", "result"),
    [
        ("a_heic", lambda: heic(pixels(64, 80)), "a-clean.heic"),
        ("a_jxl", lambda: jxl(pixels(64, 80, channels=4)), "a-clean.png"),
        ("a_DNG", lambda: dng(64, 80), "a-clean.tif"),
        ("a_jpg", lambda: heic(pixels(64, 80)), "a-clean.jpg"),  # as telephones name them
    ],
)
def test_pictures_of_the_extra_formats(
    session: Session, tmp_path: Path, name: str, make: Callable[[], bytes], result: str
) -> None:
    data = make()
    session.take(upload(tmp_path / "root", **{name: data}))
    (picture,) = session.pictures
    assert picture.error is None
    session.run(Choice(sigma=10.0))
    assert picture.error is None
    path = session.download()
    assert path is not None
    assert path.name == result
    source = tmp_path / name.replace("_", ".")
    source.write_bytes(data)
    works("denoise", source, "-o", tmp_path / result, "--sigma", 10)
    assert path.read_bytes() == (tmp_path / result).read_bytes()
    for preview, shown in zip(session.previews(picture), (source, tmp_path / result), strict=True):
        image = Image.open(preview).convert("RGB")
        assert image.size == (80, 64)
        assert np.abs(np.asarray(image).astype(int) - load_rgb(shown)).max() <= 1


@pytest.mark.parametrize(
    ("name", "kind", "result"),
    [
        ("a.gif", "GIF", "a-clean.png"),
        ("a", "GIF", "a-clean.png"),
        ("a", "JPEG", "a-clean.jpg"),
        ("a", "TIFF", "a-clean.tif"),
        ("IMG_1.dat", "PNG", "IMG_1-clean.png"),
        ("a.txt", "WEBP", "a-clean.webp"),
        ("a.bmp", "AVIF", "a-clean.avif"),
        ("a.png", "JPEG", "a-clean.png"),
        ("a", "JPEG XL", "a-clean.png"),
        ("a", "HEIC", "a-clean.heic"),
        ("a", "camera raw", "a-clean.tif"),
    ],
)
def test_what_is_in_a_file_decides(session: Session, tmp_path: Path, name: str, kind: str, result: str) -> None:
    """The command reads such files too, where its output is named."""
    data: bytes = {
        "JPEG XL": lambda: jxl(pixels(64, 80)),
        "HEIC": lambda: heic(pixels(64, 80)),
        "camera raw": lambda: dng(64, 80),
    }.get(kind, lambda: encoded(pixels(64, 80), kind))()
    session.take([named(tmp_path / "root", name, data)])
    session.run(Choice())
    (picture,) = session.pictures
    assert picture.error is None
    path = session.download()
    assert path is not None
    assert path.name == result
    works("denoise", named(tmp_path, name, data), "-o", tmp_path / result)
    assert path.read_bytes() == (tmp_path / result).read_bytes()
    assert all(Image.open(preview).size == (80, 64) for preview in session.previews(picture))


@pytest.mark.parametrize("name", ["b.txt", "b.jpg", "b.mp4", "b"])
@pytest.mark.parametrize("data", [b"text", b"<svg></svg>", b"BM" + bytes(60), b"\0\0\0\x18ftypmp42" + bytes(40), b""])
def test_a_refusal_is_the_commands(session: Session, tmp_path: Path, name: str, data: bytes) -> None:
    session.take([named(tmp_path / "root", name, data)])
    with pytest.raises(UserError) as refused:
        read_image(named(tmp_path, name, data))
    assert f"{tmp_path}/{session.pictures[0].error}" == str(refused.value)


def test_a_gif_of_several_frames(session: Session, tmp_path: Path) -> None:
    file = io.BytesIO()
    frames = [Image.fromarray(pixels(40, 56, seed=seed)) for seed in range(2)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    session.take([named(tmp_path / "root", "a.gif", file.getvalue())])
    assert session.pictures[0].error == "a.gif: an animation of 2 frames (gif); accepted: one picture, or a video"


def test_the_same_upload_twice(session: Session, tmp_path: Path) -> None:
    (path,) = upload(tmp_path / "root", a_jpg=jpeg())
    session.take([path, path])
    assert [picture.error for picture in session.pictures] == [None, None]
    assert not path.exists()
    session.take([path, *upload(tmp_path / "root", b_jpg=jpeg(1))])  # the first is gone
    assert [picture.error for picture in session.pictures] == [f"{path.name}: the upload was lost; drop it again", None]


def test_an_upload_that_cannot_be_kept(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    uploads = upload(tmp_path / "root", a_jpg=jpeg())
    monkeypatch.setattr("fastden.ui.session.os.link", full)
    monkeypatch.setattr("fastden.ui.session.shutil.copyfile", full)
    session.take(uploads)
    (picture,) = session.pictures
    assert picture.error is not None
    assert "the upload cannot be kept: No space left on device" in picture.error
    assert not uploads[0].exists()


def test_what_cannot_be_read(session: Session, tmp_path: Path) -> None:
    large = png_claiming(1000, 1000)
    session.take(upload(tmp_path / "root", a_jpg=jpeg()[:300], b_txt=b"text", c_png=large))
    session.run(Choice())
    broken, other, huge = (picture.error or "" for picture in session.pictures)
    assert broken.startswith("a.jpg: corrupt or truncated")
    assert other.startswith("b.txt: not an image in a known format; accepted: JPEG, PNG, TIFF, WebP, AVIF")
    assert huge.startswith("c.png: 1000 x 1000")
    assert not any(str(tmp_path) in error for error in (broken, other, huge))
    assert session.download() is None


def test_one_bad_picture_does_not_stop_the_others(session: Session, tmp_path: Path) -> None:
    session.take(upload(tmp_path / "root", a_png=b"", b_jpg=jpeg()))
    session.run(Choice())
    assert [picture.done for picture in session.pictures] == [False, True]
    path = session.download()
    assert path is not None
    with ZipFile(path) as archive:
        assert archive.namelist() == ["b-clean.jpg"]


def test_too_many(session: Session, tmp_path: Path) -> None:
    files = upload(tmp_path / "root", a_jpg=jpeg(), b_jpg=jpeg(), c_jpg=jpeg(), d_jpg=jpeg())
    with pytest.raises(UserError, match="4 pictures at a time; accepted: at most 3"):
        session.take(files)
    assert not any(file.exists() for file in files)
    assert not list(session.folder.iterdir())


def test_a_setting_that_cannot_be(session: Session, tmp_path: Path) -> None:
    session.take(upload(tmp_path / "root", a_jpg=jpeg()))
    with pytest.raises(ValueError, match="this model is blind"):
        session.run(Choice("color-blind", sigma=20.0))
    assert session.download() is None


def test_cancel_leaves_nothing(session: Session, tmp_path: Path) -> None:
    session.take(upload(tmp_path / "root", a_jpg=jpeg(1), b_jpg=jpeg(2)))
    with pytest.raises(Cancelled):
        session.run(Choice(), lambda index, part: session.cancel())
    assert session.download() is None
    assert sorted(path.name for path in session.folder.rglob("*.*")) == ["in.jpg", "in.jpg"]
    session.run(Choice())  # and it can be done again
    assert all(picture.done for picture in session.pictures)


def test_cancel_between_a_drop_and_its_run(session: Session, tmp_path: Path) -> None:
    session.take(upload(tmp_path / "root", a_jpg=jpeg()))
    session.cancel()
    with pytest.raises(Cancelled):
        session.run(Choice())
    session.run(Choice())  # and it can be done again
    assert session.pictures[0].done


@pytest.mark.parametrize("end", ["leave", "drop again"])
def test_what_ends_the_look_at_pictures(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    first = upload(tmp_path / "root", a_jpg=jpeg(1), b_jpg=jpeg(2))
    second = upload(tmp_path / "root", c_jpg=jpeg(3))
    looked, others = [], []
    look = Session._look

    def then(session: Session, picture: Any) -> None:
        looked.append(picture.name)
        if picture.name == "a.jpg":
            before = session._round
            others.append(threading.Thread(target=session.close if end == "leave" else lambda: session.take(second)))
            others[0].start()
            while not session._closed and session._round == before:
                time.sleep(0.001)
        look(session, picture)

    monkeypatch.setattr(Session, "_look", then)
    with pytest.raises(Cancelled if end == "leave" else Superseded):
        session.take(first)
    others[0].join(60)
    assert looked == (["a.jpg"] if end == "leave" else ["a.jpg", "c.jpg"])
    assert [picture.name for picture in session.pictures] == looked[1:]
    assert not any(file.exists() for file in first)
    with pytest.raises(Cancelled) if end == "leave" else nullcontext():
        session.run(Choice())


def test_leaving_ends_the_run_and_removes_everything(session: Session, tmp_path: Path) -> None:
    session.take(upload(tmp_path / "root", a_jpg=jpeg()))
    session.run(Choice())
    session.close()
    assert not session.folder.exists()
    with pytest.raises(Cancelled):
        session.run(Choice())


@pytest.mark.parametrize(
    ("levels", "coarseness", "words"),
    [
        ((0.5,) * 8, 0.5, "Hardly any noise (level 0.5)."),
        ((3.0,) * 8, 0.5, "A little noise of fine grain (level 3.0 of 255)."),
        (
            tuple(np.linspace(20, 5, 8).tolist()),
            0.8,
            "Clear noise of coarse grain, most in the shadows (level 12.0 of 255).",
        ),
        (
            tuple(np.linspace(5, 40, 8).tolist()),
            0.5,
            "Strong noise of fine grain, most in the lights (level 22.0 of 255).",
        ),
        ((50.0,) * 8, 0.5, "Very strong noise of fine grain (level 50.0 of 255)."),
    ],
)
def test_the_estimate_in_words(levels: tuple[float, ...], coarseness: float, words: str) -> None:
    sigma = float(words.split("level ")[1].split(")", maxsplit=1)[0].split(maxsplit=1)[0])
    assert in_words(NoiseEstimate(levels, sigma, coarseness)) == words


def test_no_estimate_in_words() -> None:
    assert in_words(UNDECIDED).startswith("Too little to judge by")
