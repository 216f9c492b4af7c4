import base64
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from modeling_llava.data import load_image
from modeling_llava.image_processing_llava import LlavaImageProcessor


def noise(width, height, channels=3, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values if channels > 1 else values[..., 0])


def assert_equals_stock(image, call=None, **options):
    processors = (cls(**options) for cls in (LlavaImageProcessor, LlavaImageProcessorPil))
    ours, stock = (processor(image, return_tensors="np", **(call or {})).pixel_values for processor in processors)
    assert ours.dtype == stock.dtype
    np.testing.assert_array_equal(ours, stock)
    return ours


def reference_pixels(image, size, crop, pad, mean, std):
    """The original's steps: expand to a square, resize horizontally then vertically, crop, rescale, normalise."""
    image = image.convert("RGB")
    width, height = image.size
    if pad:
        side = max(width, height)
        canvas = Image.new("RGB", (side, side), tuple(int(x * 255) for x in mean))
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        image, width, height = canvas, side, side
    long = int(size * max(width, height) / min(width, height))
    new_width, new_height = (size, long) if width <= height else (long, size)
    image = image.resize((new_width, height), Image.BICUBIC).resize((new_width, new_height), Image.BICUBIC)
    left, top = (new_width - crop) // 2, (new_height - crop) // 2
    values = np.asarray(image.crop((left, top, left + crop, top + crop)))
    values = (values.astype(np.float64) / 255).astype(np.float32)
    return ((values - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)


@pytest.mark.parametrize("pad", [True, False])
def test_pixels_equal_the_written_out_steps_for_random_sizes(pad):
    rng = np.random.default_rng(0)
    processor = LlavaImageProcessor(size=56, crop_size=56, do_pad=pad)
    sizes = [(1, 1), (56, 56), (57, 56), (56, 57), (3, 40), (40, 3), *rng.integers(1, 400, (40, 2)).tolist()]
    sizes.append((900, 1500))  # padded in three strips
    for i, (width, height) in enumerate(sizes):
        if max(width, height) > 15 * min(width, height):
            continue
        image = noise(width, height, seed=i)
        ours = processor(image, return_tensors="np").pixel_values[0]
        expected = reference_pixels(image, 56, 56, pad, processor.image_mean, processor.image_std)
        np.testing.assert_array_equal(ours, expected, err_msg=f"{width}x{height}")


@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"do_pad": True, "size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}},
        {"do_pad": True, "size": {"height": 30, "width": 30}, "do_center_crop": False},
        {"do_pad": True, "do_resize": False, "crop_size": {"height": 50, "width": 60}},
        {"size": {"shortest_edge": 42}, "crop_size": {"height": 39, "width": 42}},
        {"size": {"shortest_edge": 42}, "crop_size": {"height": 45, "width": 50}},
        {"size": {"shortest_edge": 42}, "crop_size": {"height": 41, "width": 43}},
        {"size": {"height": 49, "width": 35}, "do_center_crop": False},
        {"size": {"shortest_edge": 30, "longest_edge": 50}, "do_center_crop": False},
        {"size": {"max_height": 30, "max_width": 50}, "do_center_crop": False},
        {"size": {"shortest_edge": 42}, "do_normalize": False, "crop_size": {"height": 42, "width": 42}},
        {"size": {"shortest_edge": 42}, "do_rescale": False, "crop_size": {"height": 42, "width": 42}},
        {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_center_crop": False},
    ],
)
def test_pixels_equal_the_stock_pil_processors(options, resample):
    # Landscape, where every Pillow resizes horizontally first, and tall images where padding makes them square.
    sizes = [(80, 60), (61, 60), (60, 60), (42, 42), (200, 70), (43, 42)]
    if options.get("do_pad"):
        sizes += [(60, 80), (60, 61), (70, 200)]
    for i, size in enumerate(sizes):
        assert_equals_stock(noise(*size, seed=i), resample=resample, **options)


