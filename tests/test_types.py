"""What an editor knows: names that it completes equal the tables, and a user's program has the types that it should."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import sdopt
from sdopt.engine import BACKENDS, PRECISIONS
from sdopt.engine.names import BackendName, MemoryName, PrecisionName
from sdopt.engine.pool import MEMORY
from sdopt.request.keywords import KEYWORDS, documentation
from sdopt.request.options import Options
from sdopt.samplers import SAMPLERS, SCHEDULES
from sdopt.samplers.names import RngName, SamplerName, ScheduleName
from sdopt.samplers.noise import GPU_THREADS
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (SamplerName, SAMPLERS),
        (ScheduleName, SCHEDULES),
        (RngName, ("cpu", "numpy", "cuda", *(f"cuda:{gpu}" for gpu in GPU_THREADS))),
        (BackendName, ("auto", *BACKENDS)),
        (PrecisionName, PRECISIONS),
        (MemoryName, MEMORY),
    ],
)
def test_the_names_that_an_editor_completes_are_those_of_the_table(names: object, table: tuple[str, ...]) -> None:
    assert sorted(get_args(names)) == sorted(table)


def test_keywords_have_the_types_that_complete() -> None:
    hints = Options.__annotations__
    for name, names in (("sampler", SamplerName), ("schedule", ScheduleName), ("rng", RngName)):
        kinds = get_args(get_args(hints[name])[0])
        assert names in kinds
        assert str in kinds


def test_every_keyword_is_documented_where_an_editor_shows_it() -> None:
    text = documentation()
    assert f"\n{text}\n" in str(Options.__doc__), f"the docstring of Options should have\n{text}"
    for method in (sdopt.Pipeline.__call__, sdopt.Pipeline.denoise):
        assert all(f" {name}: " in str(method.__doc__) for name in list(KEYWORDS)[1:])
    assert not re.findall(r"(?<![\w-])--?[a-z]\S*", text)  # no flag of the command line


PROGRAM = """
import sdopt

def make(sampler: str, backend: str, output_type: str, precision: str) -> None:
    pipe = sdopt.load("sd15", backend=backend, precision=precision, memory="low")
    reveal_type(pipe("a", sampler=sampler, schedule="karras", rng="cuda:a100", prompt_style="a1111").images)
    reveal_type(pipe("a", sampler="DPM++ 2M Karras", progress=True, output_type="np").images)
    reveal_type(pipe("a", output_type=output_type).images)
    for step in pipe.denoise("a", seed=[1, 2], num_images_per_prompt=2, sampler="euler"):
        print(step.sample.shape)
    pipe.set_progress_bar_config(disable=True)
    sdopt.export("checkpoint", "bundle", steps=20, progress=lambda phase, done, of: print(phase, done, of))
    sdopt.sampler_table({"_class_name": "DDIMScheduler"}, 10, sampler=sampler, schedule="simple")
    with sdopt.open_engine(pipe.bundle, "unet", "ort:cuda") as unet:
        unet(sample=pipe.encode(["a"]))

pipe = sdopt.load(backend="openvino")
pipe("a", samplr="euler")  # wrong: a keyword that does not exist
pipe("a", num_inference_steps="20")  # wrong: a text
"""


@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")
def test_a_program_of_a_user_has_its_types_and_its_mistakes_are_seen(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)], "typeCheckingMode": "strict"}))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", tmp_path],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    findings = json.loads(done.stdout)["generalDiagnostics"]
    wrong = [number for number, line in enumerate(PROGRAM.splitlines()) if "# wrong" in line]
    assert [f["range"]["start"]["line"] for f in findings if f["severity"] == "error"] == wrong, findings
    revealed = [f["message"].split(" is ")[1] for f in findings if f["severity"] == "information"]
    assert [kind.partition("[")[0] for kind in revealed] == ['"list', '"ndarray', '"Any"']
