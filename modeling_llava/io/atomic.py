"""Files that are whole or not there: written next to their place, then moved."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike, sync: bool = False) -> Iterator[Path]:
    """
    A path to write in place of `path`: it takes that name when the block ends, and is removed if the block raises.

    Args:
        path (`str` or `os.PathLike`):
            The file's name; one that is there is replaced.
        sync (`bool`, *optional*, defaults to `False`):
            Wait until the content is on the disk before it takes the name: it survives a power cut.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        if sync:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike, content: str | bytes, sync: bool = False) -> None:
    """Write a file by [`atomic_path`]; text as UTF-8. A full disk leaves what was there before."""
    with atomic_path(path, sync) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def sha256_of(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


__all__ = ["atomic_path", "sha256_of", "write_atomic"]
