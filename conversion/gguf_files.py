"""GGUF files: tensors written with the `gguf` package, one after the other and piece by piece, and read back."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from modeling_llava.io.atomic import atomic_path

from .checks import CheckReport
from .tensors import FileRange, LazyTensor
from .writing import as_bytes, copy_range, write_all


TYPES = ("f16", "bf16", "f32", "q8_0")
TORCH_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}

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


def write_gguf(gguf, path: Path, metadata: Callable, tensors: Mapping[str, GgufTensor], advance=int) -> None:
    """Write a GGUF file; it gets its name when it is whole and on the disk."""
    with atomic_path(path, sync=True) as partial:
        writer = gguf.GGUFWriter(partial, "clip" if path.name.startswith("mmproj") else "llama")
        metadata(gguf, writer)
        for name, tensor in tensors.items():
            kind = gguf.GGMLQuantizationType[tensor.kind.upper()]
            writer.add_tensor_info(name, tensor.content.shape, _NO_DTYPE, tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        alignment = writer.data_alignment
        writer.close()
        with open(partial, "r+b", buffering=0) as file:
            file.seek(0, os.SEEK_END)
            write_all(file, bytes(-file.tell() % alignment))
            for tensor in tensors.values():
                _write_tensor(gguf, tensor, file, advance)
                write_all(file, bytes(-tensor.nbytes % alignment))


_NO_DTYPE = None
"""`add_tensor_info` looks at NumPy's dtype only where no GGML type is given."""


def _write_tensor(gguf, tensor: GgufTensor, file, advance) -> None:
    content = tensor.content
    if tensor.kind == "q8_0":
        for rows in content.row_pieces():
            packed = gguf.quantize(rows.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
            write_all(file, packed.tobytes())
            advance(packed.nbytes)
        return
    dtype = TORCH_TYPES[tensor.kind]
    for piece in content.pieces() if content.dtype == dtype else content.row_pieces():
        if isinstance(piece, FileRange):
            copy_range(piece, file, advance)
        else:
            data = as_bytes(piece.to(dtype))
            write_all(file, data)
            advance(len(data))


def check_gguf(gguf, folder: Path, files: Mapping[str, tuple[Callable, Mapping[str, GgufTensor]]]) -> CheckReport:
    """Read the files back: names, shapes, types, and every value within the rounding of its type."""
    report = CheckReport(folder)
    for name, (_, tensors) in files.items():
        reader = gguf.GGUFReader(folder / name)
        found = {tensor.name: tensor for tensor in reader.tensors}
        if found.keys() != tensors.keys():
            report.add(name, "failed", f"has {len(found)} tensors, {len(tensors)} were written")
            continue
        wrong = [key for key, tensor in tensors.items() if not _reads_back(gguf, found[key], tensor)]
        if wrong:
            report.add(
                name,
                "failed",
                f"{len(wrong)} tensors do not read back, such as '{wrong[0]}': they hold values that are not numbers, or "
                f"too large for {tensors[wrong[0]].kind} (bf16 and f32 go further)",
            )
        else:
            report.add(name, "ok", f"{len(tensors)} tensors, {len(reader.fields)} fields, read back value by value")
    return report


def _reads_back(gguf, found, tensor: GgufTensor) -> bool:
    kind = gguf.GGMLQuantizationType[tensor.kind.upper()]
    if found.tensor_type != kind or tuple(int(n) for n in reversed(found.shape)) != tensor.content.shape:
        return False
    data, start = found.data.reshape(tensor.content.num_rows, -1), 0
    for rows in tensor.content.row_pieces():
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
