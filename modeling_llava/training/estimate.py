"""
Memory and time of a run, by part, from the model's configuration: parameters are counted on the meta device.

    weights      what is stored, by component and dtype
    gradients    of what is trained, in its dtype
    optimizer    two moments per trained parameter (AdamW)
    activations  what autograd keeps of one micro-batch (see `kernels/efficient_layers.py`), or one layer of it with checkpointing
    loss         the head's logits, a chunk of tokens at a time
    evaluation   activations of one layer of an evaluation batch, without gradients
    device       CUDA context, libraries' workspaces, fragmentation

The formulas are sums over the layers' operations, in bytes per token. On the CPU the growth is within 15 % of what is
measured (tests/training/test_training_estimate.py); on a GPU they have not been compared with measurements yet.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..configuration_llava import LlavaConfig, count_additional_image_tokens, count_image_tokens
from ..io.checkpoints import base_model_of, base_revision_of, checkpoint_kind
from ..modeling_llava import LlavaForConditionalGeneration


MIB, GIB = 2**20, 2**30

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a 4-bit weight: itself, an 8-bit scale per 64 weights, a float32 scale per 256 of those (double_quant)."""

CUDA_CONTEXT = 0.55 * GIB
"""CUDA context, cuBLAS and FlashAttention workspaces, before anything of ours is on the device."""

FRAGMENTATION = 0.06
"""Fraction by which PyTorch's caching allocator reserves more than a step allocates."""

_OPTIMIZER_BYTES = {
    # bytes of state per trained parameter of four bytes
    "adamw_torch": 8, "adamw_torch_fused": 8, "adamw_8bit": 2.1, "adamw_bnb_8bit": 2.1, "paged_adamw": 0.0,
    "paged_adamw_32bit": 0.0, "paged_adamw_8bit": 0.0, "lion_8bit": 1.05, "sgd": 0, "adafactor": 0.1,
}  # fmt: skip

# Language models of the presets, for a machine that has neither a copy nor a network.
_PRESET_TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": {"model_type": "llama", "vocab_size": 32064},
    "llava-hf/llava-1.5-13b-hf": {
        "model_type": "llama", "vocab_size": 32064, "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
    },
}  # fmt: skip

LIKE_LLAMA = ("llama", "mistral", "phi3", "qwen2", "qwen3")
"""Language models whose layers need as much memory as a Llama's: the estimate was compared with measurements of each."""


def load_config(model: str, revision: str | None = None) -> LlavaConfig:
    """
    The configuration of a model folder or Hub name; of an adapter or a projector, that of its base.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: the model is neither in the Hub's cache nor can the Hub be reached.
        ValueError: it is not a LLaVA.
    """
    if model in _PRESET_TEXT_CONFIGS and not os.path.isdir(model):
        return LlavaConfig(text_config=_PRESET_TEXT_CONFIGS[model])
    if checkpoint_kind(model, revision) != "full":
        return load_config(base_model_of(model, revision), base_revision_of(model, revision))
    return LlavaConfig.from_pretrained(model, revision=revision)


@dataclass(frozen=True)
class ModelSizes:
    """What of a model decides about memory and time: its configuration, and parameters by component."""

    config: LlavaConfig
    tower: int
    """Parameters of the vision tower."""
    projector: int
    """Parameters of the projector."""
    language_model: int
    """Parameters of the language model, its head included."""
    linears: tuple[tuple[int, int], ...]
    """(inputs, outputs) of each linear layer of the language model but its head: what QLoRA keeps in 4 bits."""
    vision_tokens: int
    """Tokens of the vision tower per image."""

    @property
    def text(self) -> PreTrainedConfig:
        return self.config.text_config

    @property
    def vision(self) -> PreTrainedConfig:
        return self.config.vision_config

    @property
    def embeddings(self) -> int:
        """Parameters of the embedding matrix, and of the head if it has its own."""
        return self.head * (1 if self.config.tie_word_embeddings else 2)

    @property
    def head(self) -> int:
        """Parameters of the head."""
        return self.text.vocab_size * self.text.hidden_size

    @property
    def feature_layers(self) -> int:
        """Hidden states of the vision tower that are concatenated."""
        layers = self.config.vision_feature_layer
        return 1 if isinstance(layers, int) else len(layers)

    @property
    def layer_matrices(self) -> int:
        """Parameters of `linears`."""
        return sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def layer_rest(self) -> int:
        """Norms and biases of the language model."""
        return self.language_model - self.embeddings - self.layer_matrices

    def lora(self, rank: int) -> int:
        """Parameters of the LoRA weights of every linear layer of the language model."""
        return sum(rank * (inputs + outputs) for inputs, outputs in self.linears)


