"""The values that every part of the package shares. They are written here and nowhere else."""

from .versions import installed, is_older


IGNORE_INDEX = -100
"""Label of a position without supervision; the value that `torch.nn.functional.cross_entropy` ignores."""

IMAGE_TOKEN = "<image>"
"""Text of the image token: one position of the language model that is filled by one patch of an image."""

CACHE = "past_key_values" if is_older(installed("transformers") or "5.24", "5.24") else "cache"
"""What transformers calls the keys and values of earlier positions, as an argument and in an output."""

ONEDNN_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""Environment variables that oneDNN and PyTorch read at the first product: how many kernels each keeps. A kernel is made
for each shape and takes up to a megabyte; packs differ in length from step to step, so that the usual 1024 fill with
kernels that never serve again. With 64 a step takes no longer (`examples/benchmarks/train.py`)."""
