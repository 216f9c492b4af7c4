"""The efficient language model against the stock one: the same numbers, and less that is kept."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_text_config
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from modeling_llava.kernels.efficient_layers import make_efficient
from modeling_llava.kernels.packed_attention import VARLEN


FAMILIES = {
    # model type → what is replaced of two layers: norms, mlps, attentions
    "llama": (5, 2, 2),
    "llama with biases": (5, 2, 2),
    "mistral": (5, 2, 2),
    "qwen2": (5, 2, 2),
    "qwen3": (9, 2, 0),  # norms of queries and keys; its attention normalises, so ours is not its like
    "granite": (5, 2, 2),
    "gemma": (0, 0, 2),  # (1 + w) · x, and a GELU
    "olmo2": (9, 2, 0),
    "phi3": (5, 0, 0),  # gate and up in one matrix
}


SETTINGS = {  # windows are shorter than the samples
    "llama with biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "mistral": {"sliding_window": 4},
    "qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
}


def language_model(family="llama"):
    torch.manual_seed(0)
    config = tiny_text_config(family.split()[0], pad_token_id=0, **SETTINGS.get(family, {}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.5)  # ones would hide what they are multiplied with
        if name.endswith("proj.bias"):
            torch.nn.init.normal_(parameter)
    return model.train()


def inputs():
    lens = torch.tensor([0, 9, 15, 30], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (9, 6, 15)])
    ids = torch.randint(3, 290, (1, 30), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": positions[None], "cu_seq_lens_q": lens, "cu_seq_lens_k": lens,
            "max_length_q": 15, "max_length_k": 15, "use_cache": False,
            "attention_mask": torch.empty(1, 1, 0, 0)}  # fmt: skip


def step(model):
    model.zero_grad()
    torch.manual_seed(3)  # the same draws of dropout
    logits = model(**inputs()).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), inputs()["input_ids"][0, 1:])
    loss.backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(efficient, stock, tolerance=1e-5):
    (logits, grads), (expected, expected_grads) = step(efficient), step(stock)
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_the_stock_ones(family, checkpointing):
    stock = language_model(family)
    efficient = copy.deepcopy(stock)
    counts = make_efficient(efficient.base_model)
    assert (counts["norms"], counts["mlps"], counts["attentions"]) == FAMILIES[family]
    if checkpointing:
        efficient.gradient_checkpointing_enable()
    assert_same_step(efficient, stock)


def with_lora(dropout=0.0, dtype=torch.float32):
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=r".*_proj", init_lora_weights=False)
    model = get_peft_model(language_model(), config)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_layers_give_the_same(dropout):
    stock = with_lora(dropout)
    efficient = copy.deepcopy(stock)
    counts = make_efficient(efficient.get_base_model().base_model)
    assert counts["loras"] == 14 and counts["mlps"] == counts["attentions"] == 2
    assert_same_step(efficient, stock)


def test_lora_on_16_bit_weights_is_as_exact_as_pefts():
    exact = step(with_lora())[1]
    errors = []
    for is_efficient in (False, True):
        model = with_lora(dtype=torch.bfloat16)
        if is_efficient:
            make_efficient(model.get_base_model().base_model)
        with torch.autocast("cpu", torch.bfloat16):
            grads = step(model)[1]
        assert grads.keys() == exact.keys() and all(grad.dtype == torch.float32 for grad in grads.values())
        errors.append(sum((grads[name] - exact[name]).norm() / exact[name].norm() for name in exact) / len(exact))
    assert errors[1] < 1.2 * errors[0]


def test_a_module_whose_forward_is_of_another_form_is_left_as_it_is():
    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj = self.up_proj = self.down_proj = torch.nn.Linear(64, 64)

        def forward(self, hidden_states, router):
            return hidden_states

    model = language_model().model
    model.layers[0].mlp = Routed()
    assert make_efficient(model)["mlps"] == 1 and type(model.layers[0].mlp) is Routed


def test_dora_is_left_as_it_is():
    config = LoraConfig(r=4, target_modules=r".*_proj", init_lora_weights=False, use_dora=True)
    model = get_peft_model(language_model(), config)
    stock = copy.deepcopy(model)
    assert make_efficient(model.get_base_model().base_model)["loras"] == 0
    assert_same_step(model, stock)


def test_four_bit_layers_give_the_same(tmp_path):
    pytest.importorskip("bitsandbytes")
    language_model().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    settings = {"quantization_config": config, "dtype": torch.float32, "attn_implementation": VARLEN}
    models = []
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=r".*_proj", init_lora_weights=False)
        models.append(get_peft_model(model, lora).train())
    counts = make_efficient(models[0].get_base_model().base_model)
    assert counts["loras"] == 14 and counts["mlps"] == 2
    assert_same_step(*models, tolerance=1e-4)


def kept_bytes(model):
    """Bytes of distinct tensors that autograd keeps for one step, parameters left out."""
    parameters = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs()).logits.sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_less_is_kept():
    stock = language_model()
    efficient = copy.deepcopy(stock)
    make_efficient(efficient.base_model)
    # By hand, floats per position and layer, h = 64, i = 96: of its two norms and half of the last one stock keeps the
    # normalised states too (2.5 h), of the MLP silu(gate) and the product (2 i). The product is not given back to this
    # test's hooks where the MLP's own hooks replace it.
    difference = (kept_bytes(stock) - kept_bytes(efficient)) / (30 * 4 * 2)
    assert difference == pytest.approx(2.5 * 64 + 2 * 96, abs=5)
