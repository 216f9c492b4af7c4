"""The two values that every part of the package shares. They are written here and nowhere else."""

IGNORE_INDEX = -100
"""Label of a position without supervision; the value that `torch.nn.functional.cross_entropy` ignores."""

IMAGE_TOKEN = "<image>"
"""Text of the image token: one position of the language model that is filled by one patch of an image."""
