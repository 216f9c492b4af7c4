"""Copies what is published into a folder of its own, without local paths."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from .card_fields import check_card_fields
from .files import read_record


RECORDS = (
    "config.json", "tokenizer_config.json", "trainer_state.json", "all_results.json", "adapter_config.json",
    "projector_config.json",
)  # fmt: skip
"""Read before they are copied, so that an error names the source."""

LINKED = (".safetensors", ".gguf", ".parquet")
"""Suffixes of large files, which are hard links; the others are copies."""

PLACE = r"""(?<![\w:/.\\])(?:~|[A-Za-z]:(?=[\\/])|\.{1,2}(?=[\\/]))?[\\/](?:[^\s"'\\/]+[\\/])*([^\s"'\\/]+)[\\/]?"""
"""A path in a text, such as a recipe's `benchmarks`; its last component is the group."""


def stage_files(source: Path, target: Path, files: list[Path]) -> None:
    """
    Put `files` into `target`: weights as hard links where possible; of local paths in a recipe, a run record and results
    only the last component is kept.

    Raises:
        ValueError: a record cannot be read.
    """
    for file in files:
        place = target / file
        place.parent.mkdir(parents=True, exist_ok=True)
        original = (source / file).resolve()
        if file.name in RECORDS:
            read_record(source / file)
        if file.name in ("recipe.yaml", "run.json") or file.match("results*.json"):
            place.write_text(_shortened(source / file), "utf-8")
        elif file.suffix not in LINKED:
            shutil.copyfile(original, place)
        else:
            try:
                os.link(original, place)
            except OSError:  # another file system
                shutil.copyfile(original, place)


def _shortened(file: Path) -> str:
    # the user is asked about a path within a sentence
    is_prose = file.name not in ("recipe.yaml", "run.json")

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {shorten(key): shorten(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shorten(item) for item in value]
        if not isinstance(value, str):
            return value
        if os.path.isabs(value) or re.match(r"(?:[A-Za-z]:|\.{1,2}|~)[\\/]", value):  # one path, with spaces in it
            if not re.search(r"\s[\\/~-]", value):
                return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
        return value if is_prose else re.sub(PLACE, r"\1", value)

    if file.suffix == ".json":
        return json.dumps(shorten(read_record(file)), indent=2) + "\n"
    try:
        content = yaml.safe_load(file.read_text("utf-8")) or {}
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} where lines of `key: value` should be")
        return yaml.safe_dump(shorten(content), sort_keys=False)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())}). Fix or remove it.") from None


def stage_results(paths: Iterable[str | os.PathLike], folder: Path) -> None:
    """Copies the `results.json` of evaluations and their plots into `folder`, named for their benchmark."""
    staged = set()
    for path in map(Path, paths):
        file = path / "results.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"{path} holds no results.json: give an output folder of `llava eval`.")
        benchmark = read_record(file).get("benchmark")
        if not isinstance(benchmark, str) or not benchmark:
            raise ValueError(f"{file} names no benchmark: it was not written by `llava eval`.")
        place = folder / f"results-{re.sub(r'[^A-Za-z0-9]+', '-', benchmark).strip('-').lower()}.json"
        if place in staged:
            raise ValueError(f"{path} and another one are of the same benchmark, {benchmark}. Give one.")
        staged.add(place)
        place.write_text(_shortened(file), "utf-8")
        if (plot := file.with_name("results.png")).is_file():
            shutil.copyfile(plot, place.with_suffix(".png"))


def finish_data_card(card: Path, repo: str, license: str | None) -> None:
    """Writes license and Hub name into a data set's own card. ValueError if its metadata is not YAML's `key: value`."""
    if not card.is_file():
        return
    text = card.read_text("utf-8-sig", errors="replace").replace("PATH OR REPOSITORY", repo)
    front, body = {}, text
    if head := re.match(r"---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", text, re.DOTALL | re.MULTILINE):
        body = text[head.end() :]
        try:
            front = yaml.safe_load(head[1]) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{card.name}: its head is not YAML ({' '.join(str(error).split())}).") from None
        if not isinstance(front, dict):
            raise ValueError(f"{card.name}: its head is a {type(front).__name__}; it must be lines of `key: value`.")
    if license:
        front = {"license": license} | {key: value for key, value in front.items() if key != "license"}
    check_card_fields(front.get("license"), front.get("language"), f"{card.name}:")
    if "configs" not in front and card.with_name("instruct.json").is_file():
        front["configs"] = [{"config_name": "default", "data_files": "instruct.json"}]
    card.write_text(f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n{body}", "utf-8")


def name_base(file: Path, base: str) -> None:
    """Write the base model's Hub name into an adapter's or a projector's configuration."""
    config = read_record(file)
    config["base_model_name_or_path"] = base
    file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def drop_local_names(folder: Path) -> None:
    """Drop the path a model was loaded from, which transformers and tokenizers note in their files."""
    for name in ("config.json", "tokenizer_config.json", "trainer_state.json"):
        if (file := folder / name).is_file():
            _drop_paths(content := read_record(file))
            file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _drop_paths(content: dict) -> None:
    if best := content.get("best_model_checkpoint"):
        content["best_model_checkpoint"] = re.split(r"[\\/]", best)[-1]
    for key in ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file"):
        if re.match(r"/|~|[A-Za-z]:[\\/]|\\\\", str(content.get(key, ""))):
            del content[key]
    for value in content.values():
        if isinstance(value, dict):
            _drop_paths(value)
