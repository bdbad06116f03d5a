"""`--replay PNG`: the picture in a file again, from the parameters in it and from the files that they name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdopt.bundle.precision import with_precision_words
from sdopt.cli import controls, prepare, terminal
from sdopt.errors import BundleError, UsageError

if TYPE_CHECKING:
    from sdopt.pipeline import Pipeline
    from sdopt.request.plan import Plan

KINDS = {  # what a PNG carries of adapters that saw pictures -> the keyword of these, and what users call the adapters
    "controls": (controls.CONTROL, "ControlNets"),
    "image_prompts": ("ip_adapter_image", "IP-Adapters"),
}
PICTURES = (*(keyword for keyword, _ in KINDS.values()), "mask_image")


def ways(args: Any, carried: Mapping[str, Any]) -> dict[int, prepare.Way]:
    """How the picture of each --control is prepared: as those of the PNG were. `carried`: its parameters.

    Raises: UsageError for a flag that the PNG decides, and where pictures are missing that it was made with.
    """
    from sdopt.cli import flags

    records = {entry["name"]: entry for entry in carried.get("controls", [])}
    taken = {keyword for key, (keyword, _) in KINDS.items() if carried.get(key)}
    if _has_masks(records.values()):
        taken.add("mask_image")
    refuse_decided(args, taken)
    typed = flags.typed(args)
    for key, (keyword, title) in KINDS.items():
        _require_pictures(args.replay, carried.get(key, []), title, keyword, typed.get(keyword, []))
    found: dict[int, prepare.Way] = {}
    left = {name: iter(_records(entry)) for name, entry in records.items()}
    for place, name in enumerate(controls.names(typed.get(controls.CONTROL, []))):
        record = next(left[name or next(iter(left))], None)
        if record is not None:
            found[place] = prepare.of_record(record)
    return found


def _records(entry: Mapping[str, Any]) -> list[dict[str, Any] | None]:
    """How each picture of an adapter was prepared; None for one that was ready."""
    return entry.get("prepared", [])


def _has_masks(entries: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a picture of these has masked pixels."""
    return any(one is not None and one["by"] == "inpaint" for entry in entries for one in _records(entry))


def refuse_decided(args: Any, taken: Iterable[str] = PICTURES) -> None:
    """Raises: UsageError for flags of what the PNG decides. `taken`: the keywords of pictures that it may lack."""
    from sdopt.cli import flags
    from sdopt.request.keywords import KEYWORDS

    decided = {name: None for name in flags.typed(args) if not KEYWORDS[name].how and name not in taken}
    ways: Mapping[int, prepare.Way] = args.prepare or {}
    refused = [*flags.flag_names(decided), *(way.flag for way in ways.values())]
    if refused:
        raise UsageError(f"--replay takes everything from the PNG; leave out {', '.join(refused)}")


def _require_pictures(png: Path, entries: list[dict[str, Any]], title: str, keyword: str, texts: list[str]) -> None:
    """Raises: UsageError unless the pictures of all adapters are given, and of no other one, without scales."""
    flag = controls.SEEN[keyword].flag
    for text in texts:
        if controls.has_scale(text):
            raise UsageError(f"{flag} {text}: --replay takes the scale from the PNG; leave it out")
    wanted, names = [entry["name"] for entry in entries], controls.names(texts)
    if len(wanted) == 1:
        names = [name or wanted[0] for name in names]
    if set(names) != set(wanted):
        needs = " ".join(f"{flag} {name}=FILE" for name in wanted)
        needs += " --mask FILE" if _has_masks(entries) else ""
        raise UsageError(f"{png} was made with {title}, whose pictures it does not carry; give the same: {needs}")


