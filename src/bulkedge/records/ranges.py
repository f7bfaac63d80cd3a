"""The numbers that a record may hold: finite, and in the range of what they count or measure.

A record is a file, which may have been edited or damaged.  What is computed from it, charts and
advice, need not expect a score of NaN or a matrix of 10³⁰ rows.
"""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, Field

from bulkedge.checkpoint.header import BITS

MOST = 2**48
ROUNDING = 1e-6
"""By how much a cosine, or a probability, may exceed one."""
NORM_ERROR = 1e-3
"""The relative error of a spectral norm is far below this."""

Count = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[int, Field(ge=1, le=MOST)]
Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1 + ROUNDING, allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _known_dtype(text: str) -> str:
    if text not in BITS:
        raise ValueError(f"expected a dtype of safetensors, got {text!r:.40}")
    return text


def _moment(text: str) -> str:
    if datetime.datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"expected a time with its zone, got {text!r:.40}")
    return text


Dtype = Annotated[str, AfterValidator(_known_dtype)]
Kind = Annotated[str, Field(pattern=r"^[a-z]\w{2,30}$")]
"""What an adapter, or the form that an update is stored in, is called."""
Moment = Annotated[str, AfterValidator(_moment)]


def check_between(low: float, value: float, high: float, name: str) -> None:
    """Raise unless a value lies in its interval, but for rounding.

    Args:
        low: Its lower end.
        value: The value.
        high: Its upper end.
        name: What it is called.

    Raises:
        ValueError: If it does not.
    """
    if not low - ROUNDING <= value <= high + ROUNDING:
        raise ValueError(f"expected the {name} within its interval, got {value} of {low} to {high}")


def check_frobenius(ratio: float, spectral: float, rank: int) -> None:
    """Raise unless a ratio of Frobenius norms fits that of the spectral norms.

    Args:
        ratio: Of the Frobenius norms, each at least the spectral norm and at most √rank of it.
        spectral: Of the spectral norms.
        rank: The most that a matrix can have.

    Raises:
        ValueError: If it does not.
    """
    spectral, most = min(spectral, sys.float_info.max), (1 + NORM_ERROR) * math.sqrt(rank)
    if not spectral / most <= ratio <= spectral * most:
        raise ValueError(f"a ratio of Frobenius norms does not fit {spectral}: {ratio}")


def check_parts(parts: Iterable[float], whole: float, name: str) -> None:
    """Raise where parts are more than the whole, but for rounding.

    Args:
        parts: The parts, not negative.
        whole: The whole.
        name: What it is called.

    Raises:
        ValueError: If they are.
    """
    total = sum(parts)
    if total > whole * (1 + ROUNDING):
        raise ValueError(f"expected parts of the {name} {whole}, got {total} in all")


def check_ratio(above: float, below: float, ratio: float, name: str) -> None:
    """Raise unless a ratio is that of two numbers, but for rounding.

    Args:
        above: The dividend.
        below: The divisor.
        ratio: Their ratio.
        name: What it is called.

    Raises:
        ValueError: If it is not.
    """
    if abs(above - ratio * below) > ROUNDING * above:
        raise ValueError(f"expected a {name} of {above}/{below}, got {ratio}")
