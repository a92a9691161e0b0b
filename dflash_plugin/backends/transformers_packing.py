"""Matrices of linear layers, rearranged once as the CPU's kernels read them.

torch gives a product on the CPU to oneDNN, which rearranges the whole matrix at
each call. For the 1 to 16 rows of a decoding step that takes as long as the product itself.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ROWS = 8
"""Rows the arrangement is chosen for; others are computed with it as well."""
_MULTIPLE = 32
"""More rows than that, a prompt's, are filled up to a multiple of it: oneDNN keeps about
half a MB for every number of rows and shape of matrix that it meets."""
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)")
"""A mapping's first line in Linux's ``smaps``: from, to and inode, 0 without a file."""


class PackedLinear(nn.Module):
    """What ``nn.Linear`` computes, from a matrix that nothing else can read."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Rearrange ``weight`` [out, in]."""
        super().__init__()
        # Neither a parameter nor a buffer: this layout has no copy to another device or type.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        count = x.shape[:-1].numel()
        if count <= _MULTIPLE:
            return self._product(x)
        rows = nn.functional.pad(x.reshape(count, -1), (0, 0, 0, -count % _MULTIPLE))
        made = self._product(rows)
        return made[:count].reshape(*x.shape[:-1], made.shape[-1])

    def _product(self, x: Tensor) -> Tensor:
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return made


def pack(model: nn.Module) -> int:
    """Pack every plain linear layer in ``model`` whose matrix nothing else refers to, and its head.

    A tied head's matrix stays for the embedding; a second copy would be made at each call
    otherwise. Done in place and for good, so only for a model that nobody else has.

    Returns:
        how many layers; 0 where it does not pay or cannot be done (see :func:`pays`).
    """
    used = Counter(p.data_ptr() for p in _tensors(model))
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and (used[child.weight.data_ptr()] == 1 or child is head)
    ]
    layers = [found for found in layers if pays(found[2].weight)]
    for parent, name, linear in layers:
        setattr(parent, name, PackedLinear(linear.weight, linear.bias))
        _release(linear.weight, read_again=used[linear.weight.data_ptr()] > 1)
    return len(layers)


def pays(weight: Tensor) -> bool:
    """Whether ``weight`` is of a kind that is faster packed, and this torch can do it."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float32):
        return False
    try:
        linear = PackedLinear(torch.ones(2, 2, dtype=weight.dtype), None)
        with torch.inference_mode():
            return linear(torch.ones(1, 2, dtype=weight.dtype)).tolist() == [[2.0, 2.0]]
    except (AttributeError, RuntimeError):  # built without oneDNN, or a processor too old
        return False


def _tensors(model: nn.Module) -> list[Tensor]:
    """All parameters, one that has several names as often as it has names."""
    return [p for module in model.modules() for p in module.parameters(recurse=False)]


def _release(weight: Tensor, *, read_again: bool) -> None:
    """Give back the memory of a tensor; with ``read_again`` if its file has the content.

    Checkpoints are mapped: their pages count as the process's until the file is
    unmapped, and a single tensor of it, such as the embedding, keeps it.
    """
    if sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    start = -(-weight.data_ptr() // page) * page
    end = (weight.data_ptr() + weight.nbytes) // page * page
    if end > start and (not read_again or _is_of_a_file(start, end)):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED
        )


def _is_of_a_file(start: int, end: int) -> bool:
    """Whether these addresses are within one mapped file, and nothing was written there.

    Pages that were written are anonymous memory, and gone when they are given back.
    """
    inside = mapped = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := _MAPPING.match(line):
            low, high, inode = int(found[1], 16), int(found[2], 16), int(found[3])
            inside, mapped = low <= start and end <= high, inode != 0
        elif inside and line.startswith("Anonymous:"):
            return mapped and line.split()[1] == "0"
    return False
