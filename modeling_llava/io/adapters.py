"""
Adapters: whether one fits its base, tensor by tensor, before anything is loaded; how it gets into a model; and 4-bit bases.

What a folder holds, and the weights of full models and projectors, are in `checkpoints.py`.
"""

import functools
import importlib.util
import logging
import os
import re
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from .checkpoints import (
    RUN_RECORD_NAME,
    adapter_shapes,
    base_of,
    base_record,
    checkpoint_kind,
    file_of,
    load_projector,
    require_full_base,
)
from .files import AGAIN, read_config


logger = logging.getLogger(__name__)

DORA_MAGNITUDE = ".lora_magnitude_vector"
"""How PEFT names DoRA's magnitudes in a file; transformers looks for this with `.weight` behind it."""

TODAYS_NAMES = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?multi_modal_projector\.": "model.multi_modal_projector.",
    r"^(?:model\.)?vision_tower\.(?:vision_model\.)?": "model.vision_tower.",
}
"""PEFT's `key_mapping` for adapters that were saved with earlier versions of transformers."""

UNQUANTISED_MODULES = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
"""Not quantised to 4-bit. Full names, since transformers silently ignores `["vision_tower"]`."""


def what_to_load(path: str | os.PathLike, kwargs: dict) -> tuple[str, str | None, dict]:
    """
    For `from_pretrained(path, **kwargs)`: the full model, the adapter to put on it, if any, and what finds its files. What of
    `kwargs` is the adapter's is taken out.
    """
    names = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
    hub = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    path, of_adapter = os.fspath(path), dict(kwargs.pop("adapter_kwargs", None) or {})
    adapter = of_adapter.pop("_adapter_model_path", None)  # Auto classes have found the base already
    if adapter is not None:
        find_base(adapter, base=path, base_revision=hub.get("revision"), **of_adapter)
    elif (kind := checkpoint_kind(path, config=kwargs.get("config"), **hub)) == "projector":
        raise ValueError(f"{path} is a projector alone. Merge it first: llava merge {path} OUT")
    elif kind == "adapter" and file_of(path, "config.json", **hub) is None:
        (base, kwargs["revision"]), adapter, of_adapter = find_base(path, **hub), path, hub
        path = base
        kwargs.pop("subfolder", None)
    return path, adapter, of_adapter


def find_base(
    path: str | os.PathLike,
    revision: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    **hub,
) -> tuple[str, str | None]:
    """The base of an adapter or projector ([`base_of`]; or `base`), and its revision, seen to fit ([`require_fits`])."""
    path = os.fspath(path)
    if base is None:
        base, base_revision = base_of(path, revision, **hub)
    require_fits(path, base, base_revision, revision=revision, **hub)
    trained_on = (read_config(file_of(path, RUN_RECORD_NAME, revision, **hub)) or {}).get("base")
    found = base_record(base, base_revision) if trained_on and trained_on["weights"] else None
    if found and found["weights"] not in (None, trained_on["weights"]):
        logger.warning(
            f"{path} was trained on other weights than those of {base}: on {trained_on}, and these are {found}. Give the model on "
            "which it was trained with --base, or expect other answers."
        )
    return base, base_revision


def require_fits(path: str, base: str, base_revision: str | None = None, **hub) -> None:
    """
    Raises ValueError if the weights of an adapter or a projector are not, one by one, what their configuration asks for on this
    base: loaders only warn, and run a part of it on the plain base. Nothing large is read.
    """
    require_full_base(path, base, base_revision)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(base, revision=base_revision))
        if find_adapter_config_file(path, **hub) is None:
            load_projector(model, path, hub.get("revision"))
            return
        shapes = {_todays_name(name): shape for name, shape in adapter_shapes(path, **hub).items()}
        if not shapes:
            raise ValueError(f"{path} has no adapter_model.safetensors, which holds its weights: {AGAIN}.")
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict

        resize_to_adapter(model, path, **hub)
        own = set(model.state_dict())
        try:
            config = PeftConfig.from_pretrained(path, **hub)
            config.init_lora_weights = False  # some are computed from the base's weights
            expected = get_peft_model_state_dict(PeftModel(model, config), save_embedding_layers=False)
        except Exception as error:  # PEFT raises whatever a value that it does not know makes it raise
            raise ValueError(
                f"PEFT cannot put the adapter {path} on {base}: {type(error).__name__}: {error} Its adapter_config.json is "
                "damaged, or of another version of PEFT, or it is not for this base (--base)."
            ) from error
    expected = {_todays_name(name): list(tensor.shape) for name, tensor in expected.items()}
    surplus = shapes.keys() - expected.keys()
    faults = {  # PEFT saves the embeddings too, where they are trained
        "fit no module there": [name for name in surplus if name.replace(".base_layer.", ".") not in own],
        "have another size there": [name for name in shapes.keys() - surplus if shapes[name] != expected[name]],
        "are missing": expected.keys() - shapes.keys(),
    }
    if found := [f"{len(names)} tensors {what} (such as {min(names)})" for what, names in faults.items() if names]:
        convert = f" An adapter of another format is converted: llava convert {path} OUT --base BASE"
        raise ValueError(
            f"The adapter {path} does not fit the base {base}: {', '.join(found)}. Copy the adapter again, or give the model on which "
            f"it was trained with --base.{convert if surplus else ''}"
        )


