"""`sdopt samplers --plot` draws what the tables say."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from sdopt.cli.main import main

SVG = "{http://www.w3.org/2000/svg}"


def drawn(path: Path, *words: str) -> ElementTree.Element:
    assert main(["samplers", "--plot", str(path), *words]) == 0
    return ElementTree.parse(path).getroot()


def test_a_plot_has_a_falling_curve_for_each_sampler_and_decades_on_its_axis(tmp_path: Path) -> None:
    names = ["euler", "DPM++ 2M Karras", "tcd"]
    root = drawn(tmp_path / "plot.svg", *names)
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert [word for word in words if word in names] == names
    assert {"0.01", "0.1", "1", "10"} <= {*words}
    assert "noise level sigma, 20 steps" in words
    lines = [element.attrib["points"].split() for element in root.iter(f"{SVG}polyline")]
    assert [len(points) for points in lines] == [20, 20, 20]
    for points in lines:
        heights = [float(point.split(",")[1]) for point in points]
        assert heights == sorted(heights)  # y grows downwards


def test_the_numbers_of_many_calls_do_not_cover_one_another(tmp_path: Path) -> None:
    root = drawn(tmp_path / "plot.svg", "euler", "--steps", "200")
    assert len([e for e in root.iter(f"{SVG}text") if e.get("text-anchor") == "middle"]) <= 21


def test_a_plot_is_an_svg_and_has_something_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samplers", "--plot", str(tmp_path / "plot.png")]) == 2
    assert "plots are written as SVG; name it" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_where_a_plot_is_written_is_checked_before_the_tables_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.svg").mkdir()
    for name, message in (
        ("folder.svg", "folder.svg is a folder; name a file, e.g. "),
        ("none/a.svg", "there is no folder "),
        ("file/a.svg", "there is no folder "),
    ):
        assert main(["samplers", "no-sampler", "--plot", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "nowhere"], "--config: the list of samplers does not depend on it; give a sampler's name with"),
        (["--schedule", "magic"], "--schedule: the list"),
        (["--eta", "9", "--strength", "1"], "--strength, --eta: the list"),
        (["--steps", "-5"], "--steps -5; allowed are whole numbers from 1"),
        (["--steps", "0", "--print", "euler"], "--steps 0; allowed"),
        (["euler"], "euler: samplers are named for --plot FILE.svg; --print euler prints its table"),
        (["euler", "--print", "ddim"], "euler: samplers are named for --plot FILE.svg; leave it out"),
        (["--print", "ddim", "--plot", "a.svg"], "--print and --plot: give one of them"),
    ],
    ids=str,
)
def test_what_a_list_or_a_table_would_ignore_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["samplers", *words]) == 2
    assert message in capsys.readouterr().err
