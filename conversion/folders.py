"""A checkpoint's folder, here or from the Hub, and the small files in it."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from modeling_llava.io.files import HUB_NAME, PROJECTOR_FILES, read_config


TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
HUB_PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]


def local_folder(name: str | Path, what: str) -> Path:
    """
    The folder of a checkpoint; one that is named by its Hub name is downloaded (or taken from the cache).

    Raises:
        OSError: it is neither a folder nor a Hub name, or the Hub cannot be reached.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    if path.is_file() and path.name in PROJECTOR_FILES:
        return path.parent
    if path.exists() or not HUB_NAME.fullmatch(str(name)):
        raise OSError(f"The {what} {str(name)!r} is not a folder, and not a name on the Hub (owner/name) either.")
    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        why = " ".join(str(error).split())
        raise OSError(
            f"The {what} {str(name)!r} is not a folder here, and the Hub does not give it ({why})."
        ) from error


def read_json(path: Path, of_what: str = "a checkpoint") -> dict:
    """A JSON object. OSError without the file, ValueError if it cannot be read as one."""
    content = read_config(path)
    if content is None:
        there = ", ".join(sorted(file.name for file in path.parent.iterdir())[:8]) or "nothing"
        raise OSError(f"{path.parent} is not {of_what}: it has no {path.name}. It holds: {there}.")
    return content
