"""LoRAs that make a picture in few steps: what each kind is to be called with.

No tensor tells, so the kind is found by the words that its makers use, in the file's name, its folder's name or its
metadata. It is a suggestion: what a user names goes before.
"""

from __future__ import annotations

import re
from typing import Any

from sdopt.adapters.lora.file import LoraFile
from sdopt.dataclass import dataclass


@dataclass(frozen=True)
class FewSteps:
    """A kind of LoRA and the options of a call that suit it."""

    kind: str
    options: dict[str, Any]
    source: str

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return f"{self.kind}: {values}"


@dataclass(frozen=True)
class _Row:
    """`pattern` may have a group with the number of steps."""

    kind: str
    pattern: str
    steps: int
    options: dict[str, Any]
    source: str


_OFF = 1.0  # guidance that is off
_KINDS = (
    _Row("Hyper-SD, one step", r"hyper[-_ ]?sd.*\b1[-_ ]?steps?", 1,
         {"sampler": "tcd", "eta": 1.0, "guidance_scale": _OFF}, "huggingface.co/ByteDance/Hyper-SD"),
    _Row("Hyper-SD with guidance", r"hyper[-_ ]?sd.*?(\d+)[-_ ]?steps?.*cfg", 8,
         {"sampler": "ddim", "schedule": "trailing", "guidance_scale": 5.0}, "huggingface.co/ByteDance/Hyper-SD"),
    _Row("Hyper-SD", r"hyper[-_ ]?sd(?:.*?(\d+)[-_ ]?steps?)?", 4,
         {"sampler": "ddim", "schedule": "trailing", "guidance_scale": _OFF}, "huggingface.co/ByteDance/Hyper-SD"),
    _Row("SDXL-Lightning", r"lightning(?:.*?(\d+)[-_ ]?steps?)?", 4,
         {"sampler": "euler", "schedule": "trailing", "guidance_scale": _OFF}, "arXiv:2402.13929"),
    _Row("LCM-LoRA", r"\blcm\b", 4, {"sampler": "lcm", "guidance_scale": _OFF}, "arXiv:2311.05556"),
    _Row("TCD", r"\btcd\b", 4, {"sampler": "tcd", "eta": 0.3, "guidance_scale": _OFF}, "arXiv:2402.19159"),
    _Row("DMD2", r"\bdmd2\b(?:.*?(\d+)[-_ ]?steps?)?", 4, {"sampler": "lcm", "guidance_scale": _OFF},
         "arXiv:2405.14867"),
    _Row("Turbo", r"\bturbo\b", 4, {"sampler": "euler_a", "schedule": "trailing", "guidance_scale": _OFF},
         "arXiv:2311.17042"),
)  # fmt: skip


def few_steps(lora: LoraFile) -> FewSteps | None:
    """The kind of a file and what suits it; None if its names say nothing of few steps."""
    path, metadata = lora.file.path.absolute(), lora.file.metadata
    titles = (metadata.get("modelspec.title", ""), metadata.get("ss_output_name", ""))
    for words in (path.stem, *titles, path.parent.name):
        text = re.sub(r"[_\s]+", "-", words.lower())
        for row in _KINDS:
            match = re.search(row.pattern, text)
            if match:
                steps = int(match[1]) if match.groups() and match[1] else row.steps
                if 1 <= steps <= 50:
                    return FewSteps(row.kind, {"num_inference_steps": steps, **row.options}, row.source)
    return None
