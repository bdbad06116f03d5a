"""The keywords of a request that let a picture steer another one: ControlNets, T2I-Adapters, IP-Adapters."""

# no `from __future__ import annotations`: `keywords` reads these, and as text each would be compiled first

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypedDict

from sdopt.request.arrays import EmbedsByName, PicturesByName
from sdopt.request.control_mode import Modes
from sdopt.request.keyword import Flag, Keyword
from sdopt.request.kinds import FRACTION, BlockScales, Number, OneOrMore, Switch


class ControlOptions(TypedDict, total=False):
    """The pictures that adapters of the bundle see, how strong each is, and for which part of the way."""

    control_image: Annotated[
        Any,  # a picture, or one for each image; or {name: these} for several adapters
        Keyword(
            "what a ControlNet or T2I-Adapter of the bundle sees: a ready picture, e.g. of edges",
            PicturesByName("control_image"),
            flag=Flag(("--control",), "NAME[/MODE]=FILE[:SCALE]"),
            record="never",
        ),
    ]
    control_mode: Annotated[
        Any,  # a mode, a list of them, a list of these, or {name: modes}
        Keyword(
            "which kind of picture a union ControlNet sees: the number or the name of a mode, or a list of them",
            Modes(),
            otherwise="none; a union ControlNet needs one for each picture",
            flag=Flag(("--control-mode",), "MODE[,MODE...]"),
        ),
    ]
    controlnet_conditioning_scale: Annotated[
        float | Sequence[float] | None,  # or one for each ControlNet, or for each mode of a union ControlNet alone
        Keyword(
            "how strong a ControlNet is; 0 leaves it out",
            OneOrMore(Number(-100, 100, example="0.8"), "0.8"),
            otherwise="1.0",
            flag=Flag(("--control-scale",)),
        ),
    ]
    control_guidance_start: Annotated[
        float | Sequence[float] | None,
        Keyword(
            "from which part of the way on a ControlNet is used",
            OneOrMore(FRACTION, "0.0"),
            otherwise="0.0",
            flag=Flag(("--control-start",)),
        ),
    ]
    control_guidance_end: Annotated[
        float | Sequence[float] | None,
        Keyword(
            "up to which part of the way a ControlNet is used",
            OneOrMore(FRACTION, "1.0"),
            otherwise="1.0",
            flag=Flag(("--control-end",)),
        ),
    ]
    guess_mode: Annotated[
        bool | None,
        Keyword("a ControlNet guides without a prompt: only the conditional half sees it", Switch(), False),
    ]
    adapter_conditioning_scale: Annotated[
        float | Sequence[float] | None,  # or one for each T2I-Adapter
        Keyword(
            "how strong a T2I-Adapter is",
            OneOrMore(Number(-100, 100, example="0.8"), "0.8"),
            otherwise="1.0",
            flag=Flag(("--adapter-scale",)),
        ),
    ]
    adapter_conditioning_factor: Annotated[
        float | None,
        Keyword(
            "up to which part of the way T2I-Adapters are used",
            FRACTION,
            otherwise="1.0",
            flag=Flag(("--adapter-factor",)),
        ),
    ]
    ip_adapter_image: Annotated[
        Any,  # a picture, or several for one IP-Adapter; or {name: these}
        Keyword(
            "a picture that an IP-Adapter of the bundle takes as a prompt",
            PicturesByName("ip_adapter_image", several=True, example='{"face": PIL.Image.open("face.png")}'),
            flag=Flag(("--ip-adapter",), "NAME=FILE[:SCALE]"),
            record="never",
        ),
    ]
    ip_adapter_image_embeds: Annotated[
        Any,  # what the image encoder gives, [rows, pictures, ...]; or {name: this}
        Keyword("takes the place of ip_adapter_image", EmbedsByName(), flag=None, record="never"),
    ]
    ip_adapter_scale: Annotated[
        float | Mapping[str, Any] | Sequence[Any] | None,  # of all layers, or by blocks; or one for each IP-Adapter
        Keyword(
            "how strong an IP-Adapter is; 0 leaves it out",
            OneOrMore(BlockScales(), "0.6"),
            otherwise="1.0",
            flag=Flag(("--ip-adapter-scale",)),
        ),
    ]
