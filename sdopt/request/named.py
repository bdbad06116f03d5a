"""Pictures by the names of the adapters that see them; one without a name is for the only adapter of its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sdopt.bundle.adapter import CONTROLNET, IP_ADAPTER, T2I_ADAPTER, TINY_VAE, UNION, Adapter, adapter_names
from sdopt.bundle.files import Bundle
from sdopt.errors import SdoptError, UsageError

OpenAdapter = Callable[[str], Adapter]
TITLES = {  # what users call a kind
    CONTROLNET: "ControlNet",
    UNION: "union ControlNet",
    T2I_ADAPTER: "T2I-Adapter",
    IP_ADAPTER: "IP-Adapter",
    TINY_VAE: "tiny autoencoder",
}


def named(
    keyword: str, kinds: Sequence[str], given: Mapping[str, Any], bundle: Bundle, open_adapter: OpenAdapter
) -> dict[str, Any]:
    """What was given by the names of the adapters that it is for; one that has no name stands under "".

    Raises: UsageError where it has no name, and the bundle has no adapter of these kinds or more than one.
    """
    if set(given) != {""}:
        return dict(given)
    there = list(of_kinds(kinds, bundle, open_adapter))
    if len(there) == 1:
        return {there[0]: given[""]}
    title = TITLES[kinds[0]]
    if not there:
        source = title.upper().replace("-", "_")
        raise UsageError(
            f"{keyword}: {bundle.path} has no {title}; add one: sdopt export {source} --onto {bundle.path} --name NAME",
            keyword,
        )
    raise UsageError(f"{keyword}: this bundle has {', '.join(there)}; say which: {{{there[0]!r}: ...}}", keyword)


def of_kinds(kinds: Sequence[str], bundle: Bundle, open_adapter: OpenAdapter) -> Iterator[str]:
    """The adapters of these kinds. One that cannot be opened counts too, where it is the only adapter: it says why."""
    names = adapter_names(bundle)
    for name in names:
        try:
            if open_adapter(name).manifest.kind in kinds:
                yield name
        except SdoptError:
            if len(names) == 1:
                raise
