"""Which kinds of layers lose in fp16: slices of SD3's and Flux's transformers at full width, random weights.

    python benchmarks/half_kinds.py                          every slice
    python benchmarks/half_kinds.py sd3.5-medium -o kinds.json

For each kind: the largest absolute value of what its layers give (fp16 ends at 65504), the least likeness of such a
value in half to float32, and how many dB the output gains if the kind alone stays in float32. Random weights
make no outliers as training does, so that a range which is enough here need not be enough for a trained model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from slices import SLICES, part_of

from sdopt.bench.machine import machine
from sdopt.bundle.disk import write_whole

RESULTS = Path(__file__).parent / "results/half-kinds.json"
SIZES = {"batch": 1, "latent_height": 32, "latent_width": 32, "tokens": 77 + 64}
# the first kind a part of whose name is in that of a weight
KINDS = {
    "adaLN": ("norm1.linear", "norm1_context.linear", "norm.linear"),
    "final layer": ("norm_out", "proj_out"),
    "qk-norm": ("norm_q", "norm_k", "norm_added_q", "norm_added_k"),
    "attention": ("attn.", "attn2."),
    "feed forward": ("ff.", "ff_context.", "proj_mlp"),
    "embedders": ("embed",),
}
DTYPES = {"fp16": "float16"}


def kind_of(node: Any) -> str:
    """The kind of layer that a node computes; that of its operator for one that reads no weight."""
    from sdopt.graph import name_of, names

    for value in node.inputs:
        while value is not None and value.producer() is not None and value.producer().op_type == "Cast":
            value = value.producer().inputs[0]
        weight = names.parse(name_of(value)) if value is not None and value.is_initializer() else None
        if weight is not None:
            # Flux's single blocks end in a proj_out too
            own = weight.parameter.replace("single_transformer_blocks", "").replace(".proj_out", ".ff.proj_out")
            own = own if weight.parameter.startswith(("single", "transformer_blocks")) else weight.parameter
            return next((kind for kind, parts in KINDS.items() if any(part in own for part in parts)), "others")
    return "attention" if node.op_type in ("Attention", "Softmax") else "sums and products without weights"


def measured(name: str, folder: Path) -> dict[str, Any]:
    """The kinds of a slice."""
    from sdopt import graph
    from sdopt.build.diagnose import diagnose
    from sdopt.build.examples import example
    from sdopt.build.simulate import outputs_of, session
    from sdopt.export import component

    component.write_part(part_of(name, SLICES[name][1]), folder, 23, 80.0, lambda line: None, lambda phase: None)
    path = folder / "transformer.onnx"
    model = graph.load(path)
    arrays, kinds = example(graph.specs(model)[0], SIZES), {graph.name_of(node): kind_of(node) for node in model.graph}
    found: dict[str, Any] = {"slice": name}
    for word, dtype in DTYPES.items():
        told = diagnose(path, arrays, dtype=dtype)
        (output,) = told.outputs.values()
        (exact,) = outputs_of(session(path, optimize=True), arrays).values()
        rows: dict[str, Any] = {}
        for layer in told.layers:
            row = rows.setdefault(kinds.get(layer.island, "others"), {"largest": 0.0, "least_db": 200.0})
            row["largest"] = round(max(row["largest"], layer.largest), 2)
            row["least_db"] = round(min(row["least_db"], layer.db), 1)
        for kind, row in rows.items():
            islands = [node for node, own in kinds.items() if own == kind and is_float(model, node)]
            if islands:
                row["gain_db"] = round(output_db(path, arrays, exact, dtype, islands, folder) - output, 1)
        found[word] = {"output_db": round(output, 1), "kinds": rows}
    return found


def is_float(model: Any, name: str) -> bool:
    from sdopt import graph

    node = next(node for node in model.graph if node.name == name)
    return node.op_type != "Cast" and any(graph.is_float(value) for value in (*node.inputs, *node.outputs))


def output_db(path: Path, arrays: Any, exact: Any, dtype: str, islands: Sequence[str], folder: Path) -> float:
    """How near the output in half is to float32, if some nodes stay in float32."""
    from sdopt import graph
    from sdopt.build.half import half
    from sdopt.build.simulate import outputs_of, session, simulate_half
    from sdopt.metrics import psnr

    model, rounded = graph.load(path), folder / "rounded.onnx"
    half(model, dtype=dtype, islands=islands)
    graph.save(simulate_half(model), rounded)
    (output,) = outputs_of(session(rounded, optimize=False), arrays).values()
    return psnr(exact, output)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the slices; 0 if all of it worked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slices", nargs="*", default=["sd3-medium", "sd3.5-medium", "flux-dev"], metavar="SLICE")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for name in args.slices:
        with tempfile.TemporaryDirectory(prefix="kinds-") as own:
            rows.append(measured(name, Path(own)))
        print(json.dumps(rows[-1], indent=1))
        write_whole(args.output, json.dumps({"machine": machine(), "units": "dB", "slices": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
