"""Every field of a manifest, with every kind of wrong value: a BundleError that names it, and never a traceback."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest

from sdopt.bundle.decode import DEEPEST, DecodeError, Json, Rule, decode, encode, integer
from sdopt.bundle.files import Bundle, read_manifest
from sdopt.bundle.format import Manifest
from sdopt.bundle.manifest import decode_manifest, to_json
from sdopt.bundle.settings import SETTINGS
from sdopt.cli.main import main
from sdopt.errors import BundleError
from sdopt.samplers import SAMPLERS
from tests.conftest import EMOJI_BUNDLE, edit_manifest

ENTRY: dict[str, Any] = json.loads((EMOJI_BUNDLE / "manifest.json").read_text())
FULL: dict[str, Any] = {**ENTRY, "name": "emoji", "random_weights": 1, "sampler_tables": "unet.onnx"}
Path_ = tuple[str | int, ...]
# what is not allowed anywhere, by the JSON type that stands there now
WRONG: dict[type, list[Any]] = {
    bool: [None, 0, 1, "true", [], {}, 0.5],
    int: [None, True, "1", [], {}, 0.5, -1, 10**30, float("1e400")],
    float: [None, True, "1", [], {}, float("1e400"), 10**400],
    str: [None, True, 1, [], {}, "a\nb", "\ud800", "\x1b[2J"],
    list: [None, True, 1, "text", {}],
    dict: [None, True, 1, "text", []],
    type(None): [True, [], {}, {"a": 1}],
}
OPTIONAL = {("name",), ("random_weights",), ("sampler_tables",), ("preview",)}  # may be null
LATER = {  # fields that earlier versions of the format lack
    ("denoiser",), ("even_sigmas",), ("latents", "most"), ("conditioning", "sequence"),
    ("conditioning", "true_guidance"), ("conditioning", "encoders", 0, "join"),
}  # fmt: skip
OWN_NAMES = {"files", "components", "tokenizers", "source", "versions", "graphs", "sizes"}  # objects of any names


def fields(entry: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every value in a manifest with its path, in lists the first alone."""
    for key, value in entry.items() if isinstance(entry, dict) else enumerate(entry[:1]):
        yield (*path, key), value
        if isinstance(value, (dict, list)):
            yield from fields(value, (*path, key))


FIELDS = list(fields(FULL))


def written(path: Path_) -> str:
    """The path as an error writes it."""
    text = ""
    for key in path:
        plain = isinstance(key, str) and key.isidentifier()
        text += (f".{key}" if text else str(key)) if plain else f"[{key!r}]"
    return text


def changed(path: Path_, change: Callable[[Any, Any], None]) -> Any:
    entry = copy.deepcopy(FULL)
    parent = entry
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return entry


def replaced(path: Path_, value: Any) -> Any:
    return changed(path, lambda parent, key: parent.__setitem__(key, value))


def may_be(path: Path_, value: Any) -> bool:
    """Whether a value is allowed after all."""
    if path == ("conditioning", "guidance_embedding") or path[-1] in ("skip", "steps_offset", "bytes"):
        return False
    if path[-1] in ("vocab_size", "pooled", "trained_betas", "weights_of", "bos_token_id") or path in OPTIONAL:
        return value is None
    if path[0] == "scheduler" and path[-1] not in SETTINGS:  # any JSON
        return not (isinstance(value, float) or value in (10**400, "a\nb", "\ud800", "\x1b[2J"))
    if path[-1] in ("shift_factor", "guidance_scale", "psnr_db", "r2") or "matrix" in path:
        return value == -1
    return (path[-1] == "shape" and value == []) or ("shape" in path and type(value) is int and value == 1)


def wrong_values() -> list[tuple[Path_, Any]]:
    cases = [(path, wrong) for path, value in FIELDS for wrong in WRONG[type(value)]]
    return [(path, wrong) for path, wrong in cases if path != ("format_version",) and not may_be(path, wrong)]


def problem(entry: Any) -> str:
    with pytest.raises(DecodeError) as raised:
        decode_manifest(entry)
    return str(raised.value)


def test_the_walk_reaches_every_part_of_the_manifest() -> None:
    assert len(FIELDS) > 250
    assert len(wrong_values()) > 1500
    decode_manifest(FULL)