def sizes_of(config: LlavaConfig) -> ModelSizes:
    """
    Count the parameters of a model that is built on the meta device.

    Raises:
        ValueError: the configuration lacks a size, or the language model is a mixture of experts.
    """
    for part in (config.text_config, config.vision_config):
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(part, name, None) is None:
                raise ValueError(f"The configuration of {part.model_type} has no {name}: nothing can be estimated.")
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    tower, projector, language_model = (
        model.get_submodule(f"model.{name}") for name in ("vision_tower", "multi_modal_projector", "language_model")
    )
    if any(p.dim() > 2 for p in language_model.parameters()):
        raise ValueError(
            f"The language model ({config.text_config.model_type}) has weights that are not linear layers, as a mixture of "
            "experts has: nothing can be estimated."
        )
    linears = [m for m in language_model.modules() if isinstance(m, nn.Linear)]
    return ModelSizes(
        config,
        tower=tower.num_parameters(),
        projector=sum(p.numel() for p in projector.parameters()),
        language_model=language_model.num_parameters()
        + (0 if config.tie_word_embeddings else model.lm_head.weight.numel()),
        linears=tuple((linear.in_features, linear.out_features) for linear in linears),
        vision_tokens=_patches(config) + count_additional_image_tokens(config.vision_config),
    )


def _patches(config: LlavaConfig) -> int:
    size = config.vision_config.image_size
    return count_image_tokens(size, size, config.vision_config.patch_size, 0, "full")


@dataclass
class Settings:
    """What of a recipe decides about memory. The defaults are those of [`LlavaTrainingArguments`]."""

    stage: str = "finetune"
    adapter: str = "none"
    lora_r: int = 128
    lora_dropout: float = 0.05
    train_vision_tower: bool = False
    precision: str = "auto"
    trained_dtype: str = "float32"
    double_quant: bool = True
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int | None = None
    """By default the training batch, which takes more than its evaluation."""
    gradient_accumulation_steps: int = 1
    global_batch_size: int | None = None
    max_length: int = 2048
    packing: str = "auto"
    pack_length: int | None = None
    activation_checkpointing: bool = False
    optim: str = "adamw_torch_fused"
    kernels: bool = True

    tokens: int | None = None
    """Tokens of a micro-batch; by default the most possible."""
    images: int | None = None
    """Images of a micro-batch; by default one per sample."""
    supervised: float = 0.5
    """Fraction of the tokens that are supervised."""
    devices: int = 1
    sharding: str = "ddp"
    """ddp: every device holds everything; zero2: gradients and optimizer are sharded; fsdp, zero3: weights too."""
    device: str = "cuda"

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one micro-batch."""
        if self.tokens is not None:
            return self.tokens
        length = (self.pack_length or self.max_length) if self.packing == "full" else self.max_length
        return self.per_device_train_batch_size * length

    @property
    def micro_batch_images(self) -> int:
        """Images of one micro-batch."""
        return self.per_device_train_batch_size if self.images is None else self.images

    @property
    def accumulates(self) -> bool:
        """Whether gradients of earlier micro-batches are kept while the next is computed."""
        if self.global_batch_size is not None:
            return self.global_batch_size > self.per_device_train_batch_size * self.devices
        return self.gradient_accumulation_steps > 1

    @property
    def compute_bytes(self) -> int:
        if self.precision == "auto":
            return 2 if self.device == "cuda" else 4
        return 4 if self.precision == "fp32" else 2

    @property
    def trained_bytes(self) -> int:
        return 4 if self.trained_dtype == "float32" else 2


@dataclass
class Estimate:
    """Memory of one device, in bytes, by part."""

    weights: dict[str, float] = field(default_factory=dict)
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    """Kept from the forward for the backward pass."""
    working: float = 0.0
    """On top of the activations, at the peak: one layer's backward pass, or the loss."""
    loss: float = 0.0
    """Of the loss, which is computed before the layers' backward passes."""
    evaluation: float = 0.0
    """What an evaluation batch takes, if its size is given."""
    buckets: float = 0.0
    """16-bit copies of trained float32 weights, and what is in transit between devices."""
    peak_of_step: float = 0.0
    """Highest sum of gradients, activations and working memory, or evaluation; they do not peak at the same time."""
    overhead: float = 0.0
    trained_parameters: int = 0
    flops_per_token: float = 0.0

    @property
    def growth(self) -> float:
        """Growth of a process from the loaded model to the peak of a step."""
        return self.optimizer + self.peak_of_step + self.buckets

    @property
    def total(self) -> float:
        return sum(self.weights.values()) + self.growth + self.overhead


