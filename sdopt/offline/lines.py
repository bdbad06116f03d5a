r"""A list of requests: JSON Lines, each an object with an id and the keywords of `pipe(...)`, for one picture.

    {"id": "fox-1", "prompt": "a fox", "seed": 7, "num_inference_steps": 20}
    {"id": "fox-2", "prompt": "a fox at night", "image": "photos/fox.png", "strength": 0.6}

Pictures are files, named relative to the folder of the list. A line without a seed gets one that its id decides. All
lines are checked before the first picture is made, and every wrong one is named.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from sdopt.adapters.lora.tags import cut
from sdopt.bundle.adapter import adapter_names
from sdopt.bundle.disk import parse_json
from sdopt.dataclass import dataclass
from sdopt.errors import SdoptError, UsageError, choices, shown
from sdopt.image.pil import open_picture
from sdopt.offline.folders import Folder
from sdopt.request.arrays import EmbedsByName, Picture, PicturesByName, Tensor
from sdopt.request.keyword import Keyword
from sdopt.request.keywords import KEYWORDS
from sdopt.request.kinds import Texts
from sdopt.request.presets import checked_preset

if TYPE_CHECKING:
    from sdopt.pipeline import Pipeline

MOST_SHOWN = 20  # wrong lines in one message
MOST_NAMES = 8  # keywords that a message names beside an unknown one
LONGEST_ID = 120  # characters of an id in the name of a file
DIGITS = 16  # of a digest in the name of a file
FORMAT = 1  # of what a digest is made from
ONE = ("num_images_per_prompt",)  # a line is one picture
Decides = Callable[[Mapping[str, Any]], Mapping[str, Any]]
NAME = re.compile(rf"(?P<id>.+)-[0-9a-f]{{{DIGITS}}}\.png")


@dataclass(frozen=True)
class Line:
    """One picture that is to be made.

    `place`: where it stands, as "prompts.jsonl:3". `options`: the keywords as JSON has them, with the seed; pictures
    are names of files. `hashes`: the SHA-256 of each of these files. `name`: the picture's own file.
    """

    id: str
    place: str
    options: Mapping[str, Any]
    hashes: Mapping[str, str]
    name: str

    def opened(self, folder: Folder) -> dict[str, Any]:
        """The keywords with their pictures opened, from files in the list's folder.

        Raises: UsageError for a file that is gone, damaged, or another one than when the list was read.
        """
        made = dict(self.options)
        for name in made:
            if _is_pictured(KEYWORDS[name]):
                made[name] = _each(made[name], lambda file, name=name: self._picture(folder, name, file))
        return made

    def _picture(self, folder: Folder, name: str, file: str) -> Any:
        content = _content(folder, name, file)
        if hashlib.sha256(content).hexdigest() != self.hashes[file]:
            text = f"{name}: {file} was changed after the list was read; run the same command again"
            raise UsageError(text, name)
        try:
            return open_picture(name, io.BytesIO(content))
        except UsageError as error:
            raise UsageError(f"{error}: {file}", name) from error


def read(content: bytes, label: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The objects of a list, each with its place. `label`: the list's name in errors.

    Raises: UsageError that names every line that is no JSON object, and for a list without lines.
    """
    objects: list[tuple[str, Mapping[str, Any]]] = []
    wrong: list[str] = []
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        place = f"{label}:{number}"
        try:
            entry = parse_json(raw.decode("utf-8"))
            if not isinstance(entry, dict):
                raise ValueError(f"got {shown(entry)}")
            objects.append((place, cast("dict[str, Any]", entry)))
        except UnicodeDecodeError:
            wrong.append(f"{place}: it is not UTF-8; save the list as UTF-8")
        except ValueError as error:
            text = 'allowed is a JSON object in each line, e.g. {"id": "fox-1", "prompt": "a fox"}'
            wrong.append(f"{place}: it is no JSON object ({error}); {text}")
    refuse(wrong)
    if not objects:
        example = '{"id": "fox-1", "prompt": "a fox"}'
        raise UsageError(f"{label}: there is no line in it; write a JSON object in each line, e.g. {example}", "list")
    return objects


