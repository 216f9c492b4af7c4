"""
Memory and time of a run, by part, from the model's configuration: parameters are counted on the meta device.

    weights      what is stored, by component and dtype
    gradients    of what is trained, in its dtype
    optimizer    two moments per trained parameter (AdamW); paged ones are in main memory
    activations  what autograd keeps of one micro-batch (see `kernels/efficient_layers.py`); of a checkpointed layer its input
    loss         the head's logits, a chunk of tokens at a time
    evaluation   activations of one layer of an evaluation batch, without gradients; generation: of one answer, and its cache
    device       CUDA context, libraries' workspaces, fragmentation

The formulas are sums over the layers' operations, in bytes per token. On the CPU the growth is within 15 % of what is
measured (tests/training/test_training_estimate.py); on a GPU they have not been compared with measurements yet.
"""

import os
from dataclasses import MISSING, dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..configuration_llava import LlavaConfig, count_additional_image_tokens, count_image_tokens
from ..io.checkpoints import COMPONENTS, base_of, checkpoint_kind
from ..modeling_llava import LlavaForConditionalGeneration
from .arguments import LlavaTrainingArguments
from .setup import tower_layers, unused_tower_parameters


MIB, GIB = 2**20, 2**30

CUDA_CONTEXT = 0.55 * GIB
"""CUDA context, cuBLAS and FlashAttention workspaces, before anything of ours is on the device."""

FRAGMENTATION = 0.06
"""Fraction by which PyTorch's caching allocator reserves more than a step allocates."""

MARGIN = 0.1
"""Fraction of the free memory that `activation_checkpointing=auto` leaves alone: what the estimate may be wrong by."""

CHECKPOINTING = {False: "off", "every_second": "every second", True: "on", "offload": "offload"}
"""Values of `activation_checkpointing`, the fastest first."""

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
        model, revision = base_of(model, revision)
    return LlavaConfig.from_pretrained(model, revision=revision)


@dataclass(frozen=True)
class ModelSizes:
    """What of a model decides about memory and time: its configuration, and parameters by component."""

    config: LlavaConfig
    tower: int
    tower_used: int  # of it what reaches the loss: the most that is trained
    tower_layers: int  # that reach the loss
    projector: int
    language_model: int  # with its head
    head: int
    embeddings: int  # the embedding matrix, and the head if it has its own
    layer_matrices: int  # linear layers of the language model but its head: what QLoRA keeps in 4 bits
    layer_rest: int  # norms and biases of the language model
    linears: dict[
        str, list[tuple[int, int]]
    ]  # component → (inputs, outputs) of its linear layers that reach the loss, but the head
    patches: int  # per image
    vision_tokens: int  # per image: patches and class token

    def lora(self, rank: int, component: str = "language_model") -> int:
        """Parameters of the LoRA weights of every linear layer of a component that reaches the loss."""
        return sum(rank * (inputs + outputs) for inputs, outputs in self.linears[component])


def sizes_of(config: PreTrainedConfig) -> ModelSizes:
    """
    Count the parameters of a model that is built on the meta device.

    Raises:
        ValueError: the configuration lacks a size, or the language model is a mixture of experts.
    """
    text, vision = config.text_config, config.vision_config
    for part in (text, vision):
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(part, name, None) is None:
                raise ValueError(f"The configuration of {part.model_type} has no {name}: nothing can be estimated.")
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    parts = {name: model.get_submodule(f"model.{name}") for name in COMPONENTS}
    if any(p.dim() > 2 for p in parts["language_model"].parameters()):
        raise ValueError(
            f"The language model ({text.model_type}) has weights that are not linear layers, as a mixture of experts has: "
            "nothing can be estimated."
        )
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    for unused in unused_tower_parameters(model):
        unused.requires_grad_(False)
    linears = {
        name: [
            (m.in_features, m.out_features)
            for m in part.modules()
            if isinstance(m, nn.Linear) and m.weight.requires_grad
        ]
        for name, part in parts.items()
    }
    matrices = sum(inputs * outputs for inputs, outputs in linears["language_model"])
    head = text.vocab_size * text.hidden_size
    embeddings = head if config.tie_word_embeddings else 2 * head
    language_model = counts["language_model"] + embeddings - head
    patches = count_image_tokens(vision.image_size, vision.image_size, vision.patch_size, 0, "full")
    return ModelSizes(
        config=config,
        tower=counts["vision_tower"],
        tower_used=sum(p.numel() for p in parts["vision_tower"].parameters() if p.requires_grad),
        tower_layers=tower_layers(model)[2] or vision.num_hidden_layers,
        projector=counts["multi_modal_projector"],
        language_model=language_model,
        head=head,
        embeddings=embeddings,
        layer_matrices=matrices,
        layer_rest=language_model - embeddings - matrices,
        linears=linears,
        patches=patches,
        vision_tokens=patches + count_additional_image_tokens(vision),
    )


