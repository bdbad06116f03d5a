"""What calls cost on this machine, as measured: seconds of a call of the UNet by its number of images, and of the rest.

    costs.record(kind, pixels, 4, 0.9)        a call with four images took 0.9 s
    costs.call(kind, pixels, 2)               what is known of a call with two
    costs.cap(kind, pixels, 8)                how many images a call should take at most: more would not pay

What was never measured is estimated from what is nearest: the same kind at another size, by the number of pixels.
"""

from __future__ import annotations

from collections.abc import Hashable
from threading import Lock

FIRST_GUESS = 1.0  # seconds, where nothing was measured
LATEST = 0.3  # weight of the newest measurement
PAYS = 0.97  # twice the images must cost less than this, an image


class Costs:
    """Measured seconds by kind, pixels of a picture, and number of images. Safe for threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._bounds: dict[Hashable, int] = {}
        self._curves: dict[Hashable, dict[int, dict[int, float]]] = {}  # kind -> pixels -> images -> seconds

    def record(self, kind: Hashable, pixels: int, images: int, seconds: float) -> None:
        """Take in one measured call."""
        with self._lock:
            curve = self._curves.setdefault(kind, {}).setdefault(pixels, {})
            known = curve.get(images)
            curve[images] = seconds if known is None else known + LATEST * (seconds - known)

    def call(self, kind: Hashable, pixels: int, images: int = 1) -> float:
        """The seconds of one call."""
        with self._lock:
            curve, factor = self._nearest(kind, pixels)
        if not curve:
            return FIRST_GUESS * images
        if images in curve:
            return factor * curve[images]
        known = min(curve, key=lambda n: (abs(n - images), n))
        return factor * curve[known] * images / known

    def bound(self, kind: Hashable, images: int) -> None:
        """No call takes more than so many images."""
        with self._lock:
            self._bounds[kind] = images

    def cap(self, kind: Hashable, pixels: int, most: int) -> int:
        """The largest number of images, at most `most`, up to which each doubling makes an image cheaper."""
        with self._lock:
            curve, _ = self._nearest(kind, pixels)
            most = min(most, self._bounds.get(kind, most))
        best = 1
        while best * 2 <= most and curve.get(best) and curve.get(best * 2):
            if curve[best * 2] > 2 * PAYS * curve[best]:
                return best
            best *= 2
        return most if not curve or 2 * best > most or not curve.get(best * 2) else best

    def curves(self) -> dict[str, dict[int, dict[int, float]]]:
        """All that is known, as JSON has it."""
        with self._lock:
            return {str(kind): {p: dict(c) for p, c in sizes.items()} for kind, sizes in self._curves.items()}

    def _nearest(self, kind: Hashable, pixels: int) -> tuple[dict[int, float], float]:
        """The curve that is nearest, and by what its seconds are multiplied."""
        sizes = self._curves.get(kind) or next((s for k, s in self._curves.items() if _alike(k, kind)), None)
        if sizes is None:
            return {}, 1.0
        nearest = min(sizes, key=lambda size: abs(size - pixels))
        return sizes[nearest], pixels / nearest


def _alike(known: Hashable, kind: Hashable) -> bool:
    """Whether a kind may stand for another one: both are of one bundle, which is the first word of the kind."""
    return isinstance(known, tuple) and isinstance(kind, tuple) and bool(known[:1] == kind[:1])
