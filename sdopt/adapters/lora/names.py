"""Every way in which LoRA files spell the name of a module.

A file names a module by its path in the checkpoint or by its path in the original Latent Diffusion code, with dots or
with underscores, behind one of a few prefixes. The table is built from the model's own modules to all their
spellings. So a key is looked up, and no text of a key is ever replaced.

| spelling, for `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q` | written by |
|---|---|
| `lora_unet_down_blocks_0_..._attn1_to_q` | kohya's sd-scripts, LyCORIS |
| `lora_unet_input_blocks_1_1_..._attn1_to_q` | kohya's sd-scripts for SDXL |
| `unet.down_blocks.0...attn1.to_q` | diffusers |
| `down_blocks.0...attn1.to_q`, `base_model.model.down_blocks.0...` | PEFT |
| `unet.down_blocks.0...attn1.processor.to_q_lora` | diffusers until 0.25 |
| `diffusion_model.input_blocks.1.1...attn1.to_q` | ComfyUI, OneTrainer |

| spelling, for `transformer_blocks.0.attn.to_q` of Flux | written by |
|---|---|
| `transformer.transformer_blocks.0.attn.to_q` | diffusers, PEFT, ai-toolkit |
| `lora_transformer_transformer_blocks_0_attn_to_q` | OneTrainer |
| `lora_unet_double_blocks_0_img_attn_qkv`, with `to_k` and `to_v` | kohya's sd-scripts |
| `diffusion_model.double_blocks.0.img_attn.qkv`, with both | ComfyUI |

Ref: the loaders of diffusers 0.42, kohya-ss/sd-scripts, LyCORIS 3 and ComfyUI, read for their spellings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from sdopt.bundle.format import TRANSFORMER
from sdopt.bundle.original_names import unet_names
from sdopt.bundle.transformer_names import originals
from sdopt.dataclass import dataclass

T5 = "encoder.block."  # how the paths of its modules begin


@dataclass(frozen=True)
class Module:
    """A module of a bundle: its component, e.g. "unet", and its path in the checkpoint.

    `parts`: the paths of several modules that a file has as one, with the outputs of each; `path` is the file's then.
    """

    component: str
    path: str
    parts: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.component}.{self.path}"


def spellings(
    modules: Mapping[str, Iterable[str]], outputs: Mapping[str, Mapping[str, int]] | None = None
) -> dict[str, Module]:
    """Every spelling -> the module that it names. `modules`: the paths of each component's modules.

    `outputs`: how many outputs each of them has, for modules that a file has as one.
    No two modules share a spelling.
    """
    table: dict[str, Module] = {}
    if TRANSFORMER in modules:
        table |= _of_originals(frozenset(modules[TRANSFORMER]), (outputs or {}).get(TRANSFORMER, {}))
    text_encoders = sorted(name for name in modules if name.startswith("text_encoder"))
    for component, iterable in modules.items():
        paths = frozenset(iterable)
        is_unet = component not in (*text_encoders, TRANSFORMER)
        original = unet_names(paths) if is_unet else {}
        for path in paths:
            if component in text_encoders:
                names = _of_text_encoder(path, component, alone=len(text_encoders) == 1)
            elif component == TRANSFORMER:
                names = _of_transformer(path)
            else:
                names = _of_unet(path, original[path])
            module = Module(component, path)
            for name in names:
                other = table.setdefault(name, module)
                if other != module:
                    raise AssertionError(f"{name} would name {other} and {module}")
    return table


def _of_unet(path: str, original: str | None) -> Iterator[str]:
    underscored = path.replace(".", "_")
    yield f"lora_unet_{underscored}"
    yield f"lycoris_{underscored}"
    for prefix in ("", "unet.", "base_model.model.", "unet.base_model.model."):
        yield prefix + path
        for old in _processor_names(path):
            yield prefix + old
    if original is not None:
        yield "lora_unet_" + original.replace(".", "_")
        yield f"diffusion_model.{original}"


def _of_transformer(path: str) -> Iterator[str]:
    underscored = path.replace(".", "_")
    for prefix in ("lora_transformer_", "lycoris_"):
        yield prefix + underscored
    for prefix in ("", "transformer.", "base_model.model.", "transformer.base_model.model."):
        yield prefix + path


def _of_originals(paths: frozenset[str], outputs: Mapping[str, int]) -> dict[str, Module]:
    """The spellings that have the original code's names, of modules that a file may have as one."""
    table: dict[str, Module] = {}
    for original in originals(paths):
        if original.swapped or not all(path in outputs for path in original.modules):
            continue
        module = Module(TRANSFORMER, original.modules[0])
        if len(original.modules) > 1:
            parts = tuple((path, outputs[path]) for path in original.modules)
            module = Module(TRANSFORMER, original.path, parts)
        table[f"lora_unet_{original.path.replace('.', '_')}"] = module
        table[f"diffusion_model.{original.path}"] = module
    return table


def _of_text_encoder(path: str, component: str, alone: bool) -> Iterator[str]:
    """The names of a module of CLIP. transformers 5.6 leaves `text_model.` out, so each name exists without it too."""
    number = 2 if component.endswith("_2") else 1
    number = 3 if path.startswith(T5) else number
    prefixes = [f"lora_te{number}_"] + (["lora_te_"] if alone or number == 1 else [])
    for name in {path, path.removeprefix("text_model.")}:
        for prefix in prefixes:
            yield prefix + name.replace(".", "_")
        for prefix in (f"{component}.", f"{component}.base_model.model."):
            yield prefix + name
            old = re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1_lora", name)
            if old != name:
                yield prefix + old


def _processor_names(path: str) -> Iterator[str]:
    """The name of an attention's linear while diffusers kept its LoRA in an attention processor (0.12 to 0.24)."""
    match = re.fullmatch(r"(.*\.attn[12])\.to_(q|k|v|out)(\.0)?", path)
    if match:
        yield f"{match[1]}.processor.to_{match[2]}_lora"
