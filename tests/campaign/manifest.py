"""The manifest, changed by its structure: every value by type, every key, duplicates, nesting, encodings.

The manifest itself has no hash. So another picture is legal where the changed value is a choice that the manifest
may make: `LEGAL` lists the places, each with the values that are a choice there. Anywhere else it is a fault.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdopt.bundle.disk import parse_json
from tests.campaign.cases import LEGAL, OTHER, SAME, Case, Outcome
from tests.campaign.mutate import differences, mutated_json, restore
from tests.campaign.sandbox import Sandbox, as_right, judged, picture, replaced

WORDS = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
}


def _any(value: Any) -> bool:
    return True


LEGAL_PLACES: dict[str, Callable[[Any], bool]] = {
    r"defaults\.\w+": _any,
    r"latents\.(scaling_factor|shift_factor).*": _any,
    r"tokenizers\.\w+\.(max_length|bos_token_id|eos_token_id|pad_token_id|vocab_size|file)": _any,
    r"tokenizers\.\w+": _any,  # one tokenizer in place of another
    r"conditioning\.encoders(\.\d+(\.(skip|output|tokenizer|component))?)?": _any,
    r"conditioning\.(zeros_for_empty|pooled)": _any,
    r"conditioning\.time_ids.*": _any,
    r"components\.\w+\.graphs.*": _any,  # the same computation in other operators
    r"scheduler\.trained_betas.*": _any,
    **{
        rf"(scheduler\.)?{word}": (lambda value, words=words: value is None or value in words)
        for word, words in WORDS.items()
    },
    rf"scheduler\.(?!{'|'.join(WORDS)})\w*.*": _any,
    r"scheduler": _any,
    r"sampler_tables": _any,
}


def is_legal(path: tuple[str | int, ...], value: Any) -> bool:
    """Whether a manifest may choose `value` at this place, so that another picture is right."""
    place = ".".join(map(str, path))
    return any(re.fullmatch(pattern, place) and test(value) for pattern, test in LEGAL_PLACES.items())


def run(case: Case, sandbox: Sandbox) -> Outcome:
    rng = case.random()
    names = [*sandbox.bundles, "tables"]
    name = rng.choice(names)
    folder = sandbox.with_tables if name == "tables" else sandbox.bundles[name]
    number = int(rng.random() < 0.3 and name != "tables")
    right = sandbox.right(name, number)
    path = folder / "manifest.json"
    entry = json.loads(path.read_bytes())
    content, told = mutated_json(rng, entry)
    what = f"{name}: {told}"
    with replaced(path, content):
        outcome = judged(what, lambda: picture(folder, sandbox.request(name, number)), as_right(what, right))
        if outcome.name in (SAME, OTHER):
            shown = judged(what, lambda: _shown(folder), lambda _: outcome)
            outcome = shown if shown.is_fault else outcome
    return (
        judged_by_place(outcome, path, content, right, sandbox.request(name, number))
        if outcome.name == OTHER
        else outcome
    )


def judged_by_place(outcome: Outcome, path: Path, content: bytes, right: Any, request: Mapping[str, Any]) -> Outcome:
    """Another picture is legal if it is right as soon as the legal choices are taken back."""
    entry, changed = json.loads(path.read_bytes()), parse_json(content)
    changes = list(differences(entry, changed))
    for place, value in changes:
        if is_legal(place, value):
            restore(entry, changed, place)
    what = outcome.description
    with replaced(path, json.dumps(changed).encode()):
        rest = judged(what, lambda: picture(path.parent, request), lambda images: _nearly(what, right, images))
    if rest.is_fault:
        return Outcome(rest.name, what, f"{rest.detail}; {changes[:4]}")
    return Outcome(LEGAL, what, outcome.detail)


def _nearly(what: str, right: Any, images: Any) -> Outcome:
    """The right picture, or one whose rounding is another: by other operators, or by calls with another batch."""
    is_near = images.shape == right.shape and float(np.abs(images - right).max()) < 1e-4
    return Outcome(SAME, what) if is_near else as_right(what, right)(images)


def _shown(folder: Any) -> None:
    """What else reads a manifest: `sdopt inspect`, previews, and what a bundle can do."""
    import sdopt
    from sdopt.cli.capabilities import capabilities
    from sdopt.image.preview import pictures
    from tests.campaign.commands import command

    bundle = sdopt.Bundle.open(folder)
    capabilities(bundle)
    if bundle.manifest.preview is not None:
        pictures(bundle, np.zeros((1, bundle.manifest.latents.channels, 2, 2), np.float32), 1, "pil")
    for words in (["inspect", str(folder)], ["inspect", str(folder), "--json"], ["engines", str(folder)]):
        command(words)
