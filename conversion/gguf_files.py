"""GGUF files: tensors written with the `gguf` package, one after the other and piece by piece, quantised, and read back."""

import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from modeling_llava.io.atomic import atomic_path

from .checks import CheckReport
from .tensors import LazyTensor, as_bytes


TORCH_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
QUANTISED = {
    "q4_k_m": ("LLAMA_FTYPE_MOSTLY_Q4_K_M", {"Q4_K", "Q5_K", "Q6_K"}),
    "q6_k": ("LLAMA_FTYPE_MOSTLY_Q6_K", {"Q6_K"}),
}
"""Type of a file that llama.cpp quantises → its name there, and the types of its matrices."""

TYPES = (*TORCH_TYPES, "q8_0", *QUANTISED)
BLOCK = 32
"""Values per block of `q8_0`: a row whose length is not a multiple of it is stored as `f16`."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file: its content in PyTorch's order of dimensions, and the type it is stored in."""

    content: LazyTensor
    kind: str

    @property
    def nbytes(self) -> int:
        count = self.content.nbytes // self.content.dtype.itemsize
        return count // BLOCK * 34 if self.kind == "q8_0" else count * TORCH_TYPES[self.kind].itemsize


def import_gguf():
    try:
        import gguf
    except ImportError:
        raise ImportError("Writing GGUF needs the gguf package: pip install 'modeling-llava[gguf]'.") from None
    return gguf


def import_llama_cpp():
    try:
        import llama_cpp
    except ImportError:
        raise ImportError(
            f"{' and '.join(QUANTISED)} are written by llama.cpp: pip install llama-cpp-python. Or convert with --dtype f16 "
            "and run its llama-quantize."
        ) from None
    return llama_cpp


def write_gguf(
    gguf, path: Path, architecture: str, metadata: Callable, tensors: Mapping[str, GgufTensor], advance=int
) -> None:
    """Write a GGUF file; it gets its name when it is whole and on the disk."""
    with atomic_path(path, sync=True) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        metadata(gguf, writer)
        for name, tensor in tensors.items():
            kind = gguf.GGMLQuantizationType[tensor.kind.upper()]
            writer.add_tensor_info(name, tensor.content.shape, None, tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        alignment = writer.data_alignment
        writer.close()
        with open(partial, "ab") as file:
            file.write(bytes(-file.tell() % alignment))
            for tensor in tensors.values():
                for rows in tensor.content.pieces():
                    advance(file.write(_packed(gguf, rows, tensor.kind)))
                file.write(bytes(-tensor.nbytes % alignment))


def _packed(gguf, rows: torch.Tensor, kind: str) -> bytes | memoryview:
    if kind == "q8_0":
        return gguf.quantize(rows.float().numpy(), gguf.GGMLQuantizationType.Q8_0).tobytes()
    return as_bytes(rows.to(TORCH_TYPES[kind]))


def quantise(llama_cpp, source: Path, target: Path, dtype: str) -> None:
    """Write `target` from the GGUF file `source` by llama.cpp's own quantiser."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, QUANTISED[dtype][0])
    with atomic_path(target, sync=True) as partial:
        if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(parameters)):
            raise OSError(f"llama.cpp could not quantise {source} to {dtype}: is the disk full?")


def check_gguf(
    gguf, report: CheckReport, path: Path, tensors: Mapping[str, GgufTensor], dtype: str | None = None
) -> None:
    """
    Read a file back: names, shapes, types, and every value within the rounding of its type; of a quantised file (`dtype`)
    that each matrix has one of its types, since llama.cpp silently takes another one for rows that its blocks do not divide.
    """
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    if found.keys() != tensors.keys():
        report.add(path.name, "failed", f"has {len(found)} tensors, {len(tensors)} were written")
        return
    if dtype in QUANTISED:
        kinds = {
            name: found[name].tensor_type.name for name, tensor in tensors.items() if len(tensor.content.shape) > 1
        }
        wrong = [name for name, kind in kinds.items() if kind not in QUANTISED[dtype][1]]
        why = f"are not stored as {dtype}, such as '{wrong[0]}' as {kinds[wrong[0]]}: its rows of " if wrong else ""
        why += f"{tensors[wrong[0]].content.shape[1]} values are no multiple of 256; take q8_0" if wrong else ""
    else:
        wrong = [key for key, tensor in tensors.items() if not _reads_back(gguf, found[key], tensor)]
        why = f"do not read back, such as '{wrong[0]}': they hold values that are not numbers, or " if wrong else ""
        why += f"too large for {tensors[wrong[0]].kind} (bf16 and f32 go further)" if wrong else ""
    if wrong:
        report.add(path.name, "failed", f"{len(wrong)} tensors {why}")
    else:
        report.add(path.name, "ok", f"{len(tensors)} tensors, {len(reader.fields)} fields, read back")


def _reads_back(gguf, found, tensor: GgufTensor) -> bool:
    kind = gguf.GGMLQuantizationType[tensor.kind.upper()]
    if found.tensor_type != kind or tuple(int(n) for n in reversed(found.shape)) != tensor.content.shape:
        return False
    data, start = found.data.reshape(tensor.content.num_rows, -1), 0
    for rows in tensor.content.pieces():
        stop = start + rows.shape[0]
        values = torch.from_numpy(gguf.dequantize(data[start:stop].copy(), kind)).reshape(rows.shape)
        wanted = rows.float()
        if tensor.kind == "q8_0":  # the step of a block is its largest value / 127; its scale is kept in float16
            step = wanted.reshape(-1, BLOCK).abs().amax(-1, keepdim=True) / 127
            error = (values - wanted).reshape(-1, BLOCK).abs()
            if not bool((error <= step * 0.57 + 1e-7).all()):
                return False
        elif not values.isfinite().all() or not torch.equal(values, wanted.to(TORCH_TYPES[tensor.kind]).float()):
            return False
        start = stop
    return True
