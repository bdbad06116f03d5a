"""The ControlNets of a request: which picture each sees, and how strong it is in each call. And its T2I-Adapters.

    keep[k] = 0 where k / calls < start or (k + 1) / calls > end, else 1
    scale[k] = controlnet_conditioning_scale * keep[k]

In guess mode the residuals of the first blocks count for less: 0.1 for the first, 1.0 for the middle.

A union ControlNet sees a picture for each of its modes. Where it is the only net and has several modes, scale[k] is one
of each picture: it multiplies what the net makes of the picture, and the residuals stay as they are, so that the net
runs in every call. Else scale[k] is one of each net, as above.
Ref: Zhang et al. 2023, arXiv:2302.05543; diffusers, StableDiffusionControlNetPipeline, ControlNetUnionModel and
MultiControlNetUnionModel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from sdopt.bundle import joined
from sdopt.bundle.adapter import CONTROLNET, NETS, T2I_ADAPTER, UNION, Adapter
from sdopt.bundle.files import Bundle
from sdopt.bundle.specs import Float32
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError
from sdopt.image.masks import Overlay
from sdopt.request.control_mode import MODE, modes_of
from sdopt.request.features import KEYWORDS, features
from sdopt.request.named import OpenAdapter, named
from sdopt.request.seen import PICTURE, Seen, each_of, refuse_other_unet, seen

SCALE, START, END = "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"
OF_NETS = (SCALE, START, END, "guess_mode")


@dataclass(frozen=True, eq=False)
class Union:
    """What a union ControlNet is told of its pictures.

    `modes`: the number of each picture's mode. `scales`: what its feature is multiplied by. `kept` [calls, pictures]: 1
    in calls where it is used, else 0. `types` [all modes]: 1 for those that are given.
    """

    modes: tuple[int, ...]
    scales: tuple[float, ...]
    kept: Float32
    types: Float32


@dataclass(frozen=True, eq=False)
class Control:
    """One ControlNet in a plan.

    `scales` [calls, residuals], 0 in calls where it does not run. `digest`: its files'.
    """

    name: str
    digest: str
    seen: Seen
    scales: Float32
    union: Union | None = None

    @property
    def picture(self) -> Float32:
        """[images, channels, height, width], of a union ControlNet [images, pictures, channels, height, width]."""
        return self.seen.planes

    @property
    def inputs(self) -> dict[str, Float32]:
        """What the net is told, [calls, width], by the names of its inputs."""
        of_residuals = {joined.SCALE: self.scales}
        if self.union is None:
            return of_residuals
        types = np.repeat(self.union.types[None], len(self.scales), 0)
        return {**of_residuals, joined.KEPT: self.union.kept, joined.TYPE: types}

    def described(self, image: int) -> dict[str, Any]:
        """What a PNG carries; see `Seen`."""
        modes = {} if self.union is None else {"modes": list(self.union.modes)}
        return {**self.seen.described(self.name, self.digest, image), **modes}


def steering(
    given: Mapping[str, Any],
    bundle: Bundle,
    open_adapter: OpenAdapter,
    size: tuple[int, int],
    images: int,
    calls: int,
    overlays: Sequence[Overlay] = (),
) -> dict[str, Any]:
    """The fields of a plan that describe its ControlNets and T2I-Adapters: `controls`, `guess_mode` and `features`.

    `size`: height and width in pixels. `overlays`: the regions that padding_mask_crop paints, one for each image.
    Raises: UsageError for keywords that do not fit together, a name that the bundle does not have, and pictures of
    another count.
    """
    pictures: Mapping[str, Any] | None = given[PICTURE]
    if pictures is None:
        for name in (*OF_NETS, MODE, *KEYWORDS):
            if given[name] not in (None, False):
                raise UsageError(f"{name} needs {PICTURE}: give {PICTURE}=...", name)
        return {"controls": (), "guess_mode": False, "features": ()}
    own = named(PICTURE, (*NETS, T2I_ADAPTER), pictures, bundle, open_adapter)
    opened = {name: (open_adapter(name), one) for name, one in own.items()}
    seers = {name: pair for name, pair in opened.items() if pair[0].manifest.kind == T2I_ADAPTER}
    nets = {name: pair for name, pair in opened.items() if name not in seers}
    made, guess = _controls(given, nets, bundle, size, images, calls, overlays)
    return {
        "controls": made,
        "guess_mode": guess,
        "features": features(
            given,
            {name: (one, _flat(seen)) for name, (one, seen) in seers.items()},
            bundle,
            size,
            images,
            calls,
            overlays,
        ),
    }


def _controls(
    given: Mapping[str, Any],
    pictured: Mapping[str, tuple[Adapter, Any]],
    bundle: Bundle,
    size: tuple[int, int],
    images: int,
    calls: int,
    overlays: Sequence[Overlay],
) -> tuple[tuple[Control, ...], bool]:
    """The ControlNets, each with what it sees, and whether they run in guess mode."""
    if not pictured:
        for name in (*OF_NETS, MODE):
            if given[name] not in (None, False):
                raise UsageError(f"{name} needs a ControlNet, and {PICTURE} names none; leave it out", name)
        return (), False
    adapters = {name: _fitting(bundle, adapter) for name, (adapter, _) in pictured.items()}
    guess: bool = given["guess_mode"] or _pooled(next(iter(adapters.values())))
    modes = modes_of(given[MODE], {name: one for name, one in adapters.items() if one.manifest.kind == UNION})
    alone = next(iter(modes)) if len(adapters) == 1 and modes else None  # a union ControlNet without others
    used = _windows(given, calls, *((len(modes[alone]), "modes") if alone else (len(adapters), "ControlNets")))
    made: list[Control] = []
    for i, (name, adapter) in enumerate(adapters.items()):
        spec = {spec.name: spec for spec in adapter.component(CONTROLNET).inputs}
        of_residuals = _weights(cast(int, spec["conditioning_scale"].shape[1]), guess and not _pooled(adapter))
        pictures, own = pictured[name][1], modes.get(name)
        if own is None:
            sees = seen(given, _flat(pictures), overlays, size, images, 3)
        else:
            each = [seen(given, one, overlays, size, images, 3) for one in _of_modes(name, pictures, len(own))]
            sees = Seen.stacked(each)
        scale, kept, union = *used[i], None
        if own is not None:
            several = alone is not None and len(own) > 1
            union = _union(adapter, own, used if several else [(1.0, np.ones(calls, np.float32))] * len(own))
            if several:  # the scales are those of the pictures, and the net runs in every call
                scale, kept = 1.0, np.ones(calls, np.float32)
        made.append(Control(name, adapter.digest, sees, (kept * np.float32(scale))[:, None] * of_residuals, union))
    return tuple(made), guess


def _windows(given: Mapping[str, Any], calls: int, count: int, what: str) -> list[tuple[float, Float32]]:
    """The scale of each of `count` nets or modes, and in which calls it is used: 1 or 0 for each call.

    Raises: UsageError for another number of values, and for a start that does not come before its end.
    """
    values = (each_of(given, keyword, default, count, what) for keyword, default in DEFAULTS.items())
    made: list[tuple[float, Float32]] = []
    for scale, start, end in zip(*values, strict=True):
        if start >= end:
            raise UsageError(f"{START} = {start:g} and {END} = {end:g}; the start comes before the end", START)
        kept = [not (k / calls < start or (k + 1) / calls > end) for k in range(calls)]
        made.append((scale, np.array(kept, np.float32)))
    return made


def _union(adapter: Adapter, modes: tuple[int, ...], used: Sequence[tuple[float, Float32]]) -> Union:
    """What a union ControlNet is told of pictures of these modes. `used`: see `_windows`."""
    assert adapter.manifest.control is not None  # a manifest of this kind has it
    types = np.zeros(len(adapter.manifest.control.modes), np.float32)
    types[list(modes)] = 1
    return Union(modes, tuple(scale for scale, _ in used), np.stack([kept for _, kept in used], axis=1), types)


def _flat(pictures: Any) -> Any:
    """The pictures of a ControlNet that is no union. Raises: UsageError for lists in a list."""
    if isinstance(pictures, list) and any(isinstance(one, list) for one in cast("list[Any]", pictures)):
        raise UsageError(
            f"{PICTURE}: got a list in a list, which a union ControlNet takes, by modes; allowed are PIL images and "
            "arrays [height, width, 3] in 0..1, or one list of them",
            PICTURE,
        )
    return cast(Any, pictures)


def _of_modes(name: str, pictures: Any, modes: int) -> list[Any]:
    """The pictures of each mode of a union ControlNet. Raises: UsageError for another number of them."""
    each = cast("list[Any]", pictures) if isinstance(pictures, list) else [pictures]
    if len(each) != modes:
        number = f"{len(each)} picture{'s'[: len(each) != 1]} and {modes} mode{'s'[: modes != 1]}"
        raise UsageError(
            f"{PICTURE}: {name} is given {number}; give a picture for each mode, in the order of {MODE}. A picture for "
            "each image of the call goes into a list of its own: [[first, second]]",
            PICTURE,
        )
    return each


DEFAULTS = {SCALE: 1.0, START: 0.0, END: 1.0}


def _fitting(bundle: Bundle, adapter: Adapter) -> Adapter:
    """The adapter. Raises: UsageError if it is no ControlNet; BundleError if it is made for another UNet."""
    if adapter.manifest.kind not in NETS:
        raise UsageError(f"{PICTURE}: {adapter.name} is no ControlNet, but a {adapter.manifest.kind}", PICTURE)
    refuse_other_unet(adapter, bundle)
    return adapter


def _pooled(adapter: Adapter) -> bool:
    return adapter.manifest.control is not None and adapter.manifest.control.pooled


def _weights(residuals: int, rising: bool) -> Float32:
    """The weight of each residual: 1, or in guess mode from 0.1 for the first to 1 for the middle."""
    exponents = np.linspace(-1, 0, residuals, dtype=np.float32) if rising else np.zeros(residuals, np.float32)
    return np.power(np.float32(10), exponents)
