"""Weights that oneDNN has packed, and a check that finds every change of the original weights."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from threading import Lock

import torch
from torch import Tensor
from xxhash import xxh3_128_digest

#: Largest number of packed copies of each convolution's weights; the oldest is removed first. This limits the memory of
#: packed weights. oneDNN mostly chooses one layout for all sizes.
PACKED_COPIES = 4
#: Largest number of input shapes for which each convolution remembers the packed copy.
PACKED_SHAPES = 1024


class PackedWeights:
    """One convolution's weights, packed by oneDNN for different input shapes; equal copies are stored once.

    Several threads may call it: a copy that a call received stays valid when another call adds or removes copies.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._copies: list[Tensor] = []
        self._of_shape: dict[tuple[int, ...], Tensor] = {}

    def get(self, shape: tuple[int, ...]) -> Tensor | None:
        """The weights packed for inputs of ``shape``; None where there are none."""
        return self._of_shape.get(shape)

    def add(self, shape: tuple[int, ...], packed: Tensor) -> Tensor:
        """Store ``packed`` for ``shape``. Returns the copy to use: an older copy if an equal one exists."""
        with self._lock:
            for copy in self._copies:
                if _same_packed(copy, packed):
                    packed = copy
                    break
            else:
                self._copies.append(packed)
                if len(self._copies) > PACKED_COPIES:
                    del self._copies[0]
                    self._of_shape = {}
            if len(self._of_shape) >= PACKED_SHAPES:
                self._of_shape = {}
            self._of_shape[shape] = packed
        return packed


def _packed_bytes(packed: Tensor) -> int:
    return int(torch.ops.mkldnn._nbytes(packed))


def _same_packed(one: Tensor, other: Tensor) -> bool:
    """Whether two packings of the same weights hold the same bytes."""
    size = _packed_bytes(one)
    pointer = torch.ops.mkldnn.data_ptr
    return size == _packed_bytes(other) and not _memcmp()(pointer(one), pointer(other), size)


@cache
def _memcmp() -> Callable[[int, int, int], int]:
    """The C library's ``memcmp``."""
    library = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
    function = library.memcmp
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    function.restype = ctypes.c_int
    return function


class Snapshot:
    """Copies of tensors, and a check whether the tensors still hold the same bytes.

    Only a check of all bytes finds every change. Writes through ``.data``, a NumPy view, shared memory or a
    collective operation do not change a tensor's version counter, and tensors of inference mode have no counter. Sums
    of words would miss changes that cancel, such as two weights that change their signs. Hashes of 128 bits miss none
    that occurs by chance, and read half as much as a comparison with the copies. The time of the check is in
    ``benchmarks/results/small.json``.

    Args:
        tensors: dense, on the CPU.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        with torch.inference_mode(mode=False):
            self.copies = [tensor.detach().clone(memory_format=torch.preserve_format) for tensor in tensors]
        self._dtypes = [copy.dtype for copy in self.copies]
        self._shapes = [copy.shape for copy in self.copies]
        self._strides = [copy.stride() for copy in self.copies]
        self._sizes = [copy.nbytes for copy in self.copies]
        pointers = [copy.data_ptr() for copy in self.copies]
        self._blocks = pointers, _blocks(pointers, self._sizes)
        self._digests = list(map(xxh3_128_digest, self._blocks[1]))

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` equal the copies, and have the same shapes, dtypes and devices."""
        # Compare whole lists: this is faster than a loop over the tensors.
        if not all(tensor.is_cpu for tensor in tensors) or [tensor.dtype for tensor in tensors] != self._dtypes:
            return False
        if [tensor.shape for tensor in tensors] != self._shapes:
            return False
        # The copies are dense, so tensors with the same strides are dense too.
        if [tensor.stride() for tensor in tensors] == self._strides:
            return self._same_bytes([tensor.data_ptr() for tensor in tensors])
        return all(map(_same_values, tensors, self.copies))

    def _same_bytes(self, pointers: list[int]) -> bool:
        blocks = self._blocks  # read once: another thread may replace it
        if blocks[0] != pointers:
            blocks = self._blocks = pointers, _blocks(pointers, self._sizes)
        return list(map(xxh3_128_digest, blocks[1])) == self._digests


def _blocks(pointers: Iterable[int], sizes: Iterable[int]) -> list[ctypes.Array[ctypes.c_char]]:
    """Memory as buffers. They keep nothing alive, so they may be read only while their tensors exist."""
    return [(ctypes.c_char * size).from_address(pointer) for pointer, size in zip(pointers, sizes, strict=True)]


def _same_values(tensor: Tensor, copy: Tensor) -> bool:
    """Whether tensors of the same shape and dtype hold the same bytes; ``copy`` is dense."""
    dense = torch.empty_like(copy).copy_(tensor.detach())
    return not _memcmp()(copy.data_ptr(), dense.data_ptr(), copy.nbytes)