def test_a_wrong_value_is_refused_with_its_path_and_what_is_allowed() -> None:
    missed: list[object] = []
    for path, wrong in wrong_values():
        try:
            decode_manifest(replaced(path, wrong))
            missed.append((written(path), wrong, "is taken"))
        except DecodeError as error:
            if written(path) not in str(error) or "; allowed is " not in str(error):
                missed.append((written(path), wrong, str(error)))
    assert missed == []


def test_a_missing_field_is_refused_with_its_path() -> None:
    optional = {*OPTIONAL, *LATER, ("latents", "patch"), ("scheduler",), ("tokenizers", "tokenizer", "vocab_size")}
    missed: list[object] = []
    for path, _ in FIELDS:
        named = path[-2:-1] and (path[-2] in OWN_NAMES or path[0] == "scheduler")
        if (
            isinstance(path[-1], int)
            or named
            or path[-1] == "weights_of"
            or path in optional - {("scheduler",)}
            or path == ("format_version",)
        ):
            continue
        error = problem(changed(path, lambda parent, key: parent.__delitem__(key)))
        if not error.startswith(f"{written(path)} is missing; allowed is "):
            missed.append((path, error))
    assert missed == []


@pytest.mark.parametrize(
    "path",
    [("components", "unet"), ("components", "text_encoder"), ("tokenizers", "tokenizer"), ("files", "unet.onnx")],
)
def test_an_entry_that_another_one_needs_is_refused_where_it_is_missing(path: Path_) -> None:
    entry = {**changed(path, lambda parent, key: parent.__delitem__(key)), "sampler_tables": None}
    where = {"unet.onnx": "components.unet.graph", "unet": "components.unet"}
    assert problem(entry).startswith(where.get(str(path[-1]), "conditioning.encoders[0]"))


