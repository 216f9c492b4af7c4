"""
Training steps of the language model that keep and move less: the same values and gradients.

What autograd keeps of a Llama layer for the backward pass, per token (h = hidden, i = intermediate size):

    norm ×2     input h, normalized h, output h         here: input h, output h
    MLP         gate i, silu(gate) i, up i, product i   here: gate i, up i; the product is multiplied out again
    LoRA ×7     a float32 copy of the input             here: the input itself

and the rotary embedding is written in five passes over queries and keys in place of ten.

With activation checkpointing one layer's activations exist at a time, and this is the memory of it.

A module computes by another class, which is put before its own: what `print(model)` shows is what runs.

    LlamaRMSNorm   →   EfficientLlamaRMSNorm(EfficientNorm, LlamaRMSNorm)

Modules are exchanged by what they look like, whatever they are called, and only where a probe forward gives the same numbers. In
training the `compute` of the new class runs, in `eval()` the original's `forward`, so that answers are the stock ones to the last
bit. Parameters, buffers, hooks and `isinstance` stay as they are. A pickle holds the original class, so that it is read in a process
without this package; copies and the replicas of `nn.DataParallel` keep the exchanged one.
"""

import copy
import functools
import logging
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear, rms_norm, silu
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..compat import forward_hooks, fuses_rms_norm, is_capturing, is_under_functorch
from ..constants import CACHE


logger = logging.getLogger(__name__)


@dataclass
class KernelReport:
    """
    What [`apply_kernels`] exchanged, class as `print(model)` shows it → number of modules, and what it left: modules whose forward
    is bound on the instance (accelerate's hooks, Liger).
    """

    exchanged: dict[str, int]
    left: dict[str, int]

    def __str__(self) -> str:
        parts = [f"{count} × {name}" for name, count in self.exchanged.items()] or ["none"]
        left = [f"{count} × {name}" for name, count in self.left.items()]
        return "Kernels: " + ", ".join(parts) + (f"; hooked, so left as they are: {', '.join(left)}" if left else "")


def apply_kernels(model: nn.Module) -> KernelReport:
    """
    Exchange the modules of a LLaVA's language model for kernels that compute the same training step with less time and memory, in
    place, where a probe forward shows that they do: norms, MLPs, attention, LoRA layers.

    To be called after freezing and adding adapters, and before hooks: a hooked module keeps its forward. Answers in `eval()` are
    not affected.

    Args:
        model ([`LlavaForConditionalGeneration`], ours or stock, or a `PeftModel` around it)

    Returns:
        [`KernelReport`]
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    left = Counter(type(module).__name__ for module in core.modules() if "forward" in vars(module))
    make_efficient(core.model.language_model)
    exchanged = Counter(type(module).__name__ for module in core.modules() if isinstance(module, Kernel))
    return KernelReport(dict(exchanged), dict(left))


class Kernel:
    """Base of the classes that are put before a module's own."""

    prefix: str
    """Of the name of the exchanged class."""
    original_class: type[nn.Module]

    def forward(self, *args, **kwargs):
        is_efficient = self.training and not is_under_functorch()
        return self.compute(*args, **kwargs) if is_efficient else self.compute_plainly(*args, **kwargs)

    def compute_plainly(self, *args, **kwargs):
        """The original's `forward`, for arguments that a kernel does not cover."""
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        _, _, *rest = super().__reduce_ex__(2)
        return object.__new__, (self.original_class,), *rest

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied


