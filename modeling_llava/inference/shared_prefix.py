"""
Attention for rows that share the keys and values of what stands before them: an image and the text in front of it.

    prefix of image A  [P_A tokens] ──┬── row 0: question, answer so far
                                      ├── row 1: question, answer so far
                                      └── row 2
    prefix of image B  [P_B tokens] ───── row 3
                                          row 4: a whole prompt of its own

A prefix exists once. All queries of its rows meet it in one matrix product, each row's own tokens are attended apart, and
the two are merged by their log-sum-exp: exactly the softmax over both (online softmax, Milakov & Gimelshein 2018).
Nothing is ever expanded or repeated per row.

Every forward pass is one row of packed tokens, `[1, num_tokens, hidden]`: prompts of different lengths need no padding.
The attention function takes everything that it needs from the step object (`Prefill` or `Decode`) that travels through the
language model as a keyword argument. So this works for every language model of transformers that hands keyword arguments on
to `ALL_ATTENTION_FUNCTIONS` and has full or sliding-window attention only (see `supports_shared_prefix`).
"""

from contextlib import contextmanager

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ..versions import is_older
from .prefix_cache import RowCache


ATTENTION_NAME = "llava_shared_prefix"

MAX_SCORES = 2**24
"""Attention scores against a prefix that exist at one time, in elements (64 MiB in float32)."""

HAS_MIXED_BMM = torch.version.cuda is not None and not is_older(torch.__version__, "2.8")
"""Whether `torch.bmm` multiplies 16-bit tensors into float32 on the GPU."""


class Prefill:
    """
    A pass over new tokens of several rows, packed one after the other.

    Args:
        lengths (`list[int]`): Tokens of each row.
        prefixes (`list[Prefix | None]`): What each row's tokens follow.
        write (`Callable[[int, int, torch.Tensor, torch.Tensor], None]`):
            Called with (layer, index of the row in this pass, its keys, its values), each
            `[num_kv_heads, length, head_dim]`.
        device (`torch.device`)
    """

    def __init__(self, lengths, prefixes, write, device):
        self.write = write
        ends = torch.tensor(lengths).cumsum(0).tolist()
        self.spans = [(end - length, end) for end, length in zip(ends, lengths)]
        starts = [prefix.end if prefix else 0 for prefix in prefixes]
        self.positions = torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths)]).to(
            device
        )  # [num_tokens]
        self.alone = [i for i, prefix in enumerate(prefixes) if prefix is None]
        last_positions = [start + length - 1 for start, length in zip(starts, lengths)]
        self.shared = _links_with_tokens(prefixes, self.spans, last_positions, device)

        # Rows with a prefix are short (questions): padded among themselves, they take one operation each.
        followers = [i for i, prefix in enumerate(prefixes) if prefix is not None]
        if followers:
            longest = max(lengths[i] for i in followers)
            column = torch.arange(longest, device=device)
            first = torch.tensor([self.spans[i][0] for i in followers], device=device)[:, None]
            length = torch.tensor([lengths[i] for i in followers], device=device)[:, None]
            self.valid = column < length  # [num_followers, longest]
            self.tokens = torch.where(self.valid, first + column, first)  # padding repeats the row's first token
            self.distance = column[:, None] - column  # [longest, longest], of a query to a key before it
        else:
            self.tokens = None

    def attend(self, layer, query, key, value, scaling, window):
        # query [1, num_heads, num_tokens, head_dim], key and value [1, num_kv_heads, num_tokens, head_dim]
        for row, (start, end) in enumerate(self.spans):
            self.write(layer, row, key[0, :, start:end], value[0, :, start:end])
        num_kv_heads, head_dim = key.shape[1], query.shape[-1]
        output = torch.empty((*query.shape[:3], value.shape[-1]), dtype=query.dtype, device=query.device)
        for row in self.alone:
            start, end = self.spans[row]
            span = slice(start, end)
            output[:, :, span] = _causal_attention(
                query[:, :, span], key[:, :, span], value[:, :, span], scaling, window
            )
        if self.tokens is None:
            return output

        num_followers, longest = self.tokens.shape
        own_query = query[0][:, self.tokens].unflatten(
            0, (num_kv_heads, -1)
        )  # [kv_heads, group, followers, longest, d]
        group = own_query.shape[1]
        own_query = own_query.transpose(1, 2).reshape(num_kv_heads, num_followers, group * longest, head_dim)
        mask = self.distance >= 0
        if window is not None:
            mask = mask & (self.distance < window)
        own, own_lse = partial_attention(
            own_query, key[0][:, self.tokens], value[0][:, self.tokens], mask.repeat(group, 1), scaling
        )
        valid, tokens = self.valid, self.tokens[self.valid]

        def unpad(tensor):  # [kv_heads, followers, group * longest, x] → [kv_heads, group, tokens of the followers, x]
            return tensor.unflatten(2, (group, longest)).transpose(1, 2)[:, :, valid]

        merged = query.new_zeros((num_kv_heads, group, query.shape[2], value.shape[-1]), dtype=torch.float32)
        lse = query.new_zeros((num_kv_heads, group, query.shape[2], 1), dtype=torch.float32)
        merged[:, :, tokens], lse[:, :, tokens] = unpad(own), unpad(own_lse)
        _attend_links(
            self.shared, layer, query[0].unflatten(0, (num_kv_heads, -1)), self.positions, scaling, window, merged, lse
        )
        output[:, :, tokens] = merged[:, :, tokens].flatten(0, 1).to(output.dtype)
        return output


