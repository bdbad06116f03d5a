"""`sdopt bench BUNDLE` times a bundle alone, and prints a table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sdopt.cli.main import main
from tests.conftest import EMOJI_BUNDLE


def test_a_bundle_is_timed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(EMOJI_BUNDLE), "--rounds", "2", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\| picture, end to end \| +[\d.]+ \| +[\d.]+ \| +[\d.]+ \|", out)
    assert "20 steps, guidance 4, 1 image, ort in fp32" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json", "a.json"], "--json: a comparison needs --baseline CHECKPOINT"),
        (["--peer", "a=b", "--report", "a.md"], "--peer, --report: a comparison needs --baseline"),
        (["--rounds", "0"], "--rounds 0 --warmup 1; allowed are 1 or more rounds"),
        (["--threads", "0"], "--threads 0; allowed is 1 or more"),
        (["--baseline", "b", "--json", "."], "--json . is a folder; name a file"),
    ],
)
def test_what_cannot_be_done_alone_is_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(EMOJI_BUNDLE), *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--json", "file/r.json"], "/file/r.json: there is no folder"),
        (["--json", "new/r.json", "--report", "x" * 240 + ".md"], "this name is too long by"),
        (["--report", "half.md"], "half.md: it has to have both <!-- bench:start -->"),
        (["--report", "latin.md"], "latin.md: its text cannot be read"),
    ],
)
def test_where_a_comparison_is_written_is_checked_before_it_is_measured(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("half.md").write_text("<!-- bench:start -->")
    Path("latin.md").write_bytes(b"\xe9")
    before = sorted(tmp_path.iterdir())
    assert main(["bench", "no-bundle", "--baseline", "no-checkpoint", *flags]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_where_a_report_is_written_is_checked_before_the_records_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for words in (["-o", tmp_path / "file/r.md"], ["-o", tmp_path / "r.md", "--plots", tmp_path / "file"]):
        assert main(["bench", "report", "no-record.json", *map(str, words)]) == 2
        assert f"{words[-2]} {tmp_path}/file" in capsys.readouterr().err
