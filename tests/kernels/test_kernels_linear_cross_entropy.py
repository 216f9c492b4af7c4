"""The chunked loss against transformers' own, and against torch's cross-entropy for what transformers lacks."""

import pytest
import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_llava.kernels import linear_cross_entropy as loss_module
from modeling_llava.kernels.linear_cross_entropy import causal_language_model_loss


VOCABULARY, HIDDEN = 97, 16


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 5 rows: 18 supervised positions make 4 chunks, the last one short."""
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 5 * VOCABULARY)
    monkeypatch.setattr(loss_module, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(loss_module, "MIN_CHUNK_ROWS_TRAINED", 1)


def example(dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    hidden = torch.randn(2, 14, HIDDEN, dtype=dtype, requires_grad=True)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=dtype)
    labels = torch.randint(0, VOCABULARY, (2, 14))
    labels[:, :5] = -100
    return hidden, head, labels


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(31)])
def test_equals_the_stock_loss_and_its_gradients(small_chunks, num_items, bias):
    hidden, head, labels = example(bias=bias)
    parameters = [hidden, *head.parameters()]
    stock = ForCausalLMLoss(head(hidden), labels, VOCABULARY, num_items_in_batch=num_items)
    ours = causal_language_model_loss(hidden, labels, head, num_items)
    torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-6)
    for ours_grad, stock_grad in zip(gradients(ours, *parameters), gradients(stock, *parameters)):
        torch.testing.assert_close(ours_grad, stock_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrapped", [False, True])
def test_label_smoothing_equals_torch(small_chunks, wrapped):
    hidden, head, labels = example()
    parameters = [hidden, *head.parameters()]
    expected = nn.functional.cross_entropy(
        head(hidden)[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), label_smoothing=0.1
    )
    ours = causal_language_model_loss(hidden, labels, nn.Sequential(head) if wrapped else head, label_smoothing=0.1)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients(ours, *parameters), gradients(expected, *parameters)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_graph_that_is_kept_gives_its_gradients_again_and_one_that_is_not_is_refused_as_by_torch(small_chunks):
    hidden, head, labels = example()
    parameters = [hidden, head.weight]
    expected = gradients(3 * causal_language_model_loss(hidden, labels, head), *parameters)
    loss = 3 * causal_language_model_loss(hidden, labels, head)
    for _ in range(2):
        for ours, once in zip(torch.autograd.grad(loss, parameters, retain_graph=True), expected):
            torch.testing.assert_close(ours, once)
    loss.backward()
    torch.testing.assert_close(head.weight.grad, expected[1])
    with pytest.raises(RuntimeError, match="through the graph a second time"):
        loss.backward()


def test_second_derivatives_are_refused_and_torch_func_gives_the_gradients():
    hidden, head, labels = example()
    loss = causal_language_model_loss(hidden, labels, head)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, hidden, create_graph=True)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self):
            return causal_language_model_loss(hidden, labels, self.head)

    functional = torch.func.grad(lambda weights: torch.func.functional_call(Loss(), weights, ()))
    weight = head.weight.detach()
    torch.testing.assert_close(functional({"head.weight": weight})["head.weight"], gradients(loss, head.weight)[0])


def test_indices_of_supervised_tokens_give_the_same_and_labels_that_are_shifted_win(small_chunks):
    hidden, head, labels = example()
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    indices = (shifted.flatten() != -100).nonzero().squeeze(1)
    expected = causal_language_model_loss(hidden, labels, head)
    torch.testing.assert_close(causal_language_model_loss(hidden, labels, head, supervised_indices=indices), expected)
    wrong = {"shift_labels": shifted, "supervised_indices": indices[:3]}
    torch.testing.assert_close(causal_language_model_loss(hidden, None, head, **wrong), expected)


def test_bfloat16_head_gradient_is_summed_in_float32(small_chunks):
    hidden, head, labels = example(torch.bfloat16)
    exact_hidden = hidden.detach().float().requires_grad_()
    exact_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    exact_head.load_state_dict({"weight": head.weight.detach().float()})
    ours = gradients(causal_language_model_loss(hidden, labels, head), head.weight)[0]
    exact = gradients(causal_language_model_loss(exact_hidden, labels, exact_head), exact_head.weight)[0]
    assert ours.dtype == torch.bfloat16
    error = (ours.float() - exact).norm() / exact.norm()
    assert error < 2**-7  # one rounding of a bfloat16 (8 bits), not one per chunk


def test_float32_hidden_states_meet_a_bfloat16_head():
    hidden, head, labels = example()
    causal_language_model_loss(hidden, labels, head.to(torch.bfloat16)).backward()
    assert hidden.grad.dtype == torch.float32


def test_autocast_computes_logits_in_its_dtype():
    hidden, head, labels = example()
    with torch.autocast("cpu", torch.bfloat16):
        ours = causal_language_model_loss(hidden, labels, head)
        stock = ForCausalLMLoss(head(hidden), labels, VOCABULARY)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    assert gradients(ours, head.weight)[0].dtype == torch.float32


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_supervised_is_zero_with_a_graph_not_nan(wrapped, num_items):
    hidden, head, labels = example()
    head = nn.Sequential(head) if wrapped else head
    loss = causal_language_model_loss(hidden, torch.full_like(labels, -100), head, num_items)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.abs().sum() == 0


def test_logits_of_the_whole_sequence_never_exist(small_chunks):
    hidden, head, labels = example()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            is_logits = isinstance(result, torch.Tensor) and result.dim() == 2 and result.shape[1] == VOCABULARY
            if is_logits and function is not torch.ops.aten.t.default:  # the transposed head has this width too
                largest = max(largest, result.shape[0])
            return result

    with Watch():
        causal_language_model_loss(hidden, labels, head).backward()
    assert largest == 5  # rows of one chunk
