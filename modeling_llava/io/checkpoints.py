"""
What a folder on disk or on the Hub holds, and how its weights get into a model.

| kind | recognised by | holds |
|---|---|---|
| `full` | `config.json` with weights | a stock `llava` checkpoint |
| `adapter` | `adapter_config.json` | PEFT: LoRA, the whole projector, the vision tower if it was trained |
| `projector` | `projector_config.json` | what a pretrain run trained, without the frozen weights |
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, find_adapter_config_file

from .files import (
    AGAIN,
    EMPTY_TENSOR,
    HUB_NAME,
    PROCESSORS,
    explained,
    has_tokenizer,
    listing,
    of_file,
    other_than_llava,
    read_config,
    safetensors_header,
    unreadable,
    what_is_broken,
)


logger = logging.getLogger(__name__)

PROJECTOR_CONFIG_NAME = "projector_config.json"
PROJECTOR_WEIGHTS_NAME = "projector.safetensors"
RUN_RECORD_NAME = "run.json"

A_KIND = {"full": "a full model", "adapter": "an adapter", "projector": "a projector"}

COMPONENTS = ("language_model", "multi_modal_projector", "vision_tower")
"""The parts of a LLaVA, by the names of their modules; the head counts as the language model's."""


def component_of(parameter_name: str) -> str:
    """The component to which a parameter or module belongs, in memory, in a saved file or under PEFT's wrappers."""
    parts = parameter_name.split(".")
    return next((name for name in ("vision_tower", "multi_modal_projector") if name in parts), "language_model")


# What a folder or a Hub repository is


def checkpoint_kind(
    path: str | os.PathLike, revision: str | None = None, config: PreTrainedConfig | None = None, **hub
) -> Literal["full", "adapter", "projector"]:
    """
    What a folder or Hub name holds, by its small files; `config` is given in place of a `config.json`. FileNotFoundError or
    ValueError if it is neither of both, or holds nothing that can be loaded ([`require_llava`]).
    """
    path = os.fspath(path)
    _require_folder_or_hub_name(path)
    if require_llava(path, revision=revision, **hub):
        return "adapter"
    if file_of(path, PROJECTOR_CONFIG_NAME, revision, **hub) is not None:
        return "projector"
    if config is None and os.path.isdir(path) and file_of(path, "config.json", revision, **hub) is None:
        raise ValueError(
            f"{path!r} holds no model: it has neither config.json nor adapter_config.json nor {PROJECTOR_CONFIG_NAME}. "
            f"{listing(path)}"
        )
    return "full"


def require_llava(path: str | os.PathLike, **hub) -> bool:
    """
    Whether a folder or Hub name is an adapter; `hub` are `revision`, `token` and other arguments of `cached_file`. ValueError if it
    is another model, in the original's format, or an emptied adapter; nothing large is read.
    """
    path = os.fspath(path)
    config = read_config(file_of(path, "config.json", **hub))
    adapter = read_config(find_adapter_config_file(path, **hub))
    reason = f"The config.json of {path} is empty: {AGAIN}." if config == {} else None
    reason = reason or other_than_llava(
        path, config or {}, adapter, lambda name: file_of(path, name, **hub) is not None
    )
    if reason is None and adapter is not None:
        empty = [name for name, shape in adapter_shapes(path, **hub).items() if 0 in shape]
        reason = f"{path}: {empty[0]} {EMPTY_TENSOR}" if empty else None
        if str(init := adapter.get("init_lora_weights")).startswith("pissa_niter"):
            reason = (
                f"{path} was saved with init_lora_weights={init!r}: its base lacks what a random decomposition took out of it, which "
                "cannot be repeated. Save the trained model again, with PEFT's path_initial_model_for_weight_conversion."
            )
    if reason is None and config:
        try:
            AutoConfig.from_pretrained(path, **hub)
        except Exception as error:  # transformers raises whatever a value of another type makes it raise
            reason = f"transformers cannot use the config.json of {path}: {' '.join(str(error).split())}"
    if reason is not None:
        raise ValueError(reason)
    return adapter is not None


