"""``config.json`` read field by field: wrong types are errors that name file and field."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ModelNotFoundError, PairMismatchError

_TINY = sys.float_info.min


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed ``folder/config.json``.

    Raises:
        ModelNotFoundError: no such folder or file.
        PairMismatchError: not a JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"{folder}: no such model folder",
            hint="give a local folder that holds config.json, or a hub id such as Qwen/Qwen3-8B",
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise ModelNotFoundError(
            f"{path}: no such file", hint="every model folder has a config.json"
        ) from err
    except (ValueError, RecursionError, OSError) as err:
        raise PairMismatchError(f"{path}: not readable JSON ({err})") from err
    if not isinstance(raw, dict):
        raise PairMismatchError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


class Fields:
    """Typed access to a config, with errors that name file and field.

    ``raw`` is the whole config, ``dflash`` its ``dflash_config`` table; ``nested``
    fields are looked for in that table first. ``null`` counts as not stated.
    """

    def __init__(self, source: Path, raw: Mapping[str, Any], dflash: Mapping[str, Any]) -> None:
        self.source, self.raw, self.dflash = source, raw, dflash

    def wrong(self, name: str, expected: str, found: Any) -> PairMismatchError:
        """The error to raise for a field that is not what was ``expected``."""
        return PairMismatchError(
            f"{self.source}: {name} is {json.dumps(found)}, expected {expected}",
            hint="compare config.json with the published one",
        )

    def either(self, name: str) -> Any:
        """``dflash_config.<name>`` or, failing that, the top level's."""
        nested = self.dflash.get(name)
        return self.raw.get(name) if nested is None else nested

    def integer(
        self,
        name: str,
        *,
        default: int | None = None,
        nested: bool = False,
        at_least: int = 1,
        at_most: int | None = None,
    ) -> int:
        """A whole number; PairMismatchError where it is missing and has no default."""
        value = self.either(name) if nested else self.raw.get(name)
        if value is None:
            value = default
        if type(value) is not int or value < at_least:
            raise self.wrong(name, f"an integer >= {at_least}", value)
        if at_most is not None and value > at_most:
            raise self.wrong(name, f"at most {at_most}", value)
        return value

    def number(
        self, name: str, *, default: float, nested: bool = False, at_least: float = _TINY
    ) -> float:
        """A finite number, positive unless told otherwise."""
        value = self.either(name) if nested else self.raw.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not at_least <= value <= sys.float_info.max:
            raise self.wrong(name, "a number " + (">= 0" if at_least == 0 else "> 0"), value)
        return float(value)

    def boolean(self, name: str, table: Mapping[str, Any]) -> bool | None:
        """``table[name]``; None where it is not stated."""
        value = table.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def text(self, name: str, *, default: str) -> str:
        """A string."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string", value)
        return default if value is None else value

    def strings(self, name: str) -> list[str]:
        """A list of strings; empty where it is not stated."""
        value = self.raw.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "a list of strings", value)
        return value

    def rope(self) -> dict[str, Any]:
        """RoPE settings under one spelling: ``rope_type``, ``rope_theta``, the scaling's own.

        Transformers 4 writes ``rope_theta`` + ``rope_scaling``, Transformers 5
        ``rope_parameters``; published drafts have either, or both.
        """
        merged: dict[str, Any] = {"rope_type": "default", "rope_theta": self.raw.get("rope_theta")}
        for key in ("rope_scaling", "rope_parameters"):
            extra = self.raw.get(key)
            if extra is None:
                continue
            if not isinstance(extra, Mapping):
                raise self.wrong(key, "an object or null", extra)
            extra = {k: v for k, v in extra.items() if v is not None}
            if "type" in extra and "rope_type" not in extra:
                extra["rope_type"] = extra.pop("type")
            merged.update(extra)
        fields = Fields(self.source, merged, {})
        fields.text("rope_type", default="default")
        return {**merged, "rope_theta": fields.number("rope_theta", default=10000.0)}