def test_a_key_that_is_not_of_the_format_is_refused_by_its_name() -> None:
    for path, value in [((), FULL), *FIELDS]:
        if not isinstance(value, dict) or (path[-1:] and (path[-1] in OWN_NAMES or path[0] == "scheduler")):
            continue
        error = problem(replaced((*path, "colour"), 1))
        assert error.startswith(f"{written((*path, 'colour'))} is unknown; {written(path) or 'the file'} has ")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("components.unet.inputs.0.shape.1", 0, "components.unet.inputs[0].shape[1] is 0; allowed is "),
        ("components.unet.inputs.0.shape", [4], "components.unet.inputs[0].shape is [4]; allowed is 4 dim"),
        ("components.unet.outputs.0.shape.1", 8, "components.unet.outputs[0].shape is "),
        ("components.text_encoder.inputs.1.shape", ["a"], "components.text_encoder.inputs[1].shape is ['a']"),
        ("components.text_encoder.outputs.1.shape.1", "n", "components.text_encoder.outputs[1].shape is "),
        ("components.unet.inputs", [], "components.unet.inputs is []; allowed is a list of one tensor or more"),
        ("components.unet.inputs.0.dtype", "float8", "inputs[0].dtype is 'float8'; allowed is one of float32"),
        ("components.unet.graph", "none.onnx", "components.unet.graph is 'none.onnx'; allowed is a name that is "),
        ("components.unet.graphs.ort.graph", "x", "components.unet.graphs.ort.graph is 'x'"),
        (("components", "../x"), ENTRY["components"]["unet"], "components['../x'] is '../x'; allowed is a name of "),
        ("tokenizers.tokenizer.file", "x", "tokenizers.tokenizer.file is 'x'; allowed is a name that is listed"),
        ("sampler_tables", "x", "sampler_tables is 'x'; allowed is a name that is listed"),
        ("latents.channels", 5, "preview.matrix is [5, 3]; allowed is [6, 3]"),
        ("latents.scaling_factor", 0, "latents.scaling_factor is 0; allowed is a finite number above 0"),
        ("latents.scaling_factor", -0.5, "latents.scaling_factor is -0.5; allowed is a finite number above 0"),
        ("latents.scaling_factor", [1.0, 2.0], "latents.scaling_factor is (1.0, 2.0); allowed is one number, or a "),
        ("latents.shift_factor", [1.0, None], "latents.shift_factor[1] is None; allowed is a finite number"),
        ("preview.matrix", [[1.0, 2.0]], "preview.matrix[0] is [1.0, 2.0]; allowed is a list of 3 numbers"),
        ("preview.matrix", [[1, 2, 3]], "preview.matrix is [1, 3]; allowed is [5, 3]"),
        ("defaults.height", 100, "defaults.height is 100; allowed is a multiple of latents.factor, 8"),
        ("defaults.strength", 1.5, "defaults.strength is 1.5; allowed is a number from 0 to 1"),
        ("defaults.strength_cuts", "x", "defaults.strength_cuts is 'x'; allowed is one of steps, steps_up, schedule"),
        ("conditioning.encoders", [], "conditioning.encoders is []; allowed is a list of one encoder or more"),
        ("conditioning.encoders.0.component", "x", "conditioning.encoders[0].component is 'x'; allowed is one "),
        ("conditioning.encoders.0.tokenizer", "x", "conditioning.encoders[0].tokenizer is 'x'; allowed is one "),
        ("conditioning.pooled", "unet", "conditioning.pooled is 'unet'; allowed is null, or one of the encoders"),
        ("conditioning.time_ids", ["size"], "conditioning.time_ids[0] is 'size'; allowed is one of original_size"),
        ("scheduler.beta_end", "high", "scheduler.beta_end is 'high'; allowed is a number above 0 and below 1"),
        ("scheduler.beta_end", 0.0, "scheduler.beta_end is 0.0; allowed is a number above 0 and below 1"),
        ("scheduler.trained_betas", [0.1, "x"], "scheduler.trained_betas[1] is 'x'"),
        ("scheduler.num_train_timesteps", 10**12, "scheduler.num_train_timesteps is 1000000000000; allowed is "),
        ("scheduler.clip_sample", None, "scheduler.clip_sample is None; allowed is true or false"),
        ("denoiser", "transformer", "components.transformer is missing; allowed is the component that predicts"),
        ("latents.patch", 3, "defaults.height is 128; allowed is a multiple of latents.factor times latents.patch, 24"),
        ("conditioning.encoders.0.join", "tokens", "conditioning.sequence is 0; allowed is 1 or more"),
        ("conditioning.encoders.0.join", "none", "join is 'none'; allowed is features or tokens"),
        ("conditioning.pooled", ["text_encoder"], "conditioning.pooled is 'text_encoder'; allowed is an encoder that"),
        (("files", "unet.onnx", "sha256"), "A" * 64, "files['unet.onnx'].sha256 is "),
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_do_not_fit_each_other_or_the_runtime_are_named(
    path: str | Path_, value: Any, message: str
) -> None:
    keys = tuple(int(key) if key.isdigit() else key for key in path.split(".")) if isinstance(path, str) else path
    assert message in problem(replaced(keys, value))


def test_a_scheduler_without_its_class_or_too_deep_is_refused() -> None:
    error = problem(changed(("scheduler", "_class_name"), lambda parent, key: parent.__delitem__(key)))
    assert error.startswith("scheduler._class_name is missing; allowed is ")
    deep: Any = 1
    for _ in range(DEEPEST + 1):
        deep = [deep]
    assert problem(replaced(("scheduler", "mine"), deep)).startswith("scheduler.mine is [[[[")
    decode_manifest(replaced(("scheduler", "mine"), deep[0]))


def test_every_setting_that_a_sampler_reads_has_a_type() -> None:
    read = {name for sampler in SAMPLERS.values() for name in sampler.defaults} - {"solver_p"}
    assert read <= set(SETTINGS)
    for sampler in SAMPLERS.values():
        own = {key: value for key, value in json.loads(json.dumps(dict(sampler.defaults))).items() if key != "solver_p"}
        own |= {"lambda_min_clipped": "-inf"} if "lambda_min_clipped" in own else {}
        decode_manifest({**FULL, "scheduler": {"_class_name": sampler.diffusers, **own}})