class Settings(SimpleNamespace):
    """
    What of a recipe decides about memory: the settings of [`LlavaTrainingArguments`] with its defaults, and

        tokens      of a micro-batch; by default the most possible
        images      of a micro-batch; by default one per sample, as many as fit with packing=full
        supervised  fraction of the tokens that are supervised
        devices     number of them
        sharding    ddp: every device holds everything; zero2: gradients and optimizer are sharded; fsdp, zero3: weights too
        device      cuda or cpu
    """

    def __init__(self, **given: Any):
        ours = {"tokens": None, "images": None, "supervised": 0.5, "devices": 1, "sharding": "ddp", "device": "cuda"}
        theirs = {f.name: f.default for f in fields(LlavaTrainingArguments) if f.default is not MISSING}
        super().__init__(**theirs | ours | given)
        if self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)  # its older name

    @classmethod
    def of(cls, args: LlavaTrainingArguments) -> "Settings":
        known = {name: getattr(args, name) for name in vars(cls()) if hasattr(args, name)}
        sharding = "fsdp" if args.is_sharded else "ddp"
        return cls(**known | {"devices": args.world_size, "device": args.device.type, "sharding": sharding})

    def replace(self, **changes: Any) -> "Settings":
        return Settings(**vars(self) | changes)

    @property
    def length(self) -> int:
        """Most tokens of a row: a sample or a pack."""
        return (self.pack_length or self.max_length) if self.packing.endswith("full") else self.max_length

    @property
    def micro_batch_tokens(self) -> int:
        return self.tokens or self.per_device_train_batch_size * self.length

    @property
    def accumulates(self) -> bool:
        """Whether gradients of earlier micro-batches are kept while the next is computed."""
        batch = self.per_device_train_batch_size * self.devices
        return (self.global_batch_size or batch * self.gradient_accumulation_steps) > batch

    @property
    def compute_bytes(self) -> int:
        if self.precision == "auto":
            return 2 if self.device == "cuda" else 4
        return 4 if self.precision == "fp32" else 2

    @property
    def trained_bytes(self) -> int:
        return 4 if self.trained_dtype == "float32" else 2

    @property
    def is_full(self) -> bool:
        """Whether the language model's own weights are trained."""
        return self.stage == "finetune" and self.adapter == "none"

    @property
    def residual_bytes(self) -> int:
        """Of a number between two layers."""
        return self.trained_bytes if self.is_full else self.compute_bytes


@dataclass
class Estimate:
    """Memory of one device, in bytes, by part."""

    weights: dict[str, float] = field(default_factory=dict)
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0  # kept from the forward for the backward pass
    working: float = 0.0  # on top of them, at the peak: one layer's backward pass, or the loss
    loss: float = 0.0  # it is computed before the layers' backward passes
    evaluation: float = 0.0
    generation: float = 0.0  # of one answer; as many more are generated at a time as memory has room for
    buckets: float = 0.0  # 16-bit copies of trained float32 weights, and what is in transit between devices
    peak_of_step: float = 0.0  # the highest sum of the six before it: they do not peak at the same time
    overhead: float = 0.0
    trained_parameters: int = 0
    checkpoint: float = 0.0  # on the disk: the weights that are saved, and the optimizer's state
    saved: float = 0.0  # on the disk: the result
    flops_per_token: float = 0.0

    @property
    def growth(self) -> float:
        """Growth of a process from the loaded model to the peak of a step."""
        return self.optimizer + self.peak_of_step + self.buckets

    @property
    def total(self) -> float:
        return sum(self.weights.values()) + self.growth + self.overhead


