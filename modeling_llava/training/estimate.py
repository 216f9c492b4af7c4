"""
Memory and time of a run, by part, from configurations alone: nothing is loaded, PyTorch is not imported.

    weights      what is stored, by component and dtype
    gradients    of what is trained, in its dtype
    optimizer    two moments per trained parameter (AdamW)
    activations  what autograd keeps of one micro-batch (see `kernels/efficient_layers.py`), or one layer of it with checkpointing
    loss         the head's logits, a chunk of positions at a time
    evaluation   activations of one layer of an evaluation batch, without gradients
    device       CUDA context, libraries' workspaces, fragmentation

The formulas are sums over the layers' operations, in bytes per position. On the CPU the growth is within 15 % of what is
measured (tests/training/test_training_estimate.py); on a GPU they have not been held against measurements yet.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .shapes import Shapes


MIB, GIB = 2**20, 2**30

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a 4-bit weight: itself, an 8-bit scale per 64 weights, a float32 scale per 256 of those (double_quant)."""

CUDA_CONTEXT = 0.55 * GIB
"""CUDA context, cuBLAS and FlashAttention workspaces, before anything of ours is on the device."""

FRAGMENTATION = 0.06
"""Share by which PyTorch's caching allocator holds more than is in use, of what comes and goes in a step."""

_OPTIMIZER_BYTES = {
    # bytes of state per trained parameter of four bytes
    "adamw_torch": 8, "adamw_torch_fused": 8, "adamw_8bit": 2.1, "adamw_bnb_8bit": 2.1, "paged_adamw": 0.0,
    "paged_adamw_32bit": 0.0, "paged_adamw_8bit": 0.0, "lion_8bit": 1.05, "sgd": 0, "adafactor": 0.1,
}  # fmt: skip


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
    lean: bool = True

    positions: int | None = None
    """Positions of a micro-batch; by default the most there can be."""
    images: int | None = None
    """Images of a micro-batch; by default one per sample."""
    supervised: float = 0.5
    """Share of the positions that are supervised."""
    devices: int = 1
    sharding: str = "ddp"
    """ddp: every device holds everything; zero2: gradients and optimizer are shared out; fsdp, zero3: weights too."""
    device: str = "cuda"

    @property
    def micro_positions(self) -> int:
        """Positions of one micro-batch."""
        if self.positions is not None:
            return self.positions
        length = (self.pack_length or self.max_length) if self.packing == "full" else self.max_length
        return self.per_device_train_batch_size * length

    @property
    def micro_images(self) -> int:
        """Images of one micro-batch."""
        return self.per_device_train_batch_size if self.images is None else self.images

    @property
    def accumulates(self) -> bool:
        """Whether gradients of earlier micro-batches are there while one is computed."""
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
    """Beside the activations, at the moment when most is needed: one layer's backward pass, or the loss."""
    loss: float = 0.0
    """The part of the loss, which comes before the layers' backward passes."""
    evaluation: float = 0.0
    """What an evaluation batch takes, if its size is given."""
    buckets: float = 0.0
    """16-bit copies of trained float32 weights, and what is in transit between devices."""
    peak_of_step: float = 0.0
    """Gradients, activations and working memory, or evaluation, at their highest; they are not all there at the same time."""
    overhead: float = 0.0
    trained_parameters: int = 0
    flops_per_position: float = 0.0

    @property
    def growth(self) -> float:
        """What a process grows by from the loaded model to the highest point of a step."""
        return self.optimizer + self.peak_of_step + self.buckets

    @property
    def total(self) -> float:
        return sum(self.weights.values()) + self.growth + self.overhead


