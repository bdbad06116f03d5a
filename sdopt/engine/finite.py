"""What an engine gives must be finite: NaN is an error that names the component, and not a black picture."""

from __future__ import annotations

import numpy as np

from sdopt.bundle.specs import Float32
from sdopt.errors import NumericsError


def refuse_nan(array: Float32, where: str) -> None:
    """Raises: NumericsError if `array`, which came from `where`, holds NaN or infinity."""
    if not np.isfinite(array).all():
        raise NumericsError(
            f"{where}: the output has NaN or infinity. On a half-precision engine try fp32 for this component; "
            "otherwise the weights or the inputs are damaged."
        )
