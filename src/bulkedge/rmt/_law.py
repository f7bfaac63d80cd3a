"""What a law can be asked, and the laws that are images of the arc measure."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bulkedge._errors import InputError

from ._arc import Arc
from ._arrays import analytic, count, elementwise, real


class Law(ABC):
    """A probability measure on the line, with the methods of ``scipy.stats``.

    Every function is vectorised: a number, list or NumPy array gives float64 in NumPy, a torch
    tensor gives a tensor of its device and precision, computed in float64.
    """

    @elementwise
    def pdf(self, x: Tensor) -> Tensor:
        """The density of the continuous part, zero outside it.

        Args:
            x: Any shape; differentiable in the interior.

        Returns:
            The shape of x.
        """
        return keep_nan(x, self._pdf(x))

    @elementwise
    def cdf(self, x: Tensor) -> Tensor:
        """``P(X ≤ x)``, atoms included, relatively accurate in the lower tail.

        Args:
            x: Any shape; differentiable in the interior.

        Returns:
            The shape of x.
        """
        return keep_nan(x, self._cdf(x))

    @elementwise
    def sf(self, x: Tensor) -> Tensor:
        """``P(X > x) = 1 − cdf(x)``, relatively accurate in the upper tail.

        Args:
            x: Any shape; differentiable in the interior.

        Returns:
            The shape of x.
        """
        return keep_nan(x, self._sf(x))

    @elementwise
    def ppf(self, q: Tensor) -> Tensor:
        """The smallest x of the support with ``cdf(x) ≥ q``.

        Args:
            q: Probabilities, any shape.

        Returns:
            The shape of q; no gradient.

        Raises:
            InputError: If a q lies outside [0, 1].
        """
        return self._ppf(_probabilities(q))

    @elementwise
    def isf(self, q: Tensor) -> Tensor:
        """The smallest x of the support with ``sf(x) ≤ q``, accurate for tiny q.

        Args:
            q: Probabilities, any shape.

        Returns:
            The shape of q; no gradient.

        Raises:
            InputError: If a q lies outside [0, 1].
        """
        return self._isf(_probabilities(q))

    def median(self) -> float:
        """``ppf(1/2)``."""
        return self.ppf(0.5)

    @abstractmethod
    def mean(self) -> float:
        """``E X``, atoms included."""

    @abstractmethod
    def var(self) -> float:
        """``E X² − (E X)²``, atoms included."""

    def std(self) -> float:
        """``√var``."""
        return math.sqrt(self.var())

    def support(self) -> tuple[float, float]:
        """The lowest and the highest point, atoms included."""
        points = (*self.bulk_support(), *(place for place, _ in self.atoms()))
        return min(points), max(points)

    @abstractmethod
    def bulk_support(self) -> tuple[float, float]:
        """The two ends of the continuous part."""

    def atoms(self) -> tuple[tuple[float, float], ...]:
        """The (place, mass) of each point that has a mass."""
        return ()

    def rvs(
        self,
        size: int | tuple[int, ...] = (),
        *,
        generator: np.random.Generator | torch.Generator | None = None,
    ) -> Any:
        """Independent draws, ``ppf`` of uniform ones.

        Args:
            size: The shape, or the number of draws.
            generator: The source of randomness; None is a fresh NumPy generator.

        Returns:
            A float64 tensor for a torch generator, on its device; else an array, or a float.

        Raises:
            InputError: If the generator is neither from NumPy nor from torch, or the size is not a
                shape.
        """
        shape = _shape(size)
        if isinstance(generator, torch.Generator):
            options: dict[str, Any] = {"dtype": torch.float64, "device": generator.device}
            return self.ppf(torch.rand(shape, generator=generator, **options))
        generator = np.random.default_rng() if generator is None else generator
        if not isinstance(generator, np.random.Generator):
            raise InputError(
                f"expected a generator of NumPy or torch, got {type(generator).__name__}; "
                "pass np.random.default_rng(seed)"
            )
        return self.ppf(generator.random(shape))

    @abstractmethod
    def _pdf(self, x: Tensor) -> Tensor: ...
    @abstractmethod
    def _cdf(self, x: Tensor) -> Tensor: ...
    @abstractmethod
    def _sf(self, x: Tensor) -> Tensor: ...
    @abstractmethod
    def _ppf(self, q: Tensor) -> Tensor: ...
    @abstractmethod
    def _isf(self, q: Tensor) -> Tensor: ...


class ArcLaw(Law):
    """An increasing image of the arc measure, and atoms outside it.

    A subclass gives the measure, its ends, the density, and where its points lie: with a, b from
    ``_gaps``, ``tan(φ/2) = a/b``.  By default points are ``low + (high − low) sin²(φ/2)``.
    """

    @functools.cached_property
    @abstractmethod
    def _arc(self) -> Arc: ...
    @abstractmethod
    def _density(self, x: Tensor) -> Tensor:
        """The density inside the closed bulk."""

    def _gaps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.bulk_support()
        return (x - low).sqrt(), (high - x).sqrt()

    def _place(self, sine: Tensor, cosine: Tensor) -> Tensor:
        """The point, from those of φ/2."""
        low, high = self.bulk_support()
        width = high - low
        return torch.where(sine < cosine, low + width * sine**2, high - width * cosine**2)

    def _pdf(self, x: Tensor) -> Tensor:
        low, high = self.bulk_support()
        inside = (x >= low) & (x <= high)
        return torch.where(inside, self._density(x.where(inside, (low + high) / 2)), 0.0)

    def _cdf(self, x: Tensor) -> Tensor:
        mass = self._split(x, below=True)
        return sum((weight * (x >= place).to(x) for place, weight in self.atoms()), mass)

    def _sf(self, x: Tensor) -> Tensor:
        mass = self._split(x, below=False)
        return sum((weight * (x < place).to(x) for place, weight in self.atoms()), mass)

    def _split(self, x: Tensor, *, below: bool) -> Tensor:
        """The mass of the bulk on one side of x."""
        low, high = self.bulk_support()
        inside = (x > low) & (x < high)
        a, b = self._gaps(x.where(inside, (low + high) / 2))
        angles = 2 * torch.atan2(a, b), 2 * torch.atan2(b, a)
        mass = self._arc.below(*angles) if below else self._arc.above(*angles)
        outside = self._arc.mass * ((x >= high) if below else (x <= low)).to(x)
        return torch.where(inside, mass, outside)

    def _atoms_around(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The atom below and the one above the bulk; mass 0 at the edge for none."""
        around = [(edge, 0.0) for edge in self.bulk_support()]
        for place, mass in self.atoms():
            around[place >= around[1][0]] = (place, mass)
        return around[0], around[1]

    def _ppf(self, q: Tensor) -> Tensor:
        (low, under), (high, over) = self._atoms_around()
        x = self._between(q - under, self._arc.mass + under - q if over else 1 - q)
        x = torch.where(q <= under, low, x) if under else x
        return torch.where(q > 1 - over, high, x) if over else x

    def _isf(self, q: Tensor) -> Tensor:
        (low, under), (high, over) = self._atoms_around()
        x = self._between(self._arc.mass + over - q if under else 1 - q, q - over)
        x = torch.where(q >= 1 - under, low, x) if under else x
        return torch.where(q < over, high, x) if over else x

    def _between(self, below: Tensor, above: Tensor) -> Tensor:
        """The point of the bulk with these masses below and above it, the smaller one used."""
        left, half = below <= above, self._arc.mass / 2
        angle = torch.empty_like(below)
        angle[left] = self._arc.angle_below(below[left].clamp(0, half))
        angle[~left] = self._arc.angle_above(above[~left].clamp(0, half))
        sine, cosine = (angle / 2).sin(), (angle / 2).cos()
        return self._place(torch.where(left, sine, cosine), torch.where(left, cosine, sine))


