"""
The values that every part of the package shares, and which versions are installed. Nothing is imported here that an older
transformers does not have.
"""

import platform
from importlib import metadata


IGNORE_INDEX = -100
"""Label of a token without supervision; the value that `torch.nn.functional.cross_entropy` ignores."""

IMAGE_TOKEN = "<image>"
"""Text of the image token, in whose place the language model gets the features of one patch."""

TRANSFORMERS = ("5.23", "6")
"""From, and below. setup.py says the same (a test holds it)."""

RECORDED = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets")
"""Packages on which the numbers of a training or an evaluation depend."""


def check_transformers() -> None:
    """
    Checked before a name that an older transformers does not have is imported; nothing of it is imported for the check.

    Raises:
        ImportError: it is too old, or not installed.
    """
    oldest, beyond = TRANSFORMERS
    found = installed("transformers")
    if found is None or is_older(found, oldest):
        raise ImportError(
            f"modeling_llava needs transformers ≥ {oldest}, {found or 'none'} is installed: "
            f"pip install --upgrade 'transformers>={oldest},<{beyond}'."
        )


def installed(package: str) -> str | None:
    """The version of a package, `None` if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def is_older(found: str, oldest: str) -> bool:
    """Whether a version, such as `2.13.0+cpu`, comes before another; a pre-release counts as its release."""
    from packaging.version import Version

    return Version(found).release < Version(oldest).release


def recorded_versions() -> dict[str, str]:
    """What a run record and results say about the software: this package, Python, and those of `RECORDED` that are installed."""
    from . import __version__

    found = {name: version for name in RECORDED if (version := installed(name))}
    return {"modeling_llava": __version__, "python": platform.python_version(), **found}


CACHE = "past_key_values" if is_older(installed("transformers") or "5.24", "5.24") else "cache"
"""What transformers calls the keys and values of earlier tokens, as an argument and in an output."""
