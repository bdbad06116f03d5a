"""The two things that every sampler function handles: what it is asked for, and the rows it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdopt.dataclass import dataclass
from sdopt.errors import UsageError
from sdopt.samplers.prediction import OUTPUT, Level, Pair, ratio
from sdopt.samplers.table import SamplerTable

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Request:
    """What a sampler function is asked for: every option of its class, the number of steps, and where to begin."""

    name: str
    options: Mapping[str, Any]
    steps: int
    begin: int = 0  # how many of the steps an image-to-image run skips
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    eta: float | None = None
    mu: float | None = None
    notes: tuple[str, ...] = ()
    fraction: float = 1.0  # how much of a distilled schedule is used; its noisy end is left out

    @property
    def prediction(self) -> str:
        """What the denoiser predicts."""
        return self.options["prediction_type"]

    @property
    def train(self) -> int:
        """How many timesteps the model was trained on."""
        return int(self.options["num_train_timesteps"])


class Rows:
    """Rows of a table being written, one `add` per call of the denoiser."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._rows: list[dict[str, Any]] = []

    def add(
        self,
        timestep: float,
        level: Level,
        *,
        denoised: Pair,
        sigma: float | None = None,
        step: Pair | None = None,
        keep: Pair = OUTPUT,
        update: Sequence[float] = (),
        noise: float = 0.0,
        draws: bool = False,
        c_in: float = 1.0,
    ) -> None:
        """Append a row for a call that is given a sample at `level`; `sigma` is its noise level for display.

        A first-order sampler gives `step`: the next sample in terms of [x, output]. One with history gives `keep`, what
        it keeps in terms of [x, output], and `update`: the next sample in terms of [x, kept, kept before, ...].
        """
        self._rows.append(
            {
                "timestep": timestep, "level": level, "sigma": ratio(*level) if sigma is None else sigma,
                "c_in": c_in, "c_skip": keep[0], "c_out": keep[1],
                "update": list(update if step is None else step), "noise": noise, "denoised": denoised, "draws": draws,
            }
        )  # fmt: skip

    def table(self, *, init_noise_sigma: float, end: Level, notes: Sequence[str] = ()) -> SamplerTable:
        """The rows as a proven table; the last call leaves a sample at the level `end`.

        Raises: UsageError when there is nothing to do, or a row does not prove.
        """
        if not self._rows:
            raise UsageError(f"{self.request.name}: no step is left to do; use more steps or a higher strength.")
        width = max(len(row["update"]) for row in self._rows)
        update = np.zeros((len(self._rows), width + 1))
        for k, row in enumerate(self._rows):
            update[k, : len(row["update"])] = row["update"]
            update[k, -1] = row["noise"]
        names = ("timestep", "sigma", "c_in", "c_skip", "c_out", "denoised", "draws")
        columns = {name: np.array([row[name] for row in self._rows]) for name in names}
        return SamplerTable(
            name=self.request.name,
            update=update,
            level=np.array([*(row["level"] for row in self._rows), end]),
            init_noise_sigma=init_noise_sigma,
            notes=(*self.request.notes, *notes),
            **columns,
        )
