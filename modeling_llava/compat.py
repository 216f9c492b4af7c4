"""
Every private or unstable name of another package that is used here, one function each. `tests/test_compat.py` holds a canary
for each, which fails with one clear line where a new version has changed it.

Seen in: torch 2.13 and 2.14, transformers 5.23 and 5.24, accelerate 1.15, datasets 5.2, Python 3.11. What subclasses of `Trainer` and
`PreTrainedModel` are meant to override stays where it is, and so does `config._attn_implementation`, which model code reads.
"""

from collections import OrderedDict

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoProcessor,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils.output_capturing import (
    _CAN_RECORD_REGISTRY,
    install_output_capuring_hook,
    maybe_install_capturing_hooks,
)


# ---- torch ----


def assert_in_graph(condition: torch.Tensor, message: str) -> None:
    """An assertion that a compiled graph keeps."""
    torch._assert_async(condition, message)


def is_under_functorch() -> bool:
    """Whether `torch.func` transforms what runs now."""
    return torch._C._are_functorch_transforms_active()


def keeps_graph() -> bool:
    """Within a backward pass: whether another one may follow through the same graph (`retain_graph=True`)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def fuses_rms_norm() -> bool:
    """Whether `rms_norm` is one kernel on CUDA, which keeps its input and one number per row; elsewhere it keeps copies."""
    return hasattr(torch.ops.aten, "_fused_rms_norm")


def forward_hooks(module: nn.Module) -> list:
    """The hooks that run before and after a module's forward."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def set_last_learning_rate(scheduler: torch.optim.lr_scheduler.LRScheduler, group: int, rate: float) -> None:
    """What `scheduler.get_last_lr()` says of a group."""
    scheduler._last_lr[group] = rate


# ---- transformers ----


def register_auto_classes() -> None:
    """Make transformers' Auto classes, pipelines and checkpoint loading use our classes for `model_type` "llava". Idempotent."""
    from .configuration_llava import LlavaConfig
    from .image_processing_llava import LlavaImageProcessor
    from .modeling_llava import LlavaForConditionalGeneration, LlavaModel
    from .processing_llava import LlavaProcessor

    AutoConfig.register("llava", LlavaConfig, exist_ok=True)
    AutoModel.register(LlavaConfig, LlavaModel, exist_ok=True)
    for auto_class in (AutoModelForImageTextToText, AutoModelForPreTraining, AutoModelForMultimodalLM):
        auto_class.register(LlavaConfig, LlavaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LlavaConfig, LlavaProcessor, exist_ok=True)
    # Not by AutoImageProcessor.register: it would import the stock class first, which warns that torchvision is absent.
    IMAGE_PROCESSOR_MAPPING.register(
        LlavaConfig, {"torchvision": LlavaImageProcessor, "pil": LlavaImageProcessor}, exist_ok=True
    )
    # AutoProcessor and the pipelines look a class up by its stock name first.
    PROCESSOR_MAPPING_NAMES.pop("llava", None)
    # Saved keys are the stock ones (`language_model.model.…`), but transformers maps them for classes of its own package only:
    # without this a stock checkpoint loads with a random language model, and no exception.
    for name in ("llava", "LlavaModel"):
        register_checkpoint_conversion_mapping(name, get_checkpoint_conversion_mapping(name), overwrite=True)


def can_set_attention(model: PreTrainedModel) -> bool:
    """Whether a model takes its attention from `AttentionInterface`."""
    return model._can_set_attn_implementation()


def add_named_token(tokenizer, names: dict[str, str]) -> None:
    """Let a tokenizer have special tokens by name, such as `tokenizer.image_token`."""
    tokenizer._set_model_specific_special_tokens(names)


def renamed_tokenizer(tokenizer, backend, names: dict[str, str]):
    """A shallow copy of a tokenizer over another backend, whose special tokens are called otherwise."""
    twin = type(tokenizer).__new__(type(tokenizer))
    twin.__dict__.update(tokenizer.__dict__)
    twin._tokenizer = backend
    twin._special_tokens_map = {
        name: names.get(str(token), token) if token is not None else None
        for name, token in tokenizer._special_tokens_map.items()
    }
    twin._extra_special_tokens = [names.get(str(token), token) for token in tokenizer._extra_special_tokens]
    return twin


def install_capturing_hooks(model: PreTrainedModel) -> None:
    """
    Hook the vision tower of `model` for its hidden states, once: transformers does it during the first call, under a lock that
    `torch.compile` cannot trace. It notes in the constructor, which unpickling does not call, what every part can collect.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _CAN_RECORD_REGISTRY[module] = module._can_record_outputs
    maybe_install_capturing_hooks(model.vision_tower)


_FLAG = "_output_capturing_hooks_installed"


def without_capturing_hooks(module: nn.Module) -> nn.Module:
    """
    `module` itself if nothing in it is hooked, else a shallow copy, with the same tensors, that is not: the hooks are local
    functions, which pickle refuses (`torch.save(model)`, a process that is spawned, Ray, `joblib`).
    """
    children = {name: child and without_capturing_hooks(child) for name, child in module._modules.items()}
    hooks = OrderedDict((i, hook) for i, hook in module._forward_hooks.items() if not is_capturing(hook))
    unchanged = len(hooks) == len(module._forward_hooks) and _FLAG not in module.__dict__
    if unchanged and all(child is module._modules[name] for name, child in children.items()):
        return module
    copied = object.__new__(type(module))
    copied.__dict__ = {**module.__dict__, "_modules": children, "_forward_hooks": hooks}
    copied.__dict__.pop(_FLAG, None)
    return copied


def is_capturing(hook) -> bool:
    """Whether a forward hook is one of transformers' for hidden states."""
    return getattr(hook, "__qualname__", "").startswith(f"{install_output_capuring_hook.__name__}.<locals>")


# ---- others ----


def let_cpu_shard() -> None:
    """Let accelerate use FSDP among processes on the CPU. The devices are known by then: only FSDP's check reads it."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def dataset_fingerprint(dataset) -> str:
    """What `datasets` tells one table from another by."""
    return dataset._fingerprint
