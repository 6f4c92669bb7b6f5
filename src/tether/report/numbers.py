"""How numbers are written on the page: a real minus sign, no more digits than they carry."""

from __future__ import annotations

import math
from typing import Any

MINUS = "\N{MINUS SIGN}"
MISSING = "\N{EN DASH}"


def as_number(value: Any) -> float:
    """A value read from JSON as a float; NaN for what is missing or is not a number.

    >>> as_number(3), as_number("Infinity"), as_number(None), as_number(True)
    (3.0, inf, nan, nan)
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def number(value: Any, decimals: int | None = None) -> str:
    """Write a number for reading.

    Args:
        value: anything read from JSON.
        decimals: digits after the point; None for as many as four significant digits need.

    Returns:
        The text; an en dash for what is not a number.

    >>> number(-0.123456), number(0.5, 2), number(1234567), number(2.5e-7), number(float("nan"))
    ('−0.1235', '0.50', '1,234,567', '2.5e−7', '–')
    """
    number_ = as_number(value)
    if math.isnan(number_):
        return MISSING
    if math.isinf(number_):
        return "infinite" if number_ > 0 else f"{MINUS}infinite"
    if decimals is not None:
        text = f"{number_:,.{decimals}f}"
        text = text.lstrip("-") if not any(digit in "123456789" for digit in text) else text
    elif number_ == int(number_) and abs(number_) < 1e15:
        text = f"{int(number_):,}"
    elif 1e-4 <= abs(number_) < 1e6:
        text = f"{number_:,.4g}" if abs(number_) < 1e4 else f"{number_:,.0f}"
    else:
        mantissa, exponent = f"{number_:.3g}".split("e") if "e" in f"{number_:.3g}" else (f"{number_:.3g}", "")
        text = f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return text.replace("-", MINUS)


def signed(value: Any, decimals: int) -> str:
    """A change, with its sign.

    >>> signed(0.25, 2), signed(-0.25, 2), signed(0.0, 2)
    ('+0.25', '−0.25', '0.00')
    """
    text = number(value, decimals)
    return f"+{text}" if as_number(value) > 0 and any(digit in "123456789" for digit in text) else text


def duration(seconds: Any) -> str:
    """A time in the units people say.

    >>> duration(42.4), duration(250), duration(7300), duration(None)
    ('42 s', '4 min 10 s', '2 h 1 min', '–')
    """
    total = as_number(seconds)
    if not math.isfinite(total):
        return MISSING
    minutes, rest = divmod(round(total), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
