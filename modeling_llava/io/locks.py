"""Locks between processes."""

import errno
import os


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


__all__ = ["lock"]
