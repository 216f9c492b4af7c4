"""
Files that are whole or not there: written next to their place, then moved; and locks between processes. What a folder or a Hub
repository is if it is not a LLaVA ([`other_than_llava`], asked before anything large is read), and why one cannot be loaded
([`what_is_broken`], asked after a load has failed): one line each, with the fix.
"""

import errno
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""Older folders have the second alone."""

MODEL_FILES = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
)  # fmt: skip
"""Files with a folder's weights, in the order of preference."""

NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
JSON_FILES = (
    "config.json", "generation_config.json", *PROCESSORS, "tokenizer_config.json", "tokenizer.json", "vocab.json",
    "special_tokens_map.json", "added_tokens.json", "adapter_config.json", "projector_config.json",
    "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip
ORIGINAL_FIELDS = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")
"""Of these, the config.json of a checkpoint in the original LLaVA's format has one."""

ORIGINAL_TYPES = ("llava_llama", "llava", "llama", "llava_mistral", "mistral")
"""`model_type` in the original's format (`llava`: of 2023; `llama`, `mistral`: of a projector alone) that can be converted."""

SUCCESSOR_FIELDS = {
    "image_aspect_ratio": ("pad", "square", "keep"),
    "mm_patch_merge_type": ("flat",),
    "mm_resampler_type": (),
    "s2": (),
    "use_s2": (),
}
"""Fields of the original's format that LLaVA's successors have → the values that v1 and v1.5 have too."""

EMPTY_TENSOR = (
    "is empty (no elements): it was saved under DeepSpeed ZeRO-3 without gathering the weights. Save it again with "
    "stage3_gather_16bit_weights_on_model_save, or by zero_to_fp32.py."
)
LFS_ERROR = "is Git LFS's pointer to the file, not the file: `git lfs pull`, or `hf download`."

AGAIN = "copy or download it again"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""No LLaVA on the Hub has a name without an owner."""


@contextmanager
def atomic_path(path: str | os.PathLike, sync: bool = False) -> Iterator[Path]:
    """
    A path to write in place of `path`: it takes that name when the block ends, and is removed if the block raises. With `sync` its
    content is on the disk before: it survives a power cut.
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
    Lock an open file, or on POSIX an open folder, until it is closed or the process dies; `False` if another process has it (never
    with `wait`), `True` also on a file system without locks.
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


def other_than_llava(
    name: str, config: dict, adapter: dict | None = None, has: Callable[[str], bool] = lambda file: False
) -> str | None:
    """
    What a folder or a Hub repository holds, if it is not a LLaVA that can be loaded, with the command that helps; `None` for a
    LLaVA, and an adapter or projector of ours. `config` is its `config.json` (`{}` without one), `adapter` its
    `adapter_config.json`; `has` says whether it has a file of a name.
    """
    if reason := unsupported(name, config):
        return reason
    if adapter is not None and (is_original(config) or any(map(has, NON_LORA_FILES))):
        base = adapter.get("base_model_name_or_path") or "BASE"
        neighbour = os.path.join(os.path.dirname(os.path.abspath(name)), base)
        return original(name, "a LoRA", neighbour if os.path.isdir(neighbour) and not os.path.isdir(base) else base)
    if (is_original(config) or not config) and any(map(has, PROJECTOR_FILES)) and not any(map(has, MODEL_FILES)):
        return original(name, "a projector", "BASE")
    return original(name, "a checkpoint") if is_original(config) else None


def original(name: str, what: str, base: str | None = None) -> str:
    """The sentences about something in the original's format."""
    base = f" --base {base}" if base else ""
    return f"{name} is {what} in the original LLaVA's format. Convert it first: llava convert {name} OUT{base}"


def unsupported(name: str, config: dict) -> str | None:
    """Of [`other_than_llava`]: models that this package neither loads nor converts."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT_MODELS

    kind = config.get("model_type")
    if is_original(config):
        for field, plain in SUCCESSOR_FIELDS.items():
            if config.get(field) not in (None, False, *plain):
                return (
                    f"{name} has {field} {config[field]!r}: it is one of LLaVA's successors (such as LLaVA-NeXT 1.6, "
                    "transformers' llava_next), which are not supported. LLaVA v1 and v1.5 are."
                )
        if kind not in ORIGINAL_TYPES:
            return f"{name} is an original LLaVA of model_type {kind!r}. Those on LLaMA and Mistral are supported."
    elif config and kind in TEXT_MODELS and "vision_config" not in config:
        return f"{name} is a language model ({kind}). Make a LLaVA of it: llava init VISION {name} OUT"
    elif config and kind != "llava":
        return (
            f"{name} is not a LLaVA v1 or v1.5: its config.json says model_type {kind!r}, which is not supported. Use "
            "transformers' own class for it, or give a model of model_type 'llava'."
        )
    return None


def is_original(config: dict) -> bool:
    """Whether a `config.json` is one of the original LLaVA's format."""
    fields = any(field in config for field in ORIGINAL_FIELDS)
    return "text_config" not in config and (fields or config.get("model_type") in ("llava_llama", "llava_mistral"))


def of_file(path: str) -> str:
    """What a file is that was given in the place of a model's folder."""
    name = os.path.basename(path)
    if name in (*PROJECTOR_FILES, *NON_LORA_FILES):
        return original(path, "a projector, without its language model,", "BASE")
    if name.endswith(".gguf"):
        return (
            f"{path} is a GGUF file: run it by llama.cpp, or give the folder of the checkpoint that it was made from."
        )
    return f"{path} is one file: give the folder in which it lies."


def listing(folder: str | os.PathLike) -> str:
    """What lies in a folder, as a sentence."""
    return f"It holds: {', '.join(sorted(os.listdir(folder))[:8]) or 'nothing'}."


def read_config(file: str | os.PathLike | None) -> dict | None:
    """The object in a JSON file; `None` without the file. ValueError if it cannot be read, or holds something else."""
    if file is None or not os.path.isfile(file):
        return None
    if reason := unreadable(Path(file)):
        raise ValueError(reason)
    content = json.loads(Path(file).read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object: {AGAIN}.")
    return content


@contextmanager
def explained(folder: str | os.PathLike, weights: bool = True) -> Iterator[None]:
    """Around a load: where it fails, and the folder's files say why ([`what_is_broken`]), that is the ValueError raised."""
    try:
        yield
    except Exception as error:  # loaders raise whatever a broken file makes them raise
        reason = what_is_broken(folder, weights) if os.path.isdir(folder) else None
        if reason is None:
            raise
        raise ValueError(reason) from error


def what_is_broken(folder: str | os.PathLike, weights: bool = True) -> str | None:
    """The first thing that is wrong with the JSON files and the weights of a full model's folder, or the processor; with its fix."""
    folder = Path(folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    names = {path.name for path in files}
    for path in files:
        is_weights = path.suffix in (".safetensors", ".bin")
        if path.name in JSON_FILES or path.suffix == ".model" or (weights and is_weights):
            if reason := unreadable(path):
                return reason
    if weights:
        for index in (path for path in files if path.name.endswith(".index.json")):
            lost = sorted({*json.loads(index.read_text("utf-8"))["weight_map"].values()} - names)
            if lost:
                return f"{index} names {lost[0]}, which is not there ({len(lost)} of its files): download it."
        return None if names & {*MODEL_FILES} else f"{folder} holds no weights (model.safetensors). {listing(folder)}"
    if "config.json" in names and not names & {*PROCESSORS}:
        return f"{folder} has no processor ({' or '.join(PROCESSORS)}): copy the model's there. {listing(folder)}"
    if names & {*PROCESSORS} and not has_tokenizer(folder):
        files = f"{', '.join(TOKENIZERS[:-1])} or {TOKENIZERS[-1]}"
        return f"{folder} has no tokenizer ({files}): copy the language model's there. {listing(folder)}"
    return None


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Whether a folder has a tokenizer. From `tokenizer_config.json` alone transformers 5 makes an empty one."""
    names = (*TOKENIZERS, "vocab.txt", "tekken.json")
    return any(name in names or name.endswith((".model", ".tiktoken")) for name in os.listdir(folder))


def safetensors_header(path: str | os.PathLike) -> dict[str, dict]:
    """`{name: {"dtype", "shape", "data_offsets"}}`, and `__metadata__`. ValueError if the file is damaged or cut short."""
    try:
        with safe_open(path, framework="pt"):  # checks the header against itself and against the file's size
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut off ({error}): {AGAIN}.") from error
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def is_lfs_pointer(path: Path) -> bool:
    """Whether `git clone` without Git LFS left a pointer in the place of a file."""
    return _begins(path, b"version https://git-lfs")


def _begins(path: Path, sign: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(sign)) == sign


def unreadable(path: Path) -> str | None:
    """Why a file cannot be read as what its name says; `None` if it can."""
    if not os.access(path, os.R_OK):
        return f"{path}: this user may not read it."
    if is_lfs_pointer(path):
        return f"{path} {LFS_ERROR}"
    try:
        if path.suffix == ".safetensors":
            empty = [name for name, entry in safetensors_header(path).items() if 0 in entry.get("shape", ())]
            return f"{path}: {empty[0]} {EMPTY_TENSOR}" if empty else None
        if path.suffix == ".json":
            content = json.loads(path.read_text("utf-8"))
            kinds = dict if path.name.endswith(("config.json", "index.json")) else dict | list
            if not isinstance(content, kinds) or path.name.endswith("index.json") and "weight_map" not in content:
                return f"{path} holds no JSON object of its kind: {AGAIN}."
        if path.suffix == ".bin" and not zipfile.is_zipfile(path) and not _begins(path, b"\x80"):
            return f"{path} is damaged or cut off: {AGAIN}."  # torch.save writes an archive; before 2020, a pickle
    except ValueError as error:
        return str(error) if path.suffix == ".safetensors" else f"{path} is not JSON ({error}): {AGAIN}."
    return None
