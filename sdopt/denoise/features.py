"""T2I-Adapters: what they see becomes features once, before the loop. `unet_controlled` takes them as further inputs.

Ref: Mou et al. 2023, arXiv:2302.08453.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

import numpy as np

from sdopt.bundle.adapter import T2I_ADAPTER, adapter_component
from sdopt.bundle.joined import DEEP, FEATURE_SCALE, divisor_of
from sdopt.bundle.specs import Array, Float32, TensorSpec
from sdopt.engine import Engine
from sdopt.request.features import Feature


def lacking(inputs: Iterable[TensorSpec], given: Mapping[str, Array]) -> dict[str, Float32]:
    """Zeros for those features among the inputs of an engine that no adapter gives, and for deep features, which an
    earlier call will give. `given`: its other inputs.
    """
    images, _, *size = given["sample"].shape
    known: dict[str, int] = {"batch": images, "images": images, "latent_height": size[0], "latent_width": size[1]}

    def length(dimension: int | str) -> int:
        if isinstance(dimension, int):
            return dimension
        own, by = divisor_of(dimension)
        return -(-known[own] // by)

    features = [spec for spec in inputs if "feature" in spec.name or spec.name == DEEP]
    wanted = [spec for spec in features if spec.name not in (FEATURE_SCALE, *given)]
    return {spec.name: np.zeros([length(dimension) for dimension in spec.shape], np.float32) for spec in wanted}


def summed(features: Iterable[Feature], using: Callable[[str], AbstractContextManager[Engine]]) -> dict[str, Float32]:
    """The features of all adapters, each times its scale, added up, by the names of the UNet's inputs.

    `using`: opens the engine of a component for a while.
    """
    total: dict[str, Float32] = {}
    for feature in features:
        with using(adapter_component(feature.name, T2I_ADAPTER)) as engine:
            given = engine(control_image=feature.picture)
        scaled: dict[str, Float32] = {name: array * np.float32(feature.scale) for name, array in given.items()}
        total |= {name: total[name] + array if name in total else array for name, array in scaled.items()}
    return total
