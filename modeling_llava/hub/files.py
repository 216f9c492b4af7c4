"""Which files of a folder are published, and what must not be in them: pickles, secrets, paths of this machine."""

import codecs
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io.files import has_tokenizer, read_config, safetensors_header


PUBLISHED = {
    "model": (
        "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json", "tokenizer*.model",
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "processor_config.json",
        "preprocessor_config.json", "chat_template*", "additional_chat_templates/*.jinja", "adapter_config.json", "projector_config.json", "recipe.yaml",
        "run.json", "trainer_state.json", "all_results.json", "results*.json", "*.png", "LICENSE*", "*.gguf",
    ),
    "dataset": ("*.parquet", "data/*.parquet", "*.json", "*.jsonl", "*.png", "images/*", "README.md", "LICENSE*"),
    "run": ("instruct.json", "rejected.jsonl", "prompts.json", "summary.json", "*.png", "README.md", "LICENSE*"),
}  # fmt: skip
"""File names that are published, by kind of folder: a model, a data set, or a run of the data engine without one."""

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".dill")
"""Suffixes of files that can hold a pickle, which runs code when it is loaded."""

PICKLE_BEGINNINGS = (*(b"\x80" + bytes([protocol]) for protocol in range(2, 6)), b"PK\x03\x04", b"\x93NUMPY")
"""First bytes of pickles, of what `torch.save` writes, and of arrays."""
ARCHIVE_BEGINNINGS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"7z\xbc\xaf\x27\x1c", b"\x28\xb5\x2f\xfd", b"Rar!")
"""First bytes of gzip, bzip2, xz, 7z, zstd and rar, whose content cannot be searched."""

TEXT_ENDINGS = (".json", ".jsonl", ".yaml", ".yml", ".md", ".jinja", ".txt", "")
SEARCHED_BYTES = 16 * 2**20
"""How much of a binary file is searched: GGUF and PNG have their metadata in front."""
CHUNK_BYTES = 2**22
"""How much of a text is searched before its lines are."""

