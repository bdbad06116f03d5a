"""The baselines: diffusers on PyTorch, eager or compiled, in the precisions that suit the device.

Only this module of the harness imports torch, and only when a baseline is opened. The only setting that it changes is
torch's number of threads. Clocks of the device and other switches of torch stay as they are.
Timings use TF32 as torch does by default: in convolutions, not in matrix products. The outputs that other sides are
compared with are computed without TF32 (see `exact`).
"""

from __future__ import annotations

import gc
import importlib.metadata
import inspect
import json
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from sdopt.bench.cases import Case
from sdopt.bench.sides import Inputs
from sdopt.bench.timing import Call, Sample, timed
from sdopt.bundle.precision import precision_word
from sdopt.bundle.specs import Array, Float32
from sdopt.dataclass import dataclass
from sdopt.errors import BackendError, CheckpointError, UsageError, install

REFERENCE = "eager-fp32"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
COMPILE_MODES = {"cpu": ("default",), "cuda": ("max-autotune", "default")}  # the first that works is used
DEFAULTS = {  # the baselines of each device
    "cpu": (REFERENCE, "eager-bf16-nhwc"),
    "cuda": (REFERENCE, "eager-fp16", "eager-fp16-nhwc", "compile-fp16-nhwc"),
}


@dataclass(frozen=True)
class Baseline:
    """The name of a baseline, taken apart. It is MODE-PRECISION, or MODE-PRECISION-nhwc for channels last.

    Examples: "eager-fp32", "compile-bf16-nhwc".
    """

    name: str
    compiled: bool
    precision: str
    nhwc: bool

    @staticmethod
    def parse(name: str) -> Baseline:
        """Raises: UsageError for a name of another form."""
        mode, _, rest = name.partition("-")
        precision_text, _, layout = rest.partition("-")
        precision = precision_word(precision_text)
        if mode not in ("eager", "compile") or precision not in DTYPES or layout not in ("", "nhwc"):
            raise UsageError(
                f"baseline {name!r} is not known; it is eager or compile, then -{', -'.join(DTYPES)}, "
                "then nothing or -nhwc (channels last): eager-fp32, compile-bf16-nhwc"
            )
        name = "-".join(filter(None, (mode, precision, layout)))
        return Baseline(name, mode == "compile", precision, layout == "nhwc")


def find_device(device: str = "auto") -> str:
    """The device itself. For "auto" it is "cuda" if PyTorch finds a GPU, and "cpu" otherwise.

    Raises: BackendError if PyTorch is missing, or if the device is "cuda" and PyTorch finds no GPU.
    """
    has_gpu: bool = _torch().cuda.is_available()
    if device == "auto":
        return "cuda" if has_gpu else "cpu"
    if device == "cuda" and not has_gpu:
        raise BackendError("device cuda: PyTorch finds no NVIDIA GPU here; use --device cpu")
    return device


