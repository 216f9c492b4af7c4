"""Locks between processes."""

import errno
import os


def lock(descriptor: int, wait: bool = False) -> bool:
    """
    Lock an open file, or on POSIX an open folder, until it is closed or the process dies, however it dies.

    Args:
        descriptor (`int`): Of the open file.
        wait (`bool`, *optional*, defaults to `False`): Wait until another process lets go of it.

    Returns:
        `bool`: `False` if another process has it. A file system without locks leaves it to the user: `True`.
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