def estimate(sizes: ModelSizes, settings: Settings) -> Estimate:
    """
    Estimate the memory of one device.

    Args:
        sizes ([`ModelSizes`]): Of the model.
        settings ([`Settings`]): Of the run.

    Returns:
        [`Estimate`]
    """
    c, t = settings.compute_bytes, settings.trained_bytes
    full = settings.stage == "finetune" and settings.adapter == "none"
    trains_lora = settings.adapter != "none"
    result = Estimate()

    # Weights and what is trained of them
    text, vision, images = sizes.text, sizes.vision, settings.micro_batch_images
    h, m, layers, head = text.hidden_size, text.intermediate_size, text.num_hidden_layers, sizes.head
    frozen = t if full else c
    original = c if trains_lora else 0  # PEFT keeps it next to the copy that is trained
    of_tower = t + original if settings.train_vision_tower else c
    matrices = NF4_BYTES if settings.adapter == "qlora" else frozen
    if settings.adapter == "qlora" and not settings.double_quant:
        matrices = 0.5 + 4 / 64
    of_matrices = "4-bit" if settings.adapter == "qlora" else _dtype(frozen)
    result.weights = {
        f"vision tower, {_dtype(t if settings.train_vision_tower else c)}": sizes.tower * of_tower,
        f"projector, {_dtype(t)}": sizes.projector * (t + original),
        f"language model, layers, {of_matrices}": sizes.layer_matrices * matrices + sizes.layer_rest * frozen,
        f"language model, embeddings, head, {_dtype(frozen)}": sizes.embeddings * frozen,
    }
    trained = sizes.projector + (sizes.language_model if full else 0)
    trained += sizes.tower if settings.train_vision_tower else 0
    if trains_lora:
        lora = sizes.lora(settings.lora_r)
        result.weights[f"LoRA, rank {settings.lora_r}, {_dtype(t)}"] = lora * t
        trained += lora
    result.trained_parameters = trained
    result.gradients = trained * t
    result.optimizer = trained * _optimizer_bytes(settings.optim, t)
    # Autocast keeps 16-bit copies of trained float32 weights for the length of a step.
    if c == 2 and t == 4 and (full or trains_lora):
        result.buckets += (trained - sizes.projector) * 2

    # What is kept of one micro-batch
    layer, of_down = _language_layer(sizes, settings)
    tokens = settings.micro_batch_tokens
    residual = 4 if full and t == 4 else c
    per_layer = tokens * layer
    outside = tokens * h * (3 * residual + c)  # embeddings, last norm, hidden states
    outside += images * _patches(sizes.config) * (vision.hidden_size * sizes.feature_layers + 2 * h) * max(c, 4)
    if settings.train_vision_tower:
        outside += _tower_activations(sizes, settings)
    # The peak is where the MLP's last product is differentiated, or just after it, when its inputs are freed
    at_down = ((3 if trains_lora and settings.lora_dropout else 2) * m + h) * c
    backward = tokens * max(at_down, (4 * m + 2 * h) * c - of_down)
    dequantised = max(inputs * outputs for inputs, outputs in sizes.linears) * c if settings.adapter == "qlora" else 0
    backward += dequantised
    if settings.activation_checkpointing:
        # a layer's input each; the first one's is counted outside of the layers
        result.activations = outside + (layers - 1) * tokens * h * residual
        backward += per_layer
        per_kept_layer = tokens * h * residual
    else:
        result.activations = outside + layers * per_layer
        per_kept_layer = per_layer
    result.loss, head_gradient = _loss(sizes, settings, full, head)
    tower = images * sizes.vision_tokens * (8 * vision.hidden_size + 3 * vision.intermediate_size)
    pixels = images * 3 * vision.image_size**2 * 4

    # The peak: after the loss, or in the backward pass of some layer, where gradients replace activations
    fixed = result.gradients if settings.accumulates else 0.0
    in_layers = sizes.layer_matrices + sizes.layer_rest if full else trained - sizes.projector
    layer_gradient = in_layers * t / layers if full or trains_lora else 0.0
    tied_up = result.activations + backward + head_gradient
    moments = [fixed + result.activations + result.loss, fixed + pixels + tower * c]
    for done in range(layers):
        gradients = fixed + layer_gradient if settings.accumulates else done * layer_gradient
        moments.append(tied_up - done * per_kept_layer + gradients)
    # Last the gradient of the embeddings; where they are tied to the head, the head's gradient is still kept.
    keeps_head_gradient = settings.accumulates or sizes.config.tie_word_embeddings
    moments.append(result.gradients + (head_gradient if keeps_head_gradient else 0.0))
    if settings.per_device_eval_batch_size is not None:
        # gate, up and their product; the layer's input and output, queries, keys, values, attention
        result.evaluation = (
            settings.per_device_eval_batch_size * settings.max_length * (3 * m + 6 * h) * c + dequantised
        )
    result.peak_of_step = max(max(moments) + pixels, result.evaluation)
    result.working = max(backward, result.loss)

    _shard(result, sizes, settings, trained, t)
    result.overhead = CUDA_CONTEXT + FRAGMENTATION * result.peak_of_step if settings.device == "cuda" else 0.0
    # Multiplications and additions: forward 2 per weight and token, as many for the gradients of the activations,
    # as many again for those of the weights (full finetuning only)
    passes = 6 if full else 4
    result.flops_per_token = passes * sizes.layer_matrices + passes * head * settings.supervised
    if settings.activation_checkpointing:
        result.flops_per_token += 2 * sizes.layer_matrices
    result.flops_per_token += 2 * sizes.tower * images * sizes.vision_tokens / max(tokens, 1)
    return result


