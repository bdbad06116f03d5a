"""Tables and plots say what the records say, and nothing is quoted that is another picture."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from sdopt.bench.report import report, short_report
from sdopt.cli.main import main
from tests.bench.records import CASE, record, side, steady


def run(picture_db: float = 100.0) -> dict[str, Any]:
    return record(
        side("sdopt", {"unet": [0.010] * 5, "picture": [0.5] * 5, "cold_start": steady(2.0)}, picture_db),
        side("eager-fp32", {"unet": [0.020] * 5, "picture": [0.8] * 5, "cold_start": [6.0] * 8}, 200.0),
        side("fast", {"picture": [0.25] * 5}, 31.0, kind="peer", versions={"fastlib": "9.9"}),
        side("broken", {}, None, failed="OSError: no such\nlibrary"),
    )


def rows(text: str) -> dict[str, list[str]]:
    """The cells of every table row, by its first cell."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines}


def test_the_tables_are_the_timings() -> None:
    text, _ = report([run()])
    table = rows(text)
    assert table["ms, median (p10-p90)"] == ["sdopt", "eager-fp32", "fast"]
    assert table["UNet, one call"] == ["10.0 (10.0-10.0)", "20.0 (20.0-20.0)", "-"]
    assert table["picture, end to end"] == ["500 (500-500)", "800 (800-800)", "250 (250-250)"]
    assert table["peak memory of a fresh process, MB"] == ["200"] * 3
    assert table["parity of the picture, dB"] == ["100.0", "200.0", "31.0"]
    assert table["eager-fp32"] == ["1.60x [1.60, 1.60]", "2.00x [2.00, 2.00]", "3.00x [2.97, 3.03]"]


def test_where_another_is_faster_the_table_says_so() -> None:
    assert rows(report([run()])[0])["fast"] == ["0.50x [0.50, 0.50] (fast is faster)", "-", "-"]


def test_it_tells_machine_versions_and_command_and_what_failed() -> None:
    text, _ = report([run()])
    for words in ("Abacus 9000, 2 cores, 8 GB", "python 3.12.0, sdopt 0.1.0", "fast: fastlib 9.9", "2 threads"):
        assert words in text
    assert "    sdopt bench BUNDLE --baseline CHECKPOINT\n" in text
    assert "- broken could not be measured: OSError: no such\n" in text
    assert "- below the floors, or not to be compared (another picture): fast" in text
    assert "was busy" not in text
    assert "was busy" in report([record(*run()["results"][0]["sides"], load_before=1.5)])[0]


def test_below_the_floor_nothing_is_quoted_and_the_speed_is_struck() -> None:
    text, plots = report([run(picture_db=31.0)])
    assert rows(text)["eager-fp32"] == ["not quoted"] * 3
    assert "~~1.60x eager-fp32~~" in text
    assert "sdopt's parity is 31.0 dB (picture), 31.0 dB (UNet); the floors are 60 and 80 dB" in text
    assert not [name for name in plots if name.endswith("speedup.svg")]


def steps(count: int, seconds: float) -> dict[str, Any]:
    case = dataclasses.replace(CASE, name=f"steps-{count}", steps=count)
    return record(side("sdopt", {"picture": [seconds] * 5}), case=case)


def test_every_plot_is_an_svg_for_light_and_dark_and_is_shown() -> None:
    text, plots = report([run(), steps(5, 0.2), steps(10, 0.3)], folder="plots")
    assert len(plots) == 5
    for name, svg in plots.items():
        root = ET.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme: dark" in svg
        assert f"](plots/{name})" in text
    words = "".join(ET.fromstring(plots["bench-1-one-speedup.svg"]).itertext())
    assert "1.60x" in words
    assert "3.00x" in words


def test_cost_against_steps_joins_the_cases_that_differ_in_nothing_else() -> None:
    _, plots = report([run(), steps(5, 0.2), steps(10, 0.3)])
    curve = ET.fromstring(plots["bench-steps-1-emoji.svg"])
    (line,) = curve.iter("{http://www.w3.org/2000/svg}polyline")
    assert len(line.attrib["points"].split()) == 3  # 5, 10 and 20 steps
    assert not [name for name in plots if "pixels" in name]


def test_curves_have_a_table_of_ratios_and_need_no_tables_of_their_own() -> None:
    def batch(count: int, ours: float, theirs: float) -> dict[str, Any]:
        case = dataclasses.replace(CASE, name=f"batch-{count}", batch=count)
        sides = [side(n, {"picture": [s] * 5}) for n, s in (("sdopt", ours), ("eager-fp32", theirs))]
        return record(*sides, case=case)

    text, plots = report([], more=[batch(1, 0.5, 1.0), batch(4, 2.0, 3.0)])
    assert list(plots) == ["bench-images-1-emoji.svg"]
    assert "(case `batch-1`)" not in text
    assert rows(text)["1"] == ["0.5", "1", "2.00x [2.00, 2.00]"]
    assert rows(text)["4"] == ["2", "3", "1.50x [1.50, 1.50]"]


