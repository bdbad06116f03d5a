"""LoRA files on the command line: `--lora FILE:WEIGHT`, `--lora-dir`, and tags in prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt.cli import terminal
from sdopt.errors import UsageError

if TYPE_CHECKING:
    from sdopt.adapters.lora.merge import Overlay
    from sdopt.bundle.files import Bundle
    from sdopt.pipeline import Pipeline

Weights = float | dict[str, float]


class CommandLoras:
    """The files of `--lora` and, by the tags of a prompt, those of `--lora-dir`, loaded into a pipeline."""

    def __init__(self, pipe: Pipeline, files: list[str], folder: Path | None) -> None:
        self._pipe, self._folder = pipe, folder
        self._names: dict[Path, str] = {}
        self._always: dict[str, Weights] = {}
        for text in files:
            path, weight = file_and_weight(text, pipe.loras.components)
            name = self._loaded(path)
            if name in self._always:
                raise UsageError(f"--lora {path} is given twice; give it once, with the sum of its weights")
            self._always[name] = weight

    @property
    def entries(self) -> tuple[tuple[str, str, Weights], ...]:
        """The files of `--lora`, each with its name and weight."""
        return tuple(
            (str(path), name, self._always[name]) for path, name in self._names.items() if name in self._always
        )

    def use(self, prompt: str, reads_tags: bool) -> str:
        """Use the files of `--lora` and of the prompt's tags, and no others. Returns the prompt without its tags."""
        from sdopt.adapters.lora.tags import cut, find

        chosen = dict(self._always)
        if reads_tags:
            prompt, tags = cut(prompt)
            if tags and self._folder is None:
                raise UsageError(f"<lora:{tags[0].name}>: say where its file is, with --lora-dir DIR", "prompt")
            for tag in tags:
                assert self._folder is not None
                name = self._loaded(find(self._folder, tag.name))
                chosen[name] = tag.weights(self._pipe.loras.components)
        if chosen or self._names:
            self._pipe.set_adapters(list(chosen), list(chosen.values()))
        return prompt

    def suggest(self, options: dict[str, Any]) -> None:
        """Fill in what a LoRA for few steps wants, where the user named nothing else, and say so."""
        for name in self._always:
            suggestion = self._pipe.loras.suggestion(name)
            if suggestion is None:
                continue
            wanted = dict(suggestion.options)
            if "sampler" in options and options["sampler"] != wanted["sampler"]:  # schedule and eta are the sampler's
                wanted = {key: wanted[key] for key in ("num_inference_steps", "guidance_scale")}
            if {"timesteps", "sigmas"} & set(options):
                wanted.pop("num_inference_steps")
            added = {key: value for key, value in wanted.items() if options.get(key) is None}
            options |= added
            if added:
                values = ", ".join(f"{key} {value}" for key, value in added.items())
                terminal.note(f"{name}, {suggestion.kind}: {values}; what you name goes before")

    def _loaded(self, path: Path) -> str:
        from sdopt.adapters.lora.file import located  # late: only a command with LoRAs needs it

        path = located(path).resolve()
        if path not in self._names:
            taken = path.stem in self._names.values()
            name = f"{path.stem}-{len(self._names)}" if taken else path.stem
            self._names[path] = self._pipe.load_lora_weights(path, name)
        return self._names[path]


def file_and_weight(text: str, components: tuple[str, ...]) -> tuple[Path, Weights]:
    """`FILE:0.8`, or `FILE:0.5:0.8` for the text encoders and the UNet, in two; the weight is 1 where there is none."""
    if Path(text).exists():
        return Path(text), 1.0
    file, numbers = text, list[float]()
    while len(numbers) < 2 and (split := file.rpartition(":"))[1]:
        try:
            numbers.insert(0, float(split[2]))
        except ValueError:
            break
        file = split[0]
    if not numbers:
        return Path(text), 1.0
    if len(numbers) == 1:
        return Path(file), numbers[0]
    from sdopt.bundle.format import DENOISERS

    return Path(file), {name: numbers[1] if name in DENOISERS else numbers[0] for name in components}


def overlay_of(bundle: Bundle, files: list[str]) -> Overlay:
    """The LoRAs of `--lora` for a bundle without a pipeline."""
    from sdopt.adapters.lora.loaded import Loras  # late: only a command with LoRAs needs it

    loras, weights = Loras(bundle), dict[str, Weights]()
    for i, text in enumerate(files):
        path, weight = file_and_weight(text, loras.components)
        weights[loras.load(path, f"{path.stem}-{i}" if path.stem in weights else None).name] = weight
    loras.use(list(weights), list(weights.values()))
    return loras.overlay


def require_same(png: Path, carried: dict[str, Any], parameters: dict[str, Any]) -> None:
    """Raises: UsageError unless the LoRAs that a picture was made with are in use, with its weights."""
    wanted, used = carried.get("loras", []), parameters.get("loras", [])
    if _keys(wanted) == _keys(used):
        return
    given = " ".join(f"--lora {lora['name']}.safetensors:{_weight_text(lora['weights'])}" for lora in wanted)
    hashes = ", ".join(f"{lora['name']} {str(lora['sha256'])[:10]}" for lora in wanted)
    raise UsageError(
        f"{png} was made with {f'these LoRAs: {hashes}; give {given}' if wanted else 'no LoRA; leave out --lora'}"
    )


def _keys(loras: list[dict[str, Any]]) -> list[Any]:
    return [(lora["sha256"], sorted(lora["weights"].items())) for lora in loras]


def _weight_text(weights: dict[str, float]) -> str:
    """The weights as `--lora` takes them."""
    from sdopt.bundle.format import DENOISERS

    unet = next((weight for name, weight in weights.items() if name in DENOISERS), 1.0)
    text_encoder = next((weight for name, weight in weights.items() if name not in DENOISERS), unet)
    return f"{unet:g}" if text_encoder == unet else f"{text_encoder:g}:{unet:g}"