def test_what_is_read_is_what_was_written() -> None:
    manifest = decode_manifest(ENTRY)
    assert to_json(manifest) == ENTRY
    assert list(to_json(manifest)) == list(ENTRY)
    assert decode_manifest(to_json(decode_manifest(FULL))) == decode_manifest(FULL)
    assert manifest == read_manifest(EMOJI_BUNDLE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest.latents.factor = 1  # type: ignore[misc]


def test_the_digest_is_of_the_files_alone(bundle_copy: Path) -> None:
    """As in version 1: engines and caches that go by it stay where they are."""
    hashes = sorted((name, entry["sha256"]) for name, entry in ENTRY["files"].items())
    digest = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:10]
    edit_manifest(bundle_copy, name="another", verified=False)
    assert Bundle.open(EMOJI_BUNDLE).digest == Bundle.open(bundle_copy).digest == digest


@pytest.mark.parametrize("command", ["inspect", "generate"])
@pytest.mark.parametrize(
    ("path", "wrong"),
    [(("latents",), None), (("components", "unet", "inputs", 0, "shape"), {}), (("defaults", "height"), -8),
     (("scheduler", "beta_start"), "x"), (("source",), []), (("conditioning", "encoders", 0), 5)],
    ids=lambda value: written(value) if isinstance(value, tuple) else None,
)  # fmt: skip
def test_a_command_tells_it_in_a_sentence_and_ends_with_3(
    command: str, path: Path_, wrong: Any, bundle_copy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    entry = replaced(path, wrong)
    (bundle_copy / "manifest.json").write_text(json.dumps(entry))
    words = {"inspect": ["inspect", str(bundle_copy)], "generate": ["generate", "a", "-m", str(bundle_copy), "-o"]}
    assert main(words[command] + [str(tmp_path / "a.png")] * (command == "generate")) == 3
    told = capsys.readouterr()
    assert f"manifest.json: {written(path)} is {wrong!r}; allowed is " in told.err
    assert "export it again: `sdopt export CHECKPOINT -o " in told.err
    assert (told.out, (tmp_path / "a.png").exists()) == ("", False)


def test_opening_a_bundle_gives_a_bundle_error(bundle_copy: Path) -> None:
    entry = replaced(("latents", "factor"), -8)
    (bundle_copy / "manifest.json").write_text(json.dumps(entry))
    with pytest.raises(BundleError, match=r"manifest.json: latents.factor is -8; allowed is a whole number from 1"):
        Bundle.open(bundle_copy)


@dataclasses.dataclass(frozen=True)
class Point:
    x: Annotated[int, integer(0, 9)]
    both: float | tuple[float, ...]
    rest: Json
    name: Annotated[str, Rule("a name", str.isidentifier)] | None = None


def test_the_decoder_follows_annotations() -> None:
    point = decode(Point, {"x": 1, "both": [1, 2.5], "rest": {"a": [None, True]}})
    assert point == Point(1, (1.0, 2.5), {"a": [None, True]})
    assert encode(point) == {"x": 1, "both": [1.0, 2.5], "rest": {"a": [None, True]}}
    assert decode(Point, {"x": 1, "both": 1, "rest": None, "name": "n"}).both == 1.0
    for entry, message in (
        ({"x": 10, "both": 1, "rest": 1}, "p.x is 10; allowed is a whole number from 0 to 9"),
        ({"x": 1, "both": "1", "rest": 1}, "p.both is '1'; allowed is a finite number or a list of a finite number"),
        ({"x": 1, "both": 1, "rest": float("nan")}, "p.rest is nan; allowed is JSON"),
        ({"x": 1, "both": 1, "rest": 1, "name": "a b"}, "p.name is 'a b'; allowed is a name"),
        ([], r"p is \[\]; allowed is an object with x, both, rest, name"),
    ):
        with pytest.raises(DecodeError, match=message):
            decode(Point, entry, "p")


def test_every_field_has_its_place_in_the_manifest() -> None:
    assert set(FULL) == {f.name for f in dataclasses.fields(Manifest)}


def test_two_text_encoders_read_as_many_tokens() -> None:
    entry = copy.deepcopy(FULL)
    entry["tokenizers"]["second"] = {**entry["tokenizers"]["tokenizer"], "max_length": 5}
    entry["conditioning"]["encoders"].append({**entry["conditioning"]["encoders"][0], "tokenizer": "second"})
    length = entry["tokenizers"]["tokenizer"]["max_length"]
    assert problem(entry) == f"tokenizers.second.max_length is 5; allowed is {length}, as that of tokenizer"