def _dtype(size: int) -> str:
    return "float32" if size == 4 else "16-bit"


def _language_layer(sizes: ModelSizes, settings: Settings) -> tuple[float, float]:
    """Bytes per token that autograd keeps of one layer, and how many of them the MLP's last matrix keeps."""
    c = settings.compute_bytes
    full = settings.stage == "finetune" and settings.adapter == "none"
    residual = 4 if full and settings.trained_bytes == 4 else c
    h, m, heads = sizes.text.hidden_size, sizes.text.intermediate_size, sizes.text.num_attention_heads
    head_dim = getattr(sizes.text, "head_dim", None) or h // heads
    queries, keys = heads * head_dim, (getattr(sizes.text, "num_key_value_heads", None) or heads) * head_dim

    def inputs_of(width: int, siblings: int, is_kept_anyway: bool = False) -> float:
        """Inputs of `siblings` linear layers that share them."""
        if full:
            if c == 4:
                return 0 if is_kept_anyway else width * 4
            return 0 if is_kept_anyway else siblings * width * 2  # autocast makes a copy for each
        if settings.adapter == "none":
            return 0  # frozen
        low = siblings * settings.lora_r * c
        if settings.lora_dropout:
            mask = 1 if settings.device == "cuda" else c
            return siblings * width * (c + mask) + low
        return low + (0 if is_kept_anyway else width * c)

    kept = 2 * h * residual  # inputs of the norms
    kept += inputs_of(h, 3)
    kept += (2 * queries + 2 * keys) * c + 4 * heads  # queries, keys, values, output, its log-sums
    kept += inputs_of(queries, 1, is_kept_anyway=True)
    kept += inputs_of(h, 2)
    kept += 2 * m * c  # gate, up
    # without dropout the product is recomputed; with dropout the masked product is another tensor
    of_down = inputs_of(m, 1, is_kept_anyway=True) if settings.adapter != "none" else 0
    kept += of_down
    if not settings.kernels:
        kept += 2 * h * (residual + c) + m * c * (2 if full else 1)
    return kept, of_down


def _tower_activations(sizes: ModelSizes, settings: Settings) -> float:
    """Bytes that a trained vision tower keeps of a micro-batch."""
    v, m = sizes.vision.hidden_size, sizes.vision.intermediate_size
    layer = (8 * v + 4 * m) * settings.compute_bytes
    tokens = settings.micro_batch_images * sizes.vision_tokens
    if settings.activation_checkpointing:
        return tokens * (sizes.vision.num_hidden_layers * v * settings.compute_bytes + layer)
    return tokens * sizes.vision.num_hidden_layers * layer


