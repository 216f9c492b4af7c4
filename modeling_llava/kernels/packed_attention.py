"""
Attention for packs: several samples behind one another in one row, none of which sees another.

    input_ids     a a a a a b b c c c c      cu_seq_lens_q = [0, 5, 7, 11]
    position_ids  0 1 2 3 4 0 1 0 1 2 3

    a ■ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚
    a ■ ■ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚     A dense mask costs T² positions, most of them for nothing. Here only the triangles
    a ■ ■ ■ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚     are computed:
    a ■ ■ ■ ■ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚     - on a GPU that FlashAttention supports (sm80 and later, 16 bit) in one kernel:
    a ■ ■ ■ ■ ■ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚       flash-attn 3 or PyTorch's own `varlen_attn`, or flash-attn 2 where PyTorch has none;
    b ⬚ ⬚ ⬚ ⬚ ⬚ ■ ⬚ ⬚ ⬚ ⬚ ⬚     - elsewhere (CPU, float32, older GPUs) one causal SDPA per sample.
    b ⬚ ⬚ ⬚ ⬚ ⬚ ■ ■ ⬚ ⬚ ⬚ ⬚
    c ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ■ ⬚ ⬚ ⬚     Without `cu_seq_lens_q` (padded batches, generation) it is stock `sdpa` with its mask.
    c ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ■ ■ ⬚ ⬚
    c ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ■ ■ ■ ⬚
    c ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ■ ■ ■ ■

It is registered with transformers under the name "varlen" for every model that uses `AttentionInterface`. Choose it
for the language model of a LLaVA by `use_varlen_attention(model)`; nothing about it is saved with a checkpoint.
"""

import functools
import importlib.util
import inspect
import weakref

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from ..compat import (
    can_set_attention,
    cpu_flash_attention,
    cpu_flash_attention_backward,
    flash_attention_forward,
    tensor_version,
)


logger = logging.get_logger(__name__)

VARLEN = "varlen"
"""Name under which transformers finds this attention."""


class DeferredMask:
    """
    A mask matrix that is built when something needs it.

    transformers builds a model's mask before its attention layers are asked, and cannot know that they will go by
    `cu_seq_lens_q`. For a pack that mask is `[T, T]`: here its construction is put off, and for packs never happens.
    """

    is_refused = False
    """Whether a pack's mask is an error: set while a model is tried."""

    def __init__(self, arguments: dict):
        self.arguments = arguments
        self.mask = None

    def build(self) -> torch.Tensor | None:
        """The mask of stock `sdpa`, `[batch_size, 1, T, T]`, the same object for every layer."""
        if self.arguments is not None:
            if not self.arguments["allow_is_causal_skip"] and not self.arguments.get("allow_is_bidirectional_skip"):
                if self.is_refused:
                    raise ValueError(
                        "the language model does not hand cu_seq_lens_q to its attention layers, so that a pack would "
                        "need a mask of all positions × all positions. Do not pack."
                    )
                logger.warning_once(
                    "position_ids restart inside a row, but no cu_seq_lens_q came with them: a dense mask of "
                    f"{self.arguments['q_length']}² positions is built. Pass on everything that the collator returned."
                )
            self.mask, self.arguments = sdpa_mask(**self.arguments), None
        return self.mask


def varlen_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, **arguments
) -> torch.Tensor | DeferredMask | None:
    """Stock `sdpa`'s mask, but deferred where the row may be a pack: no padding mask, no earlier positions."""
    arguments = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length,
        "q_offset": q_offset, "kv_offset": kv_offset, "allow_is_causal_skip": True, **arguments,
    }  # fmt: skip
    may_be_pack = (
        arguments.get("attention_mask") is None
        and isinstance(q_offset, int)
        and q_offset == 0
        and 1 < q_length == kv_length
        and not arguments.get("use_vmap", False)  # someone's own mask function: it is to be applied
        and not is_tracing()
    )
    return DeferredMask(arguments) if may_be_pack else sdpa_mask(**arguments)