SECRETS = {
    "a Hugging Face token": (("hf_", "api_org_"), r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"),
    "an OpenAI key": (("sk-",), r"\bsk-[A-Za-z0-9_-]{20,}"),
    "an AWS key": (("akia", "asia"), r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "an AWS secret": (("secret",), r"(?i)aws_?secret_?(?:access_?)?key\W+[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])"),
    "a Google key": (("aiza",), r"\bAIza[A-Za-z0-9_-]{35}\b"),
    "a GitHub token": (
        ("gho_", "ghp_", "ghr_", "ghs_", "ghu_", "github_pat_"), r"\b(?:gh[oprsu]|github_pat)_[A-Za-z0-9_]{20,}",
    ),
    "a GitLab token": (("glpat-",), r"\bglpat-[A-Za-z0-9_-]{20,}"),
    "a Slack token": (("xox",), r"\bxox[abeprs]-[A-Za-z0-9-]{10,}"),
    "a Weights & Biases key": (("wandb_",), r"(?i)\bwandb_v1_\w{20,}|wandb_api_key\W+[0-9a-f]{40}"),
    "a private key": (("private key-",), r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a web token": (("eyj",), r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    "a password in a URL": (("://",), r"\b[a-z][a-z0-9+]*://[^\s/:@\"'<>]+:[^\s/:@\"'<>]{3,}@[\w.-]"),
    "a key": (
        ("key", "secret", "token"),
        r"""(?i)(?:api[_-]?key|secret(?:[_-]?key)?|(?:access|auth|hub)[_-]?token)["']?\s*[:=]\s*["']?"""
        r"(?=[\w+/.-]*\d)[\w+/.-]{20,}",
    ),
}  # fmt: skip
"""What it is → substrings in lower case, one of which a text with it has (they are faster than patterns), and its pattern."""

ROOTS = (
    "home", "users", "root", "mnt", "media", "tmp", "work", "data", "scratch", "workspace", "content", "var", "opt", "srv",
    "gpfs", "lustre", "nfs", "kaggle", "dbfs", "volumes", "private", "storage", "fsx", "efs", "raid", "export", "cluster",
    "shared", "teamspace", "notebooks", "ssd", "nvme",
)  # fmt: skip
LOCAL_PATH = (
    (*(f"/{root}/" for root in ROOTS), "~/", ":\\", ":/", "\\\\"),
    r"""(?x)
    (?:(?<=["'`\s=:(,\[>|;{@]) | ^ | (?<=file://))
    (?:
        /(?:Users|Volumes|ROOTS)/[^\s"'`,)<|]+
        | ~/[^\s"'`,)<|]+
        | [A-Za-z]:(?:\\\\[\w.-]|\\(?:Users\b|[\w.-]+\\)|/[\w.-]+/)[^\s"'`,)]*
        | \\\\\\\\?[\w.-]+\\\\[^\s"'`,)]+
    )""".replace("ROOTS", "|".join(ROOTS)),
)
"""POSIX, home, Windows and network paths. Text about paths is found as well."""
HOME = (tuple(f"/{root}/" for root in ("home", "users", "root")), r"/(?:home|Users|root)/[\w.-]{2,}")
"""A home folder in a binary file."""


@dataclass(frozen=True)
class Problem:
    """Why a folder must not be published: the file, the line (0: the whole file), what is wrong and the fix."""

    file: str
    line: int
    message: str

    def __str__(self):
        return f"{self.file}{f':{self.line}' if self.line else ''}: {self.message}"


def select_files(folder: str | os.PathLike, kind: str) -> tuple[list[Path], list[Path]]:
    """Split a folder's files into those that are published and those that stay."""
    folder = Path(folder)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files = [file for file in files if not any(part.startswith((".", "checkpoint-")) for part in file.parts)]
    published = [file for file in files if any(_matches(file, pattern) for pattern in PUBLISHED[kind])]
    return published, [file for file in files if file not in published]


def _matches(file: Path, pattern: str) -> bool:
    return len(file.parts) == pattern.count("/") + 1 and file.match(pattern)


def read_record(file: Path) -> dict[str, Any]:
    """The object in a JSON file; `{}` if it is not there. ValueError, which names the file, if it cannot be read."""
    return read_config(file) or {}


def find_problems(folder: str | os.PathLike) -> list[Problem]:
    """Everything in a folder that must not leave this machine: pickles, secrets, local paths, links to elsewhere."""
    folder = Path(folder)
    problems = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink()):
        name, ending = path.relative_to(folder).as_posix(), path.suffix.lower()
        if path.is_symlink():
            problems.append(Problem(name, 0, "is a link; publish the file itself."))
            continue
        with open(path, "rb") as file:
            beginning = file.read(4096)
        if ending in PICKLES or beginning.startswith(PICKLE_BEGINNINGS):
            problems.append(Problem(name, 0, "can hold a pickle, which runs code; save it as safetensors."))
        elif beginning.startswith(ARCHIVE_BEGINNINGS) or beginning[257:262] == b"ustar":
            problems.append(Problem(name, 0, "is an archive, which is not searched; unpack or remove it."))
        elif ending == ".safetensors":
            problems += _problems_in_safetensors(path, name)
        elif ending == ".parquet":
            problems += _problems_in_parquet(path, name)
        elif ending in TEXT_ENDINGS or _is_text(beginning):
            problems += _problems_in_lines(path, name)
        else:
            with open(path, "rb") as file:
                problems += _problems_in_text(_decoded(file.read(SEARCHED_BYTES)), name, 0, HOME)
    return problems


def link_problems(folder: str | os.PathLike, kind: str) -> list[Problem]:
    """
    Links among the published files that lead out of the folder, or nowhere. Links of the Hub's cache to its blobs are fine.
    """
    folder = Path(folder).resolve()
    inside = [folder] + ([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])
    below = {pattern.split("/")[0] for pattern in PUBLISHED[kind] if "/" in pattern}
    problems = []
    for path in sorted(path for path in folder.rglob("*") if path.is_symlink()):
        name, place = path.relative_to(folder), path.resolve()
        if not (str(name) in below or any(_matches(name, pattern) for pattern in PUBLISHED[kind])):
            continue
        if not path.exists():
            problems.append(Problem(name.as_posix(), 0, "is a link to a missing file."))
        elif not path.is_file():
            problems.append(Problem(name.as_posix(), 0, "is a link to a folder; put the folder itself here."))
        elif not any(place.is_relative_to(root) for root in inside):
            message = f"is a link out of this folder ({place}); copy the file here."
            problems.append(Problem(name.as_posix(), 0, message))
    return problems


def missing_files(folder: Path, kind: str) -> list[Problem]:
    """Missing files without which a publication cannot be used."""
    if kind == "dataset":
        what = {"README.md": "say what the data is and under which licence."}
    else:
        config = {"full": "config.json", "adapter": "adapter_config.json", "projector": "projector_config.json"}[kind]
        what = {config: "save the model again.", "*.safetensors": "save the weights as safetensors."}
    if kind in ("full", "adapter"):
        what["processor_config.json"] = "save the processor next to the weights (processor.save_pretrained)."
    if kind == "full":
        what["chat_template*"] = "the model needs one to be asked questions."
    problems = [Problem(name, 0, f"is missing; {fix}") for name, fix in what.items() if not any(folder.glob(name))]
    if kind == "full" and not has_tokenizer(folder):
        problems.append(Problem("tokenizer.json", 0, "is missing; copy the language model's tokenizer files there."))
    for index in folder.glob("*.safetensors.index.json"):
        lost = {name for name in read_record(index).get("weight_map", {}).values() if not (folder / name).is_file()}
        message = "names {}, which is not there; save the model again."
        problems += [Problem(index.name, 0, message.format(name)) for name in sorted(lost)]
    return problems


def _is_text(beginning: bytes) -> bool:
    """By its content, since there are too many suffixes."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(beginning)  # may end within a character
    except UnicodeDecodeError:
        return False
    return b"\0" not in beginning


def _decoded(content: bytes) -> str:
    """Text for the search: UTF-16, as PowerShell writes it, and JSON's `\\/` are read as their characters."""
    return content.replace(b"\0", b"").decode("utf-8", "replace").replace("\\/", "/")


def _problems_in_lines(path: Path, name: str) -> list[Problem]:
    problems, number = [], 0
    with open(path, "rb") as file:
        while lines := file.readlines(CHUNK_BYTES):
            if _problems_in_text(_decoded(b"".join(lines)), name, 0):
                for offset, line in enumerate(lines, start=1):
                    problems += _problems_in_text(_decoded(line), name, number + offset)
            number += len(lines)
    return problems


def _problems_in_text(
    text: str, name: str, number: int, local_path: tuple[tuple[str, ...], str] = LOCAL_PATH
) -> list[Problem]:
    lower = text.lower()

    def search(hints: tuple[str, ...], pattern: str) -> re.Match | None:
        return re.search(pattern, text, re.MULTILINE) if any(hint in lower for hint in hints) else None

    problems = []
    if secret := next((what for what, looks in SECRETS.items() if search(*looks)), None):
        problems.append(Problem(name, number, f"holds what looks like {secret}; remove it, and revoke it."))
    if name not in ("tokenizer.json", "vocab.json", "tokenizer.model"):  # their tokens are not paths
        if found := search(*local_path):
            problems.append(Problem(name, number, f"names a path on this machine ({found[0]}); use a Hub name."))
    return problems


def _problems_in_safetensors(path: Path, name: str) -> list[Problem]:
    """Whether the file is whole, and what its header says next to the tensors' names. No tensor is read."""
    try:
        header = safetensors_header(path)
    except ValueError as error:
        return [Problem(name, 0, str(error).removeprefix(f"{path} "))]
    return _problems_in_text(json.dumps([header.pop("__metadata__", {}), *header]), name, 0)


def _problems_in_parquet(path: Path, name: str) -> list[Problem]:
    """The first problem of each kind in its texts and its footer; images in it are not searched."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: dict[str, Problem] = {}
    try:
        with pq.ParquetFile(path) as file:
            texts = [value.decode("utf-8", "replace") for value in (file.metadata.metadata or {}).values()]
            texts += file.schema_arrow.names
            for group in range(file.num_row_groups):
                texts += _strings(file.read_row_group(group).to_pylist())
                for text in texts:
                    for problem in _problems_in_text(text.replace("\\/", "/"), name, 0):
                        found.setdefault(problem.message.partition("(")[0], problem)
                texts = []
    except (pa.ArrowInvalid, OSError) as error:
        return [Problem(name, 0, f"is damaged or cut short ({error}); write or copy it again.")]
    return list(found.values())


def _strings(value: Any) -> Iterator[str]:
    """Every text in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
