"""GGUF files: tensors written with the `gguf` package, one after the other and piece by piece, quantised, and read back."""

import ctypes
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from modeling_llava.io.files import atomic_path

from .checks import CheckReport
from .tensors import LazyTensor, as_bytes
from .writing import write_tensor


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


def import_package(name: str, hint: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"Writing GGUF of this type needs {name}: pip install {hint}.") from None


def write_gguf(gguf, path: Path, architecture: str, metadata: Mapping, tensors: Mapping, advance=int) -> None:
    """Write a GGUF file, with fields by [`language_metadata`]; it gets its name when it is whole and on the disk."""
    with atomic_path(path, sync=True) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        for field, value in metadata.items():
            writer.add_array(field, value) if "." in field else getattr(writer, f"add_{field}")(value)
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
                if tensor.content.dtype == TORCH_TYPES.get(tensor.kind):
                    write_tensor(tensor.content, file, advance)
                else:
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


def check_gguf(gguf, report: CheckReport, path: Path, tensors: Mapping[str, GgufTensor], dtype: str) -> None:
    """
    Read a file back: names, shapes, types and every value; of a quantised file (`dtype`) that each matrix has one of its types,
    since llama.cpp silently takes another one for rows that its blocks do not divide.
    """
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    if dtype in QUANTISED:
        matrices = {name: found[name].tensor_type.name for name, t in tensors.items() if len(t.content.shape) > 1}
        wrong = {
            f"'{name}' as {kind}, whose rows of {tensors[name].content.shape[1]} values 256 does not divide; take q8_0"
            for name, kind in matrices.items()
            if kind not in QUANTISED[dtype][1]
        }
        problem = f"are not stored as {dtype}"
    else:
        wrong = {f"'{name}'" for name, tensor in tensors.items() if not _reads_back(gguf, found[name], tensor)}
        problem = f"hold values that are not numbers, or too large for {dtype} (bf16 and f32 go further)"
    if wrong:
        report.add(path.name, "failed", f"{len(wrong)} tensors {problem}, such as {min(wrong)}")
    else:
        report.add(path.name, "ok", f"{len(tensors)} tensors, {len(reader.fields)} fields, read back")


def _reads_back(gguf, found, tensor: GgufTensor) -> bool:
    kind = gguf.GGMLQuantizationType[tensor.kind.upper()]
    if found.tensor_type != kind or tuple(int(n) for n in reversed(found.shape)) != tensor.content.shape:
        return False
    data, start = found.data.reshape(tensor.content.num_rows, -1), 0
    for rows in tensor.content.pieces():
        stored, start = data[start : start + len(rows)], start + len(rows)
        is_finite = np.isfinite(gguf.dequantize(stored.copy(), kind)).all()
        if not is_finite or stored.tobytes() != bytes(_packed(gguf, rows, tensor.kind)):
            return False
    return True
