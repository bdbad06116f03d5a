"""The keywords of a request that are texts beside the prompt, and the numbers that SDXL takes with them."""

# no `from __future__ import annotations`: `keywords` reads these, and as text each would be compiled first

from collections.abc import Sequence
from typing import Annotated, TypedDict

from sdopt.bundle.format import MAX_SEQUENCE
from sdopt.request.keyword import Flag, Keyword
from sdopt.request.kinds import Integer, Number, Pair, Texts

Text = str | Sequence[str] | None
SCORE = Number(-1e3, 1e3, "finite numbers", example="6.0")


class TextOptions(TypedDict, total=False):
    """Negative prompts, the prompts of further text encoders, SDXL's sizes, and its refiner's scores."""

    negative_prompt: Annotated[
        Text,
        Keyword(
            "what to steer away from",
            Texts(),
            otherwise="nothing",
            flag=Flag(("--negative",), "PROMPT"),
            record="always",
        ),
    ]
    prompt_2: Annotated[
        Text,
        Keyword("the prompt of the second text encoder", Texts(), otherwise="PROMPT", flag=Flag(metavar="PROMPT")),
    ]
    negative_prompt_2: Annotated[
        Text,
        Keyword(
            "the negative prompt of the second text encoder",
            Texts(),
            otherwise="the negative prompt",
            flag=Flag(metavar="PROMPT"),
        ),
    ]
    prompt_3: Annotated[
        Text,
        Keyword("SD3: the prompt of T5", Texts(), otherwise="PROMPT", flag=Flag(metavar="PROMPT")),
    ]
    negative_prompt_3: Annotated[
        Text,
        Keyword(
            "SD3: the negative prompt of T5", Texts(), otherwise="the negative prompt", flag=Flag(metavar="PROMPT")
        ),
    ]
    max_sequence_length: Annotated[
        int | None,
        Keyword(
            "SD3, Flux: how many tokens T5 reads",
            Integer(1, MAX_SEQUENCE, "256"),
            otherwise="the bundle's",
            flag=Flag(metavar="TOKENS"),
        ),
    ]
    original_size: Annotated[
        tuple[int, int] | None,
        Keyword(
            "SDXL: the size that the picture seems to come from",
            Pair(),
            otherwise="the picture's",
            flag=Flag(metavar=("HEIGHT", "WIDTH")),
            record="always",
        ),
    ]
    crops_coords_top_left: Annotated[
        tuple[int, int] | None,
        Keyword(
            "SDXL: where the picture seems to be cut out",
            Pair("(0, 0)"),
            (0, 0),
            flag=Flag(metavar=("TOP", "LEFT")),
            record="always",
        ),
    ]
    target_size: Annotated[
        tuple[int, int] | None,
        Keyword(
            "SDXL: the size that the picture seems to have",
            Pair(),
            otherwise="the picture's",
            flag=Flag(metavar=("HEIGHT", "WIDTH")),
            record="always",
        ),
    ]
    negative_original_size: Annotated[
        tuple[int, int] | None,
        Keyword(
            "the same for the negative prompt", Pair(), otherwise="the same", flag=Flag(metavar=("HEIGHT", "WIDTH"))
        ),
    ]
    negative_crops_coords_top_left: Annotated[
        tuple[int, int] | None,
        Keyword(
            "the same for the negative prompt", Pair("(0, 0)"), otherwise="the same", flag=Flag(metavar=("TOP", "LEFT"))
        ),
    ]
    negative_target_size: Annotated[
        tuple[int, int] | None,
        Keyword(
            "the same for the negative prompt", Pair(), otherwise="the same", flag=Flag(metavar=("HEIGHT", "WIDTH"))
        ),
    ]
    aesthetic_score: Annotated[float | None, Keyword("SDXL's refiner: how fine the picture is, 1 to 10", SCORE, 6.0)]
    negative_aesthetic_score: Annotated[float | None, Keyword("the same for the negative prompt", SCORE, 2.5)]
