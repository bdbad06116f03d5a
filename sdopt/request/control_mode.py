"""The modes of union ControlNets: which kind of picture each one is, by number or by name.

    control_mode=1                                  one picture
    control_mode=["depth", 3]                       two pictures of one net, in their order
    control_mode=[[1, 3], 0]                        of two nets, in the order of control_image
    control_mode={"union": ["depth", "canny"]}      by the nets' names

Ref: diffusers, StableDiffusionXLControlNetUnionPipeline, control_mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from sdopt.bundle.adapter import Adapter
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, choices, shown
from sdopt.request.kinds import Integer, Kind, Schema, Word, items, read_part

MODE = "control_mode"
HIGHEST = 999


@dataclass(frozen=True)
class Modes(Kind):
    """A mode, a list of them, a list of these, or a table of them by name."""

    example: str = '"depth"'

    def allowed(self) -> str:
        return (
            "are the number or the name of a mode, a list of them for several pictures, and for several union "
            "ControlNets a list of these, or {name: these}"
        )

    def read(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return _several(value, _modes)
        table = cast("Mapping[Any, Any]", value)
        if not table or not all(isinstance(name, str) for name in table):
            raise ValueError
        return {str(name): _several(modes, _mode) for name, modes in table.items()}

    def schema(self) -> Schema:
        one: Schema = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": HIGHEST}, {"type": "string"}]}
        several = {"anyOf": [*one["anyOf"], {"type": "array", "items": one, "minItems": 1}]}
        nets = {"type": "array", "items": several, "minItems": 1}
        return {"anyOf": [*several["anyOf"], nets, {"type": "object", "additionalProperties": several}]}

    def from_flag(self, value: Any) -> Any:
        """The modes in "depth" or "1,3"."""
        modes = [mode_of(word) for word in value.split(",")]
        return modes[0] if len(modes) == 1 else modes


def mode_of(word: str) -> int | str:
    """A mode as a command line has it: a number where it can be one, else a name."""
    return int(word) if word.isdecimal() and len(word) <= len(str(HIGHEST)) else word


def _several(value: Any, read: Any) -> Any:
    """One value that `read` reads, or a list of them."""
    is_list = isinstance(value, (list, tuple, range)) or (getattr(value, "ndim", 0) and value.dtype.kind in "iu")
    return [read(one) for one in items(value)] if is_list else read(value)


def _modes(value: Any) -> Any:
    return _several(value, _mode)


def _mode(value: Any) -> Any:
    """A number or a name."""
    return Word("").read(value) if isinstance(value, str) else read_part(Integer(0, HIGHEST), value)


def modes_of(given: Any, unions: Mapping[str, Adapter]) -> dict[str, tuple[int, ...]]:
    """The numbers of the modes of each union ControlNet's pictures, by its name.

    `given`: the value of control_mode. `unions`: those of the request, in the order of control_image.
    Raises: UsageError for a mode that a net does not have, for modes of what is no union ControlNet, and without any.
    """
    if not unions:
        if given is not None:
            raise UsageError(f"{MODE}: {_none(given)}; leave it out", MODE)
        return {}
    named = _by_net(given, list(unions))
    return {name: tuple(_number(name, adapter, one) for one in named[name]) for name, adapter in unions.items()}


def _none(given: Any) -> str:
    named = f"{', '.join(cast('Mapping[str, Any]', given))} is no" if isinstance(given, Mapping) else "there is no"
    return f"{named} union ControlNet in control_image, and only these have modes"


def _by_net(given: Any, names: Sequence[str]) -> Mapping[str, Sequence[Any]]:
    """What was given for each net, as a list."""
    if given is None:
        text = f"{MODE} is missing: {names[0]} is a union ControlNet, and sees pictures of several kinds"
        example = "0" if len(names) == 1 else f"{[0] * len(names)}, one for each net"
        raise UsageError(f"{text}; say which, by number or name: {MODE}={example}; `sdopt inspect` lists them", MODE)
    if isinstance(given, Mapping):
        table = cast("Mapping[str, Any]", given)
        for name in table:
            if name not in names:
                known = choices(name, names)
                raise UsageError(f"{MODE}: {name} is no union ControlNet in control_image; there is {known}", MODE)
        for name in names:
            if name not in table:
                raise UsageError(f"{MODE}: it has no mode of {name}; give {{{name!r}: 0}} too", MODE)
        return {name: _listed(table[name]) for name in names}
    if len(names) == 1:
        modes = _listed(given)
        is_nested = len(modes) == 1 and isinstance(modes[0], list)
        own = {names[0]: cast("list[Any]", modes[0]) if is_nested else modes}
    else:
        nets = _listed(given)
        if len(nets) != len(names):
            text = f"{MODE}: {len(nets)} modes for {len(names)} union ControlNets, {', '.join(names)}"
            raise UsageError(f"{text}; give one for each, or {{name: modes}}", MODE)
        own = {name: _listed(modes) for name, modes in zip(names, nets, strict=True)}
    for modes in own.values():
        for one in modes:
            if isinstance(one, list):
                text = f"{MODE} = {shown(given)}: a list in a list is for several union ControlNets, and {names[0]} is"
                raise UsageError(f"{text} the only one; give a list of modes, one for each picture", MODE)
    return own


def _listed(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else [value]


def _number(net: str, adapter: Adapter, mode: int | str) -> int:
    """The number of a mode. Raises: UsageError for one that the net does not have."""
    assert adapter.manifest.control is not None  # a manifest of this kind has it
    names = adapter.manifest.control.modes
    if isinstance(mode, int) and mode < len(names):
        return mode
    if mode in names:
        return names.index(mode)
    known = ", ".join(f"{i} {name}" for i, name in enumerate(names))
    raise UsageError(f"{MODE} = {shown(mode)}: {net} has the modes {known}", MODE)
