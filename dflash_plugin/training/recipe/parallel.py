"""One process, or several under ``torchrun``: who does what, and sums over all."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor


class World:
    """The processes of a run; without ``torchrun`` this one alone."""

    def __init__(self, device: str = "") -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device(device or _best_device(local))
        self._owns = False
        if self.size > 1 and not torch.distributed.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self._owns = True

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def wrap(self, model: Any) -> Any:
        """``model`` with its gradients averaged over processes."""
        if self.size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        # The head's rows are another buffer at every step, and differ between processes.
        return DistributedDataParallel(model, broadcast_buffers=False)

    def sum(self, value: Tensor) -> Tensor:
        """Over processes."""
        if self.size == 1:
            return value
        found = value.detach().clone().to(self.device)
        torch.distributed.all_reduce(found)
        return found

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of them."""
        return bool(flag) if self.size == 1 else float(self.sum(torch.tensor(float(flag)))) > 0

    def agree(self, value: float | None) -> float | None:
        """The first process's value, in all."""
        if self.size == 1 or value is None:
            return value
        told = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(told, 0)
        return float(told)

    def close(self) -> None:
        """Wait for the others and part."""
        if self._owns:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
            self._owns = False


def _best_device(local: int) -> str:
    if torch.cuda.is_available():
        return f"cuda:{local}"
    return "cpu"