def test_output_forms():
    processor = LlavaImageProcessor(size=28, crop_size=28)
    images = [noise(40, 30), noise(30, 40), noise(28, 28)]
    as_torch = processor(images, return_tensors="pt").pixel_values
    assert as_torch.shape == (3, 3, 28, 28) and as_torch.dtype == torch.float32 and as_torch.is_contiguous()
    as_numpy = processor(images, return_tensors="np").pixel_values
    np.testing.assert_array_equal(as_numpy, as_torch.numpy())
    as_list = processor(images).pixel_values
    assert isinstance(as_list, list) and len(as_list) == 3
    np.testing.assert_array_equal(np.stack(as_list), as_numpy)
    nested = processor([images[:2], [], images[2:]], return_tensors="pt").pixel_values
    assert torch.equal(nested, as_torch)
    assert processor(images[0], return_tensors="pt").pixel_values.shape == (1, 3, 28, 28)


def test_images_of_different_sizes_without_crop_stay_a_list():
    processor = LlavaImageProcessor(size={"shortest_edge": 28}, do_center_crop=False)
    first, second = processor([noise(56, 28), noise(28, 28)]).pixel_values
    assert first.shape == (3, 28, 56) and second.shape == (3, 28, 28)


def test_arrays_and_tensors_equal_the_image_they_hold():
    processor = LlavaImageProcessor(size=28, crop_size=28, do_pad=True)
    image = noise(40, 31)
    expected = processor(image, return_tensors="pt").pixel_values
    last = np.array(image)
    first = last.transpose(2, 0, 1)
    batch = torch.from_numpy(first.copy())[None]
    for form in (last, first, torch.from_numpy(last), torch.from_numpy(first.copy()), batch, batch.bfloat16()):
        assert torch.equal(processor(form, return_tensors="pt").pixel_values, expected)
    assert torch.equal(
        processor(first, input_data_format="channels_first", return_tensors="pt").pixel_values, expected
    )
    for grey in (last[..., 0], last[..., 0] > 127):
        assert_pixels(grey, Image.fromarray(grey).convert("RGB"))


def test_float_arrays_equal_stock():
    image = np.asarray(noise(40, 30)).astype(np.float32)
    for array, call in ((image, {}), (image.astype(np.int64), {}), (image / 255, {"do_rescale": False})):
        assert_equals_stock(array, call, size=28, crop_size=28)


def test_float_arrays_of_the_unit_range_are_padded_with_the_mean_in_their_range():
    image = np.ones((20, 40, 3), dtype=np.float32)
    pixels = LlavaImageProcessor(size=40, crop_size=40, do_pad=True)(image, do_rescale=False, return_tensors="np")
    np.testing.assert_allclose(pixels.pixel_values[0, :, 0, 0], 0, atol=0.02)  # the mean, normalised


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA", "RGBA", "PA"])
def test_other_modes_equal_stock(mode):
    image = noise(40, 30, channels=4 if "A" in mode else 3)
    image = image.convert("LA").convert(mode) if mode in ("LA", "PA") else image.convert(mode)
    assert_equals_stock(image, size=28, crop_size=28)


def test_grey_images_without_conversion_keep_one_channel():
    options = {"size": 28, "crop_size": 28, "do_convert_rgb": False, "image_mean": [0.5], "image_std": [0.5]}
    assert assert_equals_stock(noise(40, 30, channels=1), **options).shape == (1, 1, 28, 28)
    with pytest.raises(ValueError, match="image_mean has 2 values but the image has 1 channels"):
        LlavaImageProcessor(**{**options, "image_mean": [0.5, 0.5]})(noise(40, 30, channels=1))


FORMS = {
    "opened": lambda path: Image.open(path),
    "path": str,
    "pathlib": lambda path: path,
    "bytes": Path.read_bytes,
    "bytes of datasets": lambda path: {"bytes": path.read_bytes(), "path": None},
    "path of datasets": lambda path: {"bytes": None, "path": str(path)},
    "file URL": Path.as_uri,
    "data URL": lambda path: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}",
    "base64": lambda path: base64.b64encode(path.read_bytes()).decode(),
    "training": load_image,
}
"""Ways in which a person gives an image that lies in a file."""


