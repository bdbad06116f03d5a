"""Prompts of a command line: by their place, from a file, or from stdin; and the seeds of their pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sdopt.errors import UsageError

STDIN = "-"
MAX_FILE_BYTES = 16 << 20


def read_prompts(typed: Sequence[str], file: str | None) -> list[str]:
    """The prompts that a command names: those typed, or the lines of a file; `-` is stdin. Empty lines are left out.

    Raises: UsageError for a file that cannot be read, that is not UTF-8 or that holds no prompt, and for both at once.
    """
    if list(typed) == [STDIN] and file is None:
        file, typed = STDIN, ()
    if file is None:
        for prompt in typed:
            check_text("PROMPT", prompt)
        return list(typed)
    if typed:
        raise UsageError("PROMPT and --prompt-file: give one of them")
    lines = _decoded(file).split("\n")  # a "\r" before it goes with the other spaces; nothing else ends a line
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--prompt-file {file}: there is no prompt in it; write one in each line")
    return prompts


def _decoded(file: str) -> str:
    """The text of a file or of stdin."""
    try:
        if file == STDIN:
            if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]
                raise OSError("stdin is closed")
            content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with Path(file).open("rb") as stream:
                content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"--prompt-file {file}: it cannot be read: {error.strerror or error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise UsageError(f"--prompt-file {file}: allowed are {MAX_FILE_BYTES >> 20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"--prompt-file {file}: line {line} is not UTF-8; save the file as UTF-8") from error


def check_text(name: str, text: str) -> None:
    """Raises: UsageError for a text that was typed or passed in another encoding than UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} {text!r} is not UTF-8: the script or the terminal that passes it uses another encoding; "
            "save the script as UTF-8, or give the prompt with --prompt-file"
        ) from error


def seeds(text: str) -> int | list[int]:
    """7 of "7", [7, 8] of "7,8"."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, or several: 1 or 1,2,3") from None
    return numbers if len(numbers) > 1 else numbers[0]