class DiffusersSide:
    """A diffusers pipeline of the checkpoint, run as the baseline's name says.

    Raises: BackendError without PyTorch and diffusers; CheckpointError for a folder that is not a checkpoint.
    """

    kind = "diffusers"
    half_level = 0.0

    def __init__(self, name: str, case: Case, checkpoint: Path, threads: int, device: str = "cpu") -> None:
        self._baseline, self._case, self._device = Baseline.parse(name), case, device
        self.name, self.precision, self.note = self._baseline.name, self._baseline.precision, ""
        self.backend = f"diffusers {device}"
        self.versions: Mapping[str, str] = {}
        self.engine_bytes: Mapping[str, int] = {}
        self._torch = _torch()
        self._torch.set_num_threads(threads)
        if device == "cuda" and self.name == REFERENCE:
            self.note = "timed with TF32 as PyTorch sets it; parity is against the same pipeline with TF32 off"
        self._dtype = getattr(self._torch, DTYPES[self._baseline.precision])
        self._pipe = _load(checkpoint, self._dtype).to(device)
        if self._baseline.nhwc:
            for module in (self._pipe.unet, self._pipe.vae):
                module.to(memory_format=self._torch.channels_last)
        if self._baseline.compiled:
            self._compile()

    @contextmanager
    def exact(self) -> Generator[None]:
        """A context in which a GPU computes convolutions and matrix products in float32, without TF32."""
        switches: list[Any] = [self._torch.backends.cudnn, self._torch.backends.cuda.matmul]
        allowed_before = [switch.allow_tf32 for switch in switches]
        try:
            for switch in switches:
                switch.allow_tf32 = False
            yield
        finally:
            for switch, allowed in zip(switches, allowed_before, strict=True):
                switch.allow_tf32 = allowed

    def inputs(self, latents: Float32) -> Inputs:
        """The UNet's inputs for the case: the latents, the timestep of the middle step, and this side's embeddings."""
        with self._torch.no_grad():
            arrays = {name: tensor.float().cpu().numpy() for name, tensor in self._conditions().items()}
        conditions = {name: np.repeat(array, self._case.batch, 0) for name, array in arrays.items()}
        sample = np.concatenate([latents] * (2 if self._case.guided else 1))
        times = np.full(len(sample), float(self._timestep()), np.float32)
        return Inputs(latents, {"sample": sample, "timestep": times, **conditions})

    def calls(self, inputs: Inputs) -> Mapping[str, Call]:
        pipe, torch = self._pipe, self._torch
        tensors = {name: self._tensor(array) for name, array in inputs.unet.items()}
        sample, hidden = tensors["sample"], tensors["encoder_hidden_states"]
        added = {name: tensors[name] for name in ("text_embeds", "time_ids") if name in tensors}
        timestep = torch.tensor(float(inputs.unet["timestep"][0]))  # never in bf16, which has no 999
        timestep = timestep.to(self._device, self._timestep().dtype)
        latents = self._tensor(inputs.latents)

        def unet() -> Any:
            return pipe.unet(
                sample, timestep, encoder_hidden_states=hidden, added_cond_kwargs=added or None, return_dict=False
            )[0]

        def loop() -> Array:
            with _instant_unet(pipe.unet, torch.zeros_like(sample)):
                return self._run(latents, "latent", **self._embeds(hidden, added)).float().cpu().numpy()

        return {
            "text_encoder": self._on_device(lambda: self._conditions()["encoder_hidden_states"]),
            "unet": self._on_device(unet),
            "loop_step": timed(loop, per=self._loop_calls()),
            "vae_decoder": self._on_device(lambda: self._decode(latents)),
            "picture": timed(lambda: self.picture(inputs.latents)),
        }

    def picture(self, latents: Float32) -> Array:
        """The case's pictures, [batch, height, width, 3] in 0..1."""
        return self._run(self._tensor(latents), "np", prompt=[self._case.prompt] * self._case.batch)

    def close(self) -> None:
        del self._pipe
        gc.collect()
        if self._baseline.compiled:
            self._torch._dynamo.reset()
        if self._device == "cuda":
            self._torch.cuda.empty_cache()

    def _run(self, latents: Any, output_type: str, **prompt_or_embeds: Any) -> Any:
        case = self._case
        return self._pipe(
            num_inference_steps=case.steps, guidance_scale=case.guidance, height=case.height, width=case.width,
            latents=latents, output_type=output_type, generator=self._generators(), **prompt_or_embeds,
        ).images  # fmt: skip

    def _generators(self) -> list[Any]:
        """The generators of the noise that a sampler adds. Image i has seed i, as in sdopt."""
        return [self._torch.Generator("cpu").manual_seed(i) for i in range(self._case.batch)]

    def _tensor(self, array: Array) -> Any:
        return self._torch.from_numpy(np.array(array)).to(self._device, self._dtype)

    def _timestep(self) -> Any:
        scheduler = self._pipe.scheduler
        scheduler.set_timesteps(self._case.steps)
        return scheduler.timesteps[len(scheduler.timesteps) // 2]

    def _conditions(self) -> dict[str, Any]:
        """The UNet's inputs that one prompt gives. With guidance, the rows of the empty prompt come first."""
        case, torch = self._case, self._torch
        encoded = self._pipe.encode_prompt(
            prompt=case.prompt, device=self._device, num_images_per_prompt=1, do_classifier_free_guidance=case.guided
        )

        def both(cond: Any, uncond: Any) -> Any:
            return torch.cat([uncond, cond]) if case.guided else cond

        if len(encoded) == 2:
            return {"encoder_hidden_states": both(*encoded)}
        hidden, pooled = both(*encoded[:2]), both(*encoded[2:])
        size = (case.height, case.width)
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=hidden.dtype, device=hidden.device)
        return {"encoder_hidden_states": hidden, "text_embeds": pooled, "time_ids": time_ids.repeat(len(hidden), 1)}

    def _embeds(self, hidden: Any, added: Mapping[str, Any]) -> dict[str, Any]:
        """The pipeline's arguments in place of a prompt."""
        embeds = {"prompt_embeds": hidden}
        if "text_embeds" in added:
            embeds["pooled_prompt_embeds"] = added["text_embeds"]
        if not self._case.guided:
            return embeds
        halves: dict[str, Any] = {}
        for name, both in embeds.items():
            halves[f"negative_{name}"], halves[name] = both.chunk(2)
        return halves

    def _decode(self, latents: Any) -> Any:
        pipe, vae = self._pipe, self._pipe.vae
        upcast = vae.config.force_upcast and vae.dtype == self._torch.float16  # as diffusers' SDXL pipelines do
        if upcast:
            vae.to(dtype=self._torch.float32)
        decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        if upcast:
            vae.to(dtype=self._torch.float16)
        return pipe.image_processor.postprocess(decoded, output_type="pt")

    def _loop_calls(self) -> int:
        """How many times the loop calls the UNet. Some schedulers call it more than once in a step."""
        self._pipe.scheduler.set_timesteps(self._case.steps)
        return len(self._pipe.scheduler.timesteps)

    def _on_device(self, call: Callable[[], Any]) -> Call:
        """A timed call that ends when its tensor is a NumPy array. On a GPU, CUDA events time the device's part."""
        torch = self._torch

        def sample() -> Sample:
            parts: dict[str, float] = {}
            with torch.no_grad():
                if self._device != "cuda":
                    started = time.perf_counter()
                    output = call().float().numpy()
                    return Sample(time.perf_counter() - started, output, parts)
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                started = time.perf_counter()
                begin.record()
                tensor = call()
                end.record()
                output = tensor.float().cpu().numpy()
                seconds = time.perf_counter() - started
                return Sample(seconds, output, {"device": begin.elapsed_time(end) / 1e3})

        return sample

    def _compile(self) -> None:
        """Compile UNet and decoder with the first mode that works. The first call compiles, so it is made here."""
        torch, pipe, errors = self._torch, self._pipe, list[str]()
        for mode in COMPILE_MODES[self._device]:
            pipe.unet.compile(mode=mode)
            pipe.vae.decoder.compile(mode=mode)
            try:
                self._run(None, "np", prompt=[self._case.prompt] * self._case.batch)
            except Exception as error:  # the compiler can raise anything
                errors.append(f"{mode}: {error}")
                torch._dynamo.reset()
            else:
                self.note = "; ".join([f"torch.compile mode {mode}", *errors])
                return
        raise BackendError(f"{self.name}: torch.compile works in no mode: {'; '.join(errors)}")


