"""
Next-token cross-entropy on supervised tokens only, a chunk of them at a time.

The stock loss builds `[batch, sequence, vocabulary]` logits in float32, most of them for tokens whose label is
`IGNORE_INDEX` (image tokens, questions, padding). Here the head sees supervised tokens only, and each chunk's gradient is
computed in the forward pass, while its logits exist: nothing is kept or computed twice.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from ..compat import is_under_functorch, keeps_graph
from ..constants import IGNORE_INDEX
from .efficient_layers import Kernel, exchanged_class, original_class


CHUNK_ELEMENTS = 2**23
"""Logits that exist at one time, in elements (32 MiB in float32): a chunk has `CHUNK_ELEMENTS // vocabulary` rows."""
MIN_CHUNK_ROWS, MIN_CHUNK_ROWS_TRAINED = 256, 512
"""Rows of a chunk at least: below this, reading the head's matrix (and of a trained head its gradient, too) takes longer than
computing with it."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of `linear(hidden, weight, bias)`, gradients computed with it in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, label_smoothing, chunk_rows):
        # hidden [num_rows, hidden_size], weight [vocabulary, hidden_size], targets [num_rows]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        compute_dtype = hidden.dtype
        head = weight.to(compute_dtype)
        head_bias = None if bias is None else bias.to(compute_dtype)
        vocabulary = weight.shape[0]

        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Sums of 16-bit products over many chunks are kept in float32: rounding after each chunk would add up.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros(vocabulary, dtype=torch.float32, device=hidden.device) if needs_bias else None

        # One chunk's logits in the dtype of the arithmetic and in float32, written anew for each chunk: [chunk, vocabulary]
        products = hidden.new_empty(min(chunk_rows, hidden.shape[0]), vocabulary)
        exact = products if compute_dtype == torch.float32 else torch.empty_like(products, dtype=torch.float32)

        for start in range(0, hidden.shape[0], chunk_rows):
            rows = hidden[start : start + chunk_rows]
            target = targets[start : start + chunk_rows, None]
            product, logits = products[: len(rows)], exact[: len(rows)]
            if head_bias is None:
                torch.mm(rows, head.t(), out=product)
            else:
                torch.addmm(head_bias, rows, head.t(), out=product)
            if exact is not products:
                logits.copy_(product)
            at_target = logits.gather(1, target)
            highest = logits.amax(dim=1, keepdim=True)
            mean = logits.mean(dim=1, keepdim=True) if label_smoothing else None
            total = logits.sub_(highest).exp_().sum(dim=1, keepdim=True)
            normaliser = total.log() + highest
            row_loss = normaliser - at_target
            if label_smoothing:
                row_loss = (1 - label_smoothing) * row_loss + label_smoothing * (normaliser - mean)
            loss += row_loss.sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue

            # softmax − target distribution: the gradient of the loss with respect to the logits
            grad_logits = logits.div_(total)
            grad_logits.scatter_add_(1, target, torch.full_like(at_target, label_smoothing - 1.0))
            if label_smoothing:
                grad_logits.sub_(label_smoothing / vocabulary)
            if needs_bias:
                grad_bias += grad_logits.sum(dim=0)
            if compute_dtype != torch.float32:
                grad_logits = product.copy_(grad_logits)
            if needs_hidden:
                torch.mm(grad_logits, head, out=grad_hidden[start : start + chunk_rows])
            if needs_weight:
                if compute_dtype == torch.float32:
                    grad_weight.addmm_(grad_logits.t(), rows)
                else:
                    grad_weight += grad_logits.t() @ rows

        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The loss of modeling_llava has no second derivative (create_graph=True): its gradients are computed in the "
                "forward pass. Compute a loss of your own from model(..., skip_logits=False).logits."
            )
        scale = torch.mul if keeps_graph() else torch.Tensor.mul_  # in place, they serve one backward pass
        grads = zip(ctx.saved_tensors, ctx.dtypes)
        return *(None if grad is None else scale(grad, grad_loss).to(dtype) for grad, dtype in grads), None, None, None


