"""Packed attention against the same samples one by one, and against stock attention wherever nothing is packed."""

import json

import pytest
import torch
from tiny import tiny_config, tiny_text_config
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModelForCausalLM
from transformers import LlavaForConditionalGeneration as StockModel
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.kernels import packed_attention as attention_module
from modeling_llava.kernels.packed_attention import VARLEN, use_varlen_attention, varlen_attention_forward


LENGTHS = [9, 1, 14, 5]
LANGUAGE_MODELS = {
    "llama-gqa": {},
    "llama-mha": {"num_key_value_heads": 4},
    "mistral-window": {"model_type": "mistral", "sliding_window": 4},
    "mistral-no-window": {"model_type": "mistral", "sliding_window": None},
    "qwen2-mixed-window": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1
    },
}  # fmt: skip


def language_model(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_text_config(**LANGUAGE_MODELS[name]), attn_implementation="eager")


def samples(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 290, (length,), generator=generator) for length in lengths]


def pack(parts):
    lengths = torch.tensor([len(part) for part in parts])
    ends = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    inputs = {
        "input_ids": torch.cat(parts)[None],
        "position_ids": torch.cat([torch.arange(len(part)) for part in parts])[None],
        "attention_mask": torch.empty(1, 1, 0, 0),  # `mask_of_pack`
    }
    lens = FlashAttentionKwargs(
        cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=int(lengths.max()), max_length_k=int(lengths.max())
    )
    return {**inputs, **lens}


def states_and_gradients(model, batches):
    """Last hidden states of all samples behind one another, and the gradients of a fixed weighting of them."""
    model.zero_grad()
    states = torch.cat([model.base_model(**b, use_cache=False).last_hidden_state.flatten(0, 1) for b in batches])
    weights = torch.linspace(-1, 1, states.numel()).view_as(states) / len(states)  # a mean over positions, as a loss
    (states * weights).sum().backward()
    return states.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pack_equals_its_samples_one_by_one(name, checkpointing):
    model = language_model(name).train()
    parts = samples()
    expected, expected_grads = states_and_gradients(model, [{"input_ids": part[None]} for part in parts])
    model.set_attn_implementation(VARLEN)
    if checkpointing:
        model.gradient_checkpointing_enable()
    actual, grads = states_and_gradients(model, [pack(parts)])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert grads.keys() == expected_grads.keys() and len(grads) > 10
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_padded_batches_equal_eager_and_sdpa(name):
    model = language_model(name).eval()
    ids = torch.stack([torch.cat([part, part.new_zeros(14 - len(part))]) for part in samples()])
    mask = torch.stack([torch.arange(14) < length for length in LENGTHS]).long()
    for side in ("right", "left"):
        inputs = {"input_ids": ids, "attention_mask": mask}
        if side == "left":
            inputs = {key: value.flip(1) for key, value in inputs.items()}
        logits = {}
        for implementation in ("eager", "sdpa", VARLEN):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                logits[implementation] = model(**inputs).logits[inputs["attention_mask"].bool()]
        torch.testing.assert_close(logits[VARLEN], logits["eager"], rtol=0, atol=1e-5)
        assert torch.equal(logits[VARLEN], logits["sdpa"])


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_equals_sdpa(name, cache):
    model = language_model(name).eval()
    ids = torch.randint(3, 290, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    answers = []
    for implementation in ("sdpa", VARLEN):
        model.set_attn_implementation(implementation)
        answers.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1,
                cache_implementation=cache, disable_compile=True,
            )
        )  # fmt: skip
    assert answers[0].shape == (2, 19)
    assert torch.equal(*answers)


