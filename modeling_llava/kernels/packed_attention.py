"""
Attention for packs: samples concatenated into one sequence, none of which sees another.

    input_ids     a a a a a b b c c c c      cu_seq_lens_q = [0, 5, 7, 11]
    position_ids  0 1 2 3 4 0 1 0 1 2 3

    a ■ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚
    a ■ ■ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚     A dense mask has T² entries, most of them for nothing. Here only the triangles
    a ■ ■ ■ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚     are computed:
    a ■ ■ ■ ■ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚     - on a GPU that FlashAttention supports (sm80 and later, 16 bit) in one kernel,
    a ■ ■ ■ ■ ■ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚       PyTorch's `varlen_attn`;
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

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from ..compat import can_set_attention


logger = logging.get_logger(__name__)

VARLEN = "varlen"
"""Name under which transformers finds this attention."""


def mask_of_pack(language_model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor | None:
    """
    The `attention_mask` with which a language model takes a pack. For "varlen" it is empty: transformers takes any 4-D mask as it
    is, and without one would look whether `position_ids` restart, and wait for the device to know.
    """
    name = language_model.config._attn_implementation
    if name == VARLEN:
        return states.new_empty(1, 1, 0, 0)
    if "flash" not in name:
        logger.warning_once(
            f"attn_implementation={name!r} builds an attention mask of all tokens × all tokens for a pack. "
            'Set model.set_attn_implementation({"text_config": "varlen"}).'
        )
    return None


def varlen_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    segment_lengths: list[int] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Causal attention within each sample of a pack; stock `sdpa` where no pack is described.

    Args:
        query, key, value (`torch.Tensor` of shape `(batch_size, num_heads, sequence_length, head_dim)`):
            After the rotary embedding. Fewer heads of keys and values than of queries are shared by groups (GQA).
        attention_mask: Of a pack what [`mask_of_pack`] returned, otherwise that of `sdpa`.
        dropout (`float`, *optional*, defaults to 0.0), scaling (`float`, *optional*, defaults to `head_dim ** -0.5`):
            Share of attention weights that are dropped; factor of the scores.
        sliding_window (`int`, *optional*): Tokens that a query sees, itself included, within its sample (Mistral).
        cu_seq_lens_q (`torch.IntTensor` of shape `(num_samples + 1,)`, *optional*):
            Where the samples begin in the flattened batch, and its end, in tokens. `cu_seq_lens_k` equals it.
        max_length_q (`int`, *optional*), segment_lengths (`list[int]`, *optional*):
            Length of the longest sample, and of each, in tokens: given, the device is not asked for them.

    Returns:
        `tuple`: the output, of shape `(batch_size, sequence_length, num_heads, head_dim)`, and `None`.

    Raises:
        ValueError: a pack came with a mask, with earlier tokens (a cache), or with an attention that is not plain and causal;
            the language model does not hand `cu_seq_lens_q` to its attention layers.
    """
    if cu_seq_lens_q is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise ValueError(
                "The language model does not hand cu_seq_lens_q to its attention layers, so that a pack would need a mask of "
                "all tokens × all tokens. Do not pack."
            )
        if attention_mask is None and _builds_all_scores(query, key, value):
            is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            key, value, module = _repeat_heads(key, query), _repeat_heads(value, query), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )

    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"A pack (cu_seq_lens_q) has {query.shape[2]} queries but {key.shape[2]} keys: it cannot continue a cache."
        )
    if isinstance(attention_mask, torch.Tensor) and attention_mask.numel():
        raise ValueError(
            "A pack (cu_seq_lens_q) came with an attention_mask. Leave the mask out: a pack has no padding. (If you gave none, "
            "transformers made it: a language model alone takes `mask_of_pack`, a compiled one padded batches only.)"
        )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if not is_causal or unsupported:
        what = " and ".join(unsupported) if unsupported else "bidirectional attention"
        raise ValueError(f"Packed attention has no {what}, which {type(module).__name__} requires. Do not pack.")

    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        # the rotary embedding leaves queries and keys in float32; SDPA would cast, the kernels refuse
        dtype = torch.get_autocast_dtype(query.device.type)
    elif value.dtype != query.dtype:
        dtype = value.dtype
    batch_size, num_heads, length, _ = query.shape
    # [batch_size, heads, length, head_dim] → [batch_size * length, heads, head_dim]; a view for a single row
    query, key, value = (states.to(dtype).transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    if dropout == 0.0 and _flash_takes(query.device, dtype, key, value) and _torch_varlen() is not None:
        longest = int(cu_seq_lens_q.diff().max()) if max_length_q is None else max_length_q
        output = _torch_varlen_attention(query, key, value, cu_seq_lens_q, longest, scaling, sliding_window)
    else:
        lengths = cu_seq_lens_q.diff().tolist() if segment_lengths is None else segment_lengths
        output = _sdpa_per_segment(query, key, value, lengths, dropout, scaling, sliding_window)
    return output.view(batch_size, length, num_heads, value.shape[-1]), None


def _flash_takes(device: torch.device, dtype: torch.dtype, key: torch.Tensor, value: torch.Tensor) -> bool:
    head_dim = key.shape[-1]
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and _supports_flash(device.index)
        and head_dim == value.shape[-1]
        and head_dim <= 256
        and head_dim % 8 == 0
    )