def estimate(shapes: Shapes, settings: Settings) -> Estimate:
    """
    Estimate the memory of one device.

    Args:
        shapes ([`Shapes`]): Sizes of the model.
        settings ([`Settings`]): Of the run.

    Returns:
        [`Estimate`]
    """
    c, t = settings.compute_bytes, settings.trained_bytes
    full = settings.stage == "finetune" and settings.adapter == "none"
    trains_lora = settings.adapter != "none"
    result = Estimate()

    # Weights and what is trained of them
    head = shapes.vocabulary * shapes.hidden
    matrices = NF4_BYTES if settings.adapter == "qlora" else t if full else c
    if settings.adapter == "qlora" and not settings.double_quant:
        matrices = 0.5 + 4 / 64
    of_matrices = "4 bit" if settings.adapter == "qlora" else _dtype(t if full else c)
    result.weights = {
        f"vision tower, {_dtype(t if settings.train_vision_tower else c)}": shapes.tower
        * (t if settings.train_vision_tower else c),
        f"projector, {_dtype(t)}": shapes.projector * t,
        f"language model, layers, {of_matrices}": shapes.layer_matrices * matrices
        + shapes.layer_rest * (t if full else c),
        f"language model, embeddings, head, {_dtype(t if full else c)}": shapes.embeddings * (t if full else c),
    }
    trained = shapes.projector + (shapes.language_model if full else 0)
    trained += shapes.tower if settings.train_vision_tower else 0
    if trains_lora:
        low_rank = shapes.lora(settings.lora_r)
        result.weights[f"LoRA, rank {settings.lora_r}, {_dtype(t)}"] = low_rank * t
        trained += low_rank
    result.trained_parameters = trained
    result.gradients = trained * t
    result.optimizer = trained * _optimizer_bytes(settings.optim, t)
    # Autocast keeps 16-bit copies of trained float32 weights for the length of a step.
    if c == 2 and t == 4 and (full or trains_lora):
        result.buckets += (trained - shapes.projector) * 2

    # What is kept of one micro-batch
    layer, of_down = _language_layer(shapes, settings)
    positions = settings.micro_positions
    residual = 4 if full and t == 4 else c
    per_layer = positions * layer
    image_positions = settings.micro_images * shapes.patches
    outside = positions * shapes.hidden * (3 * residual + c)  # embeddings, last norm, hidden states
    outside += image_positions * (shapes.vision_hidden * shapes.feature_layers + 2 * shapes.hidden) * max(c, 4)
    if settings.train_vision_tower:
        outside += _tower_activations(shapes, settings)
    # Most is needed where the MLP's last product is differentiated, or just behind it, when its inputs are gone already
    h, m = shapes.hidden, shapes.intermediate
    at_down = ((3 if trains_lora and settings.lora_dropout else 2) * m + h) * c
    backward = positions * max(at_down, (4 * m + 2 * h) * c - of_down)
    dequantised = max(inputs * outputs for inputs, outputs in shapes.linears) * c if settings.adapter == "qlora" else 0
    backward += dequantised
    if settings.activation_checkpointing:
        # a layer's input each; the first one's is counted outside of the layers
        result.activations = outside + (shapes.layers - 1) * positions * shapes.hidden * residual
        backward += per_layer
        per_kept_layer = positions * shapes.hidden * residual
    else:
        result.activations = outside + shapes.layers * per_layer
        per_kept_layer = per_layer
    result.loss, head_gradient = _loss(shapes, settings, full, head)
    tower = (
        settings.micro_images * shapes.vision_positions * (8 * shapes.vision_hidden + 3 * shapes.vision_intermediate)
    )
    pixels = settings.micro_images * 3 * shapes.image_size**2 * 4

    # The highest point: after the loss, or in the backward pass of some layer, where activations give way to gradients
    fixed = result.gradients if settings.accumulates else 0.0
    in_layers = shapes.layer_matrices + shapes.layer_rest if full else trained - shapes.projector
    layer_gradient = in_layers * t / shapes.layers if full or trains_lora else 0.0
    tied_up = result.activations + backward + head_gradient
    moments = [fixed + result.activations + result.loss, fixed + pixels + tower * c]
    for done in range(shapes.layers):
        gradients = fixed + layer_gradient if settings.accumulates else done * layer_gradient
        moments.append(tied_up - done * per_kept_layer + gradients)
    # At last the gradient of the embeddings; where they are the head, that of the head has waited for it.
    moments.append(result.gradients + (head_gradient if settings.accumulates or shapes.tied else 0.0))
    if settings.per_device_eval_batch_size is not None:
        # gate, up and their product; the layer's input and output, queries, keys, values, attention
        result.evaluation = (
            settings.per_device_eval_batch_size * settings.max_length * (3 * m + 6 * h) * c + dequantised
        )
    result.peak_of_step = max(max(moments) + pixels, result.evaluation)
    result.working = max(backward, result.loss)

    _share_out(result, shapes, settings, trained, t)
    dynamic = result.peak_of_step
    result.overhead = CUDA_CONTEXT + FRAGMENTATION * dynamic if settings.device == "cuda" else 0.0
    # Multiplications and additions: forward 2 per weight and position, as many for the gradients of the activations,
    # as many again for those of the weights (full finetuning only)
    passes = 6 if full else 4
    result.flops_per_position = passes * shapes.layer_matrices + passes * head * settings.supervised
    if settings.activation_checkpointing:
        result.flops_per_position += 2 * shapes.layer_matrices
    result.flops_per_position += 2 * shapes.tower * settings.micro_images * shapes.vision_positions / max(positions, 1)
    return result


def _dtype(size: int) -> str:
    return "float32" if size == 4 else "16 bit"