class Decode:
    """A pass over one new token of every active row of a `RowCache`."""

    def __init__(self, rows: RowCache, device):
        self.rows = rows
        num_rows = len(rows.lengths)
        self.slots = torch.arange(num_rows, device=device)
        self.columns = torch.tensor(rows.lengths, device=device)  # where the new token goes
        self.longest = max(rows.lengths) + 1
        rows.reserve(self.longest)
        positions = [length + (prefix.end if prefix else 0) for length, prefix in zip(rows.lengths, rows.prefixes)]
        self.positions = torch.tensor(positions, device=device)  # [num_rows]
        self.shared = _links_with_tokens(rows.prefixes, [(i, i + 1) for i in range(num_rows)], positions, device)
        self.distance = self.columns[:, None] - torch.arange(self.longest, device=device)  # [num_rows, longest]

    def attend(self, layer, query, key, value, scaling, window):
        # query [1, num_heads, num_rows, head_dim], key and value [1, num_kv_heads, num_rows, head_dim]
        keys, values = self.rows.buffers(layer, key, value)
        keys[self.slots, :, self.columns] = key[0].transpose(0, 1)
        values[self.slots, :, self.columns] = value[0].transpose(0, 1)
        num_rows, num_kv_heads = len(self.slots), key.shape[1]
        keys, values = keys[:num_rows, :, : self.longest], values[:num_rows, :, : self.longest]
        own_query = query[0].transpose(0, 1).unflatten(1, (num_kv_heads, -1))  # [num_rows, kv_heads, group, head_dim]
        mask = self.distance >= 0
        if window is not None:
            mask = mask & (self.distance < window)
        mask = mask[:, None, None]  # [num_rows, 1, 1, longest]
        if not self.shared:
            output = scaled_dot_product_attention(own_query, keys, values, attn_mask=mask, scale=scaling)
            return output.flatten(1, 2).transpose(0, 1)[None]
        own, own_lse = partial_attention(own_query, keys, values, mask, scaling)
        merged, lse = own.permute(1, 2, 0, 3).contiguous(), own_lse.permute(1, 2, 0, 3).contiguous()
        _attend_links(
            self.shared, layer, query[0].unflatten(0, (num_kv_heads, -1)), self.positions, scaling, window, merged, lse
        )
        return merged.flatten(0, 1).to(query.dtype)[None]  # [1, num_heads, num_rows, head_dim]


