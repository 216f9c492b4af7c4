import base64
import io
import os
import unicodedata
from unittest import mock
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers.image_utils import load_image as load_image_of_transformers

from modeling_llava import LlavaImageProcessor
from modeling_llava.data.schema import (
    CORRUPT_IMAGE,
    MISSING_IMAGE,
    OUTSIDE_IMAGE,
    BadSampleError,
    image_key,
    load_image,
    read_image_size,
)
from modeling_llava.io.images import read_image


def noise(width=40, height=30, channels=3, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values if channels > 1 else values[..., 0])


def smooth(width=40, height=30):
    """An image that JPEG hardly changes."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 4, y * 5, x + y], -1).astype(np.uint8))


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def assert_same(image, expected, tolerance=0):
    assert image.mode == "RGB" and image.size == expected.size
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected.convert("RGB")).astype(int)).max() <= tolerance


def fails(reason, words, *args, **options):
    with pytest.raises(BadSampleError) as caught:
        load_image(*args, **options, sample_id="s-7")
    message = str(caught.value)
    assert caught.value.reason == reason and message.startswith("sample 's-7' has ") and "\n" not in message
    assert words in message, message


def test_gif_named_jpg_and_animation_give_the_first_frame(tmp_path):
    frames = [Image.new("P", (8, 6), i) for i in (3, 90)]
    for frame in frames:
        frame.putpalette([i for value in range(256) for i in (value, 255 - value, 7)])
    frames[0].save(tmp_path / "a.jpg", "GIF", save_all=True, append_images=frames[1:])
    assert_same(load_image("a.jpg", tmp_path), Image.new("RGB", (8, 6), (3, 252, 7)))
    noise().save(tmp_path / "b.jpg", "PNG", save_all=True, append_images=[noise(seed=1)])
    assert_same(load_image("b.jpg", tmp_path), noise())


DEEP = (np.arange(30 * 40, dtype=np.uint16) * 54).reshape(30, 40)
GREY = np.asarray(noise(channels=1)).astype(np.float32)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.fromarray(DEEP)), DEEP // 256),
        (encoded(Image.fromarray(DEEP), "TIFF"), DEEP // 256),
        (encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), DEEP // 256),
        (b"P5 40 30 65535\n" + DEEP.astype(">u2").tobytes(), DEEP // 256),
        (encoded(Image.fromarray(np.full((30, 40), 200, np.uint16))), np.zeros((30, 40))),  # dark, and stays so
        (encoded(Image.fromarray(GREY), "TIFF"), GREY),
        (encoded(Image.fromarray(GREY / 255), "TIFF"), GREY),
    ],
)
def test_deep_and_floating_point_grey_is_scaled_not_clipped(data, expected):
    assert_same(load_image(data), Image.fromarray(expected.astype(np.uint8)))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_on_white(mode):
    image = noise(channels=4) if mode == "RGBA" else noise(channels=4).convert("LA")
    values = np.asarray(image).astype(float)
    alpha = values[..., -1:] / 255
    expected = np.broadcast_to(values[..., :-1] * alpha + 255 * (1 - alpha), (30, 40, 3))
    np.testing.assert_allclose(np.asarray(load_image(encoded(image))), expected, atol=1)


@pytest.mark.parametrize(("mode", "transparency"), [("RGB", (1, 2, 3)), ("P", 0)])
def test_transparency_by_a_colour_or_a_palette_entry_is_laid_on_white(mode, transparency):
    image = Image.new(mode, (4, 2), transparency)
    if mode == "P":
        image.putpalette([1, 2, 3, 9, 9, 9])
    image.putpixel((0, 0), (9, 9, 9) if mode == "RGB" else 1)
    expected = Image.new("RGB", (4, 2), (255, 255, 255))
    expected.putpixel((0, 0), (9, 9, 9))
    assert_same(load_image(encoded(image, transparency=transparency)), expected)


@pytest.mark.parametrize("mode", ["L", "1", "P", "YCbCr", "CMYK"])
def test_other_modes(mode):
    image = smooth().convert(mode)
    assert_same(load_image(image), image.convert("RGB"))
    assert_same(load_image(encoded(image, "JPEG", quality=95) if mode == "CMYK" else image), image.convert("RGB"), 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_transformers_does(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    smooth().save(path, exif=exif, quality=95)
    image = load_image("a.jpg", tmp_path)
    assert_same(image, load_image_of_transformers(str(path)))
    assert image.size == ((40, 30) if orientation < 5 else (30, 40))
    assert_same(load_image_of_transformers(image), image)  # turned once, not again by the next reader


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_cost_the_image(tmp_path):
    smooth().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12broken", quality=95)
    assert_same(load_image("a.jpg", tmp_path), smooth(), tolerance=8)
    with mock.patch.object(Image.Image, "getexif", side_effect=SyntaxError("not a TIFF file")):
        assert_same(load_image("a.jpg", tmp_path), smooth(), tolerance=8)
    with mock.patch.object(Image, "open", side_effect=MemoryError), pytest.raises(MemoryError):
        load_image("a.jpg", tmp_path)  # is not a damaged image


def test_references_of_every_kind(tmp_path):
    noise().save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    absolute = str(tmp_path / "a.png")
    dicts = {"bytes": data, "path": "x.png"}, {"bytes": None, "path": absolute}
    for reference in (absolute, tmp_path / "a.png", data, *dicts):
        assert_same(load_image(reference), noise())
    for path in ("a.png", absolute, "sub/../a.png"):
        assert_same(load_image(path, tmp_path), noise())
    assert_same(load_image((tmp_path / "a.png").as_uri()), noise())
    base64_text = base64.b64encode(data).decode()
    other_alphabet = base64.urlsafe_b64encode(data).decode().rstrip("=")
    data_urls = [f"data:;base64,{text}" for text in (base64_text, quote(base64_text, safe=""), other_alphabet)]
    for text in (f"\n{base64_text}", f"Data:image/png;base64,{base64_text}", *data_urls):
        assert_same(load_image(text), noise())
        assert_same(load_image(text, tmp_path), noise())
    array = np.array(noise())
    for values in (array, array.transpose(2, 0, 1), array.astype(int), array.astype(np.uint16) * 257, array / 255):
        assert_same(load_image(values), noise())
        assert_same(load_image(torch.from_numpy(values)), noise())
    assert_same(load_image(torch.from_numpy(array // 85 * 85).bfloat16()), Image.fromarray(array // 85 * 85))
    assert_same(load_image(array[..., :1] > 127), Image.fromarray(array[..., 0] > 127))
    fails(CORRUPT_IMAGE, "given as ndarray of shape (2, 30, 40, 3), which cannot be decoded", np.stack([array, array]))
    image = noise(channels=4)
    assert load_image(image).mode == "RGB" and image.mode == "RGBA"


def test_stream_urls_are_opened_through_fsspec():
    import fsspec

    with fsspec.open("memory://pictures/a.png", "wb") as file:
        file.write(encoded(noise()))
    assert_same(load_image({"bytes": None, "path": "memory://pictures/a.png"}), noise())
    fails(MISSING_IMAGE, "cannot be read", {"bytes": None, "path": "memory://pictures/b.png"})


def test_missing_file(tmp_path):
    fails(MISSING_IMAGE, "'a.jpg', which is not there in the image folder", "a.jpg", tmp_path)
    noise().save(tmp_path / "a.png")
    fails(MISSING_IMAGE, "There is 'a.png' instead.", "a.jpg", tmp_path)
    fails(MISSING_IMAGE, "null byte", "a\0.jpg", tmp_path)
    fails(MISSING_IMAGE, "half of a character", "\ud83d.jpg", tmp_path)
    with pytest.raises(BadSampleError, match="half of a character"):
        read_image_size("\ud83d.jpg", None, "s")
    fails(MISSING_IMAGE, "cannot be opened", "a" * 5000, tmp_path)
    fails(MISSING_IMAGE, "a URL: download", "https://example.com/a.jpg", tmp_path)
    (tmp_path / "folder.jpg").mkdir()
    fails(MISSING_IMAGE, "not a file", "folder.jpg", tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    fails(MISSING_IMAGE, "not a file", "pipe.jpg", tmp_path)


def test_a_missing_path_is_answered_with_where_it_was_looked_for_and_the_near_name(tmp_path, monkeypatch):
    (tmp_path / "Train").mkdir()
    for name in ("0.PNG", unicodedata.normalize("NFD", "é.png")):
        noise().save(tmp_path / "Train" / name)
    nfd = ascii(unicodedata.normalize("NFD", "Train/é.png"))
    for wrong, near in (("train/0.png", "'Train/0.PNG'"), ("Train\\0.jpg", "'Train/0.PNG'"), ("Train/é.png", nfd)):
        fails(MISSING_IMAGE, f"There is {near} instead.", wrong, tmp_path)
    fails(MISSING_IMAGE, "in place of its backslashes", "Train\\no.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    fails(MISSING_IMAGE, f"(looked in {str(tmp_path)!r}). There is 'Train/0.PNG' instead.", "train/0.png")
    with pytest.raises(ValueError, match="looked in .*There is 'Train/0.PNG' instead"):
        read_image("train/0.png")


def test_paths_that_leave_the_folder(tmp_path):
    folder, outside = tmp_path / "images", tmp_path / "images2"
    folder.mkdir(), outside.mkdir()
    noise().save(outside / "a.png")
    fails(OUTSIDE_IMAGE, "leaves the image folder", "../images2/a.png", folder)
    fails(OUTSIDE_IMAGE, "leaves the image folder", str(outside / "a.png"), folder)
    (folder / "link").symlink_to(outside)
    (folder / "b.png").symlink_to(outside / "a.png")
    fails(OUTSIDE_IMAGE, "by a symbolic link: pass follow_symlinks=True", "link/a.png", folder)
    fails(OUTSIDE_IMAGE, "by a symbolic link", "b.png", folder)
    assert_same(load_image("link/a.png", folder, follow_symlinks=True), noise())
    fails(OUTSIDE_IMAGE, "leaves the image folder", "../images2/a.png", folder, follow_symlinks=True)
    (tmp_path / "linked").symlink_to(outside)  # the folder itself
    assert_same(load_image("a.png", tmp_path / "linked"), noise())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (encoded(noise(200, 200), "JPEG")[:100], "cut off"),
        (encoded(noise(200, 200), "JPEG")[:9000], "cut off"),
        (encoded(noise(200, 200))[:9000], "cut off"),
        (b"", "empty (0 bytes)"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"%PDF-1.7 and so on, and on", "a PDF: save it as PNG"),
        (b"\x00\x01 nothing known", "not an image: it begins with"),
    ],
)
def test_damaged_and_other_files_are_named_from_the_whole_and_from_the_header(content, words, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    fails(CORRUPT_IMAGE, words, "a.jpg", tmp_path)
    fails(CORRUPT_IMAGE, words.split(":")[0], {"bytes": content, "path": "a.jpg"})
    with pytest.raises(BadSampleError, match=words.split("(")[0]):
        read_image_size("a.jpg", tmp_path)
    with pytest.raises(ValueError, match=words.split("(")[0]):
        read_image(tmp_path / "a.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_decompression_bomb(tmp_path, monkeypatch):
    noise(60, 60).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    fails(CORRUPT_IMAGE, "more pixels than Pillow opens", "a.png", tmp_path)


@pytest.mark.parametrize("size", [(1, 1001), (70000, 80)])
def test_images_whose_square_or_resize_would_fill_the_memory(size, tmp_path):
    Image.new("L", size).save(tmp_path / "a.png")
    fails(CORRUPT_IMAGE, f"{size[0]}×{size[1]} pixels are too long and thin", "a.png", tmp_path)
    with pytest.raises(BadSampleError, match="too long and thin"):
        read_image_size("a.png", tmp_path)
    Image.new("L", (1, 1000)).save(tmp_path / "b.png")
    assert load_image("b.png", tmp_path).size == (1, 1000)


def test_values_without_a_meaning():
    fails(CORRUPT_IMAGE, "0×4 pixels, none", Image.new("RGB", (0, 4)))
    values = np.linspace(-3, 900, 1200, dtype=np.float32).reshape(30, 40)
    fails(CORRUPT_IMAGE, "from -3 to 900", encoded(Image.fromarray(values), "TIFF"))
    values = np.arange(1200, dtype=np.int32).reshape(30, 40) * 1000
    fails(CORRUPT_IMAGE, "from 0 to 1199000", encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.filterwarnings("ignore:Tag data")
def test_random_damage_is_an_image_or_a_named_error():
    rng = np.random.default_rng(0)
    formats = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")
    for number in range(240):
        data = bytearray(encoded(smooth(), formats[number % len(formats)]))
        for _ in range(rng.integers(1, 12)):
            data[rng.integers(len(data))] = rng.integers(256)
        if number % 3 == 0:
            data = data[: rng.integers(1, len(data))]
        try:
            assert load_image(bytes(data), sample_id="s").mode == "RGB"
        except BadSampleError as error:
            assert error.reason == CORRUPT_IMAGE


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (3, "given as int, which is not one: give a path"),
        ("no.png", "is not there"),
        (b"no image", "not an image"),
        (b"", "given as bytes, which is empty"),
        ("", "which is not one"),
        ({"bytes": None, "path": None}, "by the keys ['bytes', 'path']"),
        ("data:image/png;base64,iVBORw0KGgo=", "not an image"),
        ("data:image/png;base64,iVBORw0KG", "not base64"),
        ("iVBORw0K" * 1_000, "cannot be opened"),
    ],
)
def test_what_is_no_image_is_named_in_short(reference, words):
    with pytest.raises(BadSampleError, match="sample 's' has the image ") as error:
        load_image(reference, sample_id="s")
    assert words in str(error.value) and len(str(error.value)) < 300
    with pytest.raises(ValueError, match="^The image [^\n]*$"):
        LlavaImageProcessor()(reference)


def test_size_from_the_header(tmp_path):
    noise(64, 48).save(tmp_path / "a.jpg")
    assert read_image_size("a.jpg", tmp_path) == (64, 48)
    assert read_image_size(encoded(noise(12, 5))) == (12, 5) and read_image_size(noise(3, 4)) == (3, 4)
    with pytest.raises(BadSampleError, match="not there"):
        read_image_size("b.jpg", tmp_path)


def test_key_is_equal_for_the_same_image():
    data, image = encoded(noise()), noise()
    assert image_key("a/../b.jpg") == image_key("b.jpg") == image_key({"bytes": None, "path": "b.jpg"})
    assert image_key({"bytes": data, "path": "b.jpg"}) == image_key(bytes(data)) != image_key("b.jpg")
    assert image_key(image) == image_key(image) != image_key(image.copy())
