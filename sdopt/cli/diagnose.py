"""`sdopt diagnose BUNDLE --component unet`: show layer by layer where half precision differs from fp32."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdopt.bundle.precision import precision_word
from sdopt.cli import terminal
from sdopt.cli.parser import Parser
from sdopt.errors import BackendError, UsageError, install

if TYPE_CHECKING:
    from sdopt.build.diagnose import Diagnosis, Layer
    from sdopt.bundle.specs import Array

PRECISIONS = {"fp16": "float16", "bf16": "bfloat16"}
MAX_LATENT = 1 << 11  # latents a side; a picture of 16384 pixels has as many
BELOW_FLOOR = 5  # exit code when a value is below the floor


def add_arguments(parser: Parser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="default: the embedded model")
    add = parser.group("what is compared")
    add("--component", default="unet", help="default: unet")
    add("--precision", choices=PRECISIONS, default="fp16", type=precision_word, help="default: fp16")
    add(
        "--latent",
        type=int,
        default=16,
        metavar="N",
        help="compute at N x N latents, 8 N pixels for most models; default: 16",
    )
    add("--inputs", type=Path, metavar="FILE.npz", help="input arrays; default: random numbers")
    add("--floor", type=float, default=40.0, metavar="DB", help="lowest parity of a value; default: 40")
    add = parser.group("what stays in float32")
    add("--island", action="append", default=[], metavar="PATTERN", help="nodes to leave in float32")
    add("--attention-float32", action="store_true", help="leave attention in float32 (SD 2.1)")
    parser.group("output")("--json", action="store_true", help="print every layer as JSON")
    parser.examples(
        "sdopt diagnose --component text_encoder --precision fp16",
        "sdopt diagnose sd15 --json",
    )


def run(args: argparse.Namespace) -> int:
    try:
        from sdopt.build.diagnose import diagnose
        from sdopt.build.examples import example, sizes_of
    except ImportError as error:
        raise BackendError(f"{error}; {install('build,cpu')}") from error
    from sdopt.bundle.files import Bundle, embedded
    from sdopt.bundle.specs import check_inputs

    if not args.floor >= 0:  # NaN is none either
        raise UsageError(f"--floor {args.floor:g}; allowed are decibels from 0 on, e.g. --floor 40", "floor")
    bundle = Bundle.open(args.bundle or embedded())
    component = bundle.component(args.component)
    if not 1 <= args.latent <= MAX_LATENT:
        raise UsageError(f"--latent {args.latent}; allowed are whole numbers from 1 to {MAX_LATENT}", "latent")
    if args.inputs is None:
        arrays = example(component.inputs, sizes_of(bundle.manifest, args.latent))
    else:
        arrays = _arrays_in(args.inputs)
    check_inputs(component.name, component.inputs, arrays)
    attention_overflows = args.precision == "fp16" and component.name in bundle.manifest.float16_attention_unsafe
    if attention_overflows:
        terminal.say(f"{component.name}: attention stays float32, as in `sdopt build`: it overflows in fp16")
    with _values_in_words(args.inputs):
        diagnosis = diagnose(
            component.graph,
            arrays,
            floor_db=args.floor,
            dtype=PRECISIONS[args.precision],
            islands=args.island,
            attention=args.attention_float32 or attention_overflows,
            report=lambda line: terminal.say(f"{component.name}: {line}"),
        )
    if args.json:
        layers = [_without_infinity(asdict(layer)) for layer in diagnosis.layers]
        outputs = _without_infinity(diagnosis.outputs)
        print(json.dumps({"outputs": outputs, "half": asdict(diagnosis.half), "layers": layers}))
    else:
        print("\n".join(_lines(component.name, diagnosis)))
    return 0 if diagnosis.first is None else BELOW_FLOOR


def _arrays_in(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file by name.

    Raises: UsageError for a file that is none, that is damaged, or that has NaN or infinity in it.
    """
    import numpy as np

    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays: dict[str, Array] = {name: np.asarray(file[name]) for name in file.files}
    except Exception as error:  # a damaged file can make NumPy and zipfile raise anything; a .npy is no context
        reason = error if isinstance(error, (OSError, ValueError)) else "it is another kind of file, or is damaged"
        raise UsageError(
            f"--inputs {path}: arrays cannot be read from it ({reason}); give a file that numpy.savez wrote, with one "
            "array for each input",
            "inputs",
        ) from error
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UsageError(f"--inputs {path}: {name} has NaN or infinity in it; allowed are finite numbers", "inputs")
    return arrays


@contextmanager
def _values_in_words(inputs: Path | None) -> Generator[None]:
    """Raises: UsageError where the graph cannot be run with the values of the file `inputs`, e.g. unknown tokens."""
    try:
        yield
    except Exception as error:
        if inputs is None or not type(error).__module__.startswith("onnxruntime"):
            raise
        from sdopt.engine.failures import first_line  # late, as all that `run` needs

        text = f"--inputs {inputs}: the graph does not run with these values: {first_line(error)}"
        raise UsageError(text, "inputs") from error


def _lines(component: str, diagnosis: Diagnosis) -> list[str]:
    half, first = diagnosis.half, diagnosis.first
    outputs = ", ".join(f"{name} {db:.1f} dB" for name, db in diagnosis.outputs.items())
    lines = [f"{component} in {half.dtype}: {outputs}; {half.half_nodes} nodes in half, {half.casts} casts"]
    for name, value in half.outside.items():
        lines.append(f"weight {name}: {value:.3g} is outside the range of {half.dtype}; its readers stay float32")
    if first is None:
        lines.append(f"no value is below {diagnosis.floor_db:g} dB")
    else:
        lines.append(f"first below {diagnosis.floor_db:g} dB: {_layer_text(first)}")
    lines += ["", f"{'loses dB':>9}{'to dB':>8}{'largest':>10}  node"]
    for layer in diagnosis.worst():
        lines.append(f"{layer.drop:>9.1f}{layer.db:>8.1f}{layer.largest:>10.3g}  {layer.operator} {layer.output}")
    if first is not None:
        lines += ["", f"to leave it in float32: --island {first.island!r}"]
    return lines


def _layer_text(layer: Layer) -> str:
    parity = "is not finite" if layer.db == -math.inf else f"has {layer.db:.1f} dB"
    values = f"after {layer.before_db:.1f} dB; largest value {layer.largest:.3g}"
    return f"{layer.operator} {layer.output} {parity}, {values}"


def _without_infinity(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with null in place of infinity, which JSON does not have."""
    return {name: None if value in (math.inf, -math.inf) else value for name, value in values.items()}
