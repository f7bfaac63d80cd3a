"""Spectral norms with derivatives and certificates, and weights held below a bound on them."""

from .certificate import Certificate, NormBound, Probable, Rigorous
from .convolution import Convolution
from .norm import cap, normalize, spectral_norm
from .parametrization import SpectralCap, spectral_cap
from .project import hold_spectral_ball, project_spectral_ball

__all__ = [
    "Certificate",
    "Convolution",
    "NormBound",
    "Probable",
    "Rigorous",
    "SpectralCap",
    "cap",
    "hold_spectral_ball",
    "normalize",
    "project_spectral_ball",
    "spectral_cap",
    "spectral_norm",
]
