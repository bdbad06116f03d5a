"""What is declared of one keyword, and how one value of it is checked, described and recorded."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal, cast

from sdopt.dataclass import dataclass
from sdopt.errors import UsageError, shown
from sdopt.request.kinds import Kind, PartError


@dataclass(frozen=True)
class Flag:
    """How the command line spells a keyword; without `names` as the keyword itself: `--like-this`.

    `part`: of a flag that is several keywords, as `--size WxH` is `width` and `height`, the place of this one.
    """

    names: tuple[str, ...] = ()
    metavar: str | tuple[str, ...] | None = None
    part: int | None = None


@dataclass(frozen=True)
class Keyword:
    """One keyword of a request.

    `default` is the value that leaving it out means. It is None where that depends on the bundle or on other keywords;
    then `otherwise` says what it is.
    `flag` is None for a keyword that a command line cannot give.
    `record`: whether a picture's PNG carries it: "always", when it is "given", or "never".
    `how`: it changes how a picture is computed, and not which, so that `--replay` takes its flag.
    `optional`: None is the same as leaving it out; `Options` sets it from the type.
    """

    help: str
    kind: Kind
    default: Any = None
    otherwise: str = ""
    flag: Flag | None = field(default_factory=Flag)
    record: Literal["always", "given", "never"] = "given"
    how: bool = False
    optional: bool = True

    def check(self, name: str, value: Any) -> Any:
        """The value in plain Python or NumPy. Raises: UsageError that names the keyword."""
        if value is None and self.optional:
            return self.default
        try:
            return self.kind.read(value)
        except UsageError as error:
            raise UsageError(str(error), name) from None
        except Exception as error:  # a value is any object at all, and may raise anything when it is looked at
            value = error.part if isinstance(error, PartError) else value
            own = f" ({error})" if type(error) is ValueError and error.args else ""
            example = f", e.g. {name}={self.kind.example}" if self.kind.example else ""
            raise UsageError(f"{name} = {shown(value)}{own}; allowed {self.kind.allowed()}{example}", name) from error

    def describe(self, name: str) -> dict[str, Any]:
        """Name, type, range, default and help, as JSON."""
        own = {
            "help": self.help,
            "default": plain(self.default),
            "otherwise": self.otherwise,
            "optional": self.optional,
        }
        return {"name": name, **self.kind.schema(), **own}

    def records(self, value: Any) -> bool:
        """Whether a PNG carries this value."""
        if self.record == "given":
            return value is not None and value != self.default
        return self.record == "always"


def plain(value: Any) -> Any:
    """A value as JSON has it: a tuple is a list."""
    return list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value
