"""The intruder score of a tuned singular vector, its certificate, and the verdict."""

from bulkedge._fields import DEFAULT_EPSILON
from bulkedge._verdict import COUNTED, HALF_THE_ENERGY, Verdict, verdict

from ._judge import Judgement, Remember, compute_anew, judge, judge_vectors, svd_is_cheap
from ._side import Direction, OneSide
from ._ties import ties
from .certificate import Certificate, certify
from .score import BaseVectors, Scores, base_vectors, scores

__all__ = [
    "COUNTED",
    "DEFAULT_EPSILON",
    "HALF_THE_ENERGY",
    "BaseVectors",
    "Certificate",
    "Direction",
    "Judgement",
    "OneSide",
    "Remember",
    "Scores",
    "Verdict",
    "base_vectors",
    "certify",
    "compute_anew",
    "judge",
    "judge_vectors",
    "scores",
    "svd_is_cheap",
    "ties",
    "verdict",
]