@pytest.mark.parametrize("window, is_packed", [(None, True), (4, True), (None, False)])
def test_where_flash_attention_is_not_to_be_had_sdpa_is_not_asked_for_grouped_heads(window, is_packed, monkeypatch):
    """SDPA's kernel for them builds all scores there: float32, and GPUs before sm80."""
    query, key, value = (torch.randn(1, heads, 14, 8) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    sdpa, heads = torch.nn.functional.scaled_dot_product_attention, []

    def noting_sdpa(query, key, value, *args, enable_gqa=False, **kwargs):
        heads.append((query.shape[1], key.shape[1], value.shape[1], enable_gqa))
        return sdpa(query, key, value, *args, **kwargs)

    lengths = [9, 5] if is_packed else [14]
    mask = torch.block_diag(*(torch.ones(n, n) for n in lengths)).tril().bool()
    if window is not None:
        mask &= ~torch.ones(14, 14).tril(-window).bool()
    expected = sdpa(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    monkeypatch.setattr(attention_module, "_builds_all_scores", lambda *states: True)
    monkeypatch.setattr(attention_module, "scaled_dot_product_attention", noting_sdpa)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting_sdpa)
    pack = (
        {"cu_seq_lens_q": torch.tensor([0, 9, 14], dtype=torch.int32), "sliding_window": window} if is_packed else {}
    )
    output, _ = varlen_attention_forward(module, query, key, value, None, **pack)
    torch.testing.assert_close(output, expected)
    assert set(heads) == {(4, 4, 4, False)}


def test_a_pack_builds_no_square_matrix():
    model = language_model("llama-gqa").train()
    model.set_attn_implementation(VARLEN)
    lengths = [40] * 10  # 400 positions; a dense mask or its scores would have 160,000 elements
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        model.base_model(**pack(samples(lengths)), use_cache=False).last_hidden_state.sum().backward()
    assert largest <= 400 * 96  # the widest activation: intermediate_size


def test_only_the_language_model_is_switched_and_nothing_of_it_is_saved(tmp_path):
    model = LlavaForConditionalGeneration(tiny_config())
    tower_before = model.model.vision_tower.config._attn_implementation
    use_varlen_attention(model)
    assert model.model.language_model.config._attn_implementation == VARLEN
    assert model.model.vision_tower.config._attn_implementation == tower_before == "sdpa"
    model.save_pretrained(tmp_path)
    assert VARLEN not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    stock = StockModel.from_pretrained(tmp_path)
    assert stock.config.text_config._attn_implementation == "sdpa"


def test_contradictions_are_refused():
    model = language_model("llama-gqa").eval()
    model.set_attn_implementation(VARLEN)
    packed = pack(samples())
    with pytest.raises(ValueError, match="Leave the mask out"):
        model(**{**packed, "attention_mask": torch.ones(1, 29, dtype=torch.long).index_fill(1, torch.tensor([28]), 0)})
    cache = model(packed["input_ids"][:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="29 queries but 33 keys"):
        model(**packed, past_key_values=cache)
    with pytest.raises(ValueError, match="24, but the pack has 29"):
        model(**{**packed, "cu_seq_lens_q": packed["cu_seq_lens_q"][:-1]})
    module = model.model.layers[0].self_attn
    states = torch.randn(1, 4, 29, 16), torch.randn(1, 2, 29, 16), torch.randn(1, 2, 29, 16)
    for arguments, name in [({"is_causal": False}, "bidirectional"), ({"softcap": 30.0}, "softcap")]:
        with pytest.raises(ValueError, match=name):
            varlen_attention_forward(module, *states, None, cu_seq_lens_q=packed["cu_seq_lens_q"], **arguments)


def test_float32_queries_of_an_autocast_model_meet_16_bit_values():
    model = language_model("llama-gqa").train()
    parts = samples()
    with torch.autocast("cpu", torch.bfloat16):
        one_by_one = torch.cat([model.base_model(part[None]).last_hidden_state[0] for part in parts])
        model.set_attn_implementation(VARLEN)
        packed = model.base_model(**pack(parts), use_cache=False).last_hidden_state[0]
    assert (packed - one_by_one).norm() / one_by_one.norm() < 2**-6


@pytest.mark.parametrize(
    "device, dtype, head_dim, is_sm80, expected",
    [
        ("cpu", torch.bfloat16, 64, True, False),
        ("cuda", torch.float32, 64, True, False),
        ("cuda", torch.float16, 64, False, False),
        ("cuda", torch.bfloat16, 60, True, False),
        ("cuda", torch.bfloat16, 64, True, True),
    ],
)
def test_flash_attention_is_chosen_by_device_and_dtype(monkeypatch, device, dtype, head_dim, is_sm80, expected):
    monkeypatch.setattr(attention_module, "_supports_flash", lambda index: is_sm80)
    states = torch.empty(1, 2, head_dim)
    assert attention_module._flash_takes(torch.device(device), dtype, states, states) == expected


@pytest.mark.parametrize("window", [None, 5])
def test_pytorchs_kernel_is_called_as_it_wants_to_be(monkeypatch, window):
    """Without a GPU its shape function runs: right arguments, grouped heads, and the window counted its way."""
    called = {}

    def spy(*args, **kwargs):
        called.update(kwargs)
        return varlen_attn(*args, **kwargs)

    monkeypatch.setattr(attention_module, "_torch_varlen", lambda: spy)
    states = [torch.empty(29, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2)]
    lens = torch.empty(5, dtype=torch.int32, device="meta")
    output = attention_module._torch_varlen_attention(*states, lens, 14, scaling=0.25, sliding_window=window)
    assert output.shape == (29, 4, 16)
    # FlashAttention's (left, right): right = 0 is causal; `left` does not count the query's own position
    assert called["window_size"] == ((-1, 0) if window is None else (4, 0))
    assert called["enable_gqa"] and called["scale"] == 0.25
