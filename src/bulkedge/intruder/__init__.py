"""The intruder score of a tuned singular vector, the certificate of it, and the verdict."""

from ._ties import ties
from .certificate import Certificate, certify
from .score import (
    COUNTED,
    HALF_THE_ENERGY,
    BaseVectors,
    Scores,
    Verdict,
    base_vectors,
    scores,
    verdict,
)

__all__ = [
    "COUNTED",
    "HALF_THE_ENERGY",
    "BaseVectors",
    "Certificate",
    "Scores",
    "Verdict",
    "base_vectors",
    "certify",
    "scores",
    "ties",
    "verdict",
]
