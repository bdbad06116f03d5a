"""`sdopt tune`: the search on made-up numbers, the record, and the command on the embedded model."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdopt
from sdopt.bench.tune_choose import Choice, plot, presets, table
from sdopt.bench.tune_record import Board, Settings
from sdopt.bench.tune_run import Bench, Reference
from sdopt.bench.tune_search import Candidate, Point, Score, frontier, gaps, point, rungs, search, survivors
from sdopt.bench.tune_space import Wanted, engines_here, levers, space
from sdopt.build.jobs import build
from sdopt.bundle.presets import preset_names, read_preset
from sdopt.cli.main import main
from sdopt.cli.tune import decibels, seconds
from sdopt.errors import BackendError, UsageError
from sdopt.metrics import ssim
from tests.conftest import ROOT

SETTINGS = Settings("digest", ("a cat", "a dog"), "100 steps", 64, 64, 1, "a processor", "1.0")
TINY = [
    "--backend", "ort", "--precision", "fp32", "--sampler", "dpmpp_2m", "--steps", "3", "5", "--pictures", "2",
    "--reference-steps", "6", "--threads", "1",
]  # fmt: skip


def candidate(number: int, **keywords: Any) -> Candidate:
    return Candidate("ort", "fp32", {"num_inference_steps": number, **keywords})


def at(number: int, seconds: float, psnr_db: float, precision: str = "fp32", **keywords: Any) -> Point:
    return Point(Candidate("ort", precision, {"num_inference_steps": number, **keywords}), 1, seconds, psnr_db, 0.9)


def slow_ssim(x: Any, y: Any) -> float:
    """Equation 13 of Wang et al. 2004 at each window, with its weights in two dimensions."""
    away = np.arange(11) - 5.0
    weights = np.exp(-(away[:, None] ** 2 + away[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values: list[float] = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            cov = (weights * (a - mean_a) * (b - mean_b)).sum()
            first = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            values.append(first * (2 * cov + 9e-4) / (var_a + var_b + 9e-4))
    return float(np.mean(values))


def test_ssim_is_that_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    x = rng.random((14, 17, 3)).astype(np.float32)
    for y in (x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), 1 - x, np.full_like(x, 0.5)):
        expected = np.mean([slow_ssim(x[..., c], y[..., c]) for c in range(3)])
        assert ssim(x, y) == pytest.approx(expected, abs=1e-9)
        assert ssim(255 * x, 255 * y, peak=255) == pytest.approx(expected, abs=1e-6)
        assert ssim(np.stack([x, x]), np.stack([y, x])) == pytest.approx((expected + 1) / 2, abs=1e-9)
    assert ssim(x, x) == 1
    for wrong in (x[:5], x[:10]):
        with pytest.raises(UsageError):
            ssim(x, wrong)
    with pytest.raises(UsageError, match="11x11"):
        ssim(x[:10], x[:10])


def test_the_error_is_averaged_and_not_the_decibels() -> None:
    one = point(candidate(1), [Score(1.0, 20.0, 0.8), Score(9.0, 40.0, 1.0), Score(2.0, 40.0, 0.9)])
    assert (one.pictures, one.seconds, one.ssim) == (3, 2.0, pytest.approx(0.9))
    assert one.psnr_db == pytest.approx(-10 * np.log10((1e-2 + 2e-4) / 3))


POINTS = [at(1, 1.0, 20.0), at(2, 2.0, 30.0), at(3, 2.5, 29.0), at(4, 3.0, 30.0), at(5, 4.0, 35.0), at(6, 4.0, 22.0)]


def test_the_frontier_and_how_far_others_are_below_it() -> None:
    assert [p.candidate.keywords["num_inference_steps"] for p in frontier(POINTS)] == [1, 2, 5]
    assert list(gaps(POINTS).values()) == [0, 0, 1, 0, 0, 13]
    assert survivors(POINTS, 1) == [POINTS[i].candidate for i in (0, 1, 3, 4)]
    assert survivors(POINTS, 1, {POINTS[5].candidate.key}) == [POINTS[i].candidate for i in (0, 1, 3, 4, 5)]
    assert frontier([]) == []


def test_rungs_double() -> None:
    assert [rungs(n) for n in (1, 2, 3, 8, 9)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 9]]


def test_a_search_drops_what_is_dominated_and_comes_to_the_frontier_of_all() -> None:
    rng = random.Random(1)
    true = {n: (1 + rng.random(), 20 + 20 * rng.random()) for n in range(64)}
    made: dict[str, list[Score]] = {}

    def measure(left: Sequence[Candidate], picture: int, may_end: bool) -> None:
        assert may_end == (picture == 0)
        for one in left:
            taken, decibels = true[one.keywords["num_inference_steps"]]
            scores = made.setdefault(one.key, [])
            assert len(scores) == picture
            scores.append(Score(taken, decibels, 0.9))

    everyone = [candidate(n) for n in range(64)]
    worst = max(everyone, key=lambda c: gaps([at(n, *true[n]) for n in true])[c.key])
    found = search(everyone, 8, measure, lambda one: made.get(one.key, []), {worst.key})
    assert all(p.pictures == 8 for p in found)
    expected = frontier([at(n, *true[n]) for n in true])
    assert [p.candidate for p in frontier(found)] == [p.candidate for p in expected]
    assert worst.key in {p.candidate.key for p in found}
    assert sum(map(len, made.values())) < 64 * 8 / 2
    assert min(map(len, made.values())) == 1


def test_candidates_without_a_picture_are_left_out() -> None:
    scores = {candidate(n).key: [Score(1.0, 30.0, 0.9)] * n for n in range(3)}
    found = search([candidate(n) for n in range(3)], 2, lambda *_: None, lambda one: scores[one.key])
    assert [p.candidate for p in found] == [candidate(2)]


def test_presets_of_a_floor_and_of_a_budget() -> None:
    default = at(20, 5.0, 34.0)
    cached = at(7, 0.5, 36.0, cache_interval=2)
    rounded = at(8, 0.4, 31.0, precision="int8")
    points = [*POINTS, default, cached, rounded]
    by_floor = presets(points, default, Choice(floor=33.0))
    assert {name: p.candidate.keywords["num_inference_steps"] for name, p in by_floor.items()} == {
        "exact": 5, "balanced": 7, "fast": 8,
    }  # fmt: skip
    by_budget = presets(points, default, Choice(budget=0.9))
    assert (by_budget["balanced"], by_budget["fast"]) == (cached, rounded)
    assert set(presets(points, default, Choice(floor=60.0))) == {"exact"}
    assert presets([default], default, Choice(budget=0.1)) == {"exact": default}
    text = table(points, default, by_floor)
    assert "| fast | 0.4 | 12.50x | 31.0 | 0.900 | ort in int8, num_inference_steps=8 |" in text
    assert "default" in text
    assert "num_inference_steps=6" not in text  # it is beaten
    drawn = ElementTree.fromstring(plot("a < b", points, default, by_floor))
    names = {element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"default", "exact", "balanced", "fast", "a < b"} <= names


def test_a_record_is_taken_up_again_and_no_other_one(tmp_path: Path) -> None:
    path = tmp_path / "tune.json"
    board = Board.open(path, SETTINGS, {})
    board.add(candidate(1), 0, Score(1.5, 30.0, 0.9))
    board.add(candidate(1), 1, Score(1.0, float("-inf"), 0.9))
    board.fail(candidate(2), 0, "black\npicture")
    board.save()
    again = Board.open(path, SETTINGS, {"numpy": "2"})
    assert again.record.measurements == board.record.measurements
    assert again.scores(candidate(1)) == [Score(1.5, 30.0, 0.9), Score(1.0, -1000.0, 0.9)]
    assert (again.scores(candidate(2)), again.failure(candidate(2))) == ([], "black picture")
    assert [again.has(candidate(n), k) for n, k in ((1, 0), (1, 2), (2, 0), (2, 1), (3, 0))] == [
        True, False, True, True, False,
    ]  # fmt: skip
    before = path.read_bytes()
    other = Settings("digest", ("a cat", "a bird"), "100 steps", 64, 64, 4, "a processor", "1.0")
    with pytest.raises(UsageError, match="differs in prompts, threads"):
        Board.open(path, other, {})
    for text in ("{", "[]", before.decode().replace('"picture": 0', '"picture": -1')):
        path.write_text(text)
        with pytest.raises(UsageError, match="no record of a tune"):
            Board.open(path, SETTINGS, {})
        assert path.read_text() == text


def test_numbers_with_units() -> None:
    assert [decibels(text) for text in ("30dB", "30", "27.5 db")] == [30, 30, 27.5]
    assert [seconds(text) for text in ("2s", "2", "800ms", ".5")] == [2, 2, 0.8, 0.5]


def test_the_space_of_the_embedded_model(own_folders: Path, bundle: sdopt.Bundle) -> None:
    wanted = Wanted(("ort",), ("fp32",), ("", "ddim", "dpmpp_2m/karras"), (4, 20))
    assert engines_here(bundle, wanted) == [("ort", "fp32")]
    with sdopt.load(bundle.path, "ort", precision="fp32", threads=1, verify=False) as pipe:
        tried = space(pipe, ("ort", "fp32"), wanted)
        assert {one.keywords.get("sampler") for one in tried} == {None, "dpmpp_2m"}  # ddim is the model's own
        assert len(tried) == 2 * 2 * 3  # samplers, steps, intervals
        assert levers(pipe, wanted)[-1] == [{}]
    build(bundle, "ort", cache_depth=1, report=lambda line: None)
    with sdopt.load(bundle.path, "ort", precision="fp32", threads=1, verify=False) as pipe:
        tried = space(pipe, ("ort", "fp32"), wanted)
        assert {one.keywords.get("cache_interval") for one in tried} == {None, 2, 3}
        assert {one.keywords.get("cache_depth") for one in tried} == {None, 1}
    with pytest.raises((BackendError, UsageError), match="nothere"):
        engines_here(bundle, Wanted(("nothere",)))


def test_what_fails_is_kept_with_its_reason_and_not_tried_again(bundle: sdopt.Bundle) -> None:
    board, unbuilt = Board.open(None, SETTINGS, {}), candidate(4, cache_interval=2, cache_depth=1)
    with Bench(bundle, SETTINGS.prompts, Reference(2), 1, [("ort", "fp32")]) as bench:
        bench.measure([unbuilt, candidate(2)], 0, board)
        bench.measure([unbuilt, candidate(2)], 1, board)
        assert "sdopt build" in board.failure(unbuilt)
        assert board.pictures == 3
        (same, _) = board.scores(candidate(2))
        assert (same.psnr_db, same.ssim) == (200, 1)  # it is the reference
        with pytest.raises(UsageError, match="--reference-sampler"):
            Bench(bundle, SETTINGS.prompts, Reference(2, "euler_a"), 1, []).exact(0)


@pytest.mark.parametrize(("memory", "most"), [(1, 1), (1 << 50, 2)])
def test_engines_that_do_not_fit_beside_each_other_are_open_one_at_a_time(
    memory: int, most: int, bundle: sdopt.Bundle
) -> None:
    engines = [("ort", "fp32"), ("ort:cpu", "fp32")]
    tried, board = (
        [Candidate(*engine, {"num_inference_steps": 2}) for engine in engines],
        Board.open(None, SETTINGS, {}),
    )
    with Bench(bundle, SETTINGS.prompts, Reference(2), 1, engines, memory) as bench:
        bench.measure(tried, 0, board)
        assert len(bench.opened) == most
    assert bench.opened == []
    assert [board.scores(one)[0].psnr_db for one in tried] == [200, 200]


def test_when_the_time_is_up_the_rest_is_left_out(bundle: sdopt.Bundle) -> None:
    tried, board = [candidate(n) for n in (2, 3, 4)], Board.open(None, SETTINGS, {})
    with Bench(bundle, SETTINGS.prompts, Reference(2), 1, [("ort", "fp32")]) as bench:
        bench.measure(tried, 0, board, seconds=1e-9)
        made = board.pictures
        assert made <= 1
        bench.measure(tried, 0, board, seconds=1000)
    assert board.pictures == 3


def test_a_run_that_was_killed_goes_on_and_its_presets_make_pictures(
    bundle: sdopt.Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, drawing = tmp_path / "tune.json", tmp_path / "tune.svg"
    command = ["tune", str(bundle.path), *TINY, "--budget", "1000s", "-o", str(path), "--plot", str(drawing)]
    process = subprocess.Popen([sys.executable, "-m", "sdopt", *command], cwd=ROOT, env={**os.environ})
    end = time.monotonic() + 120
    while not path.exists() or len(json.loads(path.read_text())["measurements"]) < 2:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = json.loads(path.read_text())["measurements"]
    assert preset_names(bundle) == ()
    assert main(command) == 0
    printed = capsys.readouterr()
    assert f"{len(kept)} pictures are measured already" in printed.err
    assert "balanced" in printed.out
    record = json.loads(path.read_text())
    assert record["measurements"][: len(kept)] == kept
    made = [json.dumps([one["keywords"], one["picture"]]) for one in record["measurements"]]
    assert len(made) == len(set(made))
    assert set(record["presets"]) == {"default", "exact", "balanced", "fast"} == {"default", *preset_names(bundle)}
    preset = read_preset(bundle, "balanced")
    assert preset.psnr_db == pytest.approx(record["presets"]["balanced"]["psnr_db"], abs=0.01)
    ElementTree.parse(drawing)
    assert main(command) == 0  # nothing is left to measure
    assert json.loads(path.read_text())["measurements"] == record["measurements"]
    with sdopt.load(bundle.path, preset="balanced", threads=1, verify=False) as pipe:
        assert pipe.plan("a cat").remarks == ()
        assert pipe.plan("a cat").options["num_inference_steps"] == preset.keywords.get("num_inference_steps")


def test_a_floor_that_nothing_reaches(bundle: sdopt.Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tune", str(bundle.path), *TINY, "--steps", "2", "--pictures", "1", "--floor", "150dB", "--no-presets"]
    assert main(command) == 5
    assert "no preset balanced: nothing has at least 150 dB; the best is" in capsys.readouterr().err
    assert preset_names(bundle) == ()


WRONG = {
    "an empty prompt file": (["--prompts", "empty.txt"], "there is no prompt in it"),
    "no prompt file": (["--prompts", "none.txt"], "--prompts none.txt: it cannot be read"),
    "no pictures": (["--pictures", "0"], "--pictures 0; allowed are 1 to 1000"),
    "no minutes": (["--minutes", "0"], "--minutes 0; allowed"),
    "one step": (["--reference-steps", "1"], "allowed are 2 or more"),
    "no steps": (["--steps", "0"], "--steps 0; allowed"),
    "no folder": (["-o", "nothere/tune.json"], "there is no folder"),
    "an unknown backend": (["--backend", "nothere"], "nothere"),
    "an unknown backend beside another": (["--backend", "ort", "--backend", "nothere"], "nothere"),
    "an unknown precision": (["--precision", "fp32", "--precision", "fp7"], "fp7"),
    "an unknown sampler": (["--sampler", "nothere"], "'nothere' is unknown"),
    "an unknown schedule": (["--sampler", "euler/nothere"], "nothere"),
    "a sampler that draws noise": (["--sampler", "euler_a"], "--sampler euler_a draws noise"),
    "too many steps": (["--steps", "5", "99999"], "99999"),
    "one file for two": (["-o", "a.svg", "--plot", "a.svg"], "name two files"),
    "a record of something else": (["-o", "empty.txt"], "no record of a tune"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused_before_the_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n  \n")
    options, words = WRONG[name]
    assert main(["tune", "--floor", "30dB", *options]) in (2, 4)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--floor", "30dB", "--budget", "2s"], ["--floor", "2s"], ["--budget", "-1"]])
def test_a_floor_or_a_budget_is_needed(options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tune", *options])
    assert ended.value.code == 2
