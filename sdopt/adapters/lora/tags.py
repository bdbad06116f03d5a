"""`<lora:name:weight>` in prompts, as AUTOMATIC1111's web UI has it.

    <lora:neon>             weight 1
    <lora:neon:0.8>         one weight
    <lora:neon:0.5:0.8>     the text encoders', then the UNet's
    <lora:neon:1:te=0.5:unet=0.8>

Ref: AUTOMATIC1111/stable-diffusion-webui, modules/extra_networks.py and extensions-builtin/Lora.
"""

from __future__ import annotations

import re
from pathlib import Path

from sdopt.bundle.format import DENOISERS
from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, choices

_TAG = re.compile(r"<lora:([^<>:]*)((?::[^<>:]*)*)>")
FORM = "<lora:name:0.8>, or <lora:name:0.5:0.8> for the text encoders and the UNet"


@dataclass(frozen=True)
class Tag:
    """A file's name and its two weights."""

    name: str
    text_encoder: float = 1.0
    unet: float = 1.0

    def weights(self, components: tuple[str, ...]) -> dict[str, float]:
        """A weight for each component."""
        return {name: self.unet if name in DENOISERS else self.text_encoder for name in components}


def cut(prompt: str) -> tuple[str, list[Tag]]:
    """The prompt without its tags, and the tags. A file that is named twice has the sum of its weights.

    Raises: UsageError for a tag that is not understood.
    """
    tags: dict[str, Tag] = {}
    for match in _TAG.finditer(prompt):
        tag = _tag(match[0], match[1].strip(), [part.strip() for part in match[2].split(":")[1:]])
        first = tags.get(tag.name, Tag(tag.name, 0.0, 0.0))
        tags[tag.name] = Tag(tag.name, first.text_encoder + tag.text_encoder, first.unet + tag.unet)
    text = re.sub(r"  +", " ", _TAG.sub("", prompt)).strip()
    return text, list(tags.values())


def _tag(text: str, name: str, values: list[str]) -> Tag:
    positional = [value for value in values if "=" not in value]
    named = dict(value.split("=", 1) for value in values if "=" in value)
    try:
        numbers = [float(value) for value in positional]
        te = numbers[0] if numbers else 1.0
        unet = numbers[1] if len(numbers) > 1 else te
        te, unet = float(named.pop("te", te)), float(named.pop("unet", unet))
    except ValueError:
        raise UsageError(f"{text}: its weights are no numbers; write {FORM}", "prompt") from None
    if named or len(numbers) > 2 or not name:
        raise UsageError(f"{text} is not understood; write {FORM}", "prompt")
    return Tag(name, te, unet)


def find(folder: Path, name: str) -> Path:
    """The file of a name in a folder, or in a folder inside it.

    Raises: UsageError if there is none, or more than one.
    """
    if not folder.is_dir():
        raise UsageError(f"--lora-dir {folder}: there is no such folder")
    files = sorted(folder.rglob("*.safetensors"))
    matching = [
        path for path in files if path.stem == name or path.relative_to(folder).with_suffix("").as_posix() == name
    ]
    if len(matching) == 1:
        return matching[0]
    if matching:
        several = ", ".join(str(path.relative_to(folder)) for path in matching)
        raise UsageError(f"<lora:{name}>: {folder} has {several}; name one with its folder", "prompt")
    names = choices(name, sorted({path.stem for path in files})[:50]) or "no .safetensors file"
    raise UsageError(f"<lora:{name}>: there is no {name}.safetensors in {folder}; it has {names}", "prompt")