def _language_layer(shapes: Shapes, settings: Settings) -> tuple[float, float]:
    """Bytes that autograd keeps per position of one layer, and of them those that the MLP's last matrix keeps."""
    c = settings.compute_bytes
    full = settings.stage == "finetune" and settings.adapter == "none"
    residual = 4 if full and settings.trained_bytes == 4 else c
    h, m = shapes.hidden, shapes.intermediate
    queries, keys = shapes.heads * shapes.head_dim, shapes.key_value_heads * shapes.head_dim

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
    kept += (2 * queries + 2 * keys) * c + 4 * shapes.heads  # queries, keys, values, output, its log-sums
    kept += inputs_of(queries, 1, is_kept_anyway=True)
    kept += inputs_of(h, 2)
    kept += 2 * m * c  # gate, up
    # without dropout the product is multiplied out again, but with it the masked product is another tensor
    of_down = inputs_of(m, 1, is_kept_anyway=True) if settings.adapter != "none" else 0
    kept += of_down
    if not settings.lean:
        kept += 2 * h * (residual + c) + m * c * (2 if full else 1)
    return kept, of_down


def _tower_activations(shapes: Shapes, settings: Settings) -> float:
    """Bytes that a trained vision tower keeps of a micro-batch."""
    v, m = shapes.vision_hidden, shapes.vision_intermediate
    layer = (8 * v + 4 * m) * settings.compute_bytes
    positions = settings.micro_images * shapes.vision_positions
    if settings.activation_checkpointing:
        return positions * (shapes.vision_layers * v * settings.compute_bytes + layer)
    return positions * shapes.vision_layers * layer


def _loss(shapes: Shapes, settings: Settings, full: bool, head: int) -> tuple[float, float]:
    """Bytes at the highest point of the loss, and of the head's gradient, which stays for the backward pass."""
    c = settings.compute_bytes
    rows = min(max(2**23 // shapes.vocabulary, 512 if full else 256), settings.micro_positions)
    supervised = settings.micro_positions * settings.supervised
    chunk = rows * shapes.vocabulary * (4 if c == 4 else 6)  # logits; in 16 bit beside their float32 form
    gradient = head * 4 if full else 0  # summed in float32
    copies = head * 4 if full and c == 2 else 0  # 16-bit: of the weight, and of one chunk's gradient
    return chunk + supervised * shapes.hidden * c * 2 + gradient + copies, gradient


def _optimizer_bytes(optim: str, trained_bytes: int) -> float:
    if optim not in _OPTIMIZER_BYTES:
        return 2 * trained_bytes
    known = _OPTIMIZER_BYTES[optim]
    return known * trained_bytes / 4 if known == 8 else known


def _share_out(result: Estimate, shapes: Shapes, settings: Settings, trained: int, trained_bytes: int) -> None:
    """Divide among devices what the sharding divides, in place."""
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
        layer = (shapes.layer_matrices + shapes.layer_rest) / shapes.layers
        result.buckets += (2 * layer + shapes.embeddings) * settings.compute_bytes  # gathered: this layer and the next
    result.buckets += 2 * 200 * MIB


def fits(result: Estimate, gpu_gib: float) -> bool:
    """Whether it fits a card of so many GiB, of which the driver and a screen take 2 %."""
    return result.total <= gpu_gib * GIB * 0.98


def propose(shapes: Shapes, settings: Settings, gpu_gib: float) -> dict[str, Any] | None:
    """
    The first change of the recipe that makes it fit, the mildest first; each is tried on top of those before it.

    Returns:
        `dict`: settings to change; empty if it fits as it is, `None` if nothing helps.
    """
    changes: dict[str, Any] = {}
    current = settings
    if fits(estimate(shapes, current), gpu_gib):
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
        current = dataclasses.replace(settings, **changes, positions=None, images=None)
        if fits(estimate(shapes, current), gpu_gib):
            return _shortest(shapes, settings, changes, gpu_gib)
    return None


def _shortest(shapes: Shapes, settings: Settings, changes: dict[str, Any], gpu_gib: float) -> dict[str, Any]:
    """Leave out what was tried on the way but is not needed in the end."""
    for name in list(changes):
        fewer = {key: value for key, value in changes.items() if key != name}
        if fits(estimate(shapes, dataclasses.replace(settings, **fewer, positions=None, images=None)), gpu_gib):
            changes = fewer
    return changes


def hours(samples: float, samples_per_second: float) -> float:
    """
    Wall time of so many samples.

    Raises:
        ValueError: the throughput is not above 0.
    """
    if not samples_per_second > 0:
        raise ValueError(f"{samples_per_second:g} samples per second: the throughput must be above 0.")
    return samples / samples_per_second / 3600


__all__ = ["Estimate", "Settings", "estimate", "fits", "hours", "propose"]
