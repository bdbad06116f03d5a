"""Union ControlNets: what they see becomes features once, before the loop. In each call those in use are added up.

Ref: github.com/xinsir6/ControlNetPlus; see `sdopt.export.blocks.controlnet_union`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import numpy as np

from sdopt.bundle.adapter import CONDITION, adapter_component
from sdopt.bundle.specs import Float32
from sdopt.engine import Engine
from sdopt.request.control import Control


def seen(controls: Iterable[Control], using: Callable[[str], AbstractContextManager[Engine]]) -> dict[str, Float32]:
    """What each ControlNet that runs is given, by its name: its picture, or of a union ControlNet features
    [images, pictures, channels, h, w].

    `using`: opens the engine of a component for a while.
    """
    return {
        control.name: control.picture if control.union is None else _features(control, using)
        for control in controls
        if control.scales.any()
    }


def _features(control: Control, using: Callable[[str], AbstractContextManager[Engine]]) -> Float32:
    assert control.union is not None
    images = len(control.picture)
    made: list[Float32] = []
    with using(adapter_component(control.name, CONDITION)) as engine:
        for i, (mode, scale) in enumerate(zip(control.union.modes, control.union.scales, strict=True)):
            given = {
                "control_image": np.ascontiguousarray(control.picture[:, i]),
                "control_mode": np.full(images, mode, np.int32),
                "scale": np.full((images, 1), scale, np.float32),
            }
            made.append(engine(**given)["control_feature"])
    return np.stack(made, axis=1)
