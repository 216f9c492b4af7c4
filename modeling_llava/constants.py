"""The values that every part of the package shares. They are written here and nowhere else."""

from .versions import installed, is_older


IGNORE_INDEX = -100
"""Label of a position without supervision; the value that `torch.nn.functional.cross_entropy` ignores."""

IMAGE_TOKEN = "<image>"
"""Text of the image token: one position of the language model that is filled by one patch of an image."""

CACHE = "past_key_values" if is_older(installed("transformers") or "5.24", "5.24") else "cache"
"""What transformers calls the keys and values of earlier positions, as an argument and in an output."""