def varlen_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | DeferredMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Causal attention within each sample of a pack; stock `sdpa` where no pack is described.

    Args:
        module (`nn.Module`):
            The attention layer.
        query (`torch.Tensor` of shape `(batch_size, num_heads, sequence_length, head_dim)`):
            Queries, after the rotary embedding.
        key, value (`torch.Tensor` of shape `(batch_size, num_key_value_heads, sequence_length, head_dim)`):
            Keys and values; fewer heads than queries are shared by groups (GQA), without repeating them.
        attention_mask:
            What `varlen_mask` returned.
        dropout (`float`, *optional*, defaults to 0.0):
            Share of attention weights that are dropped.
        scaling (`float`, *optional*):
            Factor of the scores, `head_dim ** -0.5` by default.
        sliding_window (`int`, *optional*):
            Positions that a query sees, itself included, within its sample (Mistral).
        cu_seq_lens_q (`torch.IntTensor` of shape `(num_samples + 1,)`, *optional*):
            Where the samples begin in the flattened batch, and its end, in positions. `cu_seq_lens_k` equals it.
        max_length_q (`int`, *optional*):
            Length of the longest sample, in positions. `max_length_k` equals it.

    Returns:
        `tuple`: the output, of shape `(batch_size, sequence_length, num_heads, head_dim)`, and `None`.

    Raises:
        ValueError: a pack came with a mask, with earlier positions (a cache), or with an attention that is not plain
            and causal.
    """
    if cu_seq_lens_q is None:
        if isinstance(attention_mask, DeferredMask):
            attention_mask = attention_mask.build()
            attention_mask = None if attention_mask is None else attention_mask.to(query.device)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )

    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"A pack (cu_seq_lens_q) has {query.shape[2]} queries but {key.shape[2]} keys per row: it cannot continue a "
            "cache. Pass cu_seq_lens_q only when all positions are computed at once."
        )
    if isinstance(attention_mask, torch.Tensor):
        raise ValueError(
            "A pack (cu_seq_lens_q) came with an attention_mask. Leave the mask out: a pack has no padding. (If you gave "
            "none, torch.compile made it: a compiled model takes padded batches only.)"
        )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if not is_causal or unsupported:
        what = " and ".join(unsupported) if unsupported else "bidirectional attention"
        raise ValueError(
            f"Packed attention does not know {what}, which {type(module).__name__} asks for. Do not pack."
        )

    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        # the rotary embedding leaves queries and keys in float32; SDPA would cast, the kernels refuse
        dtype = torch.get_autocast_dtype(query.device.type)
    elif value.dtype != query.dtype:
        dtype = value.dtype
    batch_size, num_heads, length, _ = query.shape
    # [batch_size, heads, length, head_dim] → [batch_size * length, heads, head_dim]; a view for a single row
    query, key, value = (states.to(dtype).transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    compute = _choose_kernel(query.device, dtype, query.shape[-1], value.shape[-1], dropout)
    if max_length_q is None and compute is not _sdpa_per_segment:
        max_length_q = max(_segment_lengths(cu_seq_lens_q))
    output = compute(
        query,
        key,
        value,
        cu_seq_lens_q,
        max_length_q,
        dropout=dropout,
        scaling=scaling,
        sliding_window=sliding_window,
    )
    return output.view(batch_size, length, num_heads, value.shape[-1]), None


def _choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, dropout: float):
    """The fastest implementation that is right here. All take `[num_positions, heads, head_dim]`."""
    flash = (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and _supports_flash(device.index)
        and head_dim == value_dim
        and head_dim <= 256
        and head_dim % 8 == 0
    )
    if flash and dropout == 0.0 and _is_hopper(device.index) and _has("flash_attn_interface"):
        return functools.partial(_flash_attn, implementation="flash_attention_3")
    if flash and dropout == 0.0 and _torch_varlen() is not None:
        return _torch_varlen_attn
    if flash and _has("flash_attn"):
        return functools.partial(_flash_attn, implementation="flash_attention_2")
    return _sdpa_per_segment


@functools.cache
def _supports_flash(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 0)


@functools.cache
def _is_hopper(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index)[0] == 9


@functools.cache
def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _torch_varlen():
    """PyTorch's FlashAttention for packs; None before the version that has windows and grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if "window_size" in known and "enable_gqa" in known else None