@functools.cache
def _supports_flash(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 0)


@functools.cache
def _torch_varlen():
    """PyTorch's FlashAttention for packs; None before the version that has windows and grouped heads."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if "window_size" in known and "enable_gqa" in known else None


def _torch_varlen_attention(query, key, value, cu_seq_lens, longest, scaling, sliding_window):
    window = -1 if sliding_window is None else sliding_window - 1  # there: tokens to the left, without itself
    return _torch_varlen()(
        query, key, value, cu_seq_lens, cu_seq_lens, longest, longest,
        scale=scaling, window_size=(window, 0), enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip


def _sdpa_per_segment(query, key, value, lengths, dropout, scaling, sliding_window):
    """One causal SDPA per sample: exact everywhere, and on the CPU as fast as the triangles are small."""
    if sum(lengths) != query.shape[0]:
        raise ValueError(f"cu_seq_lens_q ends at token {sum(lengths)}, but the pack has {query.shape[0]} tokens.")
    if _builds_all_scores(query, key, value):
        key, value = _repeat_heads(key, query), _repeat_heads(value, query)
    arguments = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    # `split` is undone by one concatenation in the backward pass; slices would each be padded to the whole row
    parts = [states.transpose(0, 1)[None].split(lengths, dim=2) for states in (query, key, value)]
    outputs = []
    for q, k, v in zip(*parts):  # each [1, heads, segment_length, head_dim]
        mask = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            whole = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
            mask = whole.tril().triu(1 - sliding_window)  # [segment_length, segment_length], a byte each
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **arguments))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)[0]  # [num_tokens, heads, head_dim]


def _builds_all_scores(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether SDPA would compute grouped heads by its plain kernel: in float32 and on GPUs before sm80."""
    return query.is_cuda and not _flash_takes(query.device, query.dtype, key, value)


def _repeat_heads(states: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    group = query.shape[1] // states.shape[1]
    return states if group == 1 else states.repeat_interleave(group, dim=1)


def use_varlen_attention(model: PreTrainedModel) -> None:
    """
    Let the language model of a LLaVA (ours or stock, without adapters around it) use "varlen" attention; the vision tower keeps its
    own.

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


@torch.no_grad()
def packed_attention_error(language_model: PreTrainedModel) -> float:
    """
    How much the samples of a pack influence each other in this language model: the relative error of two short random samples
    computed packed instead of one by one. 0 but for rounding where packing is right; about 1 where samples share state (Mamba, linear
    attention), or their lengths are ignored.

    Raises:
        ValueError: the model's attention has no packed form, or does not receive `cu_seq_lens_q` (StableLM).
    """
    embedding = language_model.get_input_embeddings().weight
    ids = torch.randint(0, embedding.shape[0], (1, 12), generator=torch.Generator().manual_seed(0)).to(
        embedding.device
    )
    lens = torch.tensor([0, 7, 12], dtype=torch.int32, device=embedding.device)
    packed = {
        "position_ids": torch.cat([torch.arange(7), torch.arange(5)])[None].to(embedding.device),
        "cu_seq_lens_q": lens, "cu_seq_lens_k": lens, "max_length_q": 7, "max_length_k": 7,
        "attention_mask": mask_of_pack(language_model, embedding),
    }  # fmt: skip
    was_training = language_model.training
    language_model.eval()
    try:
        together, *apart = (
            language_model(input_ids=part, use_cache=False, **arguments).last_hidden_state.float()
            for part, arguments in ((ids, packed), (ids[:, :7], {}), (ids[:, 7:], {}))
        )
    finally:
        language_model.train(was_training)
    apart = torch.cat(apart, dim=1)
    return ((together - apart)[:, 7:].norm() / apart[:, 7:].norm()).item()


AttentionInterface.register(VARLEN, varlen_attention_forward)
AttentionMaskInterface.register(VARLEN, sdpa_mask)

__all__ = [
    "VARLEN",
    "mask_of_pack",
    "packed_attention_error",
    "use_varlen_attention",
    "varlen_attention_forward",
]
