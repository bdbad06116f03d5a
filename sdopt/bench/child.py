"""`python -m sdopt.bench.child SIDE`: one side (sdopt, or a baseline such as eager-fp32) as a program of `protocol`.

Cold starts run it. It also measures another version of sdopt beside this one, when that version's interpreter runs it:
`OTHER/bin/python -P -m sdopt.bench.child sdopt` (-P keeps it from importing the sdopt in the working folder).
Libraries are imported only when `load` needs them, so that their import can be timed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sdopt.bench.protocol import Message, memory, serve

if TYPE_CHECKING:
    from sdopt.bundle.specs import Array

Draw = Callable[[], "Array"]


def main(name: str) -> None:
    """Serve the side of this name."""
    draw: Draw | None = None

    def load(message: Message) -> Message:
        nonlocal draw
        load_side = _sdopt if name == "sdopt" else _diffusers
        answer, draw = load_side(name, message)
        return {"note": "", "takes_latents": True, "half_level": 0.0, **answer}

    def run(message: Message) -> Message:
        import numpy as np

        assert draw is not None  # `load` comes before `run`
        started = time.perf_counter()
        picture = draw()
        seconds = time.perf_counter() - started
        if message.get("picture"):
            np.save(message["picture"], picture)
        return {"seconds": seconds}

    serve({"prepare": lambda message: {}, "load": load, "run": run, "memory": memory})


def _sdopt(name: str, message: Message) -> tuple[Message, Draw]:
    started = time.perf_counter()
    import numpy as np

    from sdopt import __version__, pipeline
    from sdopt.bench.built import fused_step
    from sdopt.bench.cases import Case
    from sdopt.bench.sides import picture, precision_for

    imported = time.perf_counter()
    case = Case.from_json(message["case"])
    threads: int | None = message["threads"]
    precision = precision_for(case)
    pipe = pipeline.load(message["bundle"], case.backend, precision=precision, memory=case.memory, threads=threads)
    step = fused_step(pipe.bundle, case) or "unet"
    for component, entry in pipe.bundle.manifest.components.items() if case.memory == "fast" else ():
        if component != "vae_encoder" and entry.weights_of is None:  # the others are for adapters
            pipe.engine(step if component == "unet" else component)
    loaded = time.perf_counter()
    latents = np.load(message["latents"])
    return _answer(started, imported, loaded, pipe.backend, pipe.precision, {"sdopt": __version__}), (
        lambda: picture(pipe, case, latents)
    )


def _diffusers(name: str, message: Message) -> tuple[Message, Draw]:
    from pathlib import Path

    started = time.perf_counter()
    import diffusers  # pyright: ignore[reportUnusedImport] # noqa: F401
    import numpy as np
    import torch  # pyright: ignore[reportUnusedImport] # noqa: F401

    from sdopt.bench import baseline
    from sdopt.bench.cases import Case

    imported = time.perf_counter()
    case = Case.from_json(message["case"])
    side = baseline.DiffusersSide(name, case, Path(message["checkpoint"]), message["threads"], message["device"])
    loaded = time.perf_counter()
    latents = np.load(message["latents"])
    return _answer(started, imported, loaded, side.backend, side.precision, baseline.versions()), (
        lambda: side.picture(latents)
    )


def _answer(
    started: float, imported: float, loaded: float, backend: str, precision: str, versions: dict[str, str]
) -> dict[str, Any]:
    return {
        "parts": {"import": imported - started, "load": loaded - imported},
        "backend": backend,
        "precision": precision,
        "versions": versions,
    }


if __name__ == "__main__":
    main(sys.argv[1])
