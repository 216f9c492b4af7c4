# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the License.
# You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by applicable law or agreed to
# in writing, software distributed under the License is distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY
# KIND, either express or implied. See the License for the specific language governing permissions and limitations under the License.
"""`LlavaImageProcessor`: images to `pixel_values`, with Pillow and torch only (torchvision is not needed)."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    get_image_size_for_max_height_width,
    is_valid_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .io.images import read_image, to_rgb, upright


_SMOOTH = {PILImageResampling[name] for name in ("BILINEAR", "BICUBIC", "HAMMING", "LANCZOS")}
"""Filters whose weights fall to zero at their ends: where those fall exactly does not matter."""
_TRANSPOSED_PIXELS = 1 << 19
"""Larger images are resized as they lie."""


class LlavaImageProcessor(PilBackend):
    r"""
    Turns images into the `pixel_values` of a LLaVA vision tower: pad to a square (LLaVA-1.5, `do_pad=True`) or keep the
    proportions (LLaVA v1), resize, center crop, rescale to 0..1, normalize.

    It has the fields of the stock `LlavaImageProcessor` and of `CLIPImageProcessor`, reads and writes the same
    `preprocessor_config.json`, and its pixels are bit for bit those of the original code. It is faster than the stock Pillow one: an
    image stays a Pillow image until its last step, padding and what the crop removes are not resized where that is exact, and the
    float values are written once, straight into the batch.

    Differs from stock: Pillow ≥ 13 resizes a tall image that is not padded vertically first where that is cheaper, which changes
    pixels by one step of 255. Here the order is horizontal, then vertical, as in every Pillow that LLaVA was trained with.

    Args:
        do_pad (`bool`, *optional*, defaults to `False`):
            Pad the shorter side with the mean color, `tuple(int(x * 255) for x in image_mean)`, to a square before resizing; an
            odd pixel goes to the bottom or right (LLaVA-1.5, `image_aspect_ratio: pad`).
        size (`int` or `dict[str, int]`, *optional*, defaults to `{"shortest_edge": 224}`):
            In pixels; also `{"height", "width"}`, `{"shortest_edge", "longest_edge"}` or `{"max_height", "max_width"}`.
        do_convert_rgb, do_resize, resample, do_center_crop, crop_size, do_rescale, rescale_factor, do_normalize, image_mean, image_std:
            As in stock, with CLIP's defaults. Transparency is laid on white.

    Each can be overridden in a call. A call takes one image, a list, or a list of lists (which it flattens) of
    `PIL.Image` (turned upright by their EXIF orientation), `np.ndarray` or `torch.Tensor` (`[3, H, W]`, `[H, W, 3]`, `[H, W]` or a
    batch of them, 0..255), and of all that [`~modeling_llava.io.images.read_image`] reads (paths, URLs, bytes, …), and returns a
    `BatchFeature` with `pixel_values`: float32 `[num_images, 3, height, width]` for `return_tensors="pt"` or `"np"`, and a list of
    arrays `[3, height, width]` without it.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_pad = False
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: Unpack[ImagesKwargs]):
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs) -> "LlavaImageProcessor":
        # The file of a tower without a crop (SigLIP) does not mention one; our default would cut it to 224 pixels.
        if "crop_size" not in image_processor_dict and "crop_size" not in kwargs:
            image_processor_dict = {"do_center_crop": False, **image_processor_dict}
        return super().from_dict(image_processor_dict, **kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Images as `process_image` takes them, in the lists in which they are given; see [`read_image`]."""
        images = image_url_or_urls
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if not is_valid_image(images):
            return read_image(images)
        return images[None] if getattr(images, "ndim", 3) == 2 else images  # grey, [H, W]

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Unpack[ImagesKwargs],
    ) -> Image.Image | np.ndarray:
        """One image as an RGB Pillow image where it is 8-bit RGB, and as an array `[channels, H, W]` where it is not."""
        if isinstance(image, Image.Image):
            image = to_rgb(upright(image)) if do_convert_rgb else upright(image)
            if image.mode == "RGB" and "transparency" not in image.info:
                return image
            return super().process_image(image, do_convert_rgb=False)
        if hasattr(image, "detach"):  # a torch tensor, perhaps on a GPU
            image = image.detach().cpu()
            image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()  # NumPy has no bfloat16
        rescaled = kwargs.get("do_rescale") and kwargs["rescale_factor"] > 1 / 256  # by a factor for 8 bits
        if rescaled and image.dtype.kind == "b":
            image = image.astype(np.uint8) * 255
        if rescaled and image.dtype.kind == "u" and image.dtype.itemsize == 2 and image.max(initial=0) > 255:
            image = (image >> 8).astype(np.uint8)
        if rescaled and kwargs["rescale_factor"] < 0.1 and image.dtype.kind == "f" and image.size:
            low, high = image.min(), image.max()
            if low < 0 or 0 < high <= 1:
                warnings.warn(
                    f"An image has floating-point values from {low:g} to {high:g}, and do_rescale=True takes them for 0 to "
                    "255: pass do_rescale=False if they are scaled already."
                )
        array = super().process_image(image, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format)
        if array.dtype == np.uint8 and array.shape[0] == 3:
            return Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))
        return array

    def pad_to_square(self, image: np.ndarray, background_color: float | Sequence[float] = 0) -> np.ndarray:
        """Center `image` `[channels, H, W]` in a square of its longer side, filled with `background_color`."""
        channels, height, width = image.shape
        if height == width:
            return image
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        color = np.broadcast_to(np.asarray(background_color), (channels,))
        square = np.empty((channels, side, side), dtype=image.dtype)
        square[...] = color[:, None, None].astype(image.dtype)
        square[:, top : top + height, left : left + width] = image
        return square

    def _preprocess(
        self,
        images: list[Image.Image | np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | None,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float] | None,
        image_std: float | Sequence[float] | None,
        do_pad: bool | None,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        means = [image_mean] * 3 if isinstance(image_mean, (int, float)) else image_mean
        background = tuple(int(mean * 255) for mean in means) if do_pad and means else (0, 0, 0)
        size = size if do_resize else None
        arrays = []
        for image in images:
            if isinstance(image, Image.Image):
                image = _resize_rgb(image, size, resample, crop_size if do_center_crop else None, do_pad, background)
                array = _planes(image)
            else:
                array = image
                if do_pad:
                    scaled = np.issubdtype(array.dtype, np.floating) and array.max(initial=0) <= 1
                    color = means if scaled and means else background
                    array = self.pad_to_square(array, color if len(color) == array.shape[0] else color[0])
                if do_resize:
                    array = self.resize(array, size, resample)
            if do_center_crop and array.shape[1:] != (crop_size.height, crop_size.width):
                array = self.center_crop(array, crop_size)
            arrays.append(array)

        fused = do_rescale and do_normalize and all(array.dtype == np.uint8 for array in arrays)
        if fused and arrays and len({array.shape for array in arrays}) == 1:
            # All of one size: write each image's floats into its place in the batch, so nothing is copied again.
            pixel_values = np.empty((len(arrays), *arrays[0].shape), dtype=np.float32)
            for array, out in zip(arrays, pixel_values):
                _rescale_and_normalize(array, rescale_factor, image_mean, image_std, out)
            if return_tensors is None:
                return BatchFeature({"pixel_values": list(pixel_values)})
            if TensorType(return_tensors) == TensorType.PYTORCH:
                pixel_values = torch.from_numpy(pixel_values)
            return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)
        if do_rescale:
            arrays = [self.rescale(array, rescale_factor) for array in arrays]
        if do_normalize:
            arrays = [self.normalize(array, image_mean, image_std) for array in arrays]
        return BatchFeature({"pixel_values": arrays}, tensor_type=return_tensors)


def _target_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """`(height, width)` in pixels after the resize of an image of `height` × `width` pixels."""
    if size.shortest_edge and size.longest_edge:
        return get_size_with_aspect_ratio((height, width), size.shortest_edge, size.longest_edge)
    if size.shortest_edge:
        shape_only = np.broadcast_to(np.uint8(0), (1, height, width))  # no memory: the function looks at the shape
        return get_resize_output_image_size(
            shape_only, size.shortest_edge, default_to_square=False, input_data_format=ChannelDimension.FIRST
        )
    if size.max_height and size.max_width:
        return get_image_size_for_max_height_width((height, width), size.max_height, size.max_width)
    if size.height and size.width:
        return size.height, size.width
    raise ValueError(
        f"size={dict(size)} is not one that LlavaImageProcessor knows: give 'shortest_edge' (with 'longest_edge' if "
        "wanted), 'height' and 'width', or 'max_height' and 'max_width', in pixels."
    )


def _resize_rgb(
    image: Image.Image,
    size: SizeDict | None,
    resample: PILImageResampling | None,
    crop_size: SizeDict | None,
    do_pad: bool | None,
    background: tuple[int, int, int],
) -> Image.Image:
    """Pad, resize and crop the columns of an RGB image; the rows of the crop are left to the caller.

    Pillow resizes in two passes with an 8-bit image in between. One by one they give the same pixels in a fixed order, and each works on
    fewer of them: a row of padding stays of one color in the horizontal pass, and columns are independent in the vertical pass.
    """
    width, height = image.size
    pad_columns, pad_rows = do_pad and width < height, do_pad and height < width
    side = max(width, height)
    padded_height, padded_width = (side, side) if do_pad else (height, width)
    target_height, target_width = (
        (padded_height, padded_width) if size is None else _target_size(padded_height, padded_width, size)
    )
    if not (target_height and target_width):
        raise ValueError(
            f"An image of {width}×{height} pixels would have {target_width}×{target_height} after the resize: it is too long and thin "
            f"for size={dict(size)}."
        )
    resample = PILImageResampling.BILINEAR if resample is None else resample

    left, kept = 0, target_width
    if crop_size is not None and crop_size.width < target_width:
        left, kept = (target_width - crop_size.width) // 2, crop_size.width
    if pad_columns:
        image = _widened(image, side, target_width, resample, background)
    elif width != target_width:
        first, last = left * width / target_width, (left + kept) * width / target_width
        if resample in _SMOOTH and first.is_integer() and last.is_integer():
            # The columns that stay are whole columns of the image: no others are computed.
            image, left = _with_width(image, kept, resample, int(first), int(last)), 0
        else:
            image = _with_width(image, target_width, resample, 0, width)
    if pad_rows:
        image = _on_canvas(image, (image.width, side), background)
    if image.width > kept:
        image = image.crop((left, 0, left + kept, image.height))
    if image.height != target_height:
        image = image.resize((image.width, target_height), resample)
    return image


def _with_width(image: Image.Image, width: int, resample: PILImageResampling, first: int, last: int) -> Image.Image:
    """The horizontal pass: columns `first` to `last`, resized to `width`. Pillow is faster down an image than along it, for the same
    pixels: two transpositions pay as long as a few lines fit into the cache."""
    if resample not in _SMOOTH or image.width * image.height > _TRANSPOSED_PIXELS:
        return image.resize((width, image.height), resample, box=(first, 0, last, image.height))
    lying = image.transpose(Image.Transpose.TRANSPOSE)
    lying = lying.resize((image.height, width), resample, box=(0, first, image.height, last))
    return lying.transpose(Image.Transpose.TRANSPOSE)


def _widened(image: Image.Image, side: int, target_width: int, resample, color: tuple[int, int, int]) -> Image.Image:
    """Pad to `side` columns and resize them to `target_width`, in strips: the square of a long screenshot is huge."""
    result = Image.new("RGB", (target_width, image.height))
    rows = max(1, (1 << 20) // side)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        strip = _on_canvas(strip, (side, strip.height), color)
        result.paste(strip.resize((target_width, strip.height), resample), (0, top))
    return result


def _on_canvas(image: Image.Image, size: tuple[int, int], color: tuple[int, int, int]) -> Image.Image:
    canvas = Image.new("RGB", size, color)
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


def _planes(image: Image.Image) -> np.ndarray:
    """An RGB image as uint8 `[3, height, width]`, each row contiguous: Pillow writes line by line, R then G then B."""
    lines = np.frombuffer(image.tobytes("raw", "RGB;L"), dtype=np.uint8)
    return lines.reshape(image.height, 3, image.width).transpose(1, 0, 2)


def _rescale_and_normalize(array: np.ndarray, factor: float, mean, std, out: np.ndarray) -> None:
    """`out = (array * factor - mean) / std`, `[channels, H, W]` uint8 to float32, rounded as the stock processor rounds: the product
    is taken in float64 and rounded to float32, the rest is float32."""
    channels = len(out)
    for name, values in (("image_mean", mean), ("image_std", std)):
        if isinstance(values, Sequence) and len(values) != channels:
            raise ValueError(
                f"{name} has {len(values)} values but the image has {channels} channels: give one for each."
            )
    mean = np.broadcast_to(np.asarray(mean, dtype=np.float32), (channels,))
    std = np.broadcast_to(np.asarray(std, dtype=np.float32), (channels,))
    divisor = _exact_divisor(factor)
    for plane, values, plane_mean, plane_std in zip(out, array, mean, std):
        if divisor is None:
            np.multiply(values, factor, out=plane, dtype=np.float64, casting="same_kind")
        else:
            np.divide(values, divisor, out=plane)
        plane -= plane_mean
        plane /= plane_std


@functools.lru_cache(maxsize=8)
def _exact_divisor(factor: float) -> np.float32 | None:
    """A float32 by which to divide the 256 values gives what stock gives; `1/255` has one: 255. It is four times faster."""
    values = np.arange(256)
    divisor = np.float32(1 / factor) if factor else np.float32(np.inf)
    exact = (values * np.float64(factor)).astype(np.float32)
    return divisor if np.array_equal(exact, values.astype(np.float32) / divisor) else None


__all__ = ["LlavaImageProcessor"]
