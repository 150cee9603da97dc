"""Reads the GGUF container: metadata, the table of tensors, and rows of raw tensor bytes.

The format is described in ggml's docs/gguf.md. The `gguf` package has a reader too, but it keeps several numpy views
for every token of the vocabulary: 1.8 s and 160 MiB for a vocabulary of 49,152 (0.1 s and 25 MiB here), and it says
"cannot reshape array" where the file was cut short. Block sizes and dequantisation do come from that package.
"""

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from aiollm.hub.errors import HubError

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` in numpy order (rows first), `row_bytes` the bytes of one row of the last dimension.

    The rows of a vector are its elements.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    row_bytes: int
    offset: int  # from the start of the file

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1] if len(self.shape) > 1 else self.shape)


class GgufFile:
    """An open GGUF file, checked to hold all bytes that its header promises. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        """Errors: HubError when the file is no GGUF of version 2 or 3, is cut short, or contradicts itself."""
        self.path = path
        self._file = path.open("rb")
        try:
            self.fields, self.tensors = _read_header(self._file.fileno(), path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def read_rows(self, tensor: GgufTensor, first: int, count: int) -> NDArray[np.uint8]:
        """The raw bytes of rows [first, first + count) as uint8 [count, row_bytes].

        They are read, not mapped: mapped pages would count as this process's memory until the kernel reclaims them.
        """
        raw = os.pread(self._file.fileno(), count * tensor.row_bytes, tensor.offset + first * tensor.row_bytes)
        if len(raw) != count * tensor.row_bytes:
            raise HubError(f"{self.path} shrank while it was read, at tensor {tensor.name}")
        return np.frombuffer(raw, np.uint8).reshape(count, tensor.row_bytes)


class _Cursor:
    """Walks over the header; every read past the end of the file is a HubError."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, size: int) -> int:
        """Steps over `size` bytes and returns where they start."""
        start = self.at
        if size > len(self.data) - start:
            raise HubError(f"{self.path} is truncated: its header runs past the end of the file")
        self.at = start + size
        return start

    def scalar(self, layout: str) -> Any:
        return struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        size = self.scalar("<Q")
        start = self.take(size)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError:
            raise HubError(f"{self.path}: a string in the header at byte {start} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise HubError(f"{self.path}: unknown metadata type {kind} at byte {self.at}")
        item, count = self.scalar("<I"), self.scalar("<Q")
        if item == STRING:
            return [self.string() for _ in range(count)]
        if item not in SCALARS:
            raise HubError(f"{self.path}: unknown array type {item} at byte {self.at}")
        dtype = np.dtype(SCALARS[item])
        return np.frombuffer(self.data, dtype, count, self.take(count * dtype.itemsize)).tolist()


def _read_header(descriptor: int, path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    size = os.fstat(descriptor).st_size
    if size < 24 or os.pread(descriptor, 4, 0) != b"GGUF":
        raise HubError(f"{path} is not a GGUF file (it has no GGUF header)")
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        cursor.take(4)
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise HubError(f"{path}: GGUF version {version} is not supported, only 2 and 3 (little endian)")
        tensor_count, field_count = cursor.scalar("<Q"), cursor.scalar("<Q")
        fields = {}
        for _ in range(field_count):
            key = cursor.string()
            fields[key] = cursor.value(cursor.scalar("<I"))
        entries = [_read_tensor_entry(cursor) for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise HubError(f"{path}: general.alignment must be a power of two, not {alignment!r}")
        start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, kind, shape, offset in entries:
        tensors[name] = tensor = _place(path, name, kind, shape, start + offset)
        end = tensor.offset + tensor.rows * tensor.row_bytes
        if end > size:
            raise HubError(f"{path} is truncated: tensor {name} ends at byte {end}, the file has {size}")
    return fields, tensors


def _read_tensor_entry(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.string()
    dimensions = cursor.scalar("<I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise HubError(f"{cursor.path}: tensor {name} has {dimensions} dimensions, 1 to {MAX_DIMENSIONS} are possible")
    shape = tuple(cursor.scalar("<Q") for _ in range(dimensions))
    return name, cursor.scalar("<I"), shape[::-1], cursor.scalar("<Q")


def _place(path: Path, name: str, kind: int, shape: tuple[int, ...], offset: int) -> GgufTensor:
    try:
        quantization = GGMLQuantizationType(kind)
    except ValueError:
        raise HubError(f"{path}: tensor {name} has the unknown type {kind}") from None
    block, block_bytes = GGML_QUANT_SIZES[quantization]
    if len(shape) == 1 and block > 1:
        raise HubError(f"{path}: tensor {name} is a vector of type {quantization.name}; only matrices can be quantised")
    if shape[-1] % block:
        raise HubError(f"{path}: tensor {name} has rows of {shape[-1]}, no multiple of its block of {block}")
    blocks = shape[-1] // block if len(shape) > 1 else 1
    return GgufTensor(name, quantization, shape, blocks * block_bytes, offset)
