"""The threshold θ_c of each base: the strength beyond which a generic spike makes an outlier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from bulkedge._errors import InputError
from bulkedge._linmap import LinearMap
from bulkedge.auditing.spikes import measure_base
from bulkedge.intruder import certify
from bulkedge.triplet.solver._start import generic
from bulkedge.update import BaseSpectrum

EXACT_UP_TO = 1024
"""The shorter side up to which all singular values of a base are computed."""
QUADRATURE_STEPS = 24
"""The number of Lanczos steps of the quadrature that replaces them for larger bases."""


class HasBase(Protocol):
    """Anything with a base and a name."""

    @property
    def name(self) -> str:
        """The name of the module."""
        ...

    def base_map(self) -> LinearMap:
        """W0."""
        ...


def base_spectrum(name: str, base: LinearMap) -> BaseSpectrum:
    """The singular values of a base, and the bulk fitted to them.

    Cost: ``svdvals`` where the shorter side is at most 1024, 48 passes where it is longer.

    Args:
        name: For messages.
        base: W0, shape ``(m, n)``.

    Returns:
        The spectrum.

    Raises:
        InputError: If the base has no bulk, is not finite, or is not in memory.
    """
    _require_numbers(name, base)
    shape, exact = base.shape, min(base.shape)
    with torch.no_grad():
        if exact <= EXACT_UP_TO:
            values = torch.linalg.svdvals(base.to_dense().double()).cpu()
        else:
            # an error of 1 leaves the verdict on the start vector open, so that all steps are taken
            like = torch.empty(0, dtype=base.dtype, device=base.device)
            start = generic(base.shape[0], 1, like)
            found = certify(base, start, errors=torch.ones(1), max_steps=QUADRATURE_STEPS)
            values, exact = found.spectrum, len(found.base_sigma)
    spectrum, problem = measure_base(values, (shape[0], shape[1]), exact)
    if spectrum is None:
        raise InputError(f"{name}: expected a base with a bulk, got none ({problem}); leave it out")
    return spectrum


def _require_numbers(name: str, base: LinearMap) -> None:
    """InputError unless a base has finite entries, in memory."""
    if base.device.type == "meta":
        raise InputError(
            f"{name}: expected a base in memory, got one on the meta device; load the weights first"
        )
    if not math.isfinite(base.norm_bound()):
        raise InputError(
            f"{name}: expected a base with finite entries, got NaN or infinity; the weights that "
            "were loaded are damaged, or not loaded yet"
        )


def measure_thresholds(
    matrices: Sequence[HasBase], known: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The threshold θ_c of every matrix by its name.

    Args:
        matrices: The matrices.
        known: Thresholds by name that are not measured again.

    Returns:
        ``{name: θ_c}``.

    Raises:
        InputError: If a base has no bulk, or one that ends in a step, where any spike makes an
            outlier.
    """
    found = {}
    for matrix in matrices:
        theta = (known or {}).get(matrix.name)
        if theta is None:
            theta = base_spectrum(matrix.name, matrix.base_map()).fit.threshold
        if not theta > 0:
            raise InputError(
                f"{matrix.name}: expected a positive threshold, got {theta}: the bulk of the base "
                "ends in a step, and any spike makes an outlier of it; leave it out with modules="
            )
        found[matrix.name] = float(theta)
    return found
