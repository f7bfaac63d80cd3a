"""Repair methods, and the files that a repair writes.

Your own method is a class of the form :class:`Method`: it turns a :class:`Case`, which is a
tuned matrix with the directions to be treated, into a :class:`Correction`.
"""

from __future__ import annotations

from .matrix import Selection
from .method import METHODS, Case, Clip, Correction, Method, Project, Scale, Shrink
from .protect import Protect
from .record import RepairedMatrix, RepairRecord, Treated
from .rescale import Rescale
from .sides import Sides

__all__ = [
    "METHODS",
    "Case",
    "Clip",
    "Correction",
    "Method",
    "Project",
    "Protect",
    "RepairRecord",
    "RepairedMatrix",
    "Rescale",
    "Scale",
    "Selection",
    "Shrink",
    "Sides",
    "Treated",
]