def _torch_varlen_attn(query, key, value, cu_seq_lens, max_length, *, dropout, scaling, sliding_window):
    window = -1 if sliding_window is None else sliding_window - 1  # there: positions to the left, without itself
    return _torch_varlen()(
        query,
        key,
        value,
        cu_seq_lens,
        cu_seq_lens,
        max_length,
        max_length,
        scale=scaling,
        window_size=(window, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _flash_attn(query, key, value, cu_seq_lens, max_length, *, dropout, scaling, sliding_window, implementation):
    return flash_attention_forward(
        query[None],
        key[None],
        value[None],
        attention_mask=None,
        query_length=query.shape[0],
        is_causal=True,
        dropout=dropout,
        softmax_scale=scaling,
        sliding_window=sliding_window,
        cu_seq_lens_q=cu_seq_lens,
        cu_seq_lens_k=cu_seq_lens,
        max_length_q=max_length,
        max_length_k=max_length,
        attn_implementation=implementation,
    )[0]


def _sdpa_per_segment(query, key, value, cu_seq_lens, max_length, *, dropout, scaling, sliding_window):
    """One causal SDPA per sample: exact everywhere, and on the CPU as fast as the triangles are small."""
    lengths = _segment_lengths(cu_seq_lens)
    if sum(lengths) != query.shape[0]:
        raise ValueError(
            f"cu_seq_lens_q ends at position {sum(lengths)}, but the pack has {query.shape[0]} positions."
        )
    is_windowed = sliding_window is not None and max(lengths) > sliding_window
    if query.device.type == "cpu" and dropout == 0.0 and not is_windowed and _has_cpu_kernel():
        return _CpuSegments.apply(query, key, value, lengths, scaling)
    group = query.shape[1] // key.shape[1]
    if group > 1:  # not `enable_gqa`: in float32 and on older GPUs it builds all scores
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    arguments = {"dropout_p": dropout, "scale": scaling}
    # `split` is undone by one concatenation in the backward pass; slices would each be padded to the whole row
    parts = [states.transpose(0, 1)[None].split(lengths, dim=2) for states in (query, key, value)]
    outputs = []
    for q, k, v in zip(*parts):  # each [1, heads, segment_length, head_dim]
        if sliding_window is not None and q.shape[2] > sliding_window:
            outputs.append(_windowed(q, k, v, sliding_window, arguments))
        else:
            outputs.append(scaled_dot_product_attention(q, k, v, is_causal=True, **arguments))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)[0]  # [num_positions, heads, head_dim]


class _CpuSegments(torch.autograd.Function):
    """
    What SDPA runs on the CPU, sample by sample, straight into one row. By SDPA itself every sample's output is kept
    for the backward pass beside the row that they are joined to.
    """

    @staticmethod
    def forward(ctx, query, key, value, lengths, scaling):
        # [num_positions, heads, head_dim] → [1, heads, num_positions, head_dim], all views
        query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
        output = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
        log_sums = []
        parts = zip(output.split(lengths), *(states.split(lengths, dim=2) for states in (query, key, value)))
        for out, q, k, v in parts:
            computed, log_sum = cpu_flash_attention(q, k, v, scaling)
            out.copy_(computed[0].transpose(0, 1))
            log_sums.append(log_sum)
        ctx.save_for_backward(query, key, value, output, *log_sums)
        ctx.lengths, ctx.scaling = lengths, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, output, *log_sums = ctx.saved_tensors
        grads = [torch.empty_like(states) for states in (query, key, value)]  # of the same strides
        states = [query, key, value, output.transpose(0, 1)[None], grad_output.transpose(0, 1)[None], *grads]
        for log_sum, q, k, v, out, grad, *grad_parts in zip(
            log_sums, *(tensor.split(ctx.lengths, dim=2) for tensor in states)
        ):
            computed = cpu_flash_attention_backward(grad, q, k, v, out, log_sum, ctx.scaling)
            for part, gradient in zip(grad_parts, computed):
                part.copy_(gradient)
        return *(grad[0].transpose(0, 1) for grad in grads), None, None


@functools.cache
def _has_cpu_kernel() -> bool:
    """Whether this PyTorch has SDPA's CPU kernel in the form that is used here, with grouped heads: it is tried."""
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            states = [torch.randn(5, heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
            ours = _CpuSegments.apply(*states, [3, 2], None)
            parts = [s.transpose(0, 1)[None].split([3, 2], dim=2) for s in states]
            expected = [scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True) for p in zip(*parts)]
            expected = torch.cat(expected, dim=2)[0].transpose(0, 1)
            pairs = zip(*(torch.autograd.grad(out.pow(2).sum(), states) for out in (ours, expected)))
            return torch.allclose(ours, expected, atol=1e-5) and all(torch.allclose(*p, atol=1e-4) for p in pairs)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _windowed(query, key, value, window, arguments):
    """
    A sample longer than the sliding window, a window of queries at a time: masks stay at `window × 2 window`.

    Query i sees keys i − window + 1 … i, so a block of queries needs the keys of its own block and of the one before.
    """
    length, outputs = query.shape[2], []
    for start in range(0, length, window):
        end, first = min(start + window, length), max(start - window + 1, 0)
        rows = torch.arange(start, end, device=query.device)[:, None]
        columns = torch.arange(first, end, device=query.device)[None]
        mask = (columns <= rows) & (columns > rows - window)  # [queries, keys]
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, start:end], key[:, :, first:end], value[:, :, first:end], attn_mask=mask, **arguments
            )
        )
    return torch.cat(outputs, dim=2)


