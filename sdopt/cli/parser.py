"""The parser of the command line: options are written in full, a mistake ends with a short usage, help has examples."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn, cast

VALUE = r"""\[[^\]]*\]|\([^)]*\)|"[^"]*"|'[^']*'|[^\s,;]+"""


class Parser(argparse.ArgumentParser):
    """A parser of one command.

    `brief`: the usage that follows an error, as in `sdopt inspect BUNDLE`.
    """

    def __init__(self, *args: Any, brief: str = "", **settings: Any) -> None:
        settings.setdefault("allow_abbrev", False)  # an option that is added later must not change what a script means
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **settings)
        self.brief = brief
        self.may_be_empty: set[str] = set()  # destinations of texts, such as a prompt, that say something when empty

    def error(self, message: str) -> NoReturn:
        """Print the mistake and a short usage, and end with exit code 2."""
        usage = self.brief or f"{self.prog} [options]"
        self.exit(2, f"sdopt: error: {message}\nusage: {usage}\n`{self.prog} --help` explains every option\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print a help or a mistake; argparse keeps it to itself when that fails."""
        if message:
            (file or sys.stderr).write(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse a command line.

        An argument that nobody takes is an error of the command, so that its usage is shown, and options that are
        spelled nearly like it.
        """
        parsed, left = self.parse_known_args(args, namespace)
        if left:
            command = self.commands.get(getattr(parsed, "command", ""), self)
            command.error(f"{left[0]} is not known here{command.near(left[0])}")
        return parsed

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """The values of an option; argparse takes `--steps=--` for a list without one.

        An empty value is a mistake: that of a variable that is not set in a script.
        """
        given = arg_strings[:1] if action.nargs == argparse.PARSER else arg_strings  # the rest is the command's
        if "" in given and action.dest not in self.may_be_empty:
            text = "it is empty; give a value, or leave it out (is a variable of the script not set?)"
            raise argparse.ArgumentError(action, text)
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "expected one argument")
        return cast(Any, super())._get_values(action, arg_strings)

    @property
    def commands(self) -> dict[str, Parser]:
        """The parsers of the commands below this one, by name."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
                return dict(cast(Any, action).choices)
        return {}

    def near(self, word: str) -> str:
        """The options that are spelled nearly like `word`, as the end of a sentence."""
        import difflib  # late: only an error needs it

        options = [option for option in self._option_string_actions if option.startswith("--")]
        name = word.partition("=")[0]
        near = [option for option in options if option.startswith(name)] if name.startswith("--") else []
        near = near or difflib.get_close_matches(name, options, n=3)
        return f"; there is {', '.join(near)}" if near else ""

    def group(self, title: str) -> Callable[..., argparse.Action]:
        """The `add_argument` of a group of options, which the help shows under this title."""
        return self.add_argument_group(title).add_argument

    def examples(self, *lines: str) -> None:
        """End the help with examples."""
        self.epilog = "\n".join(["examples:", *(f"  {line}" for line in lines)])


def as_typed(message: str) -> str:
    """The text of an error or a remark in the words of the command line: `--steps 0` for `num_inference_steps = 0`.

    Names of keywords that are words of English too, such as `image`, are changed only where a value follows.
    """
    from sdopt.request.keywords import KEYWORDS  # late: only an error needs the table

    for name, keyword in KEYWORDS.items():
        flag = keyword.flag
        if flag is None or name == "prompt" or flag.part is not None:
            continue
        word = flag.names[-1] if flag.names else f"--{name.replace('_', '-')}"
        message = re.sub(rf"(?<![\w-]){name} = ", f"{word} ", message)
        message = re.sub(rf"(?<![\w-]){name}=({VALUE})", lambda m, word=word: f"{word} {_plain(m[1])}", message)
        if "_" in name:
            message = re.sub(rf"(?<![\w-]){name}(?![\w=])", word, message)
    return re.sub(rf"(?<![\w-])(width|height)=({VALUE})", r"\1 \2", message)


def _plain(value: str) -> str:
    """A value as it is typed: without brackets, commas and quotes."""
    return value.strip("[]()\"'").replace(",", "")
