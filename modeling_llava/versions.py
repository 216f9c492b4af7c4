"""Which transformers this package works with. Said before a name that an older one has not is missed."""

from importlib import metadata


TRANSFORMERS = ("5.23", "6")
"""From, and below. setup.py says the same (a test holds it)."""


def check_transformers() -> None:
    """
    Nothing of transformers is imported for it.

    Raises:
        ImportError: it is too old, or not there.
    """
    oldest, beyond = TRANSFORMERS
    mend = f"pip install --upgrade 'transformers>={oldest},<{beyond}'"
    found = installed("transformers")
    if found is None:
        raise ImportError(f"modeling_llava needs transformers ≥ {oldest}, and there is none: {mend}.")
    if is_older(found, oldest):
        raise ImportError(f"modeling_llava needs transformers ≥ {oldest}, {found} is installed: {mend}.")


def installed(package: str) -> str | None:
    """The version of a package, `None` if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def is_older(found: str, oldest: str) -> bool:
    """Whether a version, such as `2.13.0+cpu`, comes before another, number by number."""

    def numbers(version: str) -> list[int]:
        parts = (part for part in version.split("+")[0].split("."))
        return [int("".join(c for c in part if c.isdigit()) or 0) for part in parts]

    return numbers(found) < numbers(oldest)


__all__ = ["check_transformers", "installed", "is_older"]
