"""What takes the steps: AdamW, or Muon for the matrices (https://kellerjordan.github.io/posts/muon).

Muon makes every step of a matrix orthogonal. Its rate is scaled so that a step is as large
as one of AdamW (arXiv 2502.16982), so one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...errors import MissingDependencyError
from .config import Fit

_STATE = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}


class Optimizer:
    """One or two of PyTorch's, used as one; vectors are never decayed.

    Raises:
        MissingDependencyError: Muon with a PyTorch that does not have it yet.
    """

    def __init__(self, fit: Fit, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._named = list(named)
        matrices = [p for _, p in named if p.ndim > 1]
        vectors = [p for _, p in named if p.ndim <= 1]
        plain = [{"params": vectors, "weight_decay": 0.0}]
        self._parts: list[torch.optim.Optimizer] = []  # of the matrices first, of vectors last
        if fit.optimizer == "muon":
            if not hasattr(torch.optim, "Muon"):
                raise MissingDependencyError(
                    f"fit.optimizer: PyTorch {torch.__version__} has no Muon",
                    hint='PyTorch 2.9 or later, or "adamw"',
                )
            self._parts.append(
                torch.optim.Muon(
                    matrices, lr=fit.learning_rate, weight_decay=fit.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )  # fmt: skip
        else:
            plain.insert(0, {"params": matrices, "weight_decay": fit.weight_decay})
        self._parts.append(
            torch.optim.AdamW(plain, lr=fit.learning_rate, betas=(0.9, 0.95), fused=True)
        )

    def step(self, rate: float) -> None:
        """Take one with this learning rate; gradients are forgotten."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint has to hold, as ``optimizer.<part>.<parameter>``."""
        for name, parameter, optimizer in self._owners():
            for part, value in optimizer.state[parameter].items():
                yield f"optimizer.{part}.{name}", value

    def load(self, held: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`tensors` gave.

        Raises:
            KeyError: a part is missing.
        """
        for name, parameter, optimizer in self._owners():
            optimizer.state[parameter] = {
                part: held[f"optimizer.{part}.{name}"].to(
                    "cpu" if part == "step" and parameter.device.type == "cpu" else parameter.device
                )
                for part in _STATE[type(optimizer).__name__]
            }

    def _owners(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        for name, parameter in self._named:
            yield name, parameter, self._parts[0 if parameter.ndim > 1 else -1]