def _links_with_tokens(prefixes, spans, last_positions, device):
    """Each link of the rows' prefixes: (link, indices of the tokens after it or `None` for all, their last position)."""
    rows_of = {}
    for row, prefix in enumerate(prefixes):
        for link in prefix.chain() if prefix else []:
            rows_of.setdefault(id(link), (link, []))[1].append(row)
    shared = []
    for link, rows in rows_of.values():
        tokens = None
        if len(rows) < len(spans):
            tokens = torch.cat([torch.arange(*spans[row]) for row in rows]).to(device)
        shared.append((link, tokens, max(last_positions[row] for row in rows)))
    return shared


def _attend_links(shared, layer, query, positions, scaling, window, merged, lse):
    """Adds to `merged` and `lse`, in place, what the tokens find in the prefixes before them.

    query, merged `[num_kv_heads, group, num_tokens, head_dim]`, lse `[num_kv_heads, group, num_tokens, 1]`."""
    for link, tokens, last_position in shared:
        index = slice(None) if tokens is None else tokens
        keys, values = link.keys[layer], link.values[layer]
        found_query, found_at = query[:, :, index], positions[index]
        num_kv_heads, group, num_tokens, _ = found_query.shape
        mask = None
        if window is not None and last_position - link.start >= window:
            key_positions = torch.arange(link.start, link.end, device=positions.device)
            mask = (found_at[:, None] - key_positions < window).repeat(group, 1)  # [group * num_tokens, link]
        part, part_lse = partial_attention(
            found_query.reshape(num_kv_heads, group * num_tokens, -1), keys, values, mask, scaling
        )
        part, part_lse = part.unflatten(1, (group, -1)), part_lse.unflatten(1, (group, -1))
        total = torch.logaddexp(lse[:, :, index], part_lse)
        # A token sees itself, so that `total` is finite; a prefix out of its window weighs exp(−∞) = 0.
        own_weight, part_weight = (lse[:, :, index] - total).exp_(), (part_lse - total).exp_()
        merged[:, :, index] = merged[:, :, index] * own_weight + part * part_weight
        lse[:, :, index] = total


def partial_attention(query, key, value, mask, scaling):
    """
    Softmax attention over a part of the keys, with what is needed to merge it with another part.

    Args:
        query (`torch.Tensor` of shape `(*, num_queries, head_dim)`)
        key, value (`torch.Tensor` of shape `(*, num_keys, head_dim)`)
        mask (`torch.Tensor` of shape `(*, num_queries, num_keys)`, *optional*): `True` where a query sees a key.
        scaling (`float`)

    Returns:
        The output `(*, num_queries, head_dim)` and the log-sum-exp `(*, num_queries, 1)`, in float32. A query that sees
        nothing has output 0 and log-sum-exp −∞.
    """
    rows = max(1, MAX_SCORES * query.shape[-2] // max(1, query[..., 0].numel() * key.shape[-2]))
    if rows < query.shape[-2]:
        parts = [
            partial_attention(
                query[..., i : i + rows, :], key, value, None if mask is None else mask[..., i : i + rows, :], scaling
            )
            for i in range(0, query.shape[-2], rows)
        ]
        return torch.cat([part[0] for part in parts], dim=-2), torch.cat([part[1] for part in parts], dim=-2)
    scores = _product(query, key.transpose(-1, -2)).mul_(scaling)  # [*, num_queries, num_keys]
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf)
    highest = scores.amax(dim=-1, keepdim=True)
    scores = scores.sub_(highest.clamp(min=torch.finfo(torch.float32).min)).exp_()
    total = scores.sum(dim=-1, keepdim=True)
    output = _product(scores, value) / total.clamp(min=torch.finfo(torch.float32).tiny)
    return output, highest + total.log()


