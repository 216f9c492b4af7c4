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
The attention function takes everything that it needs from the `Step` that travels through the language model as a keyword
argument. So this works for every language model of transformers that hands keyword arguments on to
`ALL_ATTENTION_FUNCTIONS` and has full or sliding-window attention only (see `supports_shared_prefix`).
"""

from contextlib import ExitStack, contextmanager

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ..constants import is_older
from .prefix_cache import RowCache


ATTENTION_NAME = "llava_shared_prefix"

MAX_SCORES = 2**24
"""Attention scores against a prefix that exist at one time, in elements (64 MiB in float32)."""

HAS_MIXED_BMM = torch.version.cuda is not None and not is_older(torch.__version__, "2.8")
"""Whether `torch.bmm` multiplies 16-bit tensors into float32 on the GPU."""


class Step:
    """
    A pass over new tokens of every row of a `RowCache`, packed one after the other: whole prompts, questions after a prefix,
    the latest tokens of answers.

    Args:
        cache (`RowCache`):
            Gets the tokens' keys and values; its `lengths` are the caller's to update afterwards.
        lengths (`list[int]`): New tokens of each row.
        device (`torch.device`): Where the embeddings are.

    Attributes:
        positions (`torch.Tensor` of shape `(num_tokens,)`)
        last (`torch.Tensor` of shape `(num_rows,)`): Index of each row's last token in the pass.
    """

    def __init__(self, cache: RowCache, lengths: list[int], device: torch.device):
        self.cache = cache
        starts = [len(prefix.ids) if prefix else 0 for prefix in cache.prefixes]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        spans = [(end - length, end) for end, length in zip(ends, lengths)]
        slots = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # [num_tokens]
        columns = torch.cat([torch.arange(old, old + new) for old, new in zip(cache.lengths, lengths)])  # in the slot
        cache.reserve(int(columns.max()) + 1)
        self.slots, self.columns = slots.to(device), columns.to(device)
        self.positions = self.columns + torch.tensor(starts)[slots].to(device)
        self.last = torch.tensor(ends, device=device) - 1

        follows = [start + old > 0 for start, old in zip(starts, cache.lengths)]
        self.alone = [span for span, after in zip(spans, follows) if not after]
        answers = [row for row, new in enumerate(lengths) if follows[row] and new == 1]
        questions = [row for row, new in enumerate(lengths) if follows[row] and new > 1]
        self.groups = [_PaddedRows(rows, spans, columns, device) for rows in (answers, questions) if rows]
        last_positions = [start + old + new - 1 for start, old, new in zip(starts, cache.lengths, lengths)]
        self.shared = _prefixes_with_tokens(cache.prefixes, spans, last_positions, device)

    def attend(self, layer, query, key, value, scaling, window):
        # query [1, num_heads, num_tokens, head_dim], key and value [1, num_kv_heads, num_tokens, head_dim]
        keys, values = self.cache.buffers(layer, key, value)
        keys[self.slots, :, self.columns] = key[0].transpose(0, 1)
        values[self.slots, :, self.columns] = value[0].transpose(0, 1)
        shape = (1, query.shape[2], query.shape[1], value.shape[-1])
        output = query.new_empty(shape).transpose(1, 2)  # laid out as the output projection reads it
        for start, end in self.alone:
            span = slice(start, end)
            output[:, :, span] = _causal_attention(
                query[:, :, span], key[:, :, span], value[:, :, span], scaling, window
            )
        query = query[0].unflatten(0, (key.shape[1], -1))  # [num_kv_heads, group, num_tokens, head_dim]
        if self.shared and not self.groups[0].is_pass:
            merged = query.new_zeros((*query.shape[:3], value.shape[-1]), dtype=torch.float32)
            lse = query.new_zeros((*query.shape[:3], 1), dtype=torch.float32)
        for rows in self.groups:
            own = keys[rows.slots, :, : rows.num_keys], values[rows.slots, :, : rows.num_keys]
            mask = rows.mask(query.shape[1], window)
            if self.shared:
                found = map(rows.unpad, partial_attention(rows.pad(query), *own, mask, scaling))
                if rows.is_pass:
                    merged, lse = (states.contiguous() for states in found)
                else:
                    merged[:, :, rows.tokens], lse[:, :, rows.tokens] = found
            else:
                found = scaled_dot_product_attention(rows.pad(query), *own, attn_mask=mask, scale=scaling)
                if rows.is_pass:
                    return rows.unpad(found).flatten(0, 1)[None]
                output[0, :, rows.tokens] = rows.unpad(found).flatten(0, 1)
        if self.shared:
            _attend_prefixes(self.shared, layer, query, self.positions, scaling, window, merged, lse)
            for rows in self.groups:
                output[0, :, rows.tokens] = merged[:, :, rows.tokens].flatten(0, 1).to(output.dtype)
        return output


class _PaddedRows:
    """Rows that follow something, padded among themselves, so that they take one operation each."""

    def __init__(self, rows: list[int], spans: list[tuple[int, int]], columns: torch.Tensor, device: torch.device):
        first, end = torch.tensor([spans[row] for row in rows])[:, :, None].unbind(1)  # [num_rows, 1]
        self.longest = int((end - first).max())
        column = torch.arange(self.longest)
        valid = column < end - first  # [num_rows, longest]
        padded = torch.where(valid, first + column, first)  # padding repeats the row's first token
        self.is_pass = len(columns) == len(rows)  # every token of the pass, one each: nothing to pick
        self.padded, self.tokens = padded.to(device), slice(None) if self.is_pass else padded[valid].to(device)
        self.valid = valid.flatten().nonzero()[:, 0].to(device)
        in_order = rows == list(range(rows[0], rows[-1] + 1))
        self.slots = slice(rows[0], rows[-1] + 1) if in_order else torch.tensor(rows, device=device)
        self.num_keys = int(columns[padded].max()) + 1
        self.distance = (columns[padded][:, :, None] - torch.arange(self.num_keys)).to(device)  # query − key
        self.masks: dict[int | None, torch.Tensor] = {}

    def mask(self, group: int, window: int | None) -> torch.Tensor | None:
        """`[num_rows, 1, group * longest, num_keys]`, or `None` where a single token sees all."""
        if window not in self.masks:
            if self.distance.shape[:2] == (1, 1) and (window is None or self.num_keys <= window):
                return None
            mask = self.distance >= 0
            if window is not None:
                mask = mask & (self.distance < window)
            self.masks[window] = mask.repeat(1, group, 1)[:, None]
        return self.masks[window]

    def pad(self, query):
        """`[num_kv_heads, group, num_tokens, head_dim]` → `[num_rows, num_kv_heads, group * longest, head_dim]`."""
        padded = query[:, :, :, None] if self.is_pass else query[:, :, self.padded]
        return padded.permute(2, 0, 1, 3, 4).flatten(2, 3)

    def unpad(self, states):
        """The way back: `[num_kv_heads, group, tokens of the rows, head_dim]`."""
        states = states.unflatten(2, (-1, self.longest)).permute(1, 2, 0, 3, 4).flatten(2, 3)
        return states if self.longest == 1 else states[:, :, self.valid]


def _prefixes_with_tokens(prefixes, spans, last_positions, device):
    """Each prefix of the rows: (prefix, indices of the tokens after it or `None` for all, their last position)."""
    rows_of = {}
    for row, prefix in enumerate(prefixes):
        if prefix is not None:
            rows_of.setdefault(prefix, []).append(row)
    shared = []
    for prefix, rows in rows_of.items():
        tokens = None
        if len(rows) < len(spans):
            tokens = torch.cat([torch.arange(*spans[row]) for row in rows]).to(device)
        shared.append((prefix, tokens, max(last_positions[row] for row in rows)))
    return shared


def _attend_prefixes(shared, layer, query, positions, scaling, window, merged, lse):
    """Adds to `merged` and `lse`, in place, what the tokens find in the prefixes before them.

    query, merged `[num_kv_heads, group, num_tokens, head_dim]`, lse `[num_kv_heads, group, num_tokens, 1]`."""
    for prefix, tokens, last_position in shared:
        index = slice(None) if tokens is None else tokens
        keys, values = prefix.keys[layer], prefix.values[layer]
        found_query, found_at = query[:, :, index], positions[index]
        num_kv_heads, group, num_tokens, _ = found_query.shape
        mask = None
        if window is not None and last_position >= window:
            key_positions = torch.arange(keys.shape[1], device=positions.device)
            mask = (found_at[:, None] - key_positions < window).repeat(group, 1)  # [group * num_tokens, num_keys]
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
        queries = query.split(rows, dim=-2)
        masks = [None] * len(queries) if mask is None else mask.split(rows, dim=-2)
        parts = [partial_attention(part, key, value, seen, scaling) for part, seen in zip(queries, masks)]
        return tuple(torch.cat(states, dim=-2) for states in zip(*parts))
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


@contextmanager
def prune_last_layer(language_model, tokens: torch.Tensor, num_tokens: int):
    """
    The output of the last layer is that of `tokens`, and meaningless for the others, for the duration: nothing reads it, so the
    layer's output projection and its MLP, which treat each token apart, are computed for `tokens` only. Keys and values are
    all there.

    Args:
        language_model: A decoder of transformers. One whose last layer has neither `mlp` nor `self_attn.o_proj` is left as it is.
        tokens (`torch.Tensor` of shape `(num_read,)`): Indices into the pass of `num_tokens` tokens.
        num_tokens (`int`)
    """
    if len(tokens) == num_tokens:
        yield
        return
    layer = (getattr(language_model, "layers", None) or [None])[-1]
    modules = [getattr(layer, "mlp", None), getattr(getattr(layer, "self_attn", None), "o_proj", None)]

    def choose(module, args):
        return args[0][:, tokens.to(args[0].device)], *args[1:]  # the layer may lie on another device

    def place(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        whole = first.new_zeros(first.shape[0], num_tokens, *first.shape[2:])
        whole[:, tokens.to(first.device)] = first
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    with ExitStack() as hooks:
        for module in modules:
            if module is not None:
                hooks.callback(module.register_forward_pre_hook(choose).remove)
                hooks.callback(module.register_forward_hook(place).remove)
        yield


def supports_shared_prefix(language_model, device: torch.device) -> bool:
    """
    Whether a language model with its embeddings on `device` has full or sliding-window attention only, takes it from the
    interface, and computes a token's keys from this token and its position alone.
    """
    config = language_model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        kinds <= {"full_attention", "sliding_attention"}
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
    by_kind = [value for value in parameters.values() if isinstance(value, dict)]  # one for each kind of layer
    return {one.get("rope_type") for one in [parameters, *by_kind]}
