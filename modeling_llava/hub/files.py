"""Which files of a folder are published, and what must not be in them: pickles, secrets, paths of this machine."""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors import SafetensorError, safe_open


PUBLISHED = {
    "model": (
        "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*",
        "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "processor_config.json",
        "preprocessor_config.json", "chat_template*", "adapter_config.json", "projector_config.json", "recipe.yaml",
        "run.json", "trainer_state.json", "all_results.json", "results*.json", "*.png", "LICENSE*", "*.gguf",
    ),
    "dataset": (
        "*.parquet", "data/*.parquet", "*.json", "*.jsonl", "*.png", "images/*", "README.md", "LICENSE*",
    ),
    "run": ("instruct.json", "rejected.jsonl", "prompts.json", "summary.json", "*.png", "README.md", "LICENSE*"),
}  # fmt: skip
"""File names that are published, by what a folder is: a model, a data set, or a run of the data engine without one (its
ledger, its record and what it was made from stay). Everything else stays here, and is listed."""

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".joblib")
"""Endings of files that can hold a pickle, which runs code when it is loaded."""

TEXT_ENDINGS = (".json", ".jsonl", ".yaml", ".yml", ".md", ".jinja", ".txt", "")
SEARCHED_BYTES = 16 * 2**20
"""Of a file that is not text, so much is searched for secrets: what GGUF, PNG and parquet say of themselves lies in front."""

SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an OpenAI key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": r"\bAIza[A-Za-z0-9_-]{35}\b",
    "a GitHub token": r"\b(?:ghp|gho|ghs|github_pat)_[A-Za-z0-9_]{20,}",
    "a Weights & Biases key": r"(?i)wandb_api_key\W+[0-9a-f]{40}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
LOCAL_PATH = r"""(?x)
    (?:(?<=["'`\s=:(,\[]) | ^ | (?<=file://))
    (?:
        /(?:home|Users|root|mnt|media|tmp|work|data|scratch|workspace|content|var|opt|srv|gpfs|lustre|nfs|kaggle|dbfs|Volumes)
        /[^\s"'`,)]+
        | ~/[^\s"'`,)]+
        | [A-Za-z]:(?:\\\\[\w.-]|\\(?:Users\b|[\w.-]+\\)|/[\w.-]+/)[^\s"'`,)]*
        | \\\\\\\\?[\w.-]+\\\\[^\s"'`,)]+
    )"""
"""POSIX, home, Windows and network paths. Text that is about paths is found as well: it is better asked than leaked."""


@dataclass(frozen=True)
class Problem:
    """Why a folder must not be published: the file, the line (0: the whole file), and what is wrong with the mend."""

    file: str
    line: int
    message: str

    def __str__(self):
        return f"{self.file}{f':{self.line}' if self.line else ''}: {self.message}"


def select_files(folder: str | os.PathLike, kind: str) -> tuple[list[Path], list[Path]]:
    """
    Split a folder's files into those that are published and those that stay.

    Args:
        folder (`str` or `os.PathLike`):
            A model's or a dataset's folder. Checkpoints of a run (`checkpoint-*`) inside it always stay.
        kind (`str`):
            `"model"` or `"dataset"`.

    Returns:
        `tuple[list[Path], list[Path]]`: paths relative to `folder`, sorted.
    """
    folder = Path(folder)
    files = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith((".", "checkpoint-")) for part in path.relative_to(folder).parts)
    )
    published = [file for file in files if any(_matches(file, pattern) for pattern in PUBLISHED[kind])]
    return published, [file for file in files if file not in published]


def _matches(file: Path, pattern: str) -> bool:
    return len(file.parts) == pattern.count("/") + 1 and file.match(pattern)


def stage_files(source: Path, target: Path, files: list[Path]) -> None:
    """
    Put `files` into `target`: weights as hard links where the disk allows, text with local paths shortened.

    A recipe, a run's record and results name data and models by their places on this machine. Such a place means nothing
    elsewhere, so only its last component is kept.
    """
    for file in files:
        place = target / file
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.name in ("recipe.yaml", "run.json") or file.match("results*.json"):
            place.write_text(_shortened(source / file), "utf-8")
            continue
        original = (source / file).resolve()
        try:
            os.link(original, place)
        except OSError:  # another file system
            shutil.copy2(original, place)


def _shortened(file: Path) -> str:
    """A record of the run whose paths are cut to their last component."""
    text = file.read_text("utf-8")
    try:
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{file} cannot be read ({' '.join(str(error).split())}). Mend it, or take it away."
        ) from None

    def shorten(value):
        if isinstance(value, dict):
            return {shorten(key): shorten(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shorten(item) for item in value]
        if isinstance(value, str) and (os.path.isabs(value) or re.match(r"[A-Za-z]:[\\/]|\.{1,2}[\\/]|~", value)):
            return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
        return value

    content = shorten(content)
    return json.dumps(content, indent=2) + "\n" if file.suffix == ".json" else yaml.safe_dump(content, sort_keys=False)


def find_problems(folder: str | os.PathLike) -> list[Problem]:
    """
    Everything in a folder that must not leave this machine: pickles, secrets, local paths, links to elsewhere.

    Args:
        folder (`str` or `os.PathLike`):
            What would be sent, file by file.

    Returns:
        `list[Problem]`: empty if all is well. A secret itself is not repeated in the message.
    """
    folder = Path(folder)
    problems = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink()):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            problems.append(Problem(name, 0, "is a link; publish the file itself."))
        elif path.suffix in PICKLES:
            problems.append(Problem(name, 0, "can hold a pickle, which runs code when loaded; save as safetensors."))
        elif path.suffix in TEXT_ENDINGS:
            with open(path, encoding="utf-8", errors="replace") as lines:
                for number, line in enumerate(lines, start=1):
                    problems += _problems_in_line(line, name, number)
        elif path.suffix == ".safetensors":
            problems += _problems_in_safetensors(path, name)
        else:
            with open(path, "rb") as file:
                text = file.read(SEARCHED_BYTES).decode("latin-1")
            problems += _secrets(text, name, 0)
    return problems


def _secrets(text: str, name: str, number: int) -> list[Problem]:
    found = (what for what, pattern in SECRETS.items() if re.search(pattern, text))
    return [Problem(name, number, f"holds what looks like {what}; remove it, and revoke it.") for what in found]


def _problems_in_line(line: str, name: str, number: int) -> list[Problem]:
    problems = _secrets(line, name, number)
    if name not in ("tokenizer.json", "vocab.json"):  # their pieces are text, not places
        if found := re.search(LOCAL_PATH, line):
            message = f"names a place on this machine ({found[0]}); name it by its Hub name."
            problems.append(Problem(name, number, message))
    return problems


def _problems_in_safetensors(path: Path, name: str) -> list[Problem]:
    """Whether the file is whole, and what its header says beside the tensors. No tensor is read."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        return [Problem(name, 0, f"is damaged or cut short ({error}); save or copy it again.")]
    return _problems_in_line(json.dumps(metadata), name, 0)


__all__ = ["Problem", "find_problems", "select_files", "stage_files"]
