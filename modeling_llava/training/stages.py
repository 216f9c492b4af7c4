"""
What each stage trains, in which dtype and with which learning rate (LLaVA §4.2; LLaVA-1.5 §3).

| | vision tower | projector | language model |
|---|---|---|---|
| pretrain | frozen | trained | frozen |
| finetune | frozen | trained | trained |
| finetune, LoRA or QLoRA | frozen | trained | LoRA weights |
| with `train_vision_tower` | trained | | |
"""

import logging
from dataclasses import dataclass

import torch
from torch import nn

from ..io.checkpoints import COMPONENTS, component_of
from .arguments import LlavaTrainingArguments


logger = logging.getLogger(__name__)


def set_trainable(model: nn.Module, args: LlavaTrainingArguments) -> None:
    """Freeze and unfreeze the parameters of a model without adapters, as `args.stage` says."""
    trained = {"multi_modal_projector"}
    if args.train_vision_tower:
        trained.add("vision_tower")
    if args.stage == "finetune" and args.adapter == "none":
        trained.add("language_model")
    for name, parameter in model.named_parameters():
        # 4-bit weights are integers and cannot be trained
        parameter.requires_grad_(component_of(name) in trained and parameter.is_floating_point())


def unused_tower_parameters(model: nn.Module) -> list[nn.Parameter]:
    """
    Parameters of the vision tower after its last used feature layer (LLaVA uses the last but one, −2). They do not reach the
    loss, and are frozen so that data-parallel training does not wait for their gradients.

    Hidden state 0 is the embedding, hidden state i the output of layer i − 1; what follows the layers (norm, pooling
    head) is used by none of them.
    """
    tower = model.model.vision_tower
    for copy in getattr(tower, "modules_to_save", {}).values():  # of PEFT; the original is frozen
        tower = copy
    layers = _encoder_layers(tower)
    if layers is None:
        return []
    feature_layers = model.config.vision_feature_layer
    feature_layers = [feature_layers] if isinstance(feature_layers, int) else feature_layers
    num_states = len(layers) + 1
    last_state = max(layer % num_states for layer in feature_layers)  # −2 of 25 states is 23: layers 0 to 22
    used = {id(p) for layer in layers[:last_state] for p in layer.parameters()}
    before_layers = next(n for n, m in tower.named_modules() if m is layers)
    unused = []
    for name, parameter in tower.named_parameters():
        in_layers = name.startswith(before_layers + ".")
        behind = any(part in name for part in ("post_layernorm", "head.")) and not in_layers
        if (in_layers and id(parameter) not in used) or behind:
            unused.append(parameter)
    return unused


def _encoder_layers(tower: nn.Module) -> nn.ModuleList | None:
    wanted = getattr(tower.config, "num_hidden_layers", None)
    return next((m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted), None)


@torch.no_grad()
def set_dtypes(model: nn.Module, args: LlavaTrainingArguments) -> None:
    """
    Trained weights in `args.trained_dtype`, frozen ones in the dtype of the arithmetic.

    Small updates would vanish in 16-bit weights, so trained ones are float32 by default and computed with under
    autocast. Frozen norms stay in 16 bit too (PEFT's `prepare_model_for_kbit_training` makes them float32): they were
    16-bit in the checkpoint, compute in float32 inside, and as float32 would turn all activations behind them into
    float32. 4-bit weights and buffers (rotary frequencies) are left as they are.
    """
    trained_dtype = getattr(torch, args.trained_dtype)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            dtype = trained_dtype if parameter.requires_grad else args.compute_dtype
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)


def optimizer_groups(model: nn.Module, args: LlavaTrainingArguments, decay_names: list[str] | set[str]) -> list[dict]:
    """
    Parameter groups: a learning rate per component, weight decay only on `decay_names` (no biases, no norms).

    The language model's come first: its rate is the one that `Trainer` logs.

    Args:
        model (`nn.Module`):
            The model, PEFT-wrapped or not.
        args ([`LlavaTrainingArguments`]):
            The run's settings.
        decay_names (`list[str]`):
            Names of the parameters with weight decay.

    Returns:
        `list[dict]`: `params`, `lr`, `weight_decay` and `component` of each group that is not empty.
    """
    decay_names = set(decay_names)
    rates = args.learning_rates()
    groups = []
    for component in COMPONENTS:
        for decay in (True, False):
            parameters = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and component_of(name) == component and (name in decay_names) == decay
            ]
            if parameters:
                weight_decay = args.weight_decay if decay else 0.0
                groups.append(
                    {
                        "params": parameters,
                        "lr": rates[component],
                        "weight_decay": weight_decay,
                        "component": component,
                    }
                )
    return groups


@dataclass
class ComponentSummary:
    """One row of the table that is shown before training."""

    component: str
    num_trainable: int
    """Parameters that are trained."""
    num_parameters: int
    """All parameters; a 4-bit weight counts as what it stands for."""
    dtypes: str
    """Dtypes of the stored weights, trained ones first."""
    learning_rate: float | None


def summarise_components(model: nn.Module, args: LlavaTrainingArguments) -> list[ComponentSummary]:
    """Trainable parameters per component; whole modules that PEFT replaced by a trained copy are not counted twice."""
    rates = args.learning_rates()
    rows = []
    for component in COMPONENTS:
        named = [
            (name, p)
            for name, p in model.named_parameters()
            if component_of(name) == component and ".original_module." not in name
        ]
        trained = [p for _, p in named if p.requires_grad]
        dtypes = dict.fromkeys(_dtype_name(p) for _, p in sorted(named, key=lambda item: not item[1].requires_grad))
        rows.append(
            ComponentSummary(
                component,
                sum(p.numel() for p in trained),
                sum(_count(p) for _, p in named),
                " + ".join(dtypes),
                rates[component] if trained else None,
            )
        )
    return rows


def _count(parameter: nn.Parameter) -> int:
    # Two 4-bit weights lie in one byte.
    quant_state = getattr(parameter, "quant_state", None)
    return quant_state.shape.numel() if quant_state is not None else parameter.numel()


def _dtype_name(parameter: nn.Parameter) -> str:
    return "4-bit" if parameter.__class__.__name__ == "Params4bit" else str(parameter.dtype).removeprefix("torch.")


@torch.no_grad()
def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert a trained model's weights to the dtype in which it is published; buffers that are not saved stay."""
    saved = model.state_dict(keep_vars=True)
    for tensor in [*model.parameters(), *saved.values()]:
        if tensor.is_floating_point() and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)


__all__ = [
    "ComponentSummary",
    "cast_weights",
    "optimizer_groups",
    "set_dtypes",
    "set_trainable",
    "summarise_components",
    "unused_tower_parameters",
]
