"""Modules that are exchanged by class: what is printed runs, and everything that people do with a model still works."""

import copy
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_batch, tiny_config

from modeling_llava import LlavaForConditionalGeneration
from modeling_llava.kernels import apply_kernels
from modeling_llava.kernels.efficient_layers import Kernel


def plain_model():
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(tiny_config()).train()


def lora_model():
    config = LoraConfig(
        r=4, lora_dropout=0.0, target_modules=r".*language_model.*(q_proj|down_proj)", init_lora_weights=False
    )
    torch.manual_seed(0)
    return get_peft_model(plain_model(), config)


def step(model):
    """The loss, and the gradient of every trained parameter by its place."""
    model.zero_grad()
    loss = model(**tiny_batch()).loss
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same_step(model, expected):
    loss, gradients = step(model)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert len(gradients) == len(expected[1])
    for actual, wanted in zip(gradients, expected[1]):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


KINDS = {"full": plain_model, "lora": lora_model}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@each_kind
def test_the_report_and_print_show_what_runs(make):
    model = make()
    report = apply_kernels(model)
    assert report.exchanged["EfficientLlamaRMSNorm"] == 5 and report.exchanged["EfficientLlamaMLP"] == 2
    for name in report.exchanged:
        assert f"{name}(" in repr(model) and name in str(report)
    assert not any("forward" in vars(module) for module in model.modules())
    assert apply_kernels(model).exchanged == report.exchanged  # once is enough


@each_kind
def test_answers_in_eval_are_the_originals_to_the_last_bit(make):
    model = make().eval()
    batch = {name: tensor for name, tensor in tiny_batch().items() if name != "labels"}
    expected = model(**batch).logits
    apply_kernels(model)
    assert torch.equal(model(**batch).logits, expected)


@each_kind
def test_a_copy_keeps_its_kernels_and_shares_no_weights(make):
    model = make()
    expected = step(model)
    apply_kernels(model)
    copied = copy.deepcopy(model)
    assert repr(copied) == repr(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_step(copied, expected)


def test_a_pickle_is_read_in_a_process_without_this_package(tmp_path):
    model = plain_model()
    apply_kernels(model)
    language_model = model.model.language_model
    torch.save(language_model, tmp_path / "model.pt")
    assert b"modeling_llava" not in pickle.dumps(language_model.layers[0])
    program = f"""
        import sys
        sys.modules["modeling_llava"] = None  # importing it raises ImportError
        import torch
        model = torch.load(r"{tmp_path}/model.pt", weights_only=False)
        assert type(model.norm).__name__ == "LlamaRMSNorm" and "Efficient" not in repr(model), model
        torch.save(model(inputs_embeds=torch.ones(1, 3, 64)).last_hidden_state, r"{tmp_path}/out.pt")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, cwd=tmp_path, capture_output=True)
    expected = language_model(inputs_embeds=torch.ones(1, 3, 64)).last_hidden_state
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, rtol=1e-4, atol=1e-5)


def test_a_replica_of_data_parallel_computes_by_its_own_weights():
    model = plain_model()
    apply_kernels(model)
    norm = model.model.language_model.norm
    replica = norm._replicate_for_data_parallel()
    replica._parameters["weight"] = 3 * norm.weight.detach()
    hidden = torch.randn(1, 3, 64)
    torch.testing.assert_close(replica(hidden), 3 * norm(hidden))


def test_a_hooked_module_is_left_and_named():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = plain_model()
    expected = step(model)
    norm = model.model.language_model.norm
    add_hook_to_module(norm, ModelHook())
    report = apply_kernels(model)
    assert report.left == {"LlamaRMSNorm": 1} and not isinstance(norm, Kernel) and "LlamaRMSNorm" in str(report)
    assert_same_step(model, expected)
    remove_hook_from_module(norm)
    exchanged = model.model.language_model.layers[0].input_layernorm
    add_hook_to_module(exchanged, ModelHook())  # the other order: the hook calls the kernel
    assert_same_step(model, expected)


def test_adapters_switched_off_and_merged_are_pefts():
    model = lora_model()
    apply_kernels(model)
    batch = tiny_batch()
    with model.disable_adapter():
        assert model(**batch).loss.item() == pytest.approx(plain_model()(**batch).loss.item(), rel=1e-5)
    expected = model(**batch).loss.item()
    merged = model.merge_and_unload()
    assert merged(**batch).loss.item() == pytest.approx(expected, rel=1e-4)


def test_eager_attention_is_left_to_the_model():
    model = plain_model()
    expected = step(model)
    apply_kernels(model)
    model.set_attn_implementation("eager")
    assert_same_step(model, expected)