def _product(first, second):
    """`first @ second` in float32: scores that were rounded to 16 bits make an answer several times less exact."""
    if second.dtype == torch.float32 or second.device.type != "cuda" or not HAS_MIXED_BMM:
        return torch.matmul(first.float(), second.float())
    shape = (*first.shape[:-1], second.shape[-1])
    first = first.flatten(0, -3).to(second.dtype)
    return torch.bmm(first, second.flatten(0, -3), out_dtype=torch.float32).view(shape)


def _causal_attention(query, key, value, scaling, window):
    """One row that follows nothing. query `[1, num_heads, length, head_dim]`, key, value `[1, num_kv_heads, …]`."""
    length, group = query.shape[2], query.shape[1] // key.shape[1]
    mask = None
    if window is not None and length > window:
        position = torch.arange(length, device=query.device)
        distance = position[:, None] - position
        mask = (distance >= 0) & (distance < window)
    if group > 1:  # not `enable_gqa`: in float32 and on older GPUs it builds all scores
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)


class _CannotShare(RuntimeError):
    """A language model whose attention needs more than `shared_prefix_attention` gives."""


class _Probe:
    """A step that notes which layers attend, in their order."""

    def __init__(self):
        self.layers = []

    def attend(self, layer, query, key, value, scaling, window):
        self.layers.append(layer)
        return query.new_zeros((*query.shape[:3], value.shape[-1]))


def shared_prefix_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, llava_step=None, **kwargs
):
    """An attention function of transformers that does what the step object says (see the module's text)."""
    if llava_step is None:
        raise _CannotShare("keyword arguments are not handed on to the attention function")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise _CannotShare("scores are more than scaled")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = llava_step.attend(module.layer_idx, query, key, value, scaling, sliding_window)
    return output.transpose(1, 2).contiguous(), None  # [1, num_tokens, num_heads, head_dim]


AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)


@contextmanager
def shared_prefix_implementation(config):
    """The language model of this configuration attends through `shared_prefix_attention`, for the duration."""
    before = config._attn_implementation
    config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def supports_shared_prefix(language_model, device: torch.device) -> bool:
    """
    Whether a language model, which computes its embeddings on `device`, has full or sliding-window attention only, takes it from the interface, and computes a token's
    keys from this token and its position alone.
    """
    config = language_model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    sinks = any(hasattr(module, "sinks") for module in language_model.modules())
    return bool(
        language_model._supports_attention_backend
        and kinds <= {"full_attention", "sliding_attention"}
        and not capped
        and not sinks
        and not _rope_types(config) & {"dynamic", "longrope"}  # their angles go by the longest row of a pass
        and _hands_on_steps(language_model, device)
    )


@torch.inference_mode()
def _hands_on_steps(language_model, device: torch.device) -> bool:
    """Whether each layer calls the attention function once, with the step; checked with a probe forward of one token."""
    embedding, probe = language_model.get_input_embeddings().weight, _Probe()
    token = torch.zeros(1, 1, embedding.shape[1], dtype=embedding.dtype, device=device)
    position = torch.zeros(1, 1, dtype=torch.long, device=device)
    try:
        with shared_prefix_implementation(language_model.config):
            language_model(
                inputs_embeds=token, position_ids=position, attention_mask=None, use_cache=False, llava_step=probe
            )
    except (_CannotShare, TypeError):  # TypeError: no keyword arguments beyond its own
        return False
    # Others: attention that was chosen when the model was built, that is computed twice, layers that are gone through again.
    return probe.layers == list(range(language_model.config.num_hidden_layers))


def _rope_types(config) -> set[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    every = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]  # by kind of layer
    return {one["rope_type"] for one in every if "rope_type" in one}


__all__ = [
    "Decode",
    "Prefill",
    "shared_prefix_implementation",
    "supports_shared_prefix",
]