def _segment_lengths(cu_seq_lens: torch.Tensor) -> list[int]:
    """Lengths of a pack's samples. Asked once per layer with the same tensor: on a GPU only the first one waits."""
    global _last_lengths
    known, version, lengths = _last_lengths
    if known() is not cu_seq_lens or version != tensor_version(cu_seq_lens):
        ends = cu_seq_lens.tolist()
        lengths = [end - start for start, end in zip(ends, ends[1:])]
        _last_lengths = (weakref.ref(cu_seq_lens), tensor_version(cu_seq_lens), lengths)
    return lengths


_last_lengths = (lambda: None, -1, [])


def use_varlen_attention(model: PreTrainedModel) -> None:
    """
    Let the language model of a LLaVA use "varlen" attention; the vision tower keeps its own.

    Args:
        model ([`LlavaForConditionalGeneration`], [`LlavaModel`] or stock ones):
            The model, without adapters around it or the base model inside them.

    Raises:
        ValueError: the language model's attention is written in a way that transformers cannot replace.
    """
    language_model = getattr(model, "model", model).language_model
    if not can_set_attention(language_model):
        raise ValueError(
            f"{type(language_model).__name__} does not use transformers' AttentionInterface: its attention cannot be "
            "replaced, and packed samples would see each other. Do not pack."
        )
    model.set_attn_implementation({"text_config": VARLEN})
    _has_cpu_kernel()  # now: tried within a checkpointed layer, its tensors would be counted as the layer's


def packs_cheaply(language_model: PreTrainedModel) -> bool:
    """Whether the attention of a language model goes by `cu_seq_lens_q`, and needs no mask for a pack."""
    name = language_model.config._attn_implementation
    return name == VARLEN or "flash" in name


@torch.no_grad()
def packs_leak(language_model: PreTrainedModel) -> float:
    """
    How much the samples of a pack influence each other in this language model, as a relative error: two short random
    samples are computed packed and one by one. 0 but for rounding where packing is right; about 1 where state passes
    between samples by another way than attention (Mamba, linear attention), or the lengths are ignored.

    Raises:
        ValueError: the model's attention does not know what packs need, or is not handed their lengths (StableLM): the
            mask of the whole pack would be built.
    """
    embedding = language_model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, embedding.shape[0], (1, 12), generator=generator).to(embedding.device)
    lens = torch.tensor([0, 7, 12], dtype=torch.int32, device=embedding.device)
    packed = {
        "position_ids": torch.cat([torch.arange(7), torch.arange(5)])[None].to(embedding.device),
        "cu_seq_lens_q": lens, "cu_seq_lens_k": lens, "max_length_q": 7, "max_length_k": 7,
    }  # fmt: skip
    was_training = language_model.training
    language_model.eval()
    try:
        DeferredMask.is_refused = True
        together = language_model(input_ids=ids, use_cache=False, **packed).last_hidden_state
        DeferredMask.is_refused = False
        apart = [
            language_model(input_ids=part, use_cache=False).last_hidden_state for part in (ids[:, :7], ids[:, 7:])
        ]
    finally:
        DeferredMask.is_refused = False
        language_model.train(was_training)
    apart = torch.cat(apart, dim=1).float()
    return ((together.float() - apart)[:, 7:].norm() / apart[:, 7:].norm()).item()


AttentionInterface.register(VARLEN, varlen_attention_forward)
AttentionMaskInterface.register(VARLEN, varlen_mask)

__all__ = ["VARLEN", "packs_cheaply", "packs_leak", "use_varlen_attention", "varlen_attention_forward", "varlen_mask"]