def test_a_curve_below_the_floor_has_no_ratios() -> None:
    def batch(count: int) -> dict[str, Any]:
        case = dataclasses.replace(CASE, name=f"batch-{count}", batch=count)
        ours, *others = (side(n, {"picture": [1.0] * 5}, db) for n, db in (("sdopt", 31.0), ("eager-fp32", 200.0)))
        return record(ours, *others, side("fast", {"picture": [0.5] * 5}, 31.0, kind="peer"), case=case)

    text, _ = report([], more=[batch(1), batch(4)])
    assert rows(text)["images"] == ["eager-fp32, s", "fast, s"]
    assert rows(text)["1"] == ["1", "0.5"]


def test_a_strange_name_stays_a_name() -> None:
    entry = run()
    entry["results"][0]["sides"][2]["name"] = "<b>&|"
    entry["results"][0]["case"]["name"] = "../../one@cuda:0"
    text, plots = report([entry])
    assert all(ET.fromstring(svg) is not None for svg in plots.values())
    assert set(plots) == {"bench-1-one-cuda-0-latency.svg", "bench-1-one-cuda-0-speedup.svg"}
    assert "| <b>&\\| |" in text


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run()))
    return path


def test_the_command_fills_in_what_is_between_the_marks(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Before\n<!-- bench:start -->\nold figures\n<!-- bench:end -->\nafter\n")
    for _ in range(2):
        assert main(["bench", "report", str(results), "-o", str(readme), "--plots", str(tmp_path / "plots")]) == 0
        text = readme.read_text()
        assert text.startswith("# Before\n<!-- bench:start -->")
        assert text.endswith("<!-- bench:end -->\nafter\n")
        assert "old figures" not in text
        assert text.count("1.60x [1.60, 1.60]") == 1
    assert "](plots/bench-1-one-latency.svg)" in text
    assert (tmp_path / "plots/bench-1-one-latency.svg").exists()


def test_a_single_mark_is_refused_and_the_file_is_kept(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:end --> mine")
    assert main(["bench", "report", str(results), "-o", str(readme)]) == 2
    assert readme.read_text() == "<!-- bench:end --> mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "run.json"]


def overview(*records: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """(the rows of the short report, its plots)"""
    text, plots = short_report(list(records))
    return rows(text), plots


def test_the_short_report_compares_with_diffusers_and_with_the_fastest_that_makes_the_same_picture() -> None:
    fast = {"name": "fast", "kind": "peer", "seconds": {"picture": [0.4] * 5}}
    entry = run()
    entry["results"][0]["sides"].append({**side("slow", {"picture": [0.45] * 5}), **fast})
    entry["results"][0]["sides"][2]["name"] = "another picture"
    table, plots = overview(entry)
    assert table["emoji 128x128, 20 steps"] == [
        "500 ms", "800 ms", "1.60x [1.60, 1.60]", "fast 0.80x [0.80, 0.80]", "100.0",
    ]  # fmt: skip
    assert table["emoji, cold start to first picture"] == ["2 s", "6 s", "3.00x [2.97, 3.03]", "-", "100.0"]
    words = "".join(ET.fromstring(plots["bench-overview.svg"]).itertext())
    assert "500 ms" in words
    assert "another picture *" in words
    assert "broken" not in words


def test_the_short_report_quotes_nothing_below_the_floor_and_leaves_out_single_cold_starts() -> None:
    entry = run(picture_db=31.0)
    entry["results"][0]["sides"][0]["seconds"]["cold_start"] = [2.0]
    table, plots = overview(entry)
    assert table["emoji 128x128, 20 steps"] == ["500 ms", "800 ms", "not quoted", "-", "31.0"]
    assert len(table) == 2  # the head is the other one
    assert plots == {}


def test_the_marks_of_a_page_say_which_report_it_wants(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Before\n<!-- bench-overview:start -->\nold\n<!-- bench-overview:end -->\nafter\n")
    assert main(["bench", "report", str(results), "-o", str(readme), "--plots", str(tmp_path / "plots")]) == 0
    text = readme.read_text()
    assert text.startswith("# Before\n<!-- bench-overview:start -->")
    assert text.endswith("<!-- bench-overview:end -->\nafter\n")
    assert "(case `one`)" not in text
    assert "](plots/bench-overview.svg)" in text
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["bench-overview.svg"]
