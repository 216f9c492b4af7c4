"""
Float32 matrix products on the CPU by oneDNN.

PyTorch gives float32 products to MKL, which leaves half of the vector width of AMD processors unused; oneDNN, which every
x86 build of PyTorch has for convolutions, uses all of it. On an AMD EPYC with AVX-512, two threads, GFLOP/s
(`examples/benchmarks/products.py`):

    positions × in × out                                 MKL     oneDNN
    3735 × 384 × 1024     forward                        208     420
    3735 × 384 × 1024     gradient of the input          204     471
    3735 × 384 × 1024     gradient of the weight         182     346

The arithmetic is the same float32, summed in another order. Which library computes depends on shapes alone, so that a
resumed run repeats itself bit for bit.
"""

import functools
import os

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..compat import mkldnn_linear
from ..constants import ONEDNN_CACHES
from .exchange import Kernel, can_exchange, exchange


MIN_MULTIPLICATIONS = 2**22
"""Below so many, preparing oneDNN's call takes longer than it saves (two threads: 10 µs)."""


@functools.cache
def is_available() -> bool:
    """Whether this PyTorch has the operator that is used here, and it computes what it should: it is tried."""
    for name, value in ONEDNN_CACHES.items():
        os.environ.setdefault(name, value)
    try:
        with torch.inference_mode(False), torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            a, b = (torch.randn(shape, generator=generator) for shape in ((5, 8), (7, 8)))
            results = _product(a, b), _product(a.t().contiguous().t(), b.t().contiguous().t())
            return all(torch.allclose(result, a @ b.t(), atol=1e-5) for result in results)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False


def _product(a, b):
    return mkldnn_linear(a, b)


def serves(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether oneDNN computes `a @ b.t()` here: float32 on the CPU, plain tensors, large enough."""
    return _suits(b) and _serves(a, b.shape[0])


def _serves(a: torch.Tensor, columns: int) -> bool:
    return (
        _suits(a)
        and a.numel() * columns >= MIN_MULTIPLICATIONS
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and is_available()
    )


def _suits(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu" and tensor.dtype == torch.float32 and type(tensor) in (torch.Tensor, nn.Parameter)
    )


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """
    `a @ b.t()` without autograd, by whichever library is faster.

    Args:
        a (`torch.Tensor` of shape `(rows, inner)`), b (`torch.Tensor` of shape `(columns, inner)`):
            May be transposed views: nothing is copied.

    Returns:
        `torch.Tensor` of shape `(rows, columns)`.
    """
    return _product(a, b) if serves(a, b) else a @ b.t()


class _Linear(torch.autograd.Function):
    """`x @ weight.t() + bias`, all three products by [`product`]."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        # x [positions, in], weight [out, in]
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        output = product(x, weight)
        return output if bias is None else output.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if needs_x else None,
            product(x.t(), grad.t()).t() if needs_weight else None,
            grad.sum(dim=0) if needs_bias else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, with its gradients, by oneDNN where it [`serves`]."""
    rows = x.reshape(-1, x.shape[-1])
    if not serves(rows, weight):
        return nn.functional.linear(x, weight, bias)
    return _Linear.apply(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


class _FourBitLinear(torch.autograd.Function):
    """`x @ weight.t()` for a frozen 4-bit weight, which is dequantised for the forward and again for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return product(x, _dequantised(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return product(grad, _dequantised(ctx.weight).t()), None


def _dequantised(weight):
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


class OneDNNLinear(Kernel):
    prefix = "OneDNN"

    def compute(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


class OneDNNLinear4bit(Kernel):
    prefix = "OneDNN"

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        state = getattr(self.weight, "quant_state", None)
        is_plain = state is not None and state.dtype == torch.float32 and self.compute_dtype in (None, torch.float32)
        is_packed = getattr(state, "packing_format_for_cpu", False)  # in place, by bitsandbytes, for inference
        if not is_plain or is_packed or self.bias is not None or not _serves(rows, self.out_features):
            return self.compute_plainly(x)
        return _FourBitLinear.apply(rows, self.weight).view(*x.shape[:-1], self.out_features)


def use_onednn(model: nn.Module) -> int:
    """
    Let the linear layers of a model on the CPU compute by [`linear`], in place; 4-bit layers of bitsandbytes too.

    Args:
        model (`nn.Module`): Layers that wrap others (LoRA) are left alone, those inside are not.

    Returns:
        `int`: how many layers do now.
    """
    replaced = 0
    for module in model.modules() if is_available() else ():
        is_plain = type(module).forward is nn.Linear.forward and _suits(module.weight)
        is_four_bit = hasattr(module, "compute_dtype") and module.weight.device.type == "cpu"
        if can_exchange(module) and (is_plain or is_four_bit):
            exchange(module, OneDNNLinear if is_plain else OneDNNLinear4bit)
            replaced += 1
    return replaced


__all__ = ["is_available", "linear", "product", "serves", "use_onednn"]
