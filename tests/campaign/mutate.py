"""Hostile changes of JSON, by its structure and by its text, and of bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Path = tuple[str | int, ...]
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e-320, 1e308, 2**31 - 1, 2**31, 2**63, 2**64, 10**40, -(2**63),
    "", " ", "0", "1", "null", "\0", "\n", "\x1b[31m", "\u202e", "\ud800", "../../etc/passwd", "/etc/passwd", "C:\\x",
    ".", "..", "a/../b", "x" * 300, "x" * 70_000, "é", "e\u0301", "𝕏", "unet", "unet.onnx", "manifest.json", "karras",
    [], [[]], [0], [1, 2, 3], ["x"], [None], {}, {"": 0}, {"x": {"y": []}}, {"\ud800": 1}, {"a.b": 1},
)  # fmt: skip
LITERALS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "-", "0x10", "01", "'x'", '"\\ud800"', "[" * 3000, "")


def paths(entry: Any, path: Path = ()) -> Iterator[Path]:
    """Where every value of some JSON is, containers included."""
    yield path
    items = entry.items() if isinstance(entry, dict) else enumerate(entry) if isinstance(entry, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))


def at(entry: Any, path: Path) -> Any:
    for key in path:
        entry = entry[key]
    return entry


def differences(old: Any, new: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The places where two JSON values differ, each with its new value; None for one that is gone."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from differences(old.get(key), new.get(key), (*path, key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, (*path, i))
    elif type(old) is not type(new) or old != new:
        yield path, new


def restore(old: Any, new: Any, path: Path) -> None:
    """Give one place of `new` the value that it has in `old`."""
    parent, original = at(new, path[:-1]), at(old, path[:-1])
    if isinstance(original, list) or path[-1] in original:
        parent[path[-1]] = copy.deepcopy(original[path[-1]])
    else:
        del parent[path[-1]]


def mutated_json(rng: random.Random, entry: Any) -> tuple[bytes, str]:
    """Some JSON with one or two hostile changes, as the bytes of a file, and what was changed."""
    changed = copy.deepcopy(entry)
    told = [rng.choice(CHANGES)(rng, changed) for _ in range(1 if rng.random() < 0.8 else 2)]
    text = json.dumps(changed, indent=1, ensure_ascii=rng.random() < 0.9)
    if rng.random() < 0.15:
        text, how = rng.choice(TEXT_CHANGES)(rng, text)
        told.append(how)
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        content, how = rng.choice(ENCODINGS)(text)
        told.append(how)
    return content, "; ".join(told)


def _place(rng: random.Random, entry: Any) -> tuple[Any, Any]:
    """A container inside, and a key of it."""
    path = rng.choice([path for path in paths(entry) if path] or [()])
    return (at(entry, path[:-1]), path[-1]) if path else (entry, None)


def _told(key: Any, what: str, value: Any) -> str:
    return f"{what} {key!r}: {repr(value)[:80]}"


def _replace(rng: random.Random, entry: Any) -> str:
    parent, key = _place(rng, entry)
    if key is None:
        return "nothing"
    value = copy.deepcopy(rng.choice(HOSTILE))
    parent[key] = value
    return _told(key, "replaced", value)


def _delete(rng: random.Random, entry: Any) -> str:
    parent, key = _place(rng, entry)
    if key is None:
        return "nothing"
    return _told(key, "deleted", parent.pop(key))


def _add(rng: random.Random, entry: Any) -> str:
    containers = [value for value in (at(entry, path) for path in paths(entry)) if isinstance(value, (dict, list))]
    parent = rng.choice(containers)
    value = copy.deepcopy(rng.choice(HOSTILE))
    if isinstance(parent, dict):
        key = rng.choice(("", "x", "__class__", "_class_name", "\0", "\ud800", "unet", "a" * 300, "../x", "0"))
        parent[key] = value
        return _told(key, "added", value)
    parent.insert(rng.randint(0, len(parent)), value)
    return _told("[]", "added", value)


def _swap(rng: random.Random, entry: Any) -> str:
    """Two values of one type change places."""
    first, key = _place(rng, entry)
    if key is None:
        return "nothing"
    kind = type(first[key])
    others = [path for path in paths(entry) if path and type(at(entry, path)) is kind]
    path = rng.choice(others)
    other = at(entry, path[:-1])
    first[key], other[path[-1]] = copy.deepcopy(other[path[-1]]), copy.deepcopy(first[key])
    return f"swapped {key!r} and {'.'.join(map(str, path))}"


def _copy(rng: random.Random, entry: Any) -> str:
    """A value takes the place of another one."""
    parent, key = _place(rng, entry)
    path = rng.choice(list(paths(entry)))
    if key is None:
        return "nothing"
    parent[key] = copy.deepcopy(at(entry, path))
    return f"{key!r} has the value of {'.'.join(map(str, path))}"


def _nudge(rng: random.Random, entry: Any) -> str:
    """A number, a text or a list becomes nearly the same."""
    parent, key = _place(rng, entry)
    if key is None:
        return "nothing"
    value = parent[key]
    if isinstance(value, bool) or value is None:
        value = not value
    elif isinstance(value, (int, float)):
        value = rng.choice((value + 1, value - 1, -value, value * 2, value / 2, value * 1e6, int(value), float(value)))
    elif isinstance(value, str):
        at = rng.randint(0, len(value))
        value = value[:at] + rng.choice(("", "x", "/", "\\", "\0", " ", ".", "é")) + value[at + rng.randint(0, 1) :]
    elif isinstance(value, list):
        value = rng.choice((value[1:], value[::-1], value + value[:1], value * 2, [value]))
    else:
        value = dict(list(value.items())[::-1])
    parent[key] = value
    return _told(key, "nudged", value)


def _rename(rng: random.Random, entry: Any) -> str:
    objects = [value for value in (at(entry, path) for path in paths(entry)) if isinstance(value, dict) and value]
    if not objects:
        return "nothing"
    parent = rng.choice(objects)
    key = rng.choice(list(parent))
    new = rng.choice(
        (key.upper(), key + "_", f" {key}", key[:-1], "x" * 300, "", f"../{key}", rng.choice(list(parent)))
    )
    parent[new] = parent.pop(key)
    return f"renamed {key!r} to {new[:40]!r}"


def _nest(rng: random.Random, entry: Any) -> str:
    parent, key = _place(rng, entry)
    if key is None:
        return "nothing"
    depth = rng.choice((1, 7, 9, 60, 400))
    for _ in range(depth):
        parent[key] = [parent[key]] if rng.random() < 0.5 else {"x": parent[key]}
    return f"nested {key!r} {depth} deep"


CHANGES: tuple[Callable[[random.Random, Any], str], ...] = (
    _replace, _replace, _replace, _delete, _add, _swap, _copy, _nudge, _nudge, _rename, _nest,
)  # fmt: skip


def _literal(rng: random.Random, text: str) -> tuple[str, str]:
    spots = [i for i, line in enumerate(text.splitlines()) if ": " in line]
    if not spots:
        return text, "nothing"
    lines, spot = text.splitlines(), rng.choice(spots)
    literal = rng.choice(LITERALS)
    lines[spot] = f"{lines[spot].split(': ')[0]}: {literal},"
    return "\n".join(lines), f"line {spot} is {lines[spot].strip()[:60]}"


def _twice(rng: random.Random, text: str) -> tuple[str, str]:
    lines = text.splitlines()
    spots = [i for i, line in enumerate(lines) if ": " in line and line.endswith(",")]
    if not spots:
        return text, "nothing"
    spot = rng.choice(spots)
    lines.insert(spot, rng.choice((lines[spot], f"{lines[spot].split(': ')[0]}: 1,")))
    return "\n".join(lines), f"{lines[spot].strip()[:60]} twice"


def _cut(rng: random.Random, text: str) -> tuple[str, str]:
    end = rng.randint(0, len(text))
    return text[:end], f"cut at {end}"


def _garbage(rng: random.Random, text: str) -> tuple[str, str]:
    junk = rng.choice(("x", "{}", "\0", "// comment", "\ufeff", "]" * 50))
    return rng.choice((text + junk, junk + text)), f"with {junk!r} before or after"


TEXT_CHANGES = (_literal, _literal, _twice, _twice, _cut, _garbage)
ENCODINGS: tuple[Callable[[str], tuple[bytes, str]], ...] = (
    lambda text: (text.encode("utf-16", "surrogatepass"), "as UTF-16"),
    lambda text: (text.encode("utf-32", "surrogatepass"), "as UTF-32"),
    lambda text: (text.encode("utf-8-sig", "surrogatepass"), "with a byte order mark"),
    lambda text: (text.encode("latin-1", "replace").replace(b"e", b"\xe9", 1), "as Latin-1"),
    lambda text: (b"", "empty"),
)


def mutated_bytes(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """A file's bytes with a few of them changed, and how. The new ones may have another length."""
    changed = bytearray(content)
    size = len(changed)
    how = rng.choice(
        ("flip", "flip", "flip", "overwrite", "insert", "remove", "cut", "repeat", "zeros", "tail", "empty")
    )
    start = rng.randint(0, max(0, size - 1))
    start = start if rng.random() < 0.6 else start % 512  # headers are denser
    length = rng.choice((1, 2, 4, 8, 64, 1000))
    if how == "flip":
        for _ in range(rng.choice((1, 1, 2, 10))):
            if size:
                changed[(start + rng.randint(0, 200)) % size] ^= 1 << rng.randint(0, 7)
    elif how == "overwrite":
        changed[start : start + length] = rng.randbytes(min(length, size - start))
    elif how == "insert":
        changed[start:start] = rng.randbytes(length)
    elif how == "remove":
        del changed[start : start + length]
    elif how == "cut":
        del changed[start:]
    elif how == "repeat":
        changed[start:start] = changed[start : start + length]
    elif how == "zeros":
        changed[start : start + length] = bytes(min(length, size - start))
    elif how == "tail":
        changed += rng.randbytes(length)
    else:
        changed.clear()
    return bytes(changed), f"{how} at byte {start} of {size}"
