"""
Recipes: flat YAML files whose keys are the fields of [`LlavaTrainingArguments`].

    base: qlora                        # a preset of this package, or the path of another recipe, relative to this one
    model: llava-hf/llava-1.5-7b-hf
    learning_rate: 1e-4                # replaces the base's

Later wins: base, then the recipe, then `key=value` from the command line.
"""

import contextlib
import dataclasses
import difflib
import functools
import os
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from ..io.files import write_atomic
from .arguments import LlavaTrainingArguments


PRESETS = Path(__file__).parents[1] / "presets"
"""Folder of the recipes that come with the package."""


def preset_names() -> list[str]:
    """Names of the recipes that come with the package, for `llava train NAME` and `base: NAME`."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_recipe(recipe: str | os.PathLike, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """
    Read a recipe with its bases and overrides, check every key and convert every value. Nothing is loaded.

    Args:
        recipe (`str` or `os.PathLike`): Path of a YAML file, or the name of a preset of this package (`qlora`).
        overrides (`list[str]`, *optional*):
            `key=value` pairs; values are YAML. `type_weights.detail=2` sets one entry of a mapping.

    Returns:
        `dict[str, Any]`: keyword arguments of [`LlavaTrainingArguments`].

    Raises:
        FileNotFoundError: there is neither such a file nor such a preset.
        ValueError: not a flat mapping, its own base, an unknown key, or not one of a setting's choices.
        TypeError: a value has the wrong type.
    """
    path = _find(str(recipe), Path.cwd())
    settings = _read_with_bases(path, seen=())
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ValueError(f"{override!r} is not of the form key=value.")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"The value of {override!r} is not YAML: {_one_line(error)}.") from None
        key, _, entry = key.partition(".")
        check_key(key, "the command line")
        if entry:
            current = settings.get(key)
            value = {**(current if isinstance(current, dict) else {}), entry: value}
        settings[key] = convert_value(key, value, "the command line")
    return settings


def parse_recipe(recipe: str | os.PathLike, overrides: list[str] | tuple[str, ...] = ()) -> LlavaTrainingArguments:
    """[`read_recipe`], then [`LlavaTrainingArguments`]."""
    return LlavaTrainingArguments(**read_recipe(recipe, overrides))


def write_recipe(settings: dict[str, Any], path: str | os.PathLike, header: str = "") -> None:
    """Write a flat recipe; the file is complete or not there."""
    text = "".join(f"# {line}\n" for line in header.splitlines())
    text += yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000)
    write_atomic(path, text)


def check_key(key: str, source: str) -> None:
    """Raise ValueError, with the nearest name, unless `key` is a setting."""
    names = _settings()
    if key in names:
        return
    if key in _OTHER_NAMES:
        hint = f"Here it is {_OTHER_NAMES[key]}."
    else:
        hint = _nearest(str(key), names, 0.5)
    raise ValueError(f"{source}: there is no setting {key!r}. {hint}".rstrip())


def _nearest(name: str, names, cutoff: float = 0.6) -> str:
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"Did you mean {nearest[0]!r}?" if nearest else ""


_OTHER_NAMES = {  # of other trainers; too different in spelling for `get_close_matches`
    "lr": "learning_rate", "mm_projector_lr": "projector_learning_rate", "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size, or global_batch_size over all devices",
    "warmup_ratio": "warmup_steps (below 1: a fraction of all steps)", "model_name_or_path": "model",
    "model_max_length": "max_length", "data_path": "data", "version": "chat_template", "conv_version": "chat_template",
    "lora_enable": "adapter: lora", "bits": "adapter: qlora", "load_in_4bit": "adapter: qlora", "lora_rank": "lora_r",
    "tune_mm_mlp_adapter": "stage: pretrain", "pretrain_mm_mlp_adapter": "projector",
    "group_by_modality_length": "train_sampling_strategy: group_by_length with group_by_modality: true",
}  # fmt: skip


def convert_value(key: str, value: Any, source: str) -> Any:
    """
    A value in the type of its setting: two rules of YAML 1.1 are undone, `2e-5` (no dot) is text and `no` is false. Raises TypeError for
    another type, ValueError for what is not one of the setting's choices.
    """
    accepted, choices = _accepted_types()[key], _settings()[key].metadata.get("choices")
    converted = _convert(value, accepted)
    if converted is _WRONG or isinstance(converted, list) and not all(isinstance(item, str) for item in converted):
        names = " or ".join(sorted({"nothing" if t is type(None) else _TYPE_NAMES[t] for t in accepted}))
        listed = f": one of {', '.join(choices)}" if choices else ""
        raise TypeError(f"{source}: {key}={value!r} should be {names}{listed}.")
    if choices and converted not in (None, *choices):
        hint = _nearest(converted.lower(), choices)
        raise ValueError(f"{source}: {key}={value!r} is not one of {', '.join(choices)}. {hint}".rstrip())
    return converted


_WRONG = object()


def _convert(value: Any, accepted: set[type]) -> Any:
    if value is False and bool not in accepted and str in accepted:
        return "no"
    if type(value) in accepted:
        return value
    for written, wanted, convert in (
        (int, float, float),
        (float, int, _whole),
        (str, int, int),
        (str, float, float),
        (str, list, lambda text: [item.strip() for item in text.split(",")]),
    ):
        if type(value) is written and wanted in accepted:
            with contextlib.suppress(ValueError):
                return convert(value)
    return _WRONG


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ValueError
    return int(number)


_TYPE_NAMES = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list of texts", dict: "a mapping"
}  # fmt: skip


@functools.cache
def _settings() -> dict[str, dataclasses.Field]:
    return {setting.name: setting for setting in dataclasses.fields(LlavaTrainingArguments) if setting.init}


@functools.cache
def _accepted_types() -> dict[str, set[type]]:
    """Setting → types that it accepts."""
    annotations = typing.get_type_hints(LlavaTrainingArguments)
    accepted = {name: _members(annotations[name]) for name in _settings()}
    accepted["fsdp"].add(bool)  # transformers accepts true as well, and says so in its help text only
    return accepted


def _members(annotation: Any) -> set[type]:
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):  # int | None
        return {kind for member in members for kind in _members(member)}
    if origin is typing.Literal:
        return {type(value) for value in members}
    kind = origin or annotation
    return {kind if kind in _TYPE_NAMES or kind is type(None) else str}  # an enumeration is written as text


def _find(name: str, folder: Path) -> Path:
    path = folder / os.path.expanduser(name)
    if path.is_file():
        return path
    preset = PRESETS / f"{name}.yaml"
    if os.sep not in name and preset.is_file():
        return preset
    presets = preset_names()
    raise FileNotFoundError(
        f"{path} does not exist, and there is no preset {name!r}. Presets: {', '.join(presets)}. {_nearest(name, presets)}".rstrip()
    )


class _Loader(yaml.SafeLoader):
    """YAML in which a key may occur only once (by default the last one silently wins), with the numbers of YAML 1.2."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _kind, _number in (  # by YAML 1.1 010 is 8, 4:16 is 256, and 1e-4 is text
    ("int", r"[-+]?(0|[1-9][0-9]*)$"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=e))(e[-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_number, re.IGNORECASE), [*"-+.0123456789"])


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        chain = " → ".join(str(p) for p in (*seen, path))
        raise ValueError(f"A recipe is its own base: {chain}.")
    try:
        settings = yaml.load(path.read_text("utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {_one_line(error)}.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, not a mapping of `key: value`.")
    base = settings.pop("base", None)
    inherited = {} if base is None else _read_with_bases(_find(str(base), path.parent), (*seen, path))
    for key, value in settings.items():
        check_key(key, str(path))
        inherited[key] = convert_value(key, value, str(path))
    return inherited


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
