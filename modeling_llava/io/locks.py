"""Locks between processes."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


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


__all__ = ["lock", "locked_file"]
