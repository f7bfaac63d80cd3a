"""The intruder score of a tuned singular vector, the certificate of it, and the verdict."""

from bulkedge._fields import DEFAULT_EPSILON

from ._judge import Judgement, judge, judge_vectors
from ._side import Direction, OneSide
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
    "DEFAULT_EPSILON",
    "HALF_THE_ENERGY",
    "BaseVectors",
    "Certificate",
    "Direction",
    "Judgement",
    "OneSide",
    "Scores",
    "Verdict",
    "base_vectors",
    "certify",
    "judge",
    "judge_vectors",
    "scores",
    "ties",
    "verdict",
]