def lines(
    objects: Iterable[tuple[str, Mapping[str, Any]]], defaults: Mapping[str, Any], folder: Folder, decides: Decides
) -> list[Line]:
    """The lines of a list, each checked by itself.

    `defaults`: keywords for lines that do not have them. `folder`: where pictures are. `decides`: what a picture
    with these keywords depends on beside them, as JSON.
    Raises: UsageError that names every wrong line, for an unknown keyword, a wrong value or an id that is there twice.
    """
    made: list[Line] = []
    places: dict[str, str] = {}
    hashes: dict[str, str] = {}

    def hashed(name: str, file: str) -> str:
        if file not in hashes:
            hashes[file] = hashlib.sha256(_content(folder, name, file)).hexdigest()
        return hashes[file]

    wrong: list[str] = []
    for place, entry in objects:
        try:
            line = _line(place, entry, defaults, hashed, decides)
            if line.id in places:
                raise UsageError(f"id = {shown(line.id)} is that of {places[line.id]} too; each line has its own")
            places[line.id] = place
            made.append(line)
        except SdoptError as error:
            wrong.append(f"{place}: {error}")
    refuse(wrong)
    return made


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords in an object, checked; None is the same as leaving a keyword out. Pictures stay names of files.

    Raises: UsageError for a keyword that is unknown or that JSON cannot give, and for a wrong value.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        keyword = KEYWORDS.get(name)
        if keyword is None or not _is_of_json(name, keyword):
            raise UsageError(_unknown(name), name)
        if _is_pictured(keyword):
            _each(value, lambda file, name=name: _file(name, file))
            continue
        keyword.check(name, value)
        is_text = isinstance(keyword.kind, Texts)
        if isinstance(value, list) and (is_text or name == "seed"):
            word = "text" if is_text else "number"
            raise UsageError(f"{name} = {shown(value)}; allowed is one {word}: write a line for each picture", name)
    return given


def deciding(pipe: Pipeline) -> Decides:
    """What the pictures of a pipeline depend on beside their keywords, as JSON: its files, and its precision.

    The backend is not in it: it changes the last bits of a picture at most.
    """
    common: dict[str, Any] = {
        "bundle": pipe.bundle.digest,
        "precision": pipe.precision,
        "loras": [[one["sha256"], one["weights"]] for one in pipe.loras.overlay.described],
        "embeddings": {token: one.digest for token, one in pipe.embeddings.items()},
    }

    def decides(options: Mapping[str, Any]) -> dict[str, Any]:
        adapters: set[str] = set()
        for name, value in options.items():
            if isinstance(KEYWORDS[name].kind, PicturesByName):
                adapters |= set(
                    cast("dict[str, Any]", value) if isinstance(value, dict) else adapter_names(pipe.bundle)
                )
        if options.get("vae") is not None:
            adapters.add(options["vae"])
        own: dict[str, Any] = {"adapters": {name: pipe.pool.adapter(name).digest for name in sorted(adapters)}}
        if options.get("preset") is not None:  # it may be measured anew, and then says other things
            own["preset"] = dict(checked_preset(pipe.bundle, options["preset"]).keywords)
        return {**common, **own}

    return decides


def id_in(name: str) -> str | None:
    """The id in the name of a picture's file, as it is written there; None for another file."""
    match = NAME.fullmatch(name)
    return match["id"] if match else None


def written(id: str) -> str:
    """An id as the name of a file has it: two ids never look alike, and none is a path or hidden.

    Letters and digits of ASCII, "_", "-" and "." stay; others are percent-encoded. Of a long id, a digest ends it.
    """
    text = quote(id, safe="").replace("~", "%7E")
    if text.startswith("."):
        text = f"%2E{text[1:]}"
    if len(text) > LONGEST_ID:
        text = f"{text[:LONGEST_ID]}~{hashlib.sha256(id.encode()).hexdigest()[:DIGITS]}"
    return text


