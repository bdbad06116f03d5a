"""All keywords of a request by name, and what is made of their table (`sdopt.request.options`).

    KEYWORDS["clip_skip"]   what is declared of it
    checked(options)        every keyword, checked, with defaults for those that were left out
    recorded(options, ...)  what makes the picture again, as its PNG carries it
    replayed(record)        the options in such a record
    describe()              all keywords as JSON, for a form or a server
    documentation()         all keywords as text, for the docstring of `Options`

`prompt`, which may be given by its place, is the first one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, cast, get_args

from sdopt.errors import UsageError, choices, shown
from sdopt.request.diffusers import INSTEAD
from sdopt.request.keyword import Flag, Keyword, plain
from sdopt.request.kinds import Texts
from sdopt.request.options import Options

NOT_ALONE = {  # in a record: what tells that the picture was made with others
    "strength": "from another picture, which it does not carry; use --image",
    "controls": "with ControlNets, whose pictures it does not carry; use --control",
    "image_prompts": "with IP-Adapters, whose pictures it does not carry; use --ip-adapter",
}
NOT_CARRIED = "made_with_arrays"  # in a record: the keywords of arrays that the picture was made with


def _keywords() -> dict[str, Keyword]:
    """The keywords by name, in the order of `Options`; those whose type has None are optional."""
    found = {"prompt": Keyword("what to draw", Texts(), flag=Flag(("prompt",), "PROMPT"), record="always")}
    for name, hint in Options.__annotations__.items():
        type_, keyword = get_args(hint)
        found[name] = replace(keyword, optional=type_ is Any or type(None) in get_args(type_))
    return found


KEYWORDS: dict[str, Keyword] = _keywords()


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Every keyword, checked, and with the default if it was left out.

    Raises: UsageError naming the keyword, its value and what is allowed.
    """
    for name in options:
        if name not in KEYWORDS:
            if name in INSTEAD:
                raise UsageError(f"{name}: {INSTEAD[name]}", name)
            raise UsageError(f"unknown argument {name}; there are {choices(name, KEYWORDS)}", name)
    return {
        name: keyword.check(name, options[name]) if name in options else keyword.default
        for name, keyword in KEYWORDS.items()
    }


