"""Why a folder cannot be loaded, in one line: which of its files is missing, damaged, or of another kind of model."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
JSON_FILES = (
    "config.json", "generation_config.json", *PROCESSORS, "tokenizer_config.json", "tokenizer.json", "vocab.json",
    "special_tokens_map.json", "added_tokens.json", "adapter_config.json", "projector_config.json",
    "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip
LFS_POINTER = b"version https://git-lfs"
AGAIN = "copy or download it again"


@contextlib.contextmanager
def explained(folder: str | os.PathLike, weights: bool = True) -> Iterator[None]:
    """
    Around a load: where it fails, and the folder's files say why, that is the error. A load that works costs nothing.

    Args:
        folder (`str` or `os.PathLike`): A model's or a processor's; of a Hub name nothing is said.
        weights (`bool`, *optional*, defaults to `True`): A model is loaded, not its processor alone.

    Raises:
        ValueError: as [`what_is_broken`] says; what was raised otherwise.
    """
    try:
        yield
    except Exception as error:
        reason = what_is_broken(folder, weights) if os.path.isdir(folder) else None
        if reason is None:
            raise
        raise ValueError(reason) from error


def what_is_broken(folder: str | os.PathLike, weights: bool = True) -> str | None:
    """
    The first thing that is wrong with a folder of a full model, an adapter or a projector, with its mend.

    Args:
        folder (`str` or `os.PathLike`), weights (`bool`, *optional*, defaults to `True`): As for [`explained`].

    Returns:
        `str`, *optional*: a sentence that names the file; `None` if nothing is found.
    """
    folder = Path(folder)
    there = sorted(path.name for path in folder.iterdir())
    for path in (folder / name for name in there):
        is_read = path.name in JSON_FILES or path.suffix == ".model" or (weights and path.suffix == ".safetensors")
        if is_read and path.is_file() and (reason := _unreadable(path)):
            return reason
    config = json.loads((folder / "config.json").read_text("utf-8")) if "config.json" in there else {}
    if weights and (reason := _of_another_kind(folder, config) or _without_weights(folder, there)):
        return reason
    if config or any(name in there for name in PROCESSORS):
        if not any(name in there for name in PROCESSORS):
            return _missing(folder, PROCESSORS, "no processor", "the model's", there)
        if not has_tokenizer(folder):
            return _missing(folder, TOKENIZERS, "no tokenizer", "the language model's", there)
    return None


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Whether a tokenizer's words lie in a folder. Of `tokenizer_config.json` alone transformers 5 makes one without any."""
    return any((Path(folder) / name).is_file() for name in (*TOKENIZERS, "vocab.txt", "tekken.json")) or any(
        path.suffix in (".model", ".tiktoken") for path in Path(folder).iterdir()
    )


def _unreadable(path: Path) -> str | None:
    """Why a file cannot be read as what its name says."""
    if not os.access(path, os.R_OK):
        return f"{path}: this user may not read it."
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return f"{path} is Git LFS's pointer to the file, not the file: `git lfs pull`, or `hf download`."
    try:
        if path.suffix == ".json" and not isinstance(json.loads(path.read_text("utf-8")), dict | list):
            return f"{path} holds neither an object nor a list: {AGAIN}."
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
    except ValueError as error:
        return f"{path} is not JSON ({error}): {AGAIN}."
    except (SafetensorError, OSError) as error:
        return f"{path} is damaged or cut off ({error}): {AGAIN}."
    return None


def _of_another_kind(folder: Path, config: dict) -> str | None:
    """Models for words alone, and the original's form; other models for pictures may load in transformers' own class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FOR_WORDS
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as FOR_PICTURES

    kind = config.get("model_type")
    if not config or (kind in FOR_PICTURES and "text_config" in config):
        return None
    if any(name in config for name in ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")):
        return f"{folder} is in the original LLaVA's form: llava convert {folder} OUT first."
    if kind in FOR_PICTURES:
        return None
    mend = f"A LLaVA is made of it by llava init VISION {folder} OUT" if kind in FOR_WORDS else "Give a LLaVA's folder"
    return f"{folder} is no LLaVA: its config.json says model_type {kind!r}. {mend}."


def _without_weights(folder: Path, there: list[str]) -> str | None:
    for index in (name for name in there if name.endswith(".index.json")):
        named = json.loads((folder / index).read_text("utf-8")).get("weight_map") or {}
        lost = sorted(set(named.values()) - set(there))
        if lost:
            return f"{folder / index} names {lost[0]}, which is not there ({len(lost)} of its files): download it."
    if not any(name.endswith((".safetensors", ".bin", ".index.json")) for name in there):
        return f"{folder} holds no weights (model.safetensors). It holds: {', '.join(there[:8]) or 'nothing'}."
    return None


def _missing(folder: Path, names: tuple[str, ...], what: str, whose: str, there: list[str]) -> str:
    return (
        f"{folder} has {what} ({', '.join(names[:-1])} or {names[-1]}): copy {whose} there. "
        f"It holds: {', '.join(there[:8]) or 'nothing'}."
    )


__all__ = ["explained", "has_tokenizer", "what_is_broken"]