def can_exchange(module: nn.Module) -> bool:
    """Whether nothing is bound on the instance (accelerate's hooks, Liger), and no other kernel is there."""
    return "forward" not in vars(module) and not isinstance(module, Kernel)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, as it was before an exchange."""
    return module.original_class if isinstance(module, Kernel) else type(module)


@functools.cache
def exchanged_class(original: type[nn.Module], kernel: type[Kernel]) -> type[nn.Module]:
    """The class of a kernel before an original class; made once for each pair."""
    name = f"{kernel.prefix}{original.__name__}"
    return type(name, (kernel, original), {"original_class": original, "__module__": kernel.__module__})


# Norms


class _RootMeanSquareNorm(torch.autograd.Function):
    """`weight * x / rms(x)` in float32, rounded before the weight is applied, keeping `x` only."""

    @staticmethod
    def forward(ctx, hidden, weight, epsilon):
        exact = hidden.float()
        scale = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(hidden.shape[-1])
        scale = scale.add_(epsilon).rsqrt_()  # [..., 1]
        ctx.save_for_backward(hidden, weight, scale)
        return weight * (exact * scale).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, scale = ctx.saved_tensors
        normalised = hidden.float() * scale
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normalised.to(hidden.dtype)).flatten(0, -2).sum(dim=0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad_normalised = (grad * weight).float()
            along = (grad_normalised * normalised).mean(dim=-1, keepdim=True)
            grad_hidden = grad_normalised.sub_(normalised.mul_(along)).mul_(scale).to(hidden.dtype)
        return grad_hidden, grad_weight, None


class EfficientNorm(Kernel):
    prefix = "Efficient"

    def compute(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.is_cuda and hidden_states.dtype == self.weight.dtype and fuses_rms_norm():
            with torch.autocast("cuda", enabled=False):  # which would cast to float32
                return rms_norm(hidden_states, self.weight.shape, self.weight, _epsilon(self))
        return _RootMeanSquareNorm.apply(hidden_states, self.weight, _epsilon(self))


# MLPs


class _GatedProduct(torch.autograd.Function):
    """`silu(gate) * up`, keeping its two inputs only."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_up = silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up


class _Product:
    """In place of a kept product: what it is computed from."""

    def __init__(self, gate, up, shape):
        self.gate, self.up, self.shape = gate, up, shape