def in_order(options: dict[str, Any], carried: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with the pictures in the order of the PNG, which is that of its scales."""
    ordered = dict(options)
    for key, (keyword, _) in KINDS.items():
        pictures = options.get(keyword, {})
        if len(pictures) > 1:
            ordered[keyword] = {entry["name"]: pictures[entry["name"]] for entry in carried[key]}
    return ordered


def require_same_pictures(png: Path, carried: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Raises: UsageError unless the adapters, and what they see, are those that the PNG was made with."""
    for key, (keyword, _) in KINDS.items():
        flag = controls.SEEN[keyword].flag
        for theirs, ours in zip(carried.get(key, []), parameters.get(key, []), strict=True):
            name = theirs["name"]
            if theirs["digest"] != ours["digest"]:
                raise UsageError(
                    f"{png} was made with another adapter {name}: {theirs['digest']}, and this one is {ours['digest']}"
                )
            pairs = zip(_records(theirs), _records(ours), strict=False)
            for what, (before, now) in product(("given", "mask"), pairs):
                one, other = (before or {}).get(what), (now or {}).get(what)
                if one != other:
                    typed = "--mask" if what == "mask" else f"{flag} {name}=FILE"
                    raise UsageError(
                        f"{typed}: {png} was made with another picture; the SHA-256 of its pixels begins with "
                        f"{str(one)[:10]}, and here with {str(other)[:10]}"
                    )
            if any(theirs.get(field) != ours.get(field) for field in ("picture", "pictures", "modes")):
                raise UsageError(f"{flag} {name}=FILE: {png} was made with another picture; give the same")


def plan(pipe: Pipeline, prompt: str, options: dict[str, Any]) -> Plan:
    """The plan of a picture that carries its options, without those that have no effect: earlier releases took them."""
    from sdopt.request.unused import UnusedError

    while True:
        try:
            return pipe.plan(prompt, **cast("Any", options))
        except UnusedError as error:
            if options.pop(error.param or "", None) is None:  # not one of those that it carries
                raise


def backend_of(args: Any, carried: dict[str, Any]) -> tuple[str, str]:
    """The backend and precision of the replayed picture, unless the command names others.

    If they differ from the picture's, a line on stderr says so.
    """
    from sdopt.engine import installed_backends

    made_by = str(carried.get("backend", "auto"))
    made_in = with_precision_words(str(carried.get("precision", "auto")))
    main_precision = made_in.partition(" ")[0]  # "fp16" of "fp16 (vae_decoder bf16)"
    backend, precision = args.backend, args.precision
    if backend == "auto" and made_by.partition(":")[0] in installed_backends():
        backend = made_by
    if precision == "auto" and backend == made_by:
        precision = main_precision
    differs = backend != made_by or precision != main_precision
    if "backend" in carried and differs:
        terminal.note(f"{args.replay} was made by {made_by} in {made_in}; this picture may differ")
    return backend, precision


def require_same_model(png: Path, carried: dict[str, Any], bundle: Any) -> None:
    """Raises: BundleError unless the PNG was made by this bundle."""
    model, digest = carried.get("model"), carried.get("bundle")
    if digest != bundle.digest:
        raise BundleError(f"{png} was made by the bundle {model} ({digest}); name it with -m")


def require_same_autoencoder(png: Path, carried: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Raises: UsageError unless the tiny autoencoder is the one that the PNG was made with."""
    theirs, ours = carried.get("vae_digest"), parameters.get("vae_digest")
    if theirs is not None and theirs != ours:
        name = carried.get("vae")
        raise UsageError(f"{png} was made with another tiny autoencoder {name}: {theirs}, and this one is {ours}")


def require_same_embeddings(png: Path, carried: dict[str, Any], parameters: dict[str, Any]) -> None:
    """Raises: UsageError unless the embeddings that the PNG was made with are loaded under their tokens."""
    wanted, used = carried.get("embeddings", {}), parameters.get("embeddings", {})
    for token, digest in {**used, **wanted}.items():
        if used.get(token) != wanted.get(token):
            raise UsageError(
                f"{png} was made with {', '.join(wanted) or 'no embeddings'}; give the same with --embedding "
                f"FILE={token} ({digest})"
            )