def require_weights(path: str, model_class: type[PreTrainedModel], config: PreTrainedConfig | None) -> None:
    """
    Raises ValueError if the safetensors files of a folder hold less than half of the parameters of its configuration: one without
    its parts describes a model of 7 billion parameters, and all of them would be drawn at random.
    """
    files = [file for file in weight_files(path) if file.is_file()] if os.path.isdir(path) else []
    config = config or model_class.config_class.from_pretrained(path)
    if not files or getattr(config, "quantization_config", None) is not None:
        return
    with torch.device("meta"):
        expected = sum(parameter.numel() for parameter in model_class(config).parameters())
    headers = [safetensors_header(file) for file in files]
    held = sum(math.prod(entry.get("shape", (0,))) for header in headers for entry in header.values())
    if held < expected / 2:
        raise ValueError(
            f"{path}: its weights have {held:,} parameters, the model of its config.json has {expected:,}. {AGAIN.capitalize()}."
        )


def require_all_loaded(path: str, info: dict) -> None:
    """Raises ValueError if weights were drawn at random; `info` is the `output_loading_info` of `from_pretrained`."""
    wrong = []
    if missing := info["missing_keys"]:
        wrong.append(f"{len(missing)} are missing (such as {min(missing)})")
    if mismatched := sorted(info["mismatched_keys"]):
        name, theirs, ours = mismatched[0]
        wrong.append(f"{len(mismatched)} have other sizes (such as {name}: {list(theirs)}, not {list(ours)})")
    if wrong:
        raise ValueError(
            f"{path} does not hold the weights of its config.json: {' and '.join(wrong)}. Copy or download it again, or pass "
            "ignore_mismatched_sizes=True to draw them at random."
        )


def _require_folder_or_hub_name(path: str) -> None:
    """A mistyped path must not wait for the Hub."""
    if os.path.isfile(path):
        raise ValueError(of_file(path))
    if not os.path.isdir(path) and (os.path.exists(path) or not HUB_NAME.fullmatch(path)):
        raise FileNotFoundError(
            f"{path!r} is neither a folder nor the name of a model on the Hub (owner/name); looked in {os.getcwd()}."
        )


