"""What is computed on a GPU, against the same in float32 by plain PyTorch."""

import copy

import pytest
import torch
from gpu.conftest import DTYPES
from peft import LoraConfig, get_peft_model
from tiny import tiny_text_config
from tiny_predictor import picture, tiny_llava, tiny_processor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from modeling_llava.inference import LlavaPredictor
from modeling_llava.kernels.efficient_layers import make_efficient
from modeling_llava.kernels.linear_cross_entropy import causal_language_model_loss
from modeling_llava.kernels.packed_attention import VARLEN, varlen_attention_forward


LENGTHS = [37, 1, 300, 128]


def error(actual, expected):
    """Relative, in the norm of all numbers."""
    pairs = [(a.double().cpu(), e.double().cpu()) for a, e in zip(actual, expected)]
    return sum((a - e).norm() ** 2 for a, e in pairs) ** 0.5 / sum(e.norm() ** 2 for _, e in pairs) ** 0.5


def sdpa_by_sample(query, key, value, window):
    """Float32 or 16 bits, each sample with a dense mask."""
    outputs = []
    for q, k, v in zip(*(states.split(LENGTHS, dim=2) for states in (query, key, value))):
        k, v = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (k, v))
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        mask = (distance >= 0) & (distance < (window or q.shape[2])).to(torch.bool)
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.device)))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def with_gradients(function, states, weights):
    states = [s.detach().requires_grad_() for s in states]
    output = function(*states)
    (output * weights.to(output)).sum().backward()
    return [output.detach(), *(s.grad for s in states)]


@pytest.mark.parametrize("window", [None, 64], ids=["whole", "window"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=["heads", "grouped"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pack_is_as_exact_as_its_samples_by_sdpa(dtype, head_dim, heads, window):
    total = sum(LENGTHS)
    states = [
        torch.randn(1, number, total, head_dim, device="cuda", dtype=dtype)
        for number in (heads[0], heads[1], heads[1])
    ]
    weights = torch.randn(1, total, heads[0], head_dim, device="cuda")
    ends = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()
    lens = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}

    def packed(*states):
        return varlen_attention_forward(torch.nn.Module(), *states, None, sliding_window=window, **lens)[0]

    def by_sample(*states):
        return sdpa_by_sample(*states, window)

    exact = with_gradients(by_sample, [s.float() for s in states], weights)
    stock = error(with_gradients(by_sample, states, weights), exact)
    assert error(with_gradients(packed, states, weights), exact) < 1.5 * stock


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_efficient_layers_under_autocast_are_as_exact_as_stock(dtype):
    """LoRA weights in float32 on a base in 16 bits, as training has them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_text_config(hidden_size=128), attn_implementation=VARLEN)
    config = LoraConfig(r=8, target_modules=r".*_proj", init_lora_weights=False)
    exact = get_peft_model(model, config).cuda().train()
    stock = copy.deepcopy(exact)
    for name, parameter in stock.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "lora_" in name else dtype)
    efficient = copy.deepcopy(stock)
    assert sum(make_efficient(efficient.get_base_model().model).values()) > 10
    ids = torch.randint(3, 290, (1, 60), device="cuda")

    def step(model, enabled):
        with torch.autocast("cuda", dtype, enabled=enabled):
            logits = model(input_ids=ids, use_cache=False).logits
        cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
        return [logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    reference = step(exact, False)
    assert error(step(efficient, True), reference) < 1.5 * error(step(stock, True), reference)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_are_as_exact_as_cross_entropy(dtype):
    hidden, head = torch.randn(700, 256, device="cuda"), torch.randn(32064, 256, device="cuda") / 16
    targets = torch.randint(0, 32064, (700,), device="cuda")
    targets[::3] = -100

    def stock(hidden, head):
        return cross_entropy(torch.nn.functional.linear(hidden, head).float()[:-1], targets[1:])

    def ours(hidden, head):
        module = torch.nn.Linear(*head.shape[::-1], bias=False, device="meta")
        del module.weight
        module.weight = head
        return causal_language_model_loss(hidden[None], targets[None], module)

    states, one = [hidden.to(dtype), head.to(dtype)], torch.ones((), device="cuda")
    exact = with_gradients(stock, [s.float() for s in states], one)
    assert (
        error(with_gradients(ours, states, one), exact) < 1.5 * error(with_gradients(stock, states, one), exact) + 1e-5
    )


def test_the_predictor_answers_as_generate():
    processor = tiny_processor()
    model = tiny_llava(processor).cuda()
    predictor = LlavaPredictor(model, processor)
    predictor.set_image(picture(0))
    for question in ("What is this?", "Why?"):
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        inputs = processor(images=picture(0), text=prompt, return_tensors="pt").to("cuda")
        generated = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        expected = processor.decode(generated, skip_special_tokens=True).strip()
        assert predictor.ask(question, do_sample=False, max_new_tokens=12).strip() == expected


def test_a_token_takes_no_more_launches_than_generates():
    processor = tiny_processor()
    model = tiny_llava(processor).cuda()
    inputs = processor(images=picture(0), text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt").to("cuda")
    model.generation_config.eos_token_id = None
    predictor = LlavaPredictor(model, processor)
    predictor.set_image(picture(0))

    def launches(answer, tokens):
        answer(tokens)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
            answer(tokens)
        return sum(
            e.count
            for e in profiled.key_averages()
            if e.key in ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC")
        )

    def per_token(answer):
        return (launches(answer, 24) - launches(answer, 8)) / 16

    ours = per_token(lambda n: predictor.ask("What?", do_sample=False, max_new_tokens=n))
    stock = per_token(lambda n: model.generate(**inputs, do_sample=False, max_new_tokens=n, min_new_tokens=n))
    assert 0 < ours <= 1.1 * stock