def recorded(options: Mapping[str, Any], resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture's PNG carries of these options; `resolved` takes the place of what was given, and is carried."""
    carried: dict[str, Any] = {}
    for name, keyword in KEYWORDS.items():
        value = resolved.get(name, options[name])
        if name in resolved or keyword.records(value):
            carried[name] = plain(value)
    arrays = [name for name, keyword in KEYWORDS.items() if keyword.flag is None and options.get(name) is not None]
    return {**carried, NOT_CARRIED: arrays} if arrays else carried


def replayed(record: Mapping[str, Any], what: str = "this picture", given: Collection[str] = ()) -> dict[str, Any]:
    """The options in what a PNG carries; `what` names the picture in errors.

    `given`: those of `NOT_ALONE` whose pictures the caller asks for.

    Raises: UsageError for a record that sdopt did not write, and if the picture was also made from other pictures or
    arrays, which no PNG carries.
    """
    _refuse_foreign(record)
    for name, words in NOT_ALONE.items():
        if name in record and name not in given:
            raise UsageError(f"{what} was made {words} and its parameters")
    if record.get(NOT_CARRIED):
        names = str(record[NOT_CARRIED]).strip("[]").replace("'", "")
        raise UsageError(
            f"this picture was made with {names}, which its PNG does not carry; make it in Python with the same arrays"
        )
    return {name: value for name, value in record.items() if name in KEYWORDS and KEYWORDS[name].record != "never"}


def _refuse_foreign(record: Mapping[str, Any]) -> None:
    """Raises: UsageError unless `record` can be what one picture carries: one prompt, one seed, options that are valid.

    The values that are no options, such as the backend, are texts; embeddings are digests by token. LoRAs have a name,
    a hash and weights, and adapters that saw pictures a name and hashes.
    """
    words = ("model", "bundle", "version", "backend", "precision", "vae_digest")
    digests: Any = record.get("embeddings", {})
    wrong = [name for name in words if not isinstance(record.get(name, ""), str)]
    is_table = isinstance(digests, dict) and set(map(type, cast(dict[str, Any], digests).values())) <= {str}
    wrong += [] if is_table else ["embeddings"]
    loras: Any = record.get("loras", [])
    wrong += [] if isinstance(loras, list) and all(map(_is_lora, cast(list[Any], loras))) else ["loras"]
    for name in ("controls", "image_prompts"):
        seen: Any = record.get(name, [])
        wrong += [] if isinstance(seen, list) and all(map(_is_seen, cast(list[Any], seen))) else [name]
    wrong += [name for name, keyword in KEYWORDS.items() if name in record and not _is_of_one(keyword, record[name])]
    wrong += [name for name in ("prompt", "seed") if record.get(name) is None]
    if wrong:
        values = ", ".join(f"{name} is {shown(record.get(name))}" for name in dict.fromkeys(wrong))
        raise UsageError(f"the parameters in this PNG are not those that sdopt wrote: {values}; give another PNG")


def _is_lora(entry: Any) -> bool:
    """Whether it is what a picture carries of a LoRA."""
    if not isinstance(entry, dict):
        return False
    lora = cast(dict[str, Any], entry)
    weights: Any = lora.get("weights")
    texts = all(isinstance(lora.get(name), str) for name in ("name", "sha256"))
    return (
        texts and isinstance(weights, dict) and set(map(type, cast(dict[str, Any], weights).values())) <= {int, float}
    )


def _is_seen(entry: Any) -> bool:
    """Whether it is what a picture carries of an adapter that saw pictures."""
    if not isinstance(entry, dict):
        return False
    seen = cast(dict[str, Any], entry)
    pictures: Any = seen.get("pictures", [seen.get("picture")])
    is_listed = isinstance(pictures, list) and all(isinstance(one, str) for one in cast(list[Any], pictures))
    if not is_listed or not all(isinstance(seen.get(name), str) for name in ("name", "digest")):
        return False
    if "prepared" not in seen:
        return True
    from sdopt.image.control import is_record  # late: few pictures were made so

    prepared: Any = seen["prepared"]
    return isinstance(prepared, list) and all(one is None or is_record(one) for one in cast(list[Any], prepared))


def _is_of_one(keyword: Keyword, value: Any) -> bool:
    """Whether a keyword can have this value for one picture: several prompts or seeds are those of several pictures."""
    if isinstance(value, list) and (isinstance(keyword.kind, Texts) or keyword is KEYWORDS["seed"]):
        return False
    try:
        keyword.check("", value)
    except UsageError:
        return False
    return True


def describe() -> list[dict[str, Any]]:
    """Every keyword as JSON: name, type, range, default and help, which names other keywords as Python does."""
    words = ("help", "otherwise")
    described = [keyword.describe(name) for name, keyword in KEYWORDS.items()]
    return [{**one, **{word: _in_python(one[word]) for word in words}} for one in described]


def documentation(width: int = 120) -> str:
    """Every keyword but `prompt` with its help and its default, as the docstring of `Options` has them."""
    import textwrap  # late: no picture needs it

    lines: list[str] = []
    for name, keyword in list(KEYWORDS.items())[1:]:
        default = keyword.otherwise or ("" if keyword.default is None else repr(keyword.default))
        text = f"{name}: {_in_python(keyword.help)}" + (f" (default: {_in_python(default)})" if default else "")
        lines += textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False)
    return "\n".join(lines)


def _in_python(text: str) -> str:
    """A help text with keywords in place of flags: `image` for `--image`."""
    for name, keyword in KEYWORDS.items():
        for flag in keyword.flag.names if keyword.flag is not None else ():
            text = re.sub(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", name, text) if flag.startswith("-") else text
    text = re.sub(r"(?<![\w-])PROMPT\b", "prompt", text)
    return re.sub(r"(?<![\w-])--([a-z][a-z0-9-]*)", lambda flag: flag[1].replace("-", "_"), text)
