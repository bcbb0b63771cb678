"""How exact the CPU's convolutions are: the user's choice between direct sums and faster Winograd tiles."""

from __future__ import annotations

from fastalex import _native

LEVELS = ("highest", "high", "medium")
_level = "high"


def set_conv_precision(precision: str) -> None:
    """Chooses the algorithms that the CPU backend's convolutions may use, from now on and in every thread.

    The error is that of the output (and of each gradient) against float64, as a share of its norm, and its largest
    element as a share of the largest output:

    - ``"highest"``: direct sums alone; float32's rounding in both.
    - ``"high"``: and accurate Winograd tiles; at most 1e-5, and 5e-5.
    - ``"medium"``: and aggressive Winograd tiles; at most 1e-4, and 5e-4.

    bfloat16 and float16 compute as float32 does and round once, at the end. Other backends take no notice.

    Args:
        precision: ``"highest"``, ``"high"`` (the default) or ``"medium"``.

    Raises:
        ValueError: for any other value.
    """
    global _level
    if precision not in LEVELS:
        raise ValueError(f"precision is {precision!r}; it can be one of {', '.join(LEVELS)}")
    _level = precision
    if _native.error is None:
        _native.set_conv_precision(LEVELS.index(precision))


def get_conv_precision() -> str:
    """The precision that :func:`set_conv_precision` chose."""
    return _level
