"""The file that was probably meant by a path that is not there."""

import functools
import os
import unicodedata


def _near_path(path: str, folder: str | os.PathLike) -> str | None:
    """
    The path, relative to `folder` if that is not empty, that is there when case, backslashes, the form of Unicode
    characters and the suffix do not count.
    """
    found = os.path.join(folder, "")
    for part in path.replace("\\", "/").split("/"):
        if part and not os.path.lexists(found + part):
            names = _names(found or ".", os.stat(found or ".").st_mtime_ns) if os.path.isdir(found or ".") else {}
            part = names.get(_plain(part)) or names.get(_plain(os.path.splitext(part)[0]) + ".")
            if part is None:
                return None
        found += part + "/"
    return found[len(os.path.join(folder, "")) : -1]


def where_looked(path: str, folder: str | os.PathLike | None = None) -> str:
    """The end of an error's sentence about a missing path, and the sentence about what was probably meant."""
    where = "" if os.path.isabs(path) else f" (looked in {os.getcwd()!r})"
    if folder is not None:
        where, path = f" in the image folder {os.fspath(folder)!r}", os.path.relpath(path, folder)
    near = _near_path(path, folder or "")
    if near is not None:
        looks_alike = unicodedata.normalize("NFC", near) == unicodedata.normalize("NFC", path)
        return f"{where}. There is {ascii(near) if looks_alike else repr(near)} instead."
    return f"{where}.{' Write / in place of its backslashes.' if chr(92) in path else ''}"


@functools.lru_cache(maxsize=8)
def _names(folder: str, changed: int) -> dict[str, str]:
    """The names in a folder by their plain form, and by their stem and a dot."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    return {_plain(os.path.splitext(name)[0]) + ".": name for name in names} | {_plain(name): name for name in names}


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


__all__ = ["where_looked"]
