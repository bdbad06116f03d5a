"""Where a graph's weights are, read from its file by the little of protobuf and ONNX that this needs.

ONNX lets a tensor name any file as its data. In a bundle it is `<graph>.data`, which the manifest lists. So every
tensor that is outside the graph is checked before a library opens it: the file's name, where in the file it is, and
that it has as many bytes as its shape needs.

Ref: onnx.proto of ONNX 1.19 (fields by number); protobuf.dev, "Encoding".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from sdopt.bundle.disk import read_plain
from sdopt.dataclass import dataclass

MAX_GRAPH_BYTES = (1 << 31) - 1  # protobuf's own limit
DEEPEST = 16  # graphs inside one another
KEYS = ("location", "offset", "length")
# ONNX data type -> bits of an element
BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 17: 8, 18: 8,
        19: 8, 20: 8, 21: 4, 22: 4, 23: 4}  # fmt: skip

# message -> its fields, by number, that may hold tensors, and the message of each
TENSOR = "tensor"
MESSAGES: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: TENSOR, 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: TENSOR, 6: "graph", 10: TENSOR, 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: TENSOR, 2: TENSOR},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Field = tuple[int, int, int, int]  # number, wire type, then a varint's value and its end, or where bytes begin and end


class GraphError(ValueError):
    """A file is no ONNX graph, or a tensor of it is not where it may be."""


def weight_spans(path: Path, data_name: str, data_bytes: int | None) -> set[tuple[int, int]]:
    """Where in `data_name` the tensors of the graph at `path` begin and end; empty if all are in the graph.

    `data_bytes`: how many the file has; None if the bundle does not list it.

    Raises: GraphError for a file that is no graph, or a tensor in another file or past its end; OSError.
    """
    content = read_plain(path, MAX_GRAPH_BYTES)
    spans = {_span(content, span, data_name, data_bytes) for span in _tensors(content, "model", 0, len(content), 0)}
    return spans - {(0, 0)}


def _tensors(content: bytes, message: str, start: int, end: int, depth: int) -> Iterator[tuple[int, int]]:
    """Where each tensor that names a file begins and ends."""
    if depth > 4 * DEEPEST:
        raise GraphError("its graphs are nested too deeply")
    inside = MESSAGES[message]
    for number, wire, first, last in _fields(content, start, end):
        kind = inside.get(number)
        if kind is None:
            continue
        if wire != BYTES:
            raise GraphError(f"field {number} of a {message} is not a message")
        if content.find(b"location", first, last) < 0:  # no tensor in it names a file
            continue
        if kind == TENSOR:
            yield first, last
        else:
            yield from _tensors(content, kind, first, last, depth + 1)


def _span(content: bytes, span: tuple[int, int], data_name: str, data_bytes: int | None) -> tuple[int, int]:
    """Where in its file a tensor begins and ends; (0, 0) for a tensor without one."""
    shape: list[int] = []
    kind, name, entries = 0, "", list[tuple[str, str]]()
    for number, wire, first, last in _fields(content, *span):
        if number == 1:  # dims, packed or not
            shape += [first] if wire == VARINT else _varints(content, first, last)
        elif number == 2 and wire == VARINT:
            kind = first
        elif number == 8 and wire == BYTES:
            name = content[first:last].decode("utf-8", "replace")[:100]
        elif number == 13 and wire == BYTES:
            entries.append(_entry(content, first, last))
    if not entries:  # the word was in its name or in its data
        return 0, 0
    told = dict(entries)
    if sorted(told) != sorted(KEYS) or len(entries) != len(KEYS):
        raise GraphError(f"tensor {name!r} has {', '.join(sorted(told)) or 'nothing'}; allowed is {', '.join(KEYS)}")
    if told["location"] != data_name:
        raise GraphError(f"tensor {name!r} is in the file {told['location'][:100]!r}; allowed is {data_name!r}")
    offset, length = (_number(told[key], key, name) for key in ("offset", "length"))
    needed = -(-math.prod(shape) * BITS.get(kind, 0) // 8)
    if kind not in BITS or length != needed:
        raise GraphError(f"tensor {name!r} of type {kind} and shape {shape} has {length} bytes; it needs {needed}")
    if data_bytes is None:
        raise GraphError(f"tensor {name!r} is in {data_name}, which the manifest does not list under 'files'")
    if offset + length > data_bytes:
        raise GraphError(f"tensor {name!r} ends at byte {offset + length}; {data_name} has {data_bytes}")
    return offset, offset + length


def _entry(content: bytes, start: int, end: int) -> tuple[str, str]:
    """Key and value of one line of a tensor's table."""
    texts = {1: "", 2: ""}
    for number, wire, first, last in _fields(content, start, end):
        if number in texts and wire == BYTES:
            texts[number] = content[first:last].decode("utf-8", "replace")
    return texts[1], texts[2]