class EfficientMLP(Kernel):
    prefix = "Efficient"
    efficient_layer: tuple[nn.Module]
    """The decoder layer, in a tuple, so that it does not become a child."""

    def compute(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        product = _GatedProduct.apply(gate, up)
        # Under checkpointing autograd's own hooks decide what is kept; ours would keep it in spite of them.
        if self.efficient_layer[0].gradient_checkpointing or not product.requires_grad:
            return self.down_proj(product)
        address, gate, up = product.data_ptr(), gate.detach(), up.detach()

        def pack(tensor):
            # the input of the last layer, however that layer looks: linear, 4-bit, with LoRA weights
            is_product = tensor.data_ptr() == address and tensor.numel() == gate.numel() and tensor.dtype == gate.dtype
            return _Product(gate, up, tensor.shape) if is_product else tensor

        def unpack(kept):
            return silu(kept.gate).mul_(kept.up).view(kept.shape) if isinstance(kept, _Product) else kept

        with saved_tensors_hooks(pack, unpack):
            return self.down_proj(product)


# Attention


class _Rotary(torch.autograd.Function):
    """Rotary embedding of queries and keys `[batch, length, heads, head_dim]`; backwards it turns the other way."""

    @staticmethod
    def forward(ctx, query, key, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(query, cos, sin), _rotate(key, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_key):
        cos, sin = ctx.saved_tensors
        return _rotate(grad_query, cos, sin, inverse=True), _rotate(grad_key, cos, sin, inverse=True), None, None


def _rotate(states, cos, sin, inverse=False):
    # (a, b) → (a·cos₁ − b·sin₁, b·cos₂ + a·sin₂) with a, b the halves of a head; the inverse is the transpose
    half = states.shape[-1] // 2
    cos, sin = cos[:, :, None], sin[:, :, None]  # [batch, length, 1, head_dim]
    a, b = states[..., :half], states[..., half:]
    sin_a, sin_b = (sin[..., half:], sin[..., :half]) if inverse else (sin[..., :half], sin[..., half:])
    turned = torch.empty_like(states, memory_format=torch.contiguous_format)
    left, right = turned[..., :half], turned[..., half:]
    sign = 1 if inverse else -1
    torch.mul(a, cos[..., :half], out=left)
    left.addcmul_(b, sin_a, value=sign)
    torch.mul(b, cos[..., half:], out=right)
    right.addcmul_(a, sin_b, value=-sign)
    return turned


class EfficientAttention(Kernel):
    prefix = "Efficient"
    efficient_arguments: dict
    """What the original gives its attention function besides the states (scaling, window, …), recorded by [`_record`]."""

    def compute(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        past = kwargs.pop(CACHE, None)
        attend = ALL_ATTENTION_FUNCTIONS.get(
            self.config._attn_implementation
        )  # None: eager, which each model has itself
        if past is not None or position_embeddings is None or attend is None:
            arguments = {"position_embeddings": position_embeddings, CACHE: past, **kwargs}
            return self.compute_plainly(hidden_states, attention_mask=attention_mask, **arguments)
        shape = hidden_states.shape[:-1]
        query, key, value = (
            project(hidden_states).view(*shape, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _Rotary.apply(query, key, *position_embeddings)
        kwargs |= {**self.efficient_arguments, "dropout": self.attention_dropout if self.training else 0.0}
        states = (states.transpose(1, 2) for states in (query, key, value))  # [batch, heads, length, head_dim]
        output, weights = attend(self, *states, attention_mask, **kwargs)
        return self.o_proj(output.reshape(*shape, -1)), weights


def _record(module, query, key, value, attention_mask, dropout=0.0, **kwargs):
    """The attention function of the probe."""
    module.efficient_arguments = kwargs
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, is_causal=True, **kwargs)


_RECORDING = "llava_recording"
AttentionInterface.register(_RECORDING, _record)


# LoRA weights


class EfficientLora(Kernel):
    """`base(x) + scaling · B A dropout(x)`: no float32 copy of the input, and the product is added in place."""

    prefix = "Efficient"

    def compute(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        active = self.active_adapters
        if args or kwargs or self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A:
            return self.compute_plainly(x, *args, **kwargs)
        name = active[0]
        rows = x.flatten(0, -2)  # [num_tokens, in]; autograd would copy gradients for a product added to a view
        result = self.base_layer(rows)
        dropped = self.lora_dropout[name](rows).to(result.dtype)
        low = linear(dropped, self.lora_A[name].weight.to(result.dtype))  # [..., r]
        high = self.lora_B[name].weight.to(result.dtype)
        with torch.autocast(x.device.type, enabled=False):  # all of one dtype; autocast would cast again
            result.addmm_(low, high.t(), alpha=self.scaling[name])
        return result.view(*x.shape[:-1], -1)


# Choosing


def make_efficient(language_model: nn.Module) -> Counter:
    """
    Exchange the parts of a language model, in place, where a probe forward shows that ours compute the same. Its linear layers may
    be 4-bit or have LoRA weights. Counts the exchanged `norms`, `mlps`, `attentions` and `loras`.
    """
    counts = Counter()
    embedding = language_model.get_input_embeddings().weight
    if any(p.is_meta or hasattr(p, "ds_id") for p in language_model.parameters()):
        return counts  # offloaded or sharded weights cannot be probed
    layers = [layer for layer in language_model.modules() if hasattr(layer, "gradient_checkpointing")]
    layer_of = {module: layer for layer in layers for module in layer.modules()}  # the innermost: it comes last
    for module in language_model.modules():
        kind = next((kind for kind, (looks_like, _) in _KINDS.items() if looks_like(module)), None)
        if kind is None or not can_exchange(module) or (kind == "mlps" and module not in layer_of):
            continue
        if kind == "mlps":
            module.efficient_layer = (layer_of[module],)
        if _exchange_if_same(module, kind, embedding):
            counts[kind] += 1
        else:
            logger.info("%s is left as it is: it does not compute what others of its form do.", type(module).__name__)
    return counts


def _looks_like_norm(module: nn.Module) -> bool:
    is_norm = type(module).__name__.endswith("RMSNorm") and _epsilon(module) is not None
    return is_norm and [name for name, _ in module.named_parameters()] == ["weight"]


def _epsilon(module: nn.Module) -> float | None:
    return next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)


def _looks_like_gated_mlp(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj"))


def _looks_like_attention(module: nn.Module) -> bool:
    has_projections = all(isinstance(getattr(module, f"{x}_proj", None), nn.Module) for x in "qkvo")
    return has_projections and all(hasattr(module, x) for x in ("head_dim", "attention_dropout", "config"))


def _looks_like_lora(module: nn.Module) -> bool:
    if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict) or len(module.lora_A) != 1:
        return False
    name = next(iter(module.lora_A))
    return (
        isinstance(module.lora_A[name], nn.Linear)
        and getattr(module.lora_B[name], "bias", None) is None
        and name not in getattr(module, "lora_variant", {})  # DoRA and its like
    )


_KINDS = {
    "norms": (_looks_like_norm, EfficientNorm),
    "mlps": (_looks_like_gated_mlp, EfficientMLP),
    "attentions": (_looks_like_attention, EfficientAttention),
    "loras": (_looks_like_lora, EfficientLora),
}


@torch.no_grad()
def _exchange_if_same(module: nn.Module, kind: str, embedding: torch.Tensor) -> bool:
    """Exchange a module if its kernel computes the same for random input."""
    first = next(p for p in module.parameters() if p.is_floating_point())
    width = embedding.shape[1]
    if kind == "norms":
        width = module.weight.shape[0]
    elif kind == "loras":
        width = next(iter(module.lora_A.values())).in_features
    dtype = first.dtype if kind == "norms" else embedding.dtype
    generator = torch.Generator().manual_seed(0)
    hidden, inputs = torch.randn(1, 7, width, generator=generator).to(first.device, dtype), {}
    original, was_training, config, is_same = type(module), module.training, getattr(module, "config", None), False
    if kind == "attentions":
        angles = torch.rand(1, 7, module.head_dim, generator=generator).to(first.device, dtype)
        inputs = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}
        attention, config._attn_implementation = config._attn_implementation, _RECORDING
    module.eval()  # dropout of LoRA layers
    try:
        expected = _first(module(hidden, **inputs))
        module.__class__ = exchanged_class(original, _KINDS[kind][1])
        actual = _first(module.compute(hidden, **inputs))
        tolerance = 1e-5 if expected.dtype == torch.float32 else 2e-2
        is_same = actual.dtype == expected.dtype and torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # its forward is of another form
        pass
    finally:
        if not is_same:
            module.__class__ = original
        module.train(was_training)
        if kind == "attentions":
            config._attn_implementation = attention
    return is_same


def _first(output):
    return output[0] if isinstance(output, tuple) else output


# The vision tower's layers after the one whose output is selected (LLaVA takes the last but one) need not be computed.


@contextmanager
def without_later_layers(vision_tower: nn.Module, feature_layer: int | list[int]):
    """
    Skip the tower's layers after `feature_layer` (an index of `hidden_states`, which begin with the embeddings), unless one of them is
    trained or hooked. A tower without `encoder.layers` (also below `vision_model`) is left as it is.
    """
    encoder = getattr(getattr(vision_tower, "vision_model", vision_tower), "encoder", None)
    layers = list(getattr(encoder, "layers", []))
    selected = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    last = max(index if index >= 0 else len(layers) + 1 + index for index in selected)
    later = [layer for layer in layers[last:] if can_exchange(layer)]
    if any(_is_awaited(module) for layer in later for module in layer.modules()):
        later = []
    try:
        for layer in later:
            layer.__class__ = exchanged_class(type(layer), SkippedLayer)
        yield
    finally:
        for layer in later:
            layer.__class__ = original_class(layer)  # another thread's call may have been first


def _is_awaited(module: nn.Module) -> bool:
    is_trained = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters(recurse=False))
    return is_trained or any(not is_capturing(hook) for hook in forward_hooks(module))


class SkippedLayer(Kernel):
    prefix = "Skipped"

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states
