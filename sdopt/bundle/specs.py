"""What goes into and comes out of a component: names, dtypes and shapes with named dimensions."""

# no `from __future__ import annotations`: `decode` reads annotations, and as text each would be compiled first

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from sdopt.bundle.decode import Text, integer, matching, one_of
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, shown

Array = np.ndarray[Any, np.dtype[Any]]
Float32 = np.ndarray[Any, np.dtype[np.float32]]
Scalar = Any  # a Python float: NumPy keeps float32 * float in float32, its type stubs do not

DTYPES = ("float32", "float16", "int32", "int64", "bool")
Name = Annotated[str, matching(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}", "a name of letters, digits, '_', '.' and '-'")]
Length = Annotated[int, integer(1, 1 << 20)]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a component, e.g. `("sample", "float32", ("batch", 4, "latent_height", "latent_width"))`.

    A dimension is a fixed length or a name; one name has one length in all tensors of a call.
    """

    name: Name
    dtype: Annotated[str, one_of(*DTYPES)]
    shape: tuple[Length | Name, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"tensor {self.name!r}: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not all(isinstance(d, str) or d > 0 for d in self.shape):
            raise UsageError(f"tensor {self.name!r}: {self} has a dimension that is not positive")

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"

    def check(self, array: Array, dims: dict[str, int], owner: str) -> None:
        """Record this tensor's named dimensions in `dims`.

        Raises: UsageError if dtype or shape differ from the spec, or a name already has another length.
        """
        if not isinstance(array, np.ndarray):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"{owner} input {self.name!r}: got {shown(array)}; it takes a NumPy array, {self}")
        got = f"{owner} input {self.name!r}: got {array.dtype} {list(array.shape)}"
        if array.dtype != self.dtype:
            raise UsageError(f"{got}; it takes {self.dtype}. Use {self.name}.astype(np.{self.dtype}).")
        if array.ndim != len(self.shape):
            raise UsageError(f"{got}; it takes {len(self.shape)} dimensions [{', '.join(map(str, self.shape))}]")
        for want, length in zip(self.shape, array.shape, strict=True):
            known = dims.setdefault(want, length) if isinstance(want, str) else want
            if length != known or length == 0:
                allowed = f"{want} = {known}" if isinstance(want, str) and length else f"{want}"
                raise UsageError(f"{got}; it takes [{', '.join(map(str, self.shape))}] with {allowed}")

    def sized(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where the named dimensions have these lengths."""
        return tuple(dims[d] if isinstance(d, str) else d for d in self.shape)


def check_inputs(owner: str, specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> dict[str, int]:
    """The length of every named dimension, once all `arrays` are what `specs` ask for.

    Raises: UsageError for a missing or unknown name, a wrong dtype or a wrong shape.
    """
    names = [s.name for s in specs]
    for problem, given in (("missing", set(names) - set(arrays)), ("unknown", set(arrays) - set(names))):
        if given:
            raise UsageError(f"{owner}: {problem} input {', '.join(sorted(given))}; it takes {', '.join(names)}")
    dims: dict[str, int] = {}
    for spec in specs:
        spec.check(arrays[spec.name], dims, owner)
    return dims


def check_begin(
    owner: str, specs: Sequence[TensorSpec], arrays: Mapping[str, Array], tables: Mapping[str, Array]
) -> dict[str, int]:
    """As `check_inputs`, for a run that begins with some of the inputs, and takes others row by row from `tables`.

    Raises: UsageError for an unknown name, a wrong dtype or a wrong shape, or a dimension that nothing tells.
    """
    known = {s.name: s for s in specs}
    unknown = (set(arrays) | set(tables)) - set(known)
    if unknown:
        raise UsageError(f"{owner}: unknown input {', '.join(sorted(unknown))}; it takes {', '.join(known)}")
    empty = [name for name, table in tables.items() if not len(table)]
    if empty:
        raise UsageError(f"{owner}: the table of {', '.join(empty)} has no row; a run has one for each call")
    dims: dict[str, int] = {}
    for name, array in (*arrays.items(), *((name, table[0]) for name, table in tables.items())):
        known[name].check(array, dims, owner)
    missing = {d for s in specs for d in s.shape if isinstance(d, str)} - set(dims)
    if missing:
        raise UsageError(f"{owner}: nothing tells {', '.join(sorted(missing))}; give the inputs that have it")
    return dims


Range = tuple[int, int, int]


@dataclass(frozen=True)
class Profile(Text):
    """A range per dimension name, {"batch": (1, 1, 4)}: smallest, best, largest; it shapes every tensor.

    Raises: UsageError for a range that is not 1 <= smallest <= best <= largest.
    """

    ranges: Mapping[str, Range]

    def __post_init__(self) -> None:
        for name, (low, best, high) in self.ranges.items():
            if not 1 <= low <= best <= high:
                raise UsageError(f"profile: {name}={low}:{best}:{high}; allowed is 1 <= smallest <= best <= largest")

    @classmethod
    def parse(cls, text: str) -> "Profile":
        """The profile of "batch=1:1:4 height=512"; one number is a fixed length."""
        ranges: dict[str, Range] = {}
        for word in text.split():
            match = re.fullmatch(r"(\w+)=(\d+)(?::(\d+):(\d+))?", word)
            if match is None or match[1] in ranges:
                raise UsageError(
                    f"profile {text!r}: {word!r} is not NAME=SMALLEST:BEST:LARGEST or NAME=LENGTH, each name once, "
                    'as in "batch=1:1:4 height=512:512:768 width=512"'
                )
            low = int(match[2])
            ranges[match[1]] = (low, int(match[3] or low), int(match[4] or low))
        return cls(ranges)

    def __str__(self) -> str:
        lengths = {n: (f"{a}" if a == c else f"{a}:{b}:{c}") for n, (a, b, c) in self.ranges.items()}
        return " ".join(f"{name}={text}" for name, text in lengths.items())

    def outside(self, dims: Mapping[str, int]) -> dict[str, int]:
        """Those of `dims` that this profile does not take."""
        ends = {name: (low, high) for name, (low, _, high) in self.ranges.items()}
        return {n: d for n, d in dims.items() if n in ends and not ends[n][0] <= d <= ends[n][1]}

    def distance(self, dims: Mapping[str, int]) -> float:
        """How far `dims` are from this profile's ranges, and, within them, from its best lengths; in octaves."""
        far = 1000 * len(self.outside(dims))
        return far + sum(abs(math.log2(d / self.ranges[n][1])) for n, d in dims.items() if n in self.ranges)

    def widened(self, dims: Mapping[str, int]) -> "Profile":
        """This profile, with ranges that take `dims` as well."""
        wide = {n: (min(a, dims.get(n, a)), b, max(c, dims.get(n, c))) for n, (a, b, c) in self.ranges.items()}
        return Profile(wide)

    def shape(self, spec: TensorSpec, which: int) -> tuple[int, ...]:
        """The shape of a tensor at the smallest (0), best (1) or largest (2) lengths.

        Raises: UsageError if a dimension of the tensor has no range.
        """
        missing = [d for d in spec.shape if isinstance(d, str) and d not in self.ranges]
        if missing:
            raise UsageError(f"profile {str(self)!r} has no range for {', '.join(missing)} of {spec}")
        return tuple(self.ranges[d][which] if isinstance(d, str) else d for d in spec.shape)
