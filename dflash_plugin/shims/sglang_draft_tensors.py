"""SGLang loads a draft whatever tensors it is given.

Names it does not know are skipped, and parameters that nothing was given for keep the
random values they were made with. Rejection sampling hides it: the text stays right and
the acceptance length falls to 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import CheckpointError
from . import Shim

# Parameters that are filled in parts, and by how many tensors.
_PARTS = {"qkv_proj": 3, "gate_up_proj": 2}
_SHOWN = 8


class Watch:
    """Stands before each parameter's ``weight_loader`` and notes what it is given."""

    def __init__(self, parameters: dict[str, Any], default: Any) -> None:
        self.parts: dict[str, set[Any]] = {}
        self.unused: list[str] = []
        self._used = False
        self._own = {name: vars(p).get("weight_loader") for name, p in parameters.items()}
        self._parameters = parameters
        for name, parameter in parameters.items():
            parameter.weight_loader = self._recorder(name, self._own[name] or default)

    def tensors(self, weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """The same tensors, noting the names that nothing was done with."""
        for name, tensor in weights:
            self._used = False
            yield name, tensor
            # Frequencies that older checkpoints carry are computed, never loaded.
            if not self._used and "rotary_emb" not in name:
                self.unused.append(name)

    def end(self) -> None:
        """Leave the parameters as they were."""
        for name, parameter in self._parameters.items():
            if self._own[name] is None:
                del parameter.weight_loader
            else:
                parameter.weight_loader = self._own[name]

    def missing(self) -> list[str]:
        """Parameters that were given nothing, or not all of their parts."""
        return [name for name, parts in self.parts.items() if not _whole(name, parts)]

    def _recorder(self, name: str, loader: Any) -> Any:
        parts = self.parts.setdefault(name, set())

        def load(parameter: Any, tensor: Any, *part: Any, **options: Any) -> Any:
            self._used = True
            parts.add(part[0] if part else "whole")
            return loader(parameter, tensor, *part, **options)

        return load


def _whole(name: str, parts: set[Any]) -> bool:
    wanted = next((count for key, count in _PARTS.items() if f"{key}." in name), 1)
    return "whole" in parts or len(parts) >= wanted


def apply(module: Any) -> str:
    """Have the draft look at its tensors' names."""
    published = module.DFlashDraftModel.load_weights

    def load_weights(self: Any, weights: Iterable[tuple[str, Any]]) -> Any:
        quantised = getattr(self.config, "quantization_config", None) is not None
        if quantised:  # its parameters are made, and filled, by the quantisation
            return published(self, weights)
        watch = Watch(dict(self.named_parameters()), module.default_weight_loader)
        try:
            loaded = published(self, watch.tensors(weights))
        finally:
            watch.end()
        check(watch.missing(), watch.unused)
        return loaded

    module.DFlashDraftModel.load_weights = load_weights
    return "every tensor of a draft must be known, and none may be missing"


def check(missing: list[str], unused: list[str]) -> None:
    """Raise what is wrong with a draft's tensors.

    Raises:
        CheckpointError: there is any of either.
    """
    said = [
        f"{what}: {', '.join(names[:_SHOWN])}"
        + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for what, names in (("not in the checkpoint", missing), ("not known to SGLang", unused))
        if names
    ]
    if said:
        raise CheckpointError(
            f"dflash-plugin: the draft's tensors are not those of its config; {'; '.join(said)}",
            hint="dflash-plugin doctor --target … --draft … names every tensor; use the published "
            "checkpoint, or rename its tensors",
        )


SHIM = Shim(
    name="sglang-draft-tensors",
    symptom="a draft with missing or unknown tensors is loaded without a word, random values in "
    "their place: the text stays right, the acceptance length is 1",
    mechanism="the loader skips names it does not know and never counts what it was given; both "
    "are errors now, quantised drafts left out",
    removal="when the release refuses such drafts itself, which "
    "test_each_repair_is_still_needed shows by failing",
    module="sglang.srt.models.dflash",
    fingerprints={
        "DFlashDraftModel.load_weights": frozenset(
            {
                "186fa446235a4f72",  # 0.5.18
                "06b4fa62fd14395a",  # 0.5.19
                "76893de629da19a8",  # 0.5.20 - 0.5.23
            }
        ),
    },
    apply=apply,
)
