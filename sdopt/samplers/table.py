"""SamplerTable: a sampler as rows of numbers, one row per call of the denoiser.

    for k in range(len(table)):
        output  = denoiser(c_in[k] * x, timestep[k])           # after guidance; epsilon, v, sample or flow prediction
        history = [c_skip[k] * x + c_out[k] * output, *history]
        x       = update[k] @ [x, *history, noise]

                     x      m_k   m_k-1  m_k-2   noise
    update   k=0  [  .       .      0      0       .  ]     no history yet: m_-1 must not be used
             k=1  [  .       .      .      0       .  ]
             k=2  [  .       .      .      .       .  ]
    level    [N+1, 2]  x before call k is level[k] @ [clean, noise], and level[N] after the last one
    denoised [N, 2]    what the sampler believes the clean sample to be: denoised[k] @ [x, output]

Every row is proven when a table is made, so the loop has no `if`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, replace
from functools import cached_property
from typing import Annotated, Any, cast

import numpy as np
from numpy.typing import NDArray

from sdopt.bundle.decode import decode, one_of
from sdopt.bundle.disk import parse_json
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, shown
from sdopt.samplers.prediction import Level

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """One sampler for one number of steps, proven at birth.

    Shapes: N calls of the denoiser; `order` values of history in `update`.
    Units: sigma is the noise level sqrt(1 - alpha_bar) / sqrt(alpha_bar), infinite where alpha_bar is 0, and the flow
        sigma in 0..1 for flow matching; it is for display and for guidance intervals, the rows do not need it.
    Raises: UsageError, naming the row, when an array has a wrong shape, a coefficient is NaN or infinite, a row uses
        history that does not exist yet, or noise is used without being drawn.
    """

    name: str
    timestep: Float64  # [N]           fed to the denoiser; may be fractional
    sigma: Float64  # [N]              noise level at the call
    c_in: Float64  # [N]               model input = c_in * x
    c_skip: Float64  # [N]             what is kept: c_skip * x + c_out * output
    c_out: Float64  # [N]
    update: Float64  # [N, order + 2]  x' = update @ [x, m_k, m_k-1, ..., noise]
    denoised: Float64  # [N, 2]        clean sample = denoised @ [x, output]
    level: (
        Float64  # [N + 1, 2]       (alpha, sigma): x before call k is alpha * clean + sigma * noise; the last after all
    )
    draws: Bool  # [N]                 whether the generator advances in this call (also where the noise counts 0)
    init_noise_sigma: float  # x_T = init_noise_sigma * randn
    notes: tuple[str, ...] = field(default=())  # choices made for the user, in plain words

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name in _ARRAYS:
                object.__setattr__(self, f.name, _frozen(getattr(self, f.name), bool if f.name == "draws" else float))
        object.__setattr__(self, "init_noise_sigma", float(self.init_noise_sigma))
        object.__setattr__(self, "notes", tuple(self.notes))
        self._check_shapes()
        self._check_values()

    def _check_shapes(self) -> None:
        n = len(self.timestep)
        wide = self.update.ndim == 2 and self.update.shape[1] >= 3
        pairs = {"denoised": (n, 2), "level": (n + 1, 2)}
        expected = {name: (n,) for name in _ARRAYS} | pairs | {"update": (n, self.update.shape[-1])}
        for name, shape in expected.items():
            given = getattr(self, name).shape
            if given != shape or n == 0 or not wide:
                raise UsageError(f"sampler table {self.name!r}: {name} is {list(given)}, must be {list(shape)}, N > 0.")

    def _check_values(self) -> None:
        for name in _ARRAYS:
            values = getattr(self, name)
            bad = np.isnan(values) | (values < 0) if name == "sigma" else ~np.isfinite(values)
            if bad.any():
                row = int(np.argwhere(bad)[0][0])
                call = min(row, len(self) - 1)
                raise UsageError(
                    f"sampler table {self.name!r}: {name}[{row}] is {values[row].tolist()} at timestep "
                    f"{self.timestep[call]:g} (sigma {self.sigma[call]:g}); every coefficient must be finite."
                )
        early = np.triu(self.update[:, 1:-1], k=1)
        if early.any():
            raise UsageError(f"sampler table {self.name!r}: row {int(np.argwhere(early)[0][0])} uses missing history.")
        if (self.update[:, -1][~self.draws] != 0).any():
            raise UsageError(f"sampler table {self.name!r}: a row uses noise that it does not draw.")
        if not math.isfinite(self.init_noise_sigma):
            raise UsageError(f"sampler table {self.name!r}: init_noise_sigma must be finite.")

    def __len__(self) -> int:
        """How often the denoiser is called."""
        return len(self.timestep)

    @property
    def order(self) -> int:
        """How many kept values, the newest included, a row may use."""
        return self.update.shape[1] - 2

    @property
    def stochastic(self) -> bool:
        """Whether any row adds noise."""
        return bool(self.update[:, -1].any())

    @property
    def start(self) -> Level:
        """Image to image begins with x = start @ [clean latents, noise]."""
        alpha, sigma = self.level[0].tolist()
        return alpha, sigma

    @cached_property
    def _rows(self) -> list[tuple[tuple[float, float], list[float], float]]:
        """Rows as Python floats: NumPy then keeps float32 arrays float32."""
        keep = zip(self.c_skip.tolist(), self.c_out.tolist(), strict=True)
        return [(kept, row[:-1], row[-1]) for kept, row in zip(keep, self.update.tolist(), strict=True)]

    def first(self, calls: int) -> SamplerTable:
        """The table that stops after so many calls."""
        kept: dict[str, Any] = {name: getattr(self, name)[:calls] for name in _ARRAYS}
        return replace(self, **{**kept, "level": self.level[: calls + 1]})

    def advance(
        self, k: int, x: Float32, output: Float32, history: Sequence[Float32] = (), noise: Float32 | None = None
    ) -> tuple[Float32, tuple[Float32, ...]]:
        """The sample after call `k` and the history for the next one. Start with an empty history.

        The arguments are not changed; the newest history entry may be `output` itself.

        Shapes: x, output, noise and every history entry alike; float32 in, float32 out.
        Raises: UsageError when row `k` adds noise and none is given.
        """
        (c_skip, c_out), row, gain = self._rows[k]
        scratch = np.empty_like(x)
        kept = _kept(c_skip, c_out, x, output, scratch)
        history = (kept, *history[: self.order - 1])
        result = np.multiply(x, row[0])
        for coefficient, value in zip(row[1:], history, strict=False):
            if coefficient != 0.0:
                result += np.multiply(value, coefficient, out=scratch)
        if gain != 0.0:
            if noise is None:
                raise UsageError(f"sampler {self.name!r} adds noise in call {k}; pass noise of shape {list(x.shape)}.")
            result += np.multiply(noise, gain, out=scratch)
        return result, history

    def clean(self, k: int, x: Float32, output: Float32) -> Float32:
        """The clean sample that call `k` predicts: what previews show."""
        a, b = self.denoised[k].tolist()
        return a * x + b * output

    def to_json(self) -> dict[str, Any]:
        """The table as plain JSON types; floats survive exactly, infinity is the string "inf"."""
        return {f.name: _jsonable(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> SamplerTable:
        """The table that `to_json` wrote, from its dict or from JSON text.

        Raises: UsageError when a field is missing or unknown, or the rows do not prove.
        """
        try:
            entry: Any = parse_json(data) if isinstance(data, str) else data
            if not isinstance(entry, Mapping) or not all(isinstance(key, str) for key in cast("Any", entry)):
                raise ValueError(f"it is {shown(entry)}; allowed is an object with the fields of a table")
            values = dict(cast("Mapping[str, Any]", entry))
        except ValueError as error:  # a DecodeError too
            raise UsageError(f"sampler table: {error}.") from error
        known = {f.name for f in fields(cls)}
        if known - {"notes"} - values.keys() or values.keys() - known:
            expected, given = ", ".join(sorted(known)), ", ".join(sorted(values))
            raise UsageError(f"sampler table: the fields must be {expected}; got {given}.")
        try:
            return cls(**{name: _decoded(name, value) for name, value in values.items()})
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"sampler table: {error}.") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SamplerTable) and self.to_json() == other.to_json()

    __hash__ = None  # pyright: ignore[reportAssignmentType]


_ARRAYS = {"level", "timestep", "sigma", "c_in", "c_skip", "c_out", "update", "denoised", "draws"}


_FIELDS: dict[str, Any] = {  # of the JSON; other arrays are lists of numbers
    "name": str,
    "draws": tuple[bool, ...],
    "sigma": tuple[float | Annotated[str, one_of("inf")], ...],
    **dict.fromkeys(("update", "denoised", "level"), tuple[tuple[float, ...], ...]),
    "init_noise_sigma": float,
    "notes": tuple[str, ...],
}


def _decoded(name: str, value: Any) -> Any:
    """A field as its class has it. Raises: DecodeError; ValueError for rows of unlike length."""
    plain = decode(_FIELDS.get(name, tuple[float, ...]), value, name)
    return np.array(plain, bool if name == "draws" else float) if name in _ARRAYS else plain


def _frozen(values: Any, dtype: type) -> NDArray[Any]:
    array = np.array(values, dtype=np.bool_ if dtype is bool else np.float64)
    array.setflags(write=False)
    return array


def _kept(c_skip: float, c_out: float, x: Float32, output: Float32, scratch: Float32) -> Float32:
    """c_skip * x + c_out * output, without arithmetic where the output itself is kept."""
    if c_skip == 0.0:
        return output if c_out == 1.0 else np.multiply(output, c_out)
    kept = np.multiply(x, c_skip)
    if c_out != 0.0:
        kept += np.multiply(output, c_out, out=scratch)
    return kept


def _jsonable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        array = cast("NDArray[Any]", value)
        plain: Any = array.tolist()
        return plain if np.isfinite(array).all() else ["inf" if v == math.inf else v for v in plain]
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