def estimate(sizes: ModelSizes, settings: Settings) -> Estimate:
    """Estimate the memory of one device."""
    c, t, full = settings.compute_bytes, settings.trained_bytes, settings.is_full
    trains_lora = settings.adapter != "none"
    result = Estimate()
    text, vision = sizes.config.text_config, sizes.config.vision_config
    h, m, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    tokens, images = settings.micro_batch_tokens, settings.images
    if images is None:
        per_row = settings.length // sizes.patches if settings.packing.endswith("full") else 1
        images = settings.per_device_train_batch_size * max(per_row, 1)

    # Weights and what is trained of them
    frozen = t if full else c
    original = c if trains_lora else 0  # PEFT keeps it next to the copy that is trained
    matrices, of_matrices = frozen, _dtype(frozen)
    if settings.adapter == "qlora":
        # a scale per 64 weights: in 8 bits, with a float32 scale per 256 of those, or in float32
        matrices, of_matrices = 0.5 + (1 / 64 + 4 / (64 * 256) if settings.double_quant else 4 / 64), "4-bit"
    trains_tower, trains_projector = settings.train_vision_tower, settings.train_projector == "full"
    of_tower = sizes.tower * c + trains_tower * (sizes.tower * original + sizes.tower_used * (t - c))
    result.weights = {
        f"vision tower, {_dtype(t if trains_tower else c)}": of_tower,
        f"projector, {_dtype(t if trains_projector else c)}": sizes.projector
        * (t + original if trains_projector else c),
        f"language model, layers, {of_matrices}": sizes.layer_matrices * matrices + sizes.layer_rest * frozen,
        f"embeddings, head, {_dtype(frozen)}": sizes.embeddings * frozen,
    }
    in_layers = sizes.language_model if full else 0
    if trains_lora:
        in_layers = sizes.lora(settings.lora_r)
        lora = in_layers + settings.lora_vision_tower * sizes.lora(settings.lora_r, "vision_tower")
        lora += (settings.train_projector == "lora") * sizes.lora(settings.lora_r, "multi_modal_projector")
        result.weights[f"LoRA, rank {settings.lora_r}, {_dtype(t)}"] = lora * t
    trained = (
        trains_projector * sizes.projector + trains_tower * sizes.tower_used + (lora if trains_lora else in_layers)
    )
    result.trained_parameters = trained
    result.gradients = trained * t
    state = trained * _state_bytes(settings.optim, t)
    result.optimizer = 0.0 if settings.optim.startswith("paged") else state
    result.checkpoint = state + (sum(result.weights.values()) if full else trained * t)
    result.saved = (sizes.tower + sizes.projector + sizes.language_model) * c if full else trained * t
    # Autocast keeps 16-bit copies of trained float32 weights for the length of a step.
    if c == 2 and t == 4:
        result.buckets += in_layers * 2

    # What is kept of one micro-batch
    layer, of_down = (tokens * size for size in _language_layer(sizes, settings))
    layer_input = tokens * h * settings.residual_bytes
    feature_layers = sizes.config.vision_feature_layer
    feature_layers = 1 if isinstance(feature_layers, int) else len(feature_layers)
    outside = tokens * h * (3 * settings.residual_bytes + c)  # embeddings, last norm, hidden states
    outside += images * sizes.patches * (vision.hidden_size * feature_layers + 2 * h) * max(c, 4)
    if trains_tower or settings.lora_vision_tower:
        of_layer = (8 * vision.hidden_size + 4 * vision.intermediate_size) * c
        kept = sizes.tower_layers * of_layer
        if settings.activation_checkpointing:
            kept = sizes.tower_layers * vision.hidden_size * c + of_layer
        outside += images * sizes.vision_tokens * kept
    # The peak is where the MLP's last product is differentiated, or just after it, when its inputs are freed
    at_down = ((3 if trains_lora and settings.lora_dropout else 2) * m + h) * c
    backward = max(tokens * at_down, tokens * (4 * m + 2 * h) * c - of_down)
    dequantized = (
        max(inputs * outputs for inputs, outputs in sizes.linears["language_model"]) * c
        if settings.adapter == "qlora"
        else 0
    )
    backward += dequantized
    step = {False: layers + 1, "every_second": 2}.get(settings.activation_checkpointing, 1)
    is_checkpointed = [index % step == 0 and step <= layers for index in range(layers)]
    is_offloaded = settings.activation_checkpointing == "offload" and settings.device == "cuda"
    kept_input = 0 if is_offloaded else layer_input
    of_layers = [kept_input if checkpointed else layer for checkpointed in is_checkpointed]
    of_layers[0] -= kept_input if is_checkpointed[0] else 0  # it is counted outside of the layers
    result.activations = outside + sum(of_layers)
    result.loss, head_gradient = _loss(sizes, settings)
    tower = images * sizes.vision_tokens * (8 * vision.hidden_size + 3 * vision.intermediate_size)
    pixels = images * 3 * vision.image_size**2 * 4

    # The peak: after the loss, or in the backward pass of some layer, where gradients replace activations
    accumulates = settings.accumulates
    fixed = result.gradients if accumulates else 0.0
    layer_gradient = (in_layers - (sizes.embeddings if full else 0)) * t / layers
    moments = [fixed + result.activations + result.loss, fixed + tower * c]
    for index in reversed(range(layers)):
        done = layers - 1 - index
        gradients = fixed + layer_gradient if accumulates else done * layer_gradient
        again = layer + layer_input - kept_input if is_checkpointed[index] else 0.0
        moments.append(outside + sum(of_layers[: index + 1]) + again + backward + head_gradient + gradients)
    # Last the gradient of the embeddings; where they are tied to the head, the head's gradient is still kept.
    keeps_head_gradient = accumulates or sizes.config.tie_word_embeddings
    moments.append(result.gradients + (head_gradient if keeps_head_gradient else 0.0))
    # Without gradients: gate, up and their product; the layer's input and output, queries, keys, values, attention
    per_token = (3 * m + 6 * h) * c
    eval_batch = settings.per_device_eval_batch_size
    eval_tokens = tokens if eval_batch is None else eval_batch * settings.max_length
    result.evaluation = eval_tokens * (per_token + outside / tokens) + dequantized
    result.generation = settings.max_length * (per_token + layers * _key_value_width(text) * c) + dequantized
    generates = settings.sample_answers or settings.benchmarks
    result.peak_of_step = max(max(moments) + pixels, result.evaluation, result.generation if generates else 0.0)
    result.working = max(backward + (layer if any(is_checkpointed) else 0.0), result.loss)

    _shard(result, sizes, settings)
    result.overhead = CUDA_CONTEXT + FRAGMENTATION * result.peak_of_step if settings.device == "cuda" else 0.0
    # Multiplications and additions: forward 2 per weight and token, as many for the gradients of the activations,
    # as many again for those of the weights (full finetuning only)
    passes = 6 if full else 4
    result.flops_per_token = passes * (sizes.layer_matrices + sizes.head * settings.supervised)
    result.flops_per_token += 2 * sizes.layer_matrices * sum(is_checkpointed) / layers
    result.flops_per_token += 2 * sizes.tower * images * sizes.vision_tokens / max(tokens, 1)
    return result


