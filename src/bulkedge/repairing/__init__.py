"""What to do about intruders: corrections of matrices, and files with other numbers in them."""

from __future__ import annotations

from .matrix import Selection
from .method import METHODS, Case, Clip, Correction, Method, Project, Scale, Shrink
from .record import RepairedMatrix, RepairRecord, Treated

__all__ = [
    "METHODS",
    "Case",
    "Clip",
    "Correction",
    "Method",
    "Project",
    "RepairRecord",
    "RepairedMatrix",
    "Scale",
    "Selection",
    "Shrink",
    "Treated",
]