class AffineLaw(ArcLaw):
    """An affine image of the arc measure: the ones with a Stieltjes transform in closed form.

    With ``z = mid + κ(ζ + 1/ζ)``, |ζ| ≤ 1 and 4κ the width of the bulk, the transform of the whole
    law is ``ζ/(κ(1 + rζ))``.
    """

    @property
    @abstractmethod
    def _r(self) -> float:
        """The r of the arc measure, signed, of any size."""

    @analytic
    def stieltjes(self, z: Tensor) -> Tensor:
        """``G(z) = ∫ dμ(x)/(z − x)``, atoms included; ``G(z) ~ 1/z`` far out.

        Args:
            z: Real and outside the open bulk, or complex.

        Returns:
            The shape of z; it has a pole at an atom.

        Raises:
            InputError: If a real z lies inside the bulk, where the integral does not exist.
        """
        low, high = self.bulk_support()
        if not z.is_complex() and bool(((z > low) & (z < high)).any()):
            raise InputError(
                f"expected z outside the bulk ({low:.6g}, {high:.6g}), got a real one inside; "
                "give it an imaginary part"
            )
        kappa = (high - low) / 4
        below, above = (z - low) / kappa, (z - high) / kappa
        if z.is_complex():
            root = below.sqrt() * above.sqrt()
        else:
            root = below.abs().sqrt() * above.abs().sqrt()
            root = torch.where(z <= low, -root, root)
        return 1 / (kappa * ((below + above + 2 * root) / 4 + self._r))

    @analytic
    def inverse_stieltjes(self, w: Tensor) -> Tensor:
        """The z outside the bulk with ``stieltjes(z) = w``.

        Args:
            w: Values that the transform takes, real or complex.

        Returns:
            The shape of w.

        Raises:
            InputError: If a w is no value of the transform.
        """
        low, high = self.bulk_support()
        kappa = (high - low) / 4
        zeta = kappa * w / (1 - self._r * kappa * w)
        size = zeta.abs()
        # An edge itself is a value, and rounding may put it just outside.
        if not bool(((size > 0) & (size <= 1 + 1e-12)).all()):
            ends = ", ".join(f"{float(self.stieltjes(end)):.6g}" for end in (low, high))
            raise InputError(
                "expected values that the transform takes outside the bulk, other than 0, got one "
                f"that it does not; at the edges it is {ends}"
            )
        down, up = low + kappa * (1 + zeta) ** 2 / zeta, high + kappa * (1 - zeta) ** 2 / zeta
        return torch.where(zeta.real < 0, down, up)


def require_positive(name: str, value: Any) -> float:
    """A parameter as a float; InputError unless it is a positive finite number."""
    number = real(value)
    if not 0 < number < math.inf:
        raise InputError(f"expected {name} to be positive and finite, got {value!r}")
    return number


def keep_nan(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, y)


def _probabilities(q: Tensor) -> Tensor:
    if not bool(((q >= 0) & (q <= 1)).all()):
        raise InputError("expected probabilities in [0, 1], got one outside, or not a number")
    return q


def _shape(size: Any) -> tuple[int, ...]:
    sizes = size if isinstance(size, list | tuple) else (size,)
    return tuple(count("sizes", one, 0) for one in sizes)