@contextmanager
def _instant_unet(unet: Any, answer: Any) -> Generator[None]:
    """A context in which the UNet returns `answer` at once."""
    compiled, unet._compiled_call_impl = unet._compiled_call_impl, None

    def forward(*args: Any, **keywords: Any) -> tuple[Any]:
        return (answer,)

    unet.forward = forward
    try:
        yield
    finally:
        del unet.forward
        unet._compiled_call_impl = compiled


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise BackendError(f"a baseline needs PyTorch and diffusers: {install('export')} ({error})") from error
    return cast(Any, torch)


def _load(checkpoint: Path, dtype: Any) -> Any:
    """The checkpoint's pipeline without safety checker and watermark, because sdopt has neither."""
    import diffusers
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        index = json.loads((checkpoint / "model_index.json").read_text())
        kind: Any = getattr(diffusers, index["_class_name"])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint} is not a diffusers checkpoint folder: {error}") from error
    parts = inspect.signature(kind.__init__).parameters
    absent = {"safety_checker": None, "feature_extractor": None, "add_watermarker": False, "image_encoder": None}
    left_out = {name: value for name, value in absent.items() if name in parts}
    pipe = kind.from_pretrained(checkpoint, dtype=dtype, local_files_only=True, **left_out)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def versions() -> dict[str, str]:
    """The versions of the libraries that the baselines run on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