def _dtype(size: int) -> str:
    return "float32" if size == 4 else "16-bit"


def _key_value_width(text: PreTrainedConfig) -> int:
    """Numbers of the keys and values of a token in one layer."""
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * (getattr(text, "num_key_value_heads", None) or heads) * head_dim


def _language_layer(sizes: ModelSizes, settings: Settings) -> tuple[float, float]:
    """Bytes per token that autograd keeps of one layer, and how many of them the MLP's last matrix keeps."""
    c, text, full = settings.compute_bytes, sizes.config.text_config, settings.is_full
    h, m, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
    queries = heads * (getattr(text, "head_dim", None) or h // heads)

    def inputs_of(width: int, siblings: int, is_kept_anyway: bool = False) -> float:
        """Inputs of `siblings` linear layers that share them."""
        if full:
            copies = 1 if c == 4 else siblings  # autocast makes one for each
            return 0 if is_kept_anyway else copies * width * c
        if settings.adapter == "none":
            return 0  # frozen
        low = siblings * settings.lora_r * c
        if settings.lora_dropout:
            mask = 1 if settings.device == "cuda" else c
            return siblings * width * (c + mask) + low
        return low + (0 if is_kept_anyway else width * c)

    kept = 2 * h * settings.residual_bytes  # inputs of the norms
    kept += inputs_of(h, 3) + inputs_of(queries, 1, is_kept_anyway=True) + inputs_of(h, 2)
    kept += (2 * queries + _key_value_width(text)) * c + 4 * heads  # queries, keys, values, output, its log-sums
    kept += 2 * m * c  # gate, up
    # without dropout the product is recomputed; with dropout the masked product is another tensor
    of_down = inputs_of(m, 1, is_kept_anyway=True) if settings.adapter != "none" else 0
    kept += of_down
    if not settings.kernels:
        kept += 2 * h * (settings.residual_bytes + c) + m * c * (2 if full else 1)
    return kept, of_down


def _loss(sizes: ModelSizes, settings: Settings) -> tuple[float, float]:
    """Bytes at the peak of the loss, and of the head's gradient, which is kept for the backward pass."""
    c, full, vocabulary = settings.compute_bytes, settings.is_full, sizes.config.text_config.vocab_size
    rows = min(max(2**23 // vocabulary, 512 if full else 256), settings.micro_batch_tokens)
    supervised = settings.micro_batch_tokens * settings.supervised
    chunk = rows * vocabulary * (4 if c == 4 else 6)  # logits; in 16 bits, and their float32 form
    gradient = sizes.head * 4 if full else 0  # summed in float32
    copies = sizes.head * 4 if full and c == 2 else 0  # 16-bit: of the weight, and of one chunk's gradient
    return chunk + supervised * sizes.config.text_config.hidden_size * c * 2 + gradient + copies, gradient


def _state_bytes(optim: str, trained_bytes: int) -> float:
    """Bytes of the optimizer's state per trained parameter."""
    return (
        0.0
        if optim in ("sgd", "adafactor")
        else (1 if "lion" in optim else 2) * (1.05 if "8bit" in optim else trained_bytes)
    )


def _shard(result: Estimate, sizes: ModelSizes, settings: Settings) -> None:
    """Divide among devices what is sharded, in place."""
    n = settings.devices
    if n == 1:
        return
    if settings.sharding == "ddp":
        result.buckets += result.gradients  # on their way
        return
    result.optimizer /= n
    result.peak_of_step -= result.gradients * (1 - 1 / n)
    result.gradients /= n
    if settings.sharding in ("fsdp", "zero3"):
        result.weights = {name: size / n for name, size in result.weights.items()}
        layer = (sizes.layer_matrices + sizes.layer_rest) / sizes.config.text_config.num_hidden_layers
        result.buckets += (2 * layer + sizes.embeddings) * settings.compute_bytes  # gathered: this layer and the next
    result.buckets += 2 * 200 * MIB


def choose_checkpointing(sizes: ModelSizes, settings: Settings, available: float) -> tuple[bool | str, str]:
    """The fastest `activation_checkpointing` for which a device has so many bytes, weights included, and why in words."""
    needed = {
        value: estimate(sizes, settings.replace(activation_checkpointing=value)).total - CUDA_CONTEXT
        for value in CHECKPOINTING
    }
    chosen = next((value for value, size in needed.items() if size <= (1 - MARGIN) * available), "offload")
    figures = ", ".join(f"{CHECKPOINTING[value]} {size / GIB:.1f}" for value, size in needed.items())
    why = f"(estimated GiB: {figures}; {available / GIB:.1f} free)"
    return chosen, f"activation_checkpointing: {CHECKPOINTING[chosen]} {why}"


def available_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that this process can hold: its share of what other programs leave, what it holds included."""
    free, total = torch.cuda.mem_get_info(device)
    share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free + torch.cuda.memory_reserved(device), share)
