"""Files that are whole or not there: written next to their place, then moved; and locks between processes."""

import errno
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


def lock(descriptor: int, wait: bool = False) -> bool:
    """
    Lock an open file, or on POSIX an open folder, until it is closed or the process dies.

    Returns:
        `bool`: `False` if another process has it (never with `wait`); `True` also on a file system without locks.
    """
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
    return True


@contextmanager
def locked_file(path: str | os.PathLike, wait: bool = False) -> Iterator[bool]:
    """[`lock`] a file, created if absent, until the block ends; `False` if another process has it."""
    with open(path, "ab") as file:
        yield lock(file.fileno(), wait)