def _line(
    place: str,
    entry: Mapping[str, Any],
    defaults: Mapping[str, Any],
    hashed: Callable[[str, str], str],
    decides: Decides,
) -> Line:
    given = dict(entry)
    id = _id(given.pop("id", None))
    options = {**defaults, **checked(given)}
    if "prompt" not in options:
        raise UsageError('prompt is missing; write "prompt": "a fox"', "prompt")
    _refuse_tags(options)
    options.setdefault("seed", int.from_bytes(hashlib.sha256(id.encode()).digest()[:4], "big"))
    hashes: dict[str, str] = {}
    content: dict[str, Any] = {}
    for name, value in options.items():
        if _is_pictured(KEYWORDS[name]):

            def hash_of(file: str, name: str = name) -> str:
                return hashes.setdefault(file, hashed(name, file))

            content[name] = _each(value, hash_of)
        else:
            content[name] = KEYWORDS[name].check(name, value)  # 5 and 5.0 are the same scale
    everything = json.dumps([FORMAT, id, content, decides(options)], sort_keys=True)
    digest = hashlib.sha256(everything.encode()).hexdigest()[:DIGITS]
    return Line(id, place, options, hashes, f"{written(id)}-{digest}.png")


def _refuse_tags(options: Mapping[str, Any]) -> None:
    """Raises: UsageError for the tag of a LoRA, which `pipe(...)` takes for a text."""
    tags = cut(options["prompt"])[1] if options.get("prompt_style") == "a1111" else ()
    if tags:
        text = f"prompt: <lora:{tags[0].name}> names a LoRA, and those of a list are the same for all its lines"
        raise UsageError(f"{text}: leave the tag out, and load the file before, with --lora FILE", "prompt")


def _id(given: Any) -> str:
    """An id as text; a whole number is the same as its digits."""
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)
    if not isinstance(given, str) or not given.strip():
        text = "is missing" if given is None else f"= {shown(given)}"
        raise UsageError(f'id {text}; allowed are texts and whole numbers, one for each line, e.g. "id": "fox-1"', "id")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"id = {shown(given)} is no text in Unicode: {error}", "id") from error
    return given


def _unknown(name: str) -> str:
    if name in ONE:
        return f"{name} is no keyword of a line, which is one picture; write a line for each"
    if name in KEYWORDS:
        return f"{name} takes arrays, which JSON has not; use the Python library"
    known = [key for key, keyword in KEYWORDS.items() if _is_of_json(key, keyword)]
    near = choices(name[:64], known).split(", ")[:MOST_NAMES]
    return f"unknown keyword {shown(name)}; there are {', '.join(near)}, and the others of `pipe(...)`"


def _is_of_json(name: str, keyword: Keyword) -> bool:
    """Whether a line can have this keyword."""
    return name not in ONE and not isinstance(keyword.kind, (Tensor, EmbedsByName))


def _is_pictured(keyword: Keyword) -> bool:
    return isinstance(keyword.kind, (Picture, PicturesByName))


def _each(value: Any, made: Callable[[str], Any]) -> Any:
    """A value of files with `made` of each: a file, a list of these, or either by an adapter's name."""
    if isinstance(value, list):
        return [_each(one, made) for one in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {key: _each(one, made) for key, one in cast("dict[str, Any]", value).items()}
    return made(value)


def _file(name: str, file: Any) -> str:
    """Raises: UsageError for what cannot be the name of a file."""
    if not isinstance(file, str) or not file or "\0" in file:
        allowed = "allowed are files of pictures, relative to the list's folder"
        raise UsageError(f'{name} = {shown(file)}; {allowed}, e.g. "{name}": "photo.png"', name)
    return file


def _content(folder: Folder, name: str, file: str) -> bytes:
    """Raises: UsageError for a file that cannot be read."""
    try:
        return folder.read(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{name}: {file} cannot be read from {folder}: {reason}", name) from error


def refuse(wrong: Sequence[str]) -> None:
    """Raises: UsageError with every sentence of `wrong`, or the first of many."""
    if wrong:
        more = f"\nand {len(wrong) - MOST_SHOWN} other lines are wrong" if len(wrong) > MOST_SHOWN else ""
        raise UsageError("\n".join(wrong[:MOST_SHOWN]) + more)
