"""The loggers of sdopt: each module has one of its own name, e.g. `sdopt.pipeline`.

The library prints nothing. To read what it does: `logging.basicConfig()` and
`logging.getLogger("sdopt").setLevel("DEBUG")`.
"""

from __future__ import annotations

import logging

logging.getLogger("sdopt").addHandler(logging.NullHandler())  # else Python prints warnings of loggers nobody reads


def logger(name: str) -> logging.Logger:
    """The logger of a module, by its `__name__`."""
    return logging.getLogger(name)
