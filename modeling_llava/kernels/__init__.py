"""What makes a step fast, each with its plain equivalent; [`apply_kernels`] is the one entry."""

from .efficient_layers import KernelReport, apply_kernels


__all__ = ["KernelReport", "apply_kernels"]