def _todays_name(name: str) -> str:
    """A tensor's name in an adapter file, as today's versions of transformers and PEFT write it."""
    name = name.removeprefix("base_model.model.").removesuffix(".weight" if f"{DORA_MAGNITUDE}.w" in name else "")
    for before, today in TODAYS_NAMES.items():
        name = re.sub(before, today, name)
    return name


def resize_to_adapter(model: PreTrainedModel, path: str | os.PathLike, revision: str | None = None, **hub) -> None:
    """Give a base the vocabulary of its adapter, where tokens were added in training: those of the base are fewer."""
    path = os.fspath(path)
    config = read_config(find_adapter_config_file(path, revision=revision, **hub)) or {}
    indices = config.get("trainable_token_indices") or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    sizes = [1 + max(tokens) for tokens in lists if tokens]
    for name, shape in adapter_shapes(path, revision=revision, **hub).items():
        if ("embed_tokens" in name or "lm_head" in name) and "lora_A" not in name:
            sizes.append(shape[1] if "lora_embedding_A" in name else shape[0] if "lora_embedding_B" not in name else 0)
    if max(sizes, default=0) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(max(sizes), mean_resizing=False)


def load_adapter_for_inference(model: PreTrainedModel, path: str | os.PathLike, **hub) -> None:
    """Put an adapter into a model by transformers' own means, so that it keeps its class and works in pipelines."""
    from peft import PeftConfig
    from peft.utils.save_and_load import load_peft_weights

    path = os.fspath(path)
    resize_to_adapter(model, path, **hub)
    weights = load_peft_weights(path, device="cpu", key_mapping=TODAYS_NAMES, **hub)
    renamed = {f"{name}.weight" if name.endswith(DORA_MAGNITUDE) else name: t for name, t in weights.items()}
    model.load_adapter(peft_config=PeftConfig.from_pretrained(path, **hub), adapter_state_dict=renamed)


def name_stock_class_in_adapters() -> None:
    """Make PEFT name the stock class in the adapters that it saves, which `AutoPeftModel` imports without this package."""
    from peft import PeftConfig

    save = PeftConfig.save_pretrained
    if hasattr(save, "__wrapped__"):
        return

    @functools.wraps(save)
    def save_pretrained(config, save_directory, **kwargs):
        mapping = kwargs.get("auto_mapping_dict") or {}
        if mapping.get("parent_library", "").partition(".")[0] == "modeling_llava":
            kwargs["auto_mapping_dict"] = {**mapping, "parent_library": "transformers.models.llava.modeling_llava"}
        return save(config, save_directory, **kwargs)

    PeftConfig.save_pretrained = save_pretrained


# 4-bit weights


def four_bit_config(
    compute_dtype: torch.dtype, quant_type: str = "nf4", double_quant: bool = True
) -> BitsAndBytesConfig:
    """QLoRA's quantisation of the language model; tower, projector and head stay in `compute_dtype`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "4-bit weights need bitsandbytes: pip install 'modeling-llava[qlora]' (Linux and Windows; not macOS). "
            "adapter=lora works without it."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=UNQUANTISED_MODULES,
    )


def four_bits_of(adapter: str | os.PathLike, revision: str | None = None) -> tuple[str, bool] | None:
    """`quant_type` and `double_quant` of an adapter's training, by the recipe next to it; `None` if it was not QLoRA."""
    file = file_of(os.fspath(adapter), "recipe.yaml", revision)
    try:
        recipe = yaml.safe_load(Path(file).read_text("utf-8")) if file is not None else None
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML ({' '.join(str(error).split())}). Fix it, or remove it.") from None
    if not isinstance(recipe, dict) or recipe.get("adapter") != "qlora":
        return None
    return recipe.get("quant_type", "nf4"), recipe.get("double_quant", True)


def forbid_inference_packing(model: nn.Module) -> None:
    """
    Keep 4-bit weights in the layout in which they can be trained: on CPUs with AVX512-BF16, bitsandbytes repacks them in the
    first forward of `eval()`, and a training step after it runs a kernel without gradients, with other results and no exception.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantised(model: nn.Module) -> bool:
    """Whether any linear layer holds 4- or 8-bit weights."""
    return any(parameter.__class__.__name__ in ("Params4bit", "Int8Params") for parameter in model.parameters())
