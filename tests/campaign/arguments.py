"""Hostile values for every argument of the Python interface.

Three rules. What is no value of any argument is refused. What only wraps a good value (a NumPy scalar, a subclass, a
tuple for a list) gives the same picture, or is refused. Where a value at an edge is taken, the parameters that the
picture carries make the same picture again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import sdopt
from sdopt.errors import SdoptError
from sdopt.request.keywords import KEYWORDS, replayed
from tests.campaign.cases import LEGAL, NONSENSE, OTHER, Case, Outcome
from tests.campaign.loras import small_lora, written
from tests.campaign.sandbox import Sandbox, as_right, judged


class Raising:
    """An object that cannot be looked at."""

    def _raise(self, *_: Any) -> Any:
        raise RuntimeError("no")

    __eq__ = __repr__ = __str__ = __len__ = __iter__ = __index__ = __float__ = __int__ = __bool__ = _raise
    __fspath__ = __array__ = __getitem__ = __contains__ = _raise
    __hash__ = object.__hash__


class Shape:
    """An object that pretends to be an array."""

    shape, ndim, dtype, size = (1, 4, 4, 4), 4, np.dtype(np.float32), 64


class Text(str):
    __slots__ = ()


class Whole(int):
    pass


class Real(float):
    pass


def _recursive() -> list[Any]:
    entries: list[Any] = []
    entries.append(entries)
    return entries


NEVER: dict[str, Callable[[], Any]] = {  # no argument takes these
    "object()": object,
    "a function": lambda: len,
    "a complex number": lambda: 1j,
    "bytes": lambda: b"\xff\0",
    "a set": lambda: {1, 2},
    "a generator": lambda: (i for i in range(2)),
    "NaN": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "half of a pair": lambda: "\ud800",
    "a module": lambda: json,
    "a class": lambda: int,
    "what raises": Raising,
    "what pretends": Shape,
    "Ellipsis": lambda: ...,
    "a list of itself": _recursive,
    "an array of objects": lambda: np.array([None, 1], object),
    "an array of NaN": lambda: np.full((1, 4, 4, 4), np.nan, np.float32),
    "an empty array": lambda: np.zeros((0,), np.float32),
    "an array of seven dimensions": lambda: np.zeros((1,) * 7),
    "a date": lambda: np.datetime64("2020"),
    "NaT": lambda: np.datetime64("NaT"),
    "a record": lambda: np.zeros(2, [("a", "f4")]),
    "a masked array": lambda: np.ma.masked_array([1.0, 2.0], [True, False]),
}
EDGES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e308, -1e308, 2**31 - 1, 2**31,
    2**32, 2**63, 2**64 - 1, 2**64, 10**400, "", " ", "\0", "\x1b[2J", "x" * 9000, "日本", "((((", "euler", "karras",
    "0", "16", [], [0], [1, 2], [1.0], [None], [[]], ["x"], ["a", "b"], (), (0, 0), (16, 16), (0.0, 1.0), (1, 2, 3),
    [True], [-1], [999, 500], [500, 999], [14.6, 0.5], [0.5, 0.5], [1e6], {}, range(2), range(0), [10**30],
    [float("nan")], list(range(70)), np.int8(3), np.uint64(2**64 - 1), np.float16(0.5), np.bool_(True),
    np.str_("euler"), np.array(3), np.array([1, 2]), np.zeros((1, 4, 4, 4), np.float32),
    np.ones((16, 16, 3), np.float32), np.zeros((16, 16)), np.zeros((2, 2, 3), np.uint8),
    np.zeros((1, 32, 128), np.float32), np.zeros((1, 77, 768), np.float32), np.zeros((1, 4, 4, 4)),
    np.full((4, 4), 2.0),
)  # fmt: skip
GOOD: dict[str, Any] = {
    "prompt": "a red apple", "negative_prompt": "green", "seed": 3, "num_inference_steps": 2, "height": 32, "width": 32,
    "guidance_scale": 3.0, "clip_skip": 1, "prompt_style": "plain", "sampler": "euler", "schedule": "karras",
    "eta": 0.5, "guidance_rescale": 0.5, "guidance_interval": (0.0, 0.7), "rng": "cpu", "num_images_per_prompt": 1,
    "vae_slice": True, "guidance_batch": 1, "strength": 0.5, "mask_blur": 1.0,
}  # fmt: skip
LONG = 64  # a legal wish for more steps or pixels takes its time, and is no hang


def run(case: Case, sandbox: Sandbox) -> Outcome:
    rng = case.random()
    return rng.choice((_never, _wrapped, _edge, _edge, _edge, _other_calls))(rng, sandbox)


def _base(name: str) -> dict[str, Any]:
    """A request in which a keyword counts."""
    own = {key: GOOD[key] for key in ("prompt", "seed", "num_inference_steps", "height", "width", "guidance_scale")}
    if name == "eta":
        own["sampler"] = "ddim"
    if name == "schedule":
        own["sampler"] = "euler"
    if name in ("strength", "mask_image", "mask_blur", "padding_mask_crop", "denoising_start"):
        own |= {"image": np.full((32, 32, 3), 0.5, np.float32), "num_inference_steps": 4}
    if name in ("mask_blur", "padding_mask_crop"):
        mask = np.zeros((32, 32), np.float32)
        mask[8:20, 8:20] = 1
        own["mask_image"] = mask
    if name in ("timesteps", "sigmas"):
        own |= {"sampler": "euler"}
        del own["num_inference_steps"]
    return own


def _images(sandbox: Sandbox, request: dict[str, Any]) -> Any:
    return _call(sandbox, request)[0]


def _call(sandbox: Sandbox, request: dict[str, Any]) -> tuple[Any, Any]:
    with sdopt.load(sandbox.bundles["emoji"], "ort:cpu", threads=1) as pipe:
        result = pipe(**request)
        return np.stack([np.asarray(image) for image in result.images]), result.parameters


def _never(rng: random.Random, sandbox: Sandbox) -> Outcome:
    name, (told, make) = rng.choice(list(KEYWORDS)), rng.choice(list(NEVER.items()))
    value = make()
    wrapped = rng.choice((lambda: value, lambda: value, lambda: [value], lambda: (value, value)))()
    what = f"{name}={told}{'' if wrapped is value else ' in a list'}"
    return judged(what, lambda: _images(sandbox, {**_base(name), name: wrapped}), lambda _: Outcome(NONSENSE, what))


def _wrapped(rng: random.Random, sandbox: Sandbox) -> Outcome:
    name = rng.choice(list(GOOD))
    value = GOOD[name]
    wrappers: dict[type, tuple[Callable[[Any], Any], ...]] = {
        bool: (np.bool_, int, np.array),
        int: (np.int64, np.uint8, Whole, float, np.array, lambda v: [v], str, np.float32, lambda v: np.array([v])),
        float: (np.float64, Real, np.array, lambda v: [v], str, np.longdouble, lambda v: np.array([v])),
        str: (Text, np.str_, lambda v: [v], lambda v: (v,), lambda v: v.encode(), lambda v: np.array([v])),
        tuple: (list, np.array, lambda v: iter(v), lambda v: dict.fromkeys(v)),
    }
    wrap = rng.choice(wrappers[type(value)])
    what = f"{name}={value!r} as {type(wrap(value)).__name__}"
    right = _images(sandbox, {**_base(name), name: value})
    return judged(what, lambda: _images(sandbox, {**_base(name), name: wrap(value)}), as_right(what, right))


def _edge(rng: random.Random, sandbox: Sandbox) -> Outcome:
    """A value at an edge, sometimes beside another one."""
    names = rng.sample(list(KEYWORDS), rng.choice((1, 1, 1, 2)))
    request = _base(names[0])
    for name in names:
        request[name] = rng.choice(EDGES)
    what = ", ".join(f"{name}={repr(request[name])[:60]}" for name in names)
    if any(_is_long(request.get(name)) for name in ("height", "width", "num_inference_steps", "num_images_per_prompt")):
        plan = judged(what, lambda: _planned(sandbox, request), lambda _: Outcome(LEGAL, what, "long"))
        return plan

    def again(value: tuple[Any, Any]) -> Outcome:
        images, parameters = value
        if images.size > LONG * LONG * 3 * 64:
            return Outcome(LEGAL, what)
        try:
            carried = [replayed(json.loads(json.dumps(own, allow_nan=False))) for own in parameters]
        except SdoptError as error:  # arrays that nothing carries
            return Outcome(LEGAL, what, str(error))
        if "image" in request and request["image"] is not None:
            return Outcome(LEGAL, what)
        i = rng.randrange(len(carried))
        same = as_right(what, images[i : i + 1])(_images(sandbox, carried[i]))
        return Outcome(LEGAL, what) if not same.is_fault else Outcome(OTHER, what, f"replayed: {same.detail}")

    return judged(what, lambda: _call(sandbox, request), again)


def _is_long(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer)) and not isinstance(value, bool) and value > LONG


def _planned(sandbox: Sandbox, request: dict[str, Any]) -> Any:
    from sdopt.request.plan import make_plan

    options: Any = {name: value for name, value in request.items() if name != "prompt"}
    return make_plan(sdopt.Bundle.open(sandbox.bundles["emoji"]), request.get("prompt"), options)


def _other_calls(rng: random.Random, sandbox: Sandbox) -> Outcome:
    """An argument of another call than `pipe(...)`."""
    name, call = rng.choice(list(CALLS.items()))
    told, make = rng.choice([*NEVER.items(), *((repr(edge)[:60], lambda edge=edge: edge) for edge in EDGES)])
    value, what = make(), f"{name} with {told}"
    outcome = judged(what, lambda: call(sandbox, value), lambda _: Outcome(LEGAL, what))
    is_nonsense = outcome.name == LEGAL and told in NEVER and (name, told) not in TAKEN
    return Outcome(NONSENSE, what) if is_nonsense else outcome


def _load(keyword: str) -> Callable[[Sandbox, Any], Any]:
    def call(sandbox: Sandbox, value: Any) -> Any:
        how = {"backend": "ort:cpu", "threads": 1, keyword: value}
        with sdopt.load(sandbox.bundles["emoji"], **how) as pipe:
            return pipe(**_base("prompt"))

    return call


def _pipe(use: Callable[[Any, Any], Any]) -> Callable[[Sandbox, Any], Any]:
    def call(sandbox: Sandbox, value: Any) -> Any:
        with sdopt.load(sandbox.bundles["emoji"], "ort:cpu", threads=1) as pipe:
            return use(pipe, value)

    return call


def _with_lora(use: Callable[[Any, Path, Any], Any]) -> Callable[[Sandbox, Any], Any]:
    def call(sandbox: Sandbox, value: Any) -> Any:
        path = sandbox.folder / "right.safetensors"
        if not path.exists():
            written(path, *small_lora(sandbox.bundles["emoji"]))
        with sdopt.load(sandbox.bundles["emoji"], "ort:cpu", threads=1) as pipe:
            use(pipe, path, value)
            return pipe(**_base("prompt"))

    return call


def _engine(use: Callable[[Any, Any], Any]) -> Callable[[Sandbox, Any], Any]:
    def call(sandbox: Sandbox, value: Any) -> Any:
        bundle = sdopt.Bundle.open(sandbox.bundles["emoji"])
        with sdopt.open_engine(bundle, "vae_decoder", "ort:cpu", threads=1) as engine:
            return use(engine, value)

    return call


def _steered(pipe: Any, value: Any) -> Any:
    return pipe(**_base("prompt"), callback_on_step_end=lambda *_: value)


def _saved(pipe: Any, value: Any) -> Any:
    folder = Path(pipe.bundle.path).parent / "saved"
    folder.mkdir(exist_ok=True)
    path = value if not isinstance(value, str) else folder / value
    return pipe(**_base("prompt")).save(path)


LATENTS = np.zeros((1, 4, 4, 4), np.float32)
CALLS: dict[str, Callable[[Sandbox, Any], Any]] = {
    **{
        f"load({word})": _load(word)
        for word in ("backend", "precision", "memory", "threads", "verify", "paranoid", "cache")
    },
    "load(trust_engines)": _load("trust_engines"),
    "load(path)": lambda sandbox, value: sdopt.load(value, "ort:cpu", threads=1),
    "Bundle.open": lambda sandbox, value: sdopt.Bundle.open(value),
    "component": lambda sandbox, value: sdopt.Bundle.open(sandbox.bundles["emoji"]).component(value),
    "open_engine(component)": lambda sandbox, value: sdopt.open_engine(
        sdopt.Bundle.open(sandbox.bundles["emoji"]), value, "ort:cpu", threads=1
    ),
    "output_type": _pipe(lambda pipe, value: pipe(**_base("prompt"), output_type=value)),
    "callback_on_step_end": _pipe(lambda pipe, value: pipe(**_base("prompt"), callback_on_step_end=value)),
    "what a callback returns": _pipe(_steered),
    "latents of a callback": _pipe(lambda pipe, value: _steered(pipe, {"latents": value})),
    "decode": _pipe(lambda pipe, value: pipe.decode(value)),
    "decode(output_type)": _pipe(lambda pipe, value: pipe.decode(LATENTS, value)),
    "decode(vae)": _pipe(lambda pipe, value: pipe.decode(LATENTS, vae=value)),
    "decode(vae_tile)": _pipe(lambda pipe, value: pipe.decode(LATENTS, vae_tile=value)),
    "decode(vae_slice)": _pipe(lambda pipe, value: pipe.decode(LATENTS, vae_slice=value)),
    "preview": _pipe(lambda pipe, value: pipe.preview(value)),
    "preview(scale)": _pipe(lambda pipe, value: pipe.preview(LATENTS, value)),
    "preview(output_type)": _pipe(lambda pipe, value: pipe.preview(LATENTS, 1, value)),
    "encode": _pipe(lambda pipe, value: pipe.encode(value)),
    "encode(prompt_style)": _pipe(lambda pipe, value: pipe.encode(["a"], value)),
    "encode(clip_skip)": _pipe(lambda pipe, value: pipe.encode(["a"], "plain", value)),
    "load_embedding": _pipe(lambda pipe, value: pipe.load_embedding(value, "<me>")),
    "load_embedding(token)": _pipe(lambda pipe, value: pipe.load_embedding(np.ones((1, 128), np.float32), value)),
    "load_lora_weights": _pipe(lambda pipe, value: pipe.load_lora_weights(value)),
    "load_lora_weights(adapter_name)": _with_lora(lambda pipe, path, value: pipe.load_lora_weights(path, value)),
    "set_adapters": _with_lora(lambda pipe, path, value: (pipe.load_lora_weights(path), pipe.set_adapters(value))),
    "set_adapters(weights)": _with_lora(
        lambda pipe, path, value: pipe.set_adapters([pipe.load_lora_weights(path)], value)
    ),
    "engine": _pipe(lambda pipe, value: pipe.engine(value)),
    "release": _pipe(lambda pipe, value: pipe.release(value)),
    "save": _pipe(_saved),
    "an engine's input": _engine(lambda engine, value: engine(latent_sample=value)),
    "sampler_table(steps)": lambda sandbox, value: sdopt.sampler_table({"_class_name": "DDIMScheduler"}, value),
    "sampler_table(config)": lambda sandbox, value: sdopt.sampler_table(value, 2),
    "sampler_table(sampler)": lambda sandbox, value: sdopt.sampler_table(
        {"_class_name": "DDIMScheduler"}, 2, sampler=value
    ),
}
TAKEN = {
    ("an engine's input", "an array of NaN"),  # NumPy in, NumPy out: who calls an engine sees NaN in what it gives
}