def assert_pixels(image, expected):
    processor = LlavaImageProcessor(size=28, crop_size=28, do_pad=True)
    pixels = [processor([[i, noise(5, 5)], []], return_tensors="pt").pixel_values for i in (image, expected)]
    assert torch.equal(*pixels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_in_any_form_is_turned_upright_as_exif_says(form, orientation, tmp_path):
    # What a camera wrote on its side: the turn that the EXIF standard names, undone.
    turns = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270")
    upright, exif = noise(40, 31), Image.Exif()
    exif[0x0112] = orientation
    lying = upright if orientation == 1 else upright.transpose(Image.Transpose[turns[orientation - 2]])
    lying.save(tmp_path / "a.png", exif=exif)
    assert_pixels(FORMS[form](tmp_path / "a.png"), upright)


DEEP = np.linspace(0, 65535, 40 * 31).astype(np.uint16).reshape(31, 40)
DEEP_IMAGES = {
    "I;16": lambda: Image.fromarray(DEEP),
    "I;16B": lambda: Image.frombytes("I;16B", (40, 31), DEEP.astype(">u2").tobytes()),
    "I": lambda: Image.fromarray(DEEP.astype(np.int32)),
    "F": lambda: Image.fromarray((DEEP >> 8).astype(np.float32)),
    "array": lambda: DEEP,
    "array of three channels": lambda: np.repeat(DEEP[..., None], 3, axis=-1),
}


@pytest.mark.parametrize("mode", DEEP_IMAGES)
def test_grey_of_16_bits_keeps_its_high_byte(mode):
    image = DEEP_IMAGES[mode]()
    assert "array" in mode or image.mode == mode
    assert_pixels(image, Image.fromarray((DEEP >> 8).astype(np.uint8)).convert("RGB"))


def test_arrays_that_have_a_range_of_their_own_are_left_as_they_are():
    processor = LlavaImageProcessor(size=28, crop_size=28, do_resize=False, do_normalize=False)
    for settings, scale in (({"do_rescale": False}, 1), ({"rescale_factor": 1 / 65535}, 65535)):
        pixels = processor(DEEP, return_tensors="np", **settings).pixel_values[0, 0]
        np.testing.assert_allclose(pixels, DEEP[1:29, 6:34] / scale, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats_that_are_scaled_already_are_warned_of(dtype):
    processor = LlavaImageProcessor(size=28, crop_size=28)
    values = torch.from_numpy(np.array(noise(40, 30))).permute(2, 0, 1).to(dtype)
    for image in (values / 255, values / 127.5 - 1):
        with pytest.warns(UserWarning, match="do_rescale"):
            processor(image, do_resize=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor(values)
        processor(values / 255, do_rescale=False)
        processor(values / 255, rescale_factor=1.0)


def test_saved_file_is_stocks(tmp_path):
    options = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "do_pad": True}
    LlavaImageProcessor(**options).save_pretrained(tmp_path / "ours")
    LlavaImageProcessorPil(**options).save_pretrained(tmp_path / "stock")
    ours, stock = ((tmp_path / name / "preprocessor_config.json").read_text() for name in ("ours", "stock"))
    assert ours == stock
    assert LlavaImageProcessorPil.from_pretrained(tmp_path / "ours").to_json_string() == stock
    assert LlavaImageProcessor.from_pretrained(tmp_path / "stock").to_json_string() == ours


def test_unknown_size_names_the_choices():
    with pytest.raises(ValueError, match="shortest_edge"):
        LlavaImageProcessor(size={"longest_edge": 30})(noise(40, 30))


@pytest.mark.parametrize("width, height, target", [(1, 100, "0×20"), (100, 1, "20×0")])
def test_a_picture_of_which_the_resize_would_leave_nothing_is_named(width, height, target):
    processor = LlavaImageProcessor(size={"max_height": 20, "max_width": 20}, do_center_crop=False)
    with pytest.raises(ValueError, match=f"{width}×{height} pixels would have {target}"):
        processor(noise(width, height))