def causal_language_model_loss(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    lm_head: nn.Module,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float | None = None,
    shift_labels: torch.Tensor | None = None,
    supervised_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The stock causal language-model loss, equal in value and gradients, without its logits.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Output of the language model, before the head.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Token ids, not shifted; `IGNORE_INDEX` (-100) where nothing is supervised.
        lm_head (`nn.Module`):
            The head. A `nn.Linear` takes the fast path, also where FSDP2 or ZeRO-3 shard it or PEFT trains a copy of it;
            anything else (a LoRA-wrapped or quantised head) is called chunk by chunk under activation checkpointing.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Supervised tokens of the whole optimizer step (gradient accumulation, all processes), by which the summed loss is
            divided; those given here by default.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            As in `torch.nn.functional.cross_entropy`.
        shift_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Labels that are shifted already (sequence-parallel training); used in place of `labels`.
        supervised_indices (`torch.LongTensor` of shape `(num_supervised,)`, *optional*):
            Where the tokens are, in the flattened batch, whose next one has a label: without it, the device is asked.

    Returns:
        `torch.Tensor`: the loss, a float32 scalar. With nothing supervised it is 0 (stock: NaN) and keeps its
        gradient graph, so that a process of a distributed run with such a batch stays in step with the others.
    """
    label_smoothing = label_smoothing or 0.0
    if shift_labels is None:
        shift_labels = pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    else:
        supervised_indices = None  # they are those of `labels`
    targets = shift_labels.reshape(-1).to(hidden_states.device)
    hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])  # [batch_size * sequence_length, hidden_size]

    # Choosing rows depends on the data, which would break a compiled graph; torch.func cannot look into our function.
    if torch.compiler.is_compiling() or is_under_functorch():
        logits = lm_head(hidden_states).float()
        total = cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
        count = (targets != IGNORE_INDEX).sum()
    else:
        if supervised_indices is None:
            supervised_indices = (targets != IGNORE_INDEX).nonzero().squeeze(1)
        supervised = supervised_indices.to(targets.device)
        count = supervised.numel()
        total = _summed_loss(hidden_states[supervised], targets[supervised], lm_head, label_smoothing)

    if num_items_in_batch is None:
        num_items_in_batch = count
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device).clamp(min=1)
    else:
        num_items_in_batch = max(num_items_in_batch, 1)
    return total / num_items_in_batch


def _summed_loss(hidden, targets, lm_head, label_smoothing):
    # hidden [num_supervised, hidden_size], targets [num_supervised]
    lm_head = _trained_copy(lm_head)
    is_plain = original_class(lm_head).forward is nn.Linear.forward
    if is_plain and not is_sharded(lm_head) and lm_head.weight.device == hidden.device:
        return _linear_loss(hidden, targets, lm_head, label_smoothing)
    if is_plain and _gathers_when_called(lm_head):
        # A sharded head has its weights during its own call only, and every process must call it equally often,
        # however many tokens are supervised there: the whole loss is computed inside of one call.
        return _call_as(lm_head, _linear_loss, hidden, targets, lm_head, label_smoothing)

    def chunk_loss(rows, target):
        logits = lm_head(rows).float()  # may lie on another device (device_map)
        target = target.to(logits.device)
        return cross_entropy(logits, target, reduction="sum", label_smoothing=label_smoothing).to(rows.device)

    if hidden.shape[0] == 0:  # the head is called all the same: a sharded one must gather on every process
        return lm_head(hidden.new_zeros(1, hidden.shape[-1])).float().sum() * 0.0 + hidden.sum() * 0.0
    chunk_rows = hidden.shape[0] if is_sharded(lm_head) else _rows_per_chunk(lm_head, trained=True)
    total = 0.0
    for rows, target in zip(hidden.split(chunk_rows), targets.split(chunk_rows)):
        total = total + checkpoint(chunk_loss, rows, target, use_reentrant=False)
    return total


def _linear_loss(hidden, targets, lm_head, label_smoothing):
    weight = lm_head.weight
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    elif hidden.dtype != weight.dtype:
        hidden = hidden.to(weight.dtype)  # a float32 norm before a 16-bit head, as QLoRA has it
    chunk_rows = _rows_per_chunk(lm_head, trained=weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, lm_head.bias, targets, float(label_smoothing), chunk_rows)


def _rows_per_chunk(lm_head, trained: bool) -> int:
    vocabulary = getattr(lm_head, "out_features", None) or 2**15
    return max(CHUNK_ELEMENTS // vocabulary, MIN_CHUNK_ROWS_TRAINED if trained else MIN_CHUNK_ROWS)


def _trained_copy(lm_head):
    """The plain head inside of PEFT's wrapper for modules that are trained whole (`modules_to_save`)."""
    copies = getattr(lm_head, "modules_to_save", None)
    active = getattr(lm_head, "active_adapters", [])
    if isinstance(copies, nn.ModuleDict) and len(active) == 1 and active[0] in copies and not lm_head.disable_adapters:
        return copies[active[0]]
    return lm_head


def is_sharded(module: nn.Module) -> bool:
    """Whether each process holds a shard of the weights (FSDP2, DeepSpeed ZeRO-3)."""
    return any(type(p.data) is not torch.Tensor or hasattr(p, "ds_id") for p in module.parameters())


def _gathers_when_called(module: nn.Module) -> bool:
    """Whether FSDP2 or DeepSpeed ZeRO-3 gather this module's weights when it is called (tensor parallelism does not)."""
    return hasattr(module, "unshard") or hasattr(module.weight, "ds_id")


class _RunsInstead(Kernel):
    """Runs what it is given, inside of a call with all of a module's hooks."""

    prefix = "Head"

    def forward(self, function, *inputs):
        return function(*inputs)


def _call_as(module: nn.Module, function, *inputs):
    """Call `module`, with all of its hooks, but run `function` in place of its forward."""
    before = type(module)
    module.__class__ = exchanged_class(before, _RunsInstead)
    try:
        return module(function, *inputs)
    finally:
        module.__class__ = before
