"""The keywords of a request that say where a picture begins: at another picture, or at a smaller one (hires fix)."""

# no `from __future__ import annotations`: `keywords` reads these, and as text each would be compiled first

from typing import Annotated, Any, TypedDict

from sdopt.request.arrays import Picture
from sdopt.request.keyword import Flag, Keyword
from sdopt.request.kinds import FRACTION, MAX_SIZE, Integer, Number

INSIDE = Number(0, 1, between=True)


class PictureOptions(TypedDict, total=False):
    """A picture to begin from, a mask, how much of it is replaced; and hires fix."""

    image: Annotated[
        Any,  # PIL; an array [height, width, 3] in 0..1; one of these for each image; latents; or None
        Keyword(
            "a PNG, JPEG or WebP picture to begin from",
            Picture("image", latents=True),
            flag=Flag(metavar="FILE"),
            record="never",
        ),
    ]
    mask_image: Annotated[
        Any,
        Keyword(
            "with --image: white where the picture is painted anew",
            Picture("mask_image", mask=True),
            flag=Flag(("--mask",), "FILE"),
            record="never",
        ),
    ]
    mask_blur: Annotated[
        float | None,  # as VaeImageProcessor.blur
        Keyword(
            "blur the mask by a Gaussian of this radius",
            Number(0, 1000, unit="pixels", example="8"),
            0.0,
            flag=Flag(metavar="PIXELS"),
        ),
    ]
    padding_mask_crop: Annotated[
        int | None,
        Keyword(
            "paint only the mask's region, this much wider, at full size",
            Integer(0, MAX_SIZE, "32"),
            otherwise="all",
            flag=Flag(metavar="PIXELS"),
        ),
    ]
    strength: Annotated[
        float | None, Keyword("how much of --image is replaced, 0 to 1", FRACTION, otherwise="the bundle's")
    ]
    denoising_start: Annotated[
        float | None,
        Keyword("go on from this part of the way: --image has noise already", INSIDE, otherwise="the start"),
    ]
    denoising_end: Annotated[
        float | None, Keyword("stop at this part of the way, for a refiner", INSIDE, otherwise="the end")
    ]

    hires: Annotated[
        float | None,  # as AUTOMATIC1111's hires fix
        Keyword(
            "make the picture small first, then so many times larger a side, with new details",
            Number(1, 4, example="2.0"),
            otherwise="one pass",
            flag=Flag(metavar="SCALE"),
        ),
    ]
    hires_strength: Annotated[
        float | None, Keyword("how much of the enlarged picture is replaced, 0 to 1", FRACTION, otherwise="0.7")
    ]
    hires_steps: Annotated[
        int | None,
        Keyword("--steps of the second pass", Integer(1, example="20"), otherwise="the same"),
    ]
