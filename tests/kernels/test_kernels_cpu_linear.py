"""Linear layers by oneDNN against PyTorch's own, in float64 where rounding counts."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from modeling_llava.constants import ONEDNN_CACHES
from modeling_llava.kernels import cpu_linear as onednn
from modeling_llava.kernels.cpu_linear import linear, use_onednn


pytestmark = pytest.mark.skipif(not onednn.is_available(), reason="this PyTorch is built without oneDNN's operator")


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the products that oneDNN computed."""
    monkeypatch.setattr(onednn, "MIN_MULTIPLICATIONS", 1)
    shapes, original = [], onednn._product

    def recorded(a, b):
        shapes.append((*a.shape, b.shape[0]))
        return original(a, b)

    monkeypatch.setattr(onednn, "_product", recorded)
    return shapes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(3,), (2, 3), (2, 1, 3), (0,)])
def test_values_and_gradients_are_those_of_exact_arithmetic(calls, bias, leading):
    torch.manual_seed(0)
    x, weight = torch.randn(*leading, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    tensors = [x, weight, *([torch.randn(4, requires_grad=True)] if bias else [])]
    output = linear(*tensors)
    grad = torch.randn_like(output)
    exact_tensors = [t.detach().double().requires_grad_() for t in tensors]
    expected = nn.functional.linear(*exact_tensors)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    actual_grads = torch.autograd.grad(output, tensors, grad)
    for actual, exact in zip(actual_grads, torch.autograd.grad(expected, exact_tensors, grad.double())):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)
    assert calls or 0 in leading


def test_only_needed_gradients_are_computed(calls):
    weight = torch.randn(4, 5)
    x = torch.randn(3, 5, requires_grad=True)
    linear(x, weight).sum().backward()
    assert calls == [(3, 5, 4), (3, 4, 5)]  # the output, the gradient of the input; none of the frozen weight


def test_small_products_and_other_dtypes_are_pytorchs(calls, monkeypatch):
    monkeypatch.setattr(onednn, "MIN_MULTIPLICATIONS", 61)
    linear(torch.randn(3, 5), torch.randn(4, 5))  # 60
    monkeypatch.setattr(onednn, "MIN_MULTIPLICATIONS", 1)
    for dtype in (torch.bfloat16, torch.float64):
        assert linear(torch.randn(3, 5, dtype=dtype), torch.randn(4, 5, dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(3, 5), torch.randn(4, 5)).dtype == torch.bfloat16
    assert calls == []


def test_a_model_learns_the_same_with_it_saved_under_the_same_names(calls):
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 2))
    names, x = list(stock.state_dict()), torch.randn(5, 6)
    expected = stock(x)
    expected.sum().backward()
    grads = [p.grad.clone() for p in stock.parameters()]
    stock.zero_grad()
    assert use_onednn(stock) == 2 and use_onednn(stock) == 0  # once is enough
    output = stock(x)
    output.sum().backward()
    torch.testing.assert_close(output, expected)
    for parameter, grad in zip(stock.parameters(), grads):
        torch.testing.assert_close(parameter.grad, grad)
    assert list(stock.state_dict()) == names and calls


@pytest.mark.parametrize("double", [False, True], ids=["one quantisation", "double quantisation"])
def test_four_bit_layers_give_what_bitsandbytes_gives(calls, double):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        64, 32, bias=False, compute_dtype=torch.float32, compress_statistics=double, quant_type="nf4"
    )
    layer.support_avx512bf16_for_cpu = False
    model = nn.Sequential(layer.to("cpu"))
    x = torch.randn(2, 3, 64, requires_grad=True)
    expected = model(x)
    (expected_grad,) = torch.autograd.grad(expected.pow(2).sum(), x)
    assert use_onednn(model) == 1
    output = model(x)
    (grad,) = torch.autograd.grad(output.pow(2).sum(), x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-4)
    assert calls == [(6, 64, 32), (6, 32, 64)]


def test_the_rows_that_a_layer_keeps_do_not_change_when_its_input_is_written_to():
    """Autograd notices that a saved tensor was changed in place, as it does for PyTorch's own layer."""
    x = torch.randn(300, 400, requires_grad=True)
    copy = x * 1
    output = linear(copy, torch.randn(500, 400, requires_grad=True))
    copy += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_kernels_are_not_kept_for_ever_with_each_length():
    """Those of the last lengths are; the first of 160 lengths needs new ones."""
    script = """
    import torch
    from modeling_llava.kernels.cpu_linear import use_onednn

    model = torch.nn.Sequential(*(torch.nn.Linear(n, m) for n, m in ((192, 512), (512, 256), (256, 192))))
    assert use_onednn(model) == 3
    with torch.no_grad():
        for length in range(300, 620, 2):
            model(torch.zeros(length, 192))
        for length in (618, 300):
            print("again", flush=True)
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
                model(torch.zeros(length, 192))
    """
    environment = {name: value for name, value in os.environ.items() if name not in ONEDNN_CACHES}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    _, last, first = printed.split("again")
    assert [text.count("create:cache_miss") for text in (last, first)] == [0, 3]