def file_of(path: str, name: str, revision: str | None = None, **hub) -> str | None:
    """A file of a folder or Hub repository; `None` if it is not there."""
    return cached_file(
        path,
        name,
        revision=revision,
        **hub,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def has_processor(path: str | os.PathLike, revision: str | None = None) -> bool:
    """Whether the folder or Hub repository holds a processor of its own."""
    return file_of(os.fspath(path), "processor_config.json", revision) is not None


def load_processor(path: str | os.PathLike, revision: str | None = None) -> ProcessorMixin:
    """
    The processor of a folder or Hub name; what older ones lack (`patch_size`) is the model's configuration's. FileNotFoundError or
    ValueError if it holds none, or a damaged one.
    """
    path = os.fspath(path)
    _require_folder_or_hub_name(path)
    require_llava(path, revision=revision)
    if os.path.isdir(path) and not any(os.path.isfile(os.path.join(path, name)) for name in PROCESSORS):
        raise ValueError(f"{path!r} holds no processor: it has neither {' nor '.join(PROCESSORS)}. {listing(path)}")
    if os.path.isdir(path) and not has_tokenizer(path):
        raise ValueError(what_is_broken(path, weights=False))
    with explained(path, weights=False):
        processor = AutoProcessor.from_pretrained(path, revision=revision)
    if getattr(processor, "patch_size", 0) is None and file_of(path, "config.json", revision) is not None:
        from ..configuration_llava import count_additional_image_tokens

        config = AutoConfig.from_pretrained(path, revision=revision)
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = count_additional_image_tokens(config.vision_config)
    return processor


# The base of an adapter or a projector


def adapter_shapes(path: str, **hub) -> dict[str, list[int]]:
    """The tensors of an adapter by their names in the file, `base_model.model.….lora_A.weight`."""
    if file := file_of(path, "adapter_model.safetensors", **hub):
        if reason := unreadable(Path(file)):
            raise ValueError(reason)
        return {name: entry["shape"] for name, entry in safetensors_header(file).items() if name != "__metadata__"}
    if file := file_of(path, "adapter_model.bin", **hub):
        if reason := unreadable(Path(file)):
            raise ValueError(reason)
        return {name: list(t.shape) for name, t in torch.load(file, "meta", weights_only=True).items()}
    return {}


def base_of(path: str | os.PathLike, revision: str | None = None, **hub) -> tuple[str, str | None]:
    """
    The model on which an adapter or a projector was trained, and its branch, tag or commit (`None`: the main branch). ValueError if
    it names none, or one that is gone or is not a full LLaVA.
    """
    path = os.fspath(path)
    file = find_adapter_config_file(path, revision=revision, **hub) or file_of(
        path, PROJECTOR_CONFIG_NAME, revision, **hub
    )
    config = read_config(file)
    base = config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise ValueError(f"{file} names no base model. Write its folder or Hub name as base_model_name_or_path.")
    if os.path.isabs(base) and not os.path.isdir(base):
        raise ValueError(
            f"{path} was trained on {base}, which is not there. Put it back, or write its new place into {file} as "
            "base_model_name_or_path."
        )
    require_full_base(path, base, config.get("revision"))
    return base, config.get("revision")


def require_full_base(path: str, base: str, revision: str | None) -> None:
    if (kind := checkpoint_kind(base, revision)) != "full":
        raise ValueError(
            f"The base of {path}, {base}, is {A_KIND[kind]} itself. Merge that first: llava merge {base} OUT"
        )


def base_name_to_record(model: PreTrainedModel) -> str | None:
    """The name under which `model` was loaded, as an absolute path for a folder; `None` if it was not loaded."""
    name = getattr(model, "name_or_path", None) or None
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def base_record(path: str | os.PathLike, revision: str | None = None) -> dict[str, str | None]:
    """
    What tells the weights of a full checkpoint from others: its name, revision and dtype, and a hash of the header and the last
    MiB of each file (`None` where there are none).
    """
    path, digest = os.fspath(path), hashlib.sha256()
    names = _weight_names(file_of(path, SAFE_WEIGHTS_INDEX_NAME, revision))
    files = [file for file in (file_of(path, name, revision) for name in names) if file is not None]
    for file in files:
        digest.update(json.dumps(safetensors_header(file), sort_keys=True).encode())
        with open(file, "rb") as opened:
            opened.seek(max(os.path.getsize(file) - 2**20, 0))
            digest.update(opened.read())
    config = read_config(file_of(path, "config.json", revision)) or {}
    return {
        "name": path,
        "revision": revision,
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "weights": digest.hexdigest() if files else None,
    }


# Weights by their saved names


def saved_tensors(
    model: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """
    The tensors of a model under the names that a checkpoint has for them (`language_model.lm_head.weight`): the model's own
    storage, not copies, except where transformers fuses several saved tensors into one.
    """
    return revert_weight_conversion(model, state_dict if state_dict is not None else model.state_dict())


def by_module_names(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of a checkpoint by the names in memory. ValueError for weights that are fused there (experts)."""
    own = model.state_dict()
    if state_dict.keys() <= own.keys():
        return state_dict
    names = {id(tensor): name for name, tensor in own.items()}
    saved = {name: names.get(id(tensor)) for name, tensor in saved_tensors(model, own).items()}
    if fused := [name for name in state_dict if name in saved and saved[name] is None]:
        raise ValueError(
            f"load_state_dict: {fused[0]} is fused with others in memory. Use from_pretrained, or LlavaTrainer."
        )
    return {saved.get(name, name): tensor for name, tensor in state_dict.items()}


@torch.no_grad()
def load_full_weights(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Copy the weights of a full checkpoint into a model. ValueError where names or shapes differ."""
    targets = saved_tensors(model)
    own_storage = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    if any(tensor.untyped_storage().data_ptr() not in own_storage for tensor in targets.values()):
        # a language model whose saved tensors are fused in memory (mixture of experts): let transformers fuse them
        fresh = type(model).from_pretrained(folder, dtype=torch.float32)
        model.load_state_dict(fresh.state_dict())
        return
    _copy_tensors(weight_files(folder), targets)


def weight_files(folder: str | os.PathLike) -> list[Path]:
    """The safetensors files of a full checkpoint, one or its shards."""
    index = Path(folder) / SAFE_WEIGHTS_INDEX_NAME
    return [Path(folder) / name for name in _weight_names(index if index.is_file() else None)]


def _weight_names(index: str | os.PathLike | None) -> list[str]:
    if index is None:
        return [SAFE_WEIGHTS_NAME]
    return sorted(set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values()))


def _copy_tensors(files: Iterable[Path], targets: dict[str, torch.Tensor]) -> None:
    """Fill each of `targets`, perhaps on the meta device, with the tensor of its name. ValueError where names or shapes differ."""
    loaded, unexpected, file = set(), [], None
    for file in files:
        if reason := unreadable(file):
            raise ValueError(reason)
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if name not in targets:
                    unexpected.append(name)
                    continue
                source, target = tensors.get_slice(name), targets[name]
                if source.get_shape() != list(target.shape):
                    raise ValueError(
                        f"{file}: {name} is {source.get_shape()}, but the model's is {list(target.shape)}. "
                        "They come from different vision towers or language models."
                    )
                if not target.is_meta:
                    target.copy_(source[...])
                loaded.add(name)
    filled = {targets[name].data_ptr() for name in loaded} - {0}  # a tied head is saved once; 0: on the meta device
    missing = sorted(name for name in targets.keys() - loaded if targets[name].data_ptr() not in filled)
    if missing or unexpected:
        raise ValueError(
            f"{file} does not fit the model: {len(missing)} weights are missing ({', '.join(missing[:3])}) and "
            f"{len(unexpected)} are not the model's ({', '.join(sorted(unexpected)[:3])})."
        )


# Projector folders


def save_projector(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    state_dict: dict[str, torch.Tensor] | None = None,
    revision: str | None = None,
) -> None:
    """
    Write what a pretrain run trained, the projector and perhaps the vision tower, whole and under stock names: into `folder`,
    `projector.safetensors` and `projector_config.json`. `state_dict` is the model's if it had to be gathered, `revision` the
    one from which the model was loaded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    components = sorted({component_of(name) for name, p in model.named_parameters() if p.requires_grad})
    assert "language_model" not in components, "a trained language model needs a full checkpoint"
    tensors = {
        name: tensor.detach().to("cpu").contiguous()
        for name, tensor in saved_tensors(model, state_dict).items()
        if component_of(name) in components
    }
    save_file(tensors, folder / PROJECTOR_WEIGHTS_NAME, metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": base_name_to_record(model),
        "revision": revision,
        "components": components,
        "projector_hidden_act": model.config.projector_hidden_act,
        "vision_feature_layer": model.config.vision_feature_layer,
        "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
    }
    (folder / PROJECTOR_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


@torch.no_grad()
def load_projector(model: PreTrainedModel, path: str | os.PathLike, revision: str | None = None) -> list[str]:
    """
    Put what a pretrain run trained into a model, or on the meta device see that it fits; the names of the components. ValueError if
    the folder is not a pretrain run's, or for a model of other sizes or features.
    """
    path = os.fspath(path)
    config = read_config(file_of(path, PROJECTOR_CONFIG_NAME, revision))
    if config is None:
        require_llava(path, revision=revision)
        raise ValueError(f"{path!r} is not the output folder of a pretrain run: it has no {PROJECTOR_CONFIG_NAME}.")
    for name in ("projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy"):
        ours = getattr(model.config, name)
        if (theirs := config.get(name)) != (list(ours) if isinstance(ours, tuple) else ours):
            raise ValueError(f"{path} was trained with {name}={theirs!r}, but the model has {ours!r}.")
    weights_file, components = file_of(path, PROJECTOR_WEIGHTS_NAME, revision), config.get("components") or []
    if weights_file is None:
        raise ValueError(
            f"{path} has no {PROJECTOR_WEIGHTS_NAME}, which holds its weights: copy or download it again."
        )
    targets = {name: tensor for name, tensor in saved_tensors(model).items() if component_of(name) in components}
    _copy_tensors([Path(weights_file)], targets)
    return components