def _loss(sizes: ModelSizes, settings: Settings, full: bool, head: int) -> tuple[float, float]:
    """Bytes at the peak of the loss, and of the head's gradient, which is kept for the backward pass."""
    c = settings.compute_bytes
    rows = min(max(2**23 // sizes.text.vocab_size, 512 if full else 256), settings.micro_batch_tokens)
    supervised = settings.micro_batch_tokens * settings.supervised
    chunk = rows * sizes.text.vocab_size * (4 if c == 4 else 6)  # logits; in 16 bits, and their float32 form
    gradient = head * 4 if full else 0  # summed in float32
    copies = head * 4 if full and c == 2 else 0  # 16-bit: of the weight, and of one chunk's gradient
    return chunk + supervised * sizes.text.hidden_size * c * 2 + gradient + copies, gradient


def _optimizer_bytes(optim: str, trained_bytes: int) -> float:
    if optim not in _OPTIMIZER_BYTES:
        return 2 * trained_bytes
    known = _OPTIMIZER_BYTES[optim]
    return known * trained_bytes / 4 if known == 8 else known


def _shard(result: Estimate, sizes: ModelSizes, settings: Settings, trained: int, trained_bytes: int) -> None:
    """Divide among devices what is sharded, in place."""
    n = settings.devices
    if n == 1:
        return
    if settings.sharding == "ddp":
        result.buckets += trained * trained_bytes  # gradients on their way
        return
    result.optimizer /= n
    result.peak_of_step -= result.gradients * (1 - 1 / n)
    result.gradients /= n
    if settings.sharding in ("fsdp", "zero3"):
        for name in result.weights:
            result.weights[name] /= n
        layer = (sizes.layer_matrices + sizes.layer_rest) / sizes.text.num_hidden_layers
        result.buckets += (2 * layer + sizes.embeddings) * settings.compute_bytes  # gathered: this layer and the next
    result.buckets += 2 * 200 * MIB


def fits(result: Estimate, gpu_gib: float) -> bool:
    """Whether it fits a GPU of so many GiB, of which the driver and a display take 2 %."""
    return result.total <= gpu_gib * GIB * 0.98


def propose(sizes: ModelSizes, settings: Settings, gpu_gib: float) -> dict[str, Any] | None:
    """
    The first change of the recipe that makes it fit, the mildest first; each is applied on top of the earlier ones.

    Returns:
        `dict`: settings to change; empty if it fits as it is, `None` if nothing helps.
    """
    changes: dict[str, Any] = {}
    current = settings
    if fits(estimate(sizes, current), gpu_gib):
        return changes
    steps: list[dict[str, Any]] = []
    if settings.per_device_eval_batch_size is not None:
        steps.append({"per_device_eval_batch_size": 1})
    if not settings.activation_checkpointing:
        steps.append({"activation_checkpointing": True})
    batch = settings.per_device_train_batch_size
    while batch > 1:
        batch //= 2
        steps.append({"per_device_train_batch_size": batch})
    if settings.stage == "finetune":
        if settings.adapter == "none":
            steps.append({"adapter": "lora"})
        if settings.adapter != "qlora":
            steps.append({"adapter": "qlora"})
        steps.append({"optim": "paged_adamw_8bit"})
        steps += [{"lora_r": rank} for rank in (64, 32, 16, 8) if rank < settings.lora_r]
    steps += [{"max_length": length} for length in (1536, 1280, 1024, 768) if length < settings.max_length]
    for step in steps:
        changes |= step
        current = dataclasses.replace(settings, **changes, tokens=None, images=None)
        if fits(estimate(sizes, current), gpu_gib):
            return _shortest(sizes, settings, changes, gpu_gib)
    return None


def _shortest(sizes: ModelSizes, settings: Settings, changes: dict[str, Any], gpu_gib: float) -> dict[str, Any]:
    """Leave out changes that turned out not to be needed."""
    for name in list(changes):
        fewer = {key: value for key, value in changes.items() if key != name}
        if fits(estimate(sizes, dataclasses.replace(settings, **fewer, tokens=None, images=None)), gpu_gib):
            changes = fewer
    return changes


def hours(samples: float, samples_per_second: float) -> float:
    """
    Wall time of a number of samples, in hours.

    Raises:
        ValueError: the throughput is not above 0.
    """
    if not samples_per_second > 0:
        raise ValueError(f"{samples_per_second:g} samples per second: the throughput must be above 0.")
    return samples / samples_per_second / 3600


__all__ = [
    "LIKE_LLAMA",
    "Estimate",
    "ModelSizes",
    "Settings",
    "estimate",
    "fits",
    "hours",
    "load_config",
    "propose",
    "sizes_of",
]
