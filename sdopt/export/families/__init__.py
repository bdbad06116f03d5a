"""The families of models that can be exported, one module for each. `contract` says what a family is.

A new family is a new module in this folder and an entry in FAMILIES. The rest of the export asks this module about
families.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sdopt.errors import CheckpointError
from sdopt.export.checkpoint import Checkpoint
from sdopt.export.families import flux, sd, sd3, sdxl
from sdopt.export.families.contract import Family

FAMILIES: tuple[Family, ...] = (sd.FAMILY, sdxl.FAMILY, sd3.FAMILY, flux.FAMILY)

# a word in the name of a pipeline class that is not exported -> the reason, and what to do
REFUSED = {
    "ControlNet": "export the model that it was made for, then add its ControlNet with --onto BUNDLE",
    "Pix2Pix": "its UNet takes a second guidance, which is not exported",
    "Kontext": "its transformer takes the tokens of a picture beside those of the sample, which is not exported",
    "Fill": "its transformer takes a masked picture beside the sample, which is not exported",
    "Upscale": "its UNet takes the small picture, which is not exported",
}


def of(checkpoint: Checkpoint) -> Family:
    """The family of an opened checkpoint."""
    return of_index(checkpoint.index(), str(checkpoint.folder))


def of_index(index: Mapping[str, Any], where: str) -> Family:
    """The family that the pipeline class of a model_index.json belongs to.

    Raises: CheckpointError for an unknown class, with the names of the known ones.
    """
    pipeline = str(index.get("_class_name"))
    for family in FAMILIES:
        if pipeline in family.pipelines:
            return family
    reasons = "; ".join(_reasons(pipeline, index))
    known = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise CheckpointError(
        f"{where}: pipeline class {pipeline!r} is not known{f' ({reasons})' if reasons else ''}; known are {known}"
    )


def _reasons(pipeline: str, index: Mapping[str, Any]) -> Iterator[str]:
    """The reasons why a pipeline of this class is not exported, as far as its name and its components show."""
    for word, reason in REFUSED.items():
        if word in pipeline:
            yield reason
            return
    unknown = [name for name, entry in index.items() if isinstance(entry, list) and name not in _known_components()]
    if unknown:
        verb = "is" if len(unknown) == 1 else "are"
        yield f"its {', '.join(unknown)} {verb} not exported; what is read has a {' or a '.join(_denoisers())}"


def _known_components() -> set[str]:
    return {"scheduler"}.union(*({*family.models, *family.tokenizers, *family.not_used} for family in FAMILIES))


def _denoisers() -> list[str]:
    return sorted({family.denoiser for family in FAMILIES})


def models() -> list[str]:
    """The components with weights, of all families."""
    return list(dict.fromkeys(name for family in FAMILIES for name in family.models))
