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
