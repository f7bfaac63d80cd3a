"""What to do about intruders: corrections of matrices, and files with other numbers in them."""

from __future__ import annotations

from .matrix import Selection
from .method import METHODS, Case, Correction, Method, Project, Scale, Shrink, ToEdge
from .protect import Protect
from .record import RepairedMatrix, RepairRecord, Treated

__all__ = [
    "METHODS",
    "Case",
    "Correction",
    "Method",
    "Project",
    "Protect",
    "RepairRecord",
    "RepairedMatrix",
    "Scale",
    "Selection",
    "Shrink",
    "ToEdge",
    "Treated",
]
