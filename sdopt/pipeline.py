"""Text to pictures on engines: encode, denoise, decode.

    pipe = sdopt.load("bundle")
    pipe("a red apple", seed=1).images[0].save("apple.png")

    for step in pipe.denoise("a red apple", seed=1):      # the same, with the loop in the caller's hands
        print(step.index, step.sigma)                     # to cancel, stop iterating
    image = pipe.decode(step.sample)

Ref: Rombach et al. 2022, arXiv:2112.10752.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

from sdopt import __version__
from sdopt.bundle.files import Bundle, embedded
from sdopt.bundle.specs import Array, Float32
from sdopt.denoise.board import Prepared
from sdopt.denoise.conditions import Conditions
from sdopt.denoise.features import summed
from sdopt.denoise.image_prompt import ImagePrompts
from sdopt.denoise.loop import Step, steps
from sdopt.denoise.program import compile_program, engines_beside
from sdopt.denoise.start import has_mask_channels, prepare_canvas
from sdopt.denoise.union import seen
from sdopt.denoise.upscale import second_pass
from sdopt.engine import Engine
from sdopt.engine.failures import memory_in_words
from sdopt.engine.names import BackendName, MemoryName, PrecisionName
from sdopt.engine.pool import EnginePool
from sdopt.engine.preset import engine_of_preset, remarks_on_engine
from sdopt.errors import UsageError, refuse_no_switch, refuse_other, shown
from sdopt.image import pil as pictures
from sdopt.image import preview as previews
from sdopt.image.vae import Vae
from sdopt.logs import logger
from sdopt.progress import bar, busy
from sdopt.request.autoencoder import autoencoder
from sdopt.request.calls import argument, latents, takes_four
from sdopt.request.diffusers import ATTRIBUTES
from sdopt.request.options import Options
from sdopt.request.plan import Plan, check_output_type, make_plan
from sdopt.request.presets import checked_preset
from sdopt.result import Result
from sdopt.samplers.noise import drawing
from sdopt.text.encode import TextEncoders, Texts
from sdopt.text.textual_inversion import Embedding

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Unpack

    from sdopt.adapters.lora.loaded import Loras, Weight


log = logger(__name__)
STATE = ("_shows_progress", "_loras")  # what may change while a pipeline lives
Callback = Callable[["Pipeline", int, float, dict[str, Float32]], "dict[str, Float32] | None"]


def load(
    path: str | os.PathLike[str] | None = None,
    backend: BackendName | str = "auto",
    *,
    precision: PrecisionName | str = "auto",
    memory: MemoryName | str = "fast",
    threads: int | None = None,
    verify: bool = True,
    paranoid: bool = False,
    trust_engines: bool = False,
    cache: bool = True,
    preset: str | None = None,
) -> Pipeline:
    """The pipeline of the bundle at `path`; the embedded text-to-emoji model if None.

    `precision`: "fp32", or "bf16" where the processor has it; "auto" is fp32, so that pictures are
    diffusers'. Of engines that `sdopt build` made, those in this precision are taken. If the backend is named and the
    precision is "auto", the newest are, but on a CPU those in fp32. `Pipeline.precision` says what runs.
    `memory`: "fast" keeps every component that was loaded; "low" frees it when another one is needed.
    `cache`: keep what the engine library makes of the graphs in this user's cache folder (for Stable Diffusion 1.5
    about 4 GB), so that the next process starts sooner and takes less memory.
    `paranoid`: compute the hash of every file anew; else that of a file that has not changed is known.
    Engines that `sdopt build` made are loaded if this user built them; `trust_engines` takes anybody's: they are code.
    `preset`: settings of the bundle that `sdopt tune` measured, e.g. "fast": its backend and precision are opened
    unless others are named, and every call has its keywords, as with `pipe(..., preset="fast")`.
    Raises: BundleError for a bundle that is damaged or unsafe; BackendError if no engine library is installed.
    """
    refuse_no_switch(trust_engines=trust_engines)
    bundle = Bundle.open(embedded() if path is None else path, verify=verify, paranoid=paranoid)
    preset = argument("preset", preset)
    if preset is not None:
        backend, precision = engine_of_preset(checked_preset(bundle, preset), backend, precision)
    how: dict[str, Any] = {"precision": precision, "memory": memory, "threads": threads}
    return Pipeline(EnginePool(bundle, backend, **how, trust=trust_engines, cache=cache), preset)


class Pipeline:
    """Encode, denoise and decode, on the engines of a pool, which is closed with the pipeline.

    `preset`: of every call that names none; None for a call without it.

    Threads may call one pipeline at once: each gets the picture that it would get alone. A forked child and an
    unpickled copy open engines of their own.
    Raises: UsageError for what is no pool, e.g. a path.
    """

    _loras: Loras | None

    def __init__(self, pool: EnginePool, preset: str | None = None) -> None:
        refuse_other("pool", pool, EnginePool, "are pools of engines; from a path, sdopt.load(path) makes a pipeline")
        self.pool, self.bundle, self.preset = pool, pool.bundle, preset
        self._text, self._vae, self._images, self._loras = TextEncoders(pool), Vae(pool), ImagePrompts(pool), None
        self._shows_progress: bool | None = False
        log.info("%s on %s in %s", self.bundle.path, self.backend, self.precision)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises: UsageError for what is set once, and for what nothing here would read, e.g. `pipe.scheduler`."""
        is_first = name in ("pool", "bundle", "preset", "_text", "_vae", "_images") and name not in vars(self)
        is_method = callable(getattr(type(self), name, None))
        if name in ATTRIBUTES or not (is_first or is_method or name in STATE or type(self) is not Pipeline):
            instead = ATTRIBUTES.get(name, "a pipeline has no such attribute; give options to each call")
            if name in vars(self) or hasattr(type(self), name):
                instead = "sdopt.load decides it; make another pipeline: sdopt.load(path, backend=..., precision=...)"
            raise UsageError(f"pipe.{name} cannot be set: {instead}", name)
        super().__setattr__(name, value)

    @property
    def backend(self) -> str:
        """The backend that the engines run on, e.g. "ort"."""
        return self.pool.backend

    @property
    def precision(self) -> str:
        """What pictures are computed in, e.g. "fp32" or "fp16 (vae_decoder bf16)"."""
        return self.pool.precision

    @property
    def provenance(self) -> dict[str, str]:
        """What pictures are made by: model, bundle, version, backend and precision."""
        return {
            "model": self.bundle.manifest.name or self.bundle.path.name,
            "bundle": self.bundle.digest,
            "version": __version__,
            "backend": self.backend,
            "precision": self.precision,
        }

    def __repr__(self) -> str:
        opened = ", ".join(self.pool.opened) or "none"
        return f"<Pipeline {self.bundle.path} on {self.backend} in {self.precision}; open engines: {opened}>"

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: Literal["pil"] = "pil",
        callback_on_step_end: Callback | None = None,
        progress: bool | None = None,
        **options: Unpack[Options],
    ) -> Result[list[Image]]: ...
    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: Literal["np", "latent"],
        callback_on_step_end: Callback | None = None,
        progress: bool | None = None,
        **options: Unpack[Options],
    ) -> Result[Float32]: ...
    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: str,
        callback_on_step_end: Callback | None = None,
        progress: bool | None = None,
        **options: Unpack[Options],
    ) -> Result[Any]: ...
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        progress: bool | None = None,
        **options: Unpack[Options],
    ) -> Result[Any]:
        """Pictures of `prompt`; the docstring of `sdopt.Options` lists the other keywords.

        `callback_on_step_end(pipe, index, timestep, {"latents": sample})` may return other latents, as in diffusers.
        `progress` shows how far it is on stderr; without it, what `set_progress_bar_config` said decides.
        Raises: UsageError for a wrong argument; NumericsError rather than a black picture.
        """
        check_output_type(output_type)
        if callback_on_step_end is not None and not takes_four(callback_on_step_end):
            text = f"callback_on_step_end = {shown(callback_on_step_end)}; allowed is a function of four: "
            raise UsageError(f"{text}def watch(pipe, index, timestep, tensors)", "callback_on_step_end")
        plan = self.plan(prompt, **options)
        check_output_type(output_type, plan.overlays)
        if output_type == "latent" and plan.image is None and (plan.vae or plan.vae_tile or plan.vae_slice):
            log.warning("vae, vae_tile and vae_slice have no effect: with output_type='latent' nothing is decoded")
        show = self._shows_progress if progress is None else _switch("progress", progress)
        step = None
        with bar("loading", plan.calls, show=show, leave=True) as counted:
            for step in self.steps(plan):
                counted.update(label="denoising")
                if callback_on_step_end is not None:
                    data = {"latents": step.sample}
                    step.steer(callback_on_step_end(self, step.index, step.timestep, data))
        assert step is not None  # a table has rows
        images: Any = step.sample
        if output_type != "latent":
            with busy("decoding", show=show):
                images = self.finish(plan, step.sample, output_type)
        return Result(images, plan.seeds, tuple(self.parameters(plan, i) for i in range(len(plan.seeds))))

    def denoise(self, prompt: str | Sequence[str] | None = None, **options: Unpack[Options]) -> Iterator[Step]:
        """The steps of one call, one by one; takes what `__call__` takes."""
        return self.steps(self.plan(prompt, **options))

    def plan(self, prompt: str | Sequence[str] | None = None, **options: Unpack[Options]) -> Plan:
        """What `__call__` makes of its keywords before any work: a request, checked, and the weights in use now."""
        loras = self._loras.overlay if self._loras else None
        plan = make_plan(self.bundle, prompt, {"preset": self.preset, **options}, loras, self.pool.adapter)
        if plan.measured is None:
            return plan
        notes = remarks_on_engine(plan.measured, self.pool, plan.cache.depth if plan.cache else 0)
        return replace(plan, remarks=(*plan.remarks, *notes))

    def steps(self, plan: Plan) -> Iterator[Step]:
        """The loop: predict the noise, take the sampler's row, move the sample. Of hires fix, both passes.

        Raises: UsageError for what is no plan.
        """
        _refuse_no_plan(plan)
        return self._steps(plan)

    def _steps(self, plan: Plan) -> Iterator[Step]:
        notes = (note for one in plan.passes for note in one.table.notes)
        for remark in dict.fromkeys((*plan.remarks, *notes)):
            log.warning("%s", remark)
        texts, done, step = self._encoded(plan), 0, None
        for one in plan.passes:
            if step is not None:
                one = second_pass(one, step.sample)
            ready = self.prepare(one, texts)
            with ExitStack() as stack:
                stack.enter_context(memory_in_words(_size(one)))
                using = partial(self.pool.using, overlay=plan.adapters)
                engines = {name: stack.enter_context(using(name)) for name in ready.program.engines}
                for step in steps(ready.program, ready.board(engines), done, plan.calls):
                    yield step
            done += len(one.table)

    @memory_in_words("the encoded prompts")
    def _encoded(self, plan: Plan) -> Texts:
        """The texts of all passes of a plan, with the negative ones if any pass is guided."""
        return self._text.encoded(next((one for one in plan.passes if one.guided), plan))

    def set_progress_bar_config(self, *, disable: bool | None = False, **others: Any) -> None:
        """Whether calls without `progress=` show it: as in diffusers, but at first they do not.

        `disable`: False shows it, True does not, None shows it where stderr is a terminal.
        Raises: UsageError for other options of tqdm.
        """
        for name in others:
            text = "allowed is disable; a bar of your own goes around pipe.denoise(...)"
            raise UsageError(f"set_progress_bar_config({name}=...): {text}", name)
        self._shows_progress = None if disable is None else not _switch("disable", disable)

    @memory_in_words("the first latents and the encoded prompts")
    def prepare(self, plan: Plan, texts: Texts | None = None) -> Prepared:
        """One pass of a plan with its texts and pictures encoded, and its program: what is left is the loop.

        `texts`: its texts, where they are encoded already.
        Raises: UsageError for what is no plan, and for a plan of two passes, that of hires fix.
        """
        _refuse_no_plan(plan)
        if plan.second is not None:
            raise UsageError("hires: this plan has two passes; prepare each of plan.passes", "hires")
        entry = self.bundle.manifest.latents
        size = (plan.height // entry.factor, plan.width // entry.factor)
        draw = drawing(plan.seeds, plan.rng, (len(plan.seeds), entry.channels, *size))
        cond, negative = self._text.conditions(plan, texts or self._text.encoded(plan))
        encode = partial(self._vae.encode, tile=plan.vae_tile, one_by_one=plan.vae_slice, name=plan.vae)
        canvas = prepare_canvas(plan, has_mask_channels(self.bundle), draw, encode)
        guided, pool = negative is not None, self.pool
        built = pool.built_for(plan.adapters)
        program = compile_program(plan, canvas, guided=guided, built=built, needs_built=pool.runs_only_built)
        pool.refuse_unbuilt((*engines_beside(plan), *program.engines))
        self._vae.refuse_unbuilt(plan.vae)
        pictured, unpictured = self._images.inputs(plan.image_prompts, len(plan.seeds), guided)
        cond, negative = {**cond, **pictured}, None if negative is None else {**negative, **unpictured}
        features = summed([one for one in plan.features if one.calls], pool.using)
        given = Conditions(cond, negative, canvas.extra, seen(plan.controls, pool.using), features)
        return Prepared(program, canvas, given, draw)

    @memory_in_words("the encoded prompts")
    def encode(self, prompts: Sequence[str], prompt_style: str = "plain", clip_skip: int = 0) -> Float32:
        """The prompts' embeddings, [prompts, tokens, features]; equal prompts are encoded once.

        Raises: UsageError as a call raises it for these keywords.
        """
        texts: list[str] = argument("prompts", [prompts] if isinstance(prompts, str) else prompts)
        style, skip = argument("prompt_style", prompt_style), argument("clip_skip", clip_skip)
        adapters = self._loras.overlay if self._loras else None
        return self._text.encode([(text,) * 3 for text in texts], style, skip, adapters=adapters)[0]

    def load_embedding(
        self, source: str | os.PathLike[str] | Array | Mapping[str, Array], token: str | None = None
    ) -> str:
        """The token that prompts may use from now on: a textual inversion from a .safetensors file, or an array
        [n, width] (for SDXL `{"clip_l": ..., "clip_g": ...}`).

        Without `token` it is the one that the file names, or the file's own name (see `sdopt.text.textual_inversion`).
        Raises: UsageError for a file that is not what it should be, a token that is taken, or a bundle that takes none.
        """
        return self._text.add(source, argument("token", token))

    @property
    def embeddings(self) -> Mapping[str, Embedding]:
        """The embeddings that prompts may use, by their tokens."""
        return self._text.embeddings

    def load_lora_weights(
        self, source: str | os.PathLike[str], adapter_name: str | None = None, *, strict: bool = True
    ) -> str:
        """Load a LoRA from a .safetensors file and use it from the next call on. The name is returned.

        Without `adapter_name` it is the file's.
        Files of kohya's sd-scripts, LyCORIS, PEFT, diffusers, ComfyUI and OneTrainer are read. Several may be in use:
        each weight is the bundle's own and the sum of their changes. A textual inversion inside the file is loaded
        too. `strict=False` loads a file though some of its tensors fit no module of this model.
        Raises: UsageError for a file that is damaged or made for another model.
        """
        adapter = self.loras.load(source, adapter_name, strict)
        try:
            for token, arrays in adapter.lora.embeddings.items():
                self._text.add(arrays, token)
        except UsageError:
            self.loras.unload([adapter.name])
            raise
        return adapter.name

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight] | None = None
    ) -> None:
        """Use these LoRAs and no others, each with a weight: a number, or `{"unet": 0.8, "text_encoder": 0.5}`."""
        self.loras.use(adapter_names, adapter_weights)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The LoRAs that are loaded, by component."""
        return self._loras.names if self._loras else {}

    def get_active_adapters(self) -> list[str]:
        """The names of the LoRAs that `set_adapters` chose; `disable_lora` leaves them chosen."""
        return self._loras.chosen if self._loras else []

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget these LoRAs; the others stay as they are.

        Raises: UsageError for a name that is not loaded; then none is forgotten.
        """
        self.loras.unload(adapter_names)

    def disable_lora(self) -> None:
        """Use no LoRA until `enable_lora`; those that are loaded stay so, with their weights."""
        self.loras.is_enabled = False

    def enable_lora(self) -> None:
        """Use the chosen LoRAs again, after `disable_lora`."""
        self.loras.is_enabled = True

    def fuse_lora(self, **options: Any) -> NoReturn:
        """Raises: UsageError: there is nothing to fuse."""
        raise UsageError(
            "pipe.fuse_lora: LoRAs in use are in the weights already, so a step takes no longer; leave it out. "
            "For its lora_scale use pipe.set_adapters(name, 0.7)"
        )

    def unfuse_lora(self, **options: Any) -> NoReturn:
        """Raises: UsageError: nothing is fused for good."""
        raise UsageError("pipe.unfuse_lora: nothing is fused; use pipe.disable_lora() or unload_lora_weights()")

    def unload_lora_weights(self) -> None:
        """Forget all LoRAs; the next call has the bundle's own weights."""
        if self._loras:
            self._loras.unload()

    @property
    def loras(self) -> Loras:
        """The LoRAs of this pipeline, with what else can be asked of them; see `sdopt.adapters.lora.loaded`."""
        from sdopt.adapters.lora.loaded import Loras  # late: most pipelines load none

        if self._loras is None:
            self._loras = Loras(self.bundle)
        return self._loras

    def parameters(self, plan: Plan, image: int) -> dict[str, Any]:
        """What makes image `image` of a plan again, alone; embeddings by token and digest.

        Raises: UsageError for what is no plan, and for an image that it has not.
        """
        _refuse_no_plan(plan)
        allowed = f"are whole numbers from 0 to {len(plan.seeds) - 1}"
        refuse_other("image", image, int, allowed)
        if not 0 <= image < len(plan.seeds):
            raise UsageError(f"image = {image}; allowed {allowed}", "image")
        recorded = plan.parameters(image)
        used = self._text.used(recorded)
        embeddings = {"embeddings": used} if used else {}
        loras = {"loras": list(plan.adapters.described)} if plan.adapters is not None else {}
        cached = {} if plan.cache is None else {"precision": self.pool.precision_of(plan.cache.depth)}
        return {**recorded, **embeddings, **loras, **self.provenance, **cached}

    def finish(self, plan: Plan, sample: Float32, output_type: str = "pil") -> Any:
        """The pictures of a plan's last sample: decoded and, with `padding_mask_crop`, laid over their originals.

        Raises: UsageError for what is no plan, and as `decode` does.
        """
        _refuse_no_plan(plan)
        images = self.decode(sample, output_type, vae=plan.vae, vae_tile=plan.vae_tile, vae_slice=plan.vae_slice)
        return [o.over(image) for o, image in zip(plan.overlays, images, strict=True)] if plan.overlays else images

    @memory_in_words("the preview")
    def preview(self, sample: Float32, scale: int = 1, output_type: str = "pil") -> Any:
        """Small pictures of latents such as `step.denoised`, without the decoder; see `sdopt.image.preview`.

        Raises: UsageError for what is no latents of this bundle, and for another `scale` or `output_type`.
        """
        scale, output_type = argument("scale", scale), argument("output_type", output_type)
        entry = self.bundle.manifest.latents
        sample = latents(sample, entry.channels, entry.factor)
        return previews.pictures(self.bundle, sample, scale, output_type)

    @memory_in_words("the decoded picture")
    def decode(
        self,
        sample: Float32,
        output_type: str = "pil",
        *,
        vae: str | None = None,
        vae_tile: int | None = None,
        vae_slice: bool = False,
    ) -> Any:
        """The pictures of latents [images, channels, latent_height, latent_width]; see `vae` in Options.

        Raises: UsageError as a call raises it for these keywords, and for another `output_type` than "pil" and "np".
        """
        output_type = argument("output_type", output_type)
        entry = self.bundle.manifest.latents
        sample = latents(sample, entry.channels, entry.factor)
        tile, one_by_one = argument("vae_tile", vae_tile), argument("vae_slice", vae_slice)
        tiny = autoencoder(argument("vae", vae), self.bundle, self.pool.adapter)
        decoded = self._vae.decode(sample, tile, one_by_one, None if tiny is None else tiny.name)
        return pictures.to_pil(decoded) if output_type == "pil" else pictures.to_unit(decoded)

    def engine(self, component: str) -> Engine:
        """The engine of a component, opened if it is not: to have it ready before the first picture."""
        return self.pool.open(component)

    def release(self, component: str) -> None:
        """Free the memory of a component that is no longer needed; it loads again when asked for."""
        self.pool.release(component)

    def close(self) -> None:
        """Free the memory of all components; they load again when asked for."""
        self.pool.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


for _method in (Pipeline.__call__, Pipeline.denoise):  # what `help(pipe.denoise)` and a notebook show
    _method.__doc__ = f"{_method.__doc__}\n    {Options.__doc__}"


def _switch(name: str, value: Any) -> bool:
    """Raises: UsageError unless it is True or False."""
    if value is not True and value is not False:
        raise UsageError(f"{name} = {shown(value)}; allowed are True and False", name)
    return value


def _refuse_no_plan(plan: object) -> None:
    """Raises: UsageError unless it is a plan."""
    refuse_other("plan", plan, Plan, "are plans: pipe.plan(prompt, seed=1)")


def _size(plan: Plan) -> str:
    return f"{len(plan.seeds)} at {plan.width}x{plan.height}"
