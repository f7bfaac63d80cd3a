"""Reads a drawing of names, lines and arrowheads: who points to whom."""

import re

NAME = re.compile(r"\w+")
STEP = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
BACK = {"U": "D", "D": "U", "L": "R", "R": "L"}
LINES = {
    "─": "LR", "│": "UD", "┌": "DR", "┐": "DL", "└": "UR", "┘": "UL",
    "├": "UDR", "┤": "UDL", "┬": "DLR", "┴": "ULR", "┼": "UDLR",
}  # fmt: skip
HEADS = {"◄": "L", "►": "R", "▲": "U", "▼": "D"}


class Picture:
    """All lines that touch are one wire: each name on it points to each name at its arrowheads."""

    def __init__(self, text):
        self.rows = text.splitlines()

    def at(self, row, column):
        inside = 0 <= row < len(self.rows) and 0 <= column < len(self.rows[row])
        return self.rows[row][column] if inside else " "

    def ways(self, cell):
        """The sides on which a character goes on."""
        sign = self.at(*cell)
        return BACK[HEADS[sign]] if sign in HEADS else LINES.get(sign, "")

    def name_at(self, cell, way):
        """The name that a line leads to; one blank between them is usual on a row."""
        down, right = STEP[way]
        for distance in (1, 2) if right else (1,):
            row, column = cell[0] + distance * down, cell[1] + distance * right
            for found in NAME.finditer(self.rows[row] if 0 <= row < len(self.rows) else ""):
                if found.start() <= column < found.end():
                    return found.group()
        raise AssertionError(f"a line ends nowhere: row {cell[0]}, column {cell[1]}, {way}")

    def wires(self):
        cells = {
            (i, j)
            for i, row in enumerate(self.rows)
            for j, sign in enumerate(row)
            if sign in LINES or sign in HEADS
        }
        while cells:
            wire, new = set(), [cells.pop()]
            while new:
                cell = new.pop()
                wire.add(cell)
                for way in self.ways(cell):
                    near = (cell[0] + STEP[way][0], cell[1] + STEP[way][1])
                    if near in cells and BACK[way] in self.ways(near):
                        cells.remove(near)
                        new.append(near)
            yield wire

    def arrows(self):
        """All (from, to)."""
        found = set()
        for wire in self.wires():
            heads = {
                self.name_at(cell, HEADS[self.at(*cell)])
                for cell in wire
                if self.at(*cell) in HEADS
            }
            tails = {
                self.name_at(cell, way)
                for cell in wire
                for way in self.ways(cell)
                if (cell[0] + STEP[way][0], cell[1] + STEP[way][1]) not in wire
            }
            assert heads, f"a line without an arrowhead between {tails}"
            assert tails, f"an arrow from nowhere to {heads}"
            found |= {(tail, head) for tail in tails for head in heads}
        return found


def reach(arrows):
    """Where one gets along the arrows, from each name."""
    to = {name: set() for arrow in arrows for name in arrow}
    for tail, head in arrows:
        to[tail].add(head)
    for _ in to:
        for name in to:
            to[name] |= set().union(*(to[head] for head in to[name]))
    return to