def _number(text: str, key: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise GraphError(f"tensor {name!r}: {key} is {text[:40]!r}; allowed is a whole number")
    return int(text)


def _fields(content: bytes, start: int, end: int) -> Iterator[Field]:
    """The fields of one message.

    Raises: GraphError where the bytes are no message.
    """
    at = start
    while at < end:
        tag, at = _varint(content, at, end)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(content, at, end)
            yield number, wire, value, at
            continue
        if wire == BYTES:
            size, at = _varint(content, at, end)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise GraphError(f"byte {at} is no field of a protobuf message")
        if not number or size > end - at:
            raise GraphError(f"field {number} at byte {at} is longer than its message")
        yield number, wire, at, at + size
        at += size


def _varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = shift = 0
    while at < end and shift < 64:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise GraphError(f"byte {at}: a number has no end")


def _varints(content: bytes, at: int, end: int) -> list[int]:
    values: list[int] = []
    while at < end:
        value, at = _varint(content, at, end)
        values.append(value)
    return values


# ----------------------------------------------------------------------------------------------- initializers


@dataclass(frozen=True)
class Initializer:
    """One weight of a graph: where its numbers are, and where the graph's file says of what type they are.

    Its numbers are bytes `start` to `stop` of the file `location`, or of the graph's own file where that is empty.
    """

    name: str
    kind: int  # ONNX data type
    kind_at: int  # the byte of the graph's file that holds `kind`
    shape: tuple[int, ...]
    location: str
    start: int
    stop: int


def initializers(content: bytes) -> Iterator[Initializer]:
    """The weights of a graph that `end_of_weights` has checked, those alone whose numbers are raw bytes."""
    for number, wire, first, last in _fields(content, 0, len(content)):
        if (number, wire) != (7, BYTES):
            continue
        for inner, inner_wire, start, stop in _fields(content, first, last):
            if (inner, inner_wire) == (5, BYTES):
                weight = _initializer(content, start, stop)
                if weight is not None:
                    yield weight


def _initializer(content: bytes, start: int, stop: int) -> Initializer | None:
    shape: list[int] = []
    kind, kind_at, name = 0, 0, ""
    raw: tuple[int, int] | None = None
    entries: dict[str, str] = {}
    for number, wire, first, last in _fields(content, start, stop):
        if number == 1:
            shape += [first] if wire == VARINT else _varints(content, first, last)
        elif number == 2 and wire == VARINT:
            kind, kind_at = first, last - 1  # all types are below 128, so one byte
        elif number == 8 and wire == BYTES:
            name = content[first:last].decode("utf-8", "replace")
        elif number == 9 and wire == BYTES:
            raw = first, last
        elif number == 13 and wire == BYTES:
            key, value = _entry(content, first, last)
            entries[key] = value
    if entries:
        offset, length = int(entries["offset"]), int(entries["length"])
        return Initializer(name, kind, kind_at, tuple(shape), entries["location"], offset, offset + length)
    return raw and Initializer(name, kind, kind_at, tuple(shape), "", *raw)
