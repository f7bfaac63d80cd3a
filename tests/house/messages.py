"""What the package says when it raises or warns, and what the tests ask to hear; both by AST."""

import ast
import re
from functools import cache
from itertools import product
from pathlib import Path

from imports import SOURCE

TESTS = Path(__file__).parents[1]
HOLE = "\0"  # what only a run can fill in


def constant(node):
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def joined(alternatives):
    return ["".join(parts) for parts in product(*alternatives)][:64]


class Scope:
    """What the names of a file stand for, as far as it is written there as text."""

    def __init__(self, tree):
        self.tree = tree
        self.functions = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.functions.setdefault(node.name, node)

    def texts(self, node, inside, depth=0):
        """The texts that an expression can be, with holes."""
        if depth > 6 or node is None:
            return [HOLE]
        if (text := constant(node)) is not None:
            return [text]
        if isinstance(node, ast.JoinedStr):
            return joined([self.texts(part, inside, depth + 1) for part in node.values])
        if isinstance(node, ast.FormattedValue):
            return self.texts(node.value, inside, depth + 1)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return joined([self.texts(side, inside, depth + 1) for side in (node.left, node.right)])
        if isinstance(node, ast.IfExp):
            return [
                t for arm in (node.body, node.orelse) for t in self.texts(arm, inside, depth + 1)
            ]
        if isinstance(node, ast.BoolOp):
            return [t for arm in node.values for t in self.texts(arm, inside, depth + 1)]
        if isinstance(node, ast.Name):
            values = self.assigned(node.id, inside)
            return [t for v in values for t in self.texts(v, inside, depth + 1)] or [HOLE]
        if isinstance(node, ast.Call):
            return self.returned(node, inside, depth)
        return [HOLE]

    def assigned(self, name, inside):
        """The expressions given to a name in a function, or else in the file."""
        for block in (inside, self.tree):
            found = []
            for node in ast.walk(block) if block else ():
                if isinstance(node, ast.Assign):
                    found += [node.value for t in node.targets if getattr(t, "id", "") == name]
                elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
                    found += [node.value] if getattr(node.target, "id", "") == name else []
            if found:
                return found
        return []

    def returned(self, call, inside, depth):
        """The texts that a function of this file returns; those that it is handed, if a join."""
        name = getattr(call.func, "attr", None) or getattr(call.func, "id", None)
        if name == "join":
            return [HOLE]
        if name == "format" and isinstance(call.func, ast.Attribute):
            return [re.sub(r"{.*?}", HOLE, t) for t in self.texts(call.func.value, inside, depth)]
        function = self.functions.get(name)
        if function is None:
            return [HOLE]
        returns = [n.value for n in ast.walk(function) if isinstance(n, ast.Return)]
        return [t for v in returns for t in self.texts(v, function, depth + 1)] or [HOLE]


def owners(tree):
    """Each node with the innermost function that holds it."""
    found = {}

    def walk(node, owner):
        for child in ast.iter_child_nodes(node):
            found[child] = owner
            walk(child, child if isinstance(child, ast.FunctionDef) else owner)

    walk(tree, None)
    return found


def spoken(node):
    """The expression of the message, if a node raises or warns."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        call = node.exc
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "warn":
        call = node
    else:
        return None
    return call.args[0] if call.args else None


@cache
def messages():
    """Every ``(file, line, text)`` that the package raises or warns with; text has holes."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        scope, owner = Scope(tree), owners(tree)
        for node in ast.walk(tree):
            if (message := spoken(node)) is not None:
                for text in scope.texts(message, owner[node]):
                    found.append((str(path.relative_to(SOURCE)), node.lineno, text))
    return found


def words(pattern):
    """The literal texts of a regular expression, one list for each of its alternatives."""
    branches = [[""]]
    for part in re.split(r"(\\.|\[[^\]]*\]|[.*+?{}()^$|\0])", pattern):
        if part == "|":
            branches.append([""])
        elif re.fullmatch(r"\\\W", part, re.DOTALL):
            branches[-1][-1] += part[1]
        elif re.fullmatch(r"\\\w|\[.*\]|[.*+?{}()^$\0]", part, re.DOTALL):
            branches[-1].append("")
        else:
            branches[-1][-1] += part
    return branches


def named(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


COLUMNS = {"items": None, "keys": 0, "values": 1}  # of the pairs of a dictionary


class Tests(Scope):
    """A file of tests: what its ``match=`` can be, parametrised or not."""

    def items(self, node, inside):
        """The rows of a table written in the file, dictionaries as pairs."""
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            rows = []
            for row in node.elts:
                inner = row.value if isinstance(row, ast.Starred) else None
                rows += self.items(inner, inside) if inner else [row]
            return rows
        if isinstance(node, ast.Dict):
            return [ast.Tuple([k, v]) for k, v in zip(node.keys, node.values, strict=True)]
        if isinstance(node, ast.Name):
            values = super().assigned(node.id, inside)
            return [r for v in values for r in self.items(v, inside)]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            rows = self.items(node.func.value, inside)
            return self.column(node.func, rows) if node.func.attr in COLUMNS else []
        if isinstance(node, ast.BinOp):
            return self.items(node.left, inside) + self.items(node.right, inside)
        return []

    @staticmethod
    def column(function, rows):
        place = COLUMNS[function.attr]
        return rows if place is None else [row.elts[place] for row in rows]

    @staticmethod
    def picked(target, name, row):
        """What a name stands for when a row is given to a target such as ``(a, (b, c))``."""
        if isinstance(row, ast.Call) and getattr(row.func, "attr", "") == "param":
            row = ast.Tuple(row.args)
        if isinstance(target, ast.Name):
            return [row] if target.id == name else []
        if isinstance(row, ast.Dict) or not hasattr(row, "elts"):
            return []
        pairs = zip(target.elts, row.elts, strict=False)
        return [found for t, r in pairs for found in Tests.picked(t, name, r)]

    def given(self, name, test):
        """The expressions that parametrize, or a loop, gives to a name."""
        found = []
        for mark in getattr(test, "decorator_list", ()):
            if isinstance(mark, ast.Call) and getattr(mark.func, "attr", "") == "parametrize":
                names = self.names(mark.args[0])
                many = ast.Tuple(names) if len(names) > 1 else names[0]
                for row in self.items(mark.args[1], None):
                    one = ast.Tuple(row.args) if isinstance(row, ast.Call) else row
                    if len(names) == 1 and isinstance(row, ast.Call) and row.args:
                        one = row.args[0]
                    found += self.picked(many, name, one)
        for loop in ast.walk(test) if test else ():
            if isinstance(loop, ast.For | ast.comprehension) and name in named(loop.target):
                for row in self.items(loop.iter, test):
                    found += self.picked(loop.target, name, row)
        return found

    @staticmethod
    def names(node):
        if (text := constant(node)) is not None:
            return [ast.Name(n.strip()) for n in text.split(",")]
        return [ast.Name(e.value) for e in node.elts]

    def unpacked(self, name, test):
        """The expressions of ``x, name = TABLE[case]``, for every case."""
        found = []
        for node in ast.walk(test) if test else ():
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
                for row in self.items(node.value.value, test):
                    case = row.elts[1] if isinstance(row, ast.Tuple) and len(row.elts) == 2 else row
                    found += self.picked(node.targets[0], name, case)
        return found

    def assigned(self, name, inside):
        return (
            super().assigned(name, inside)
            or self.given(name, inside)
            or self.unpacked(name, inside)
        )

    def returned(self, call, inside, depth):
        if getattr(call.func, "attr", "") == "escape":
            return [re.escape(t).replace("\\\0", HOLE) for t in
                    self.texts(call.args[0], inside, depth)]  # fmt: skip
        return super().returned(call, inside, depth)


def trees():
    """Every file of tests but these, which speak of messages only."""
    for path in sorted(TESTS.rglob("*.py")):
        if path.parent.name != "house":
            yield str(path.relative_to(TESTS)), ast.parse(path.read_text(encoding="utf-8"))


def expectations():
    """Every ``pytest.raises(...)`` or ``warns``: file, call, the function around it, scope."""
    for path, tree in trees():
        scope, owner = Tests(tree), owners(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("raises", "warns"):
                yield path, node, owner[node], scope


@cache
def patterns():
    """Every ``(file, line, pattern)`` of a ``match=``; a hole is what only a run can tell."""
    found = []
    for path, call, inside, scope in expectations():
        for keyword in call.keywords:
            if keyword.arg == "match":
                found += [(path, call.lineno, t) for t in scope.texts(keyword.value, inside)]
    return found


@cache
def written():
    """Every text in the tests that no reader but a test reads, with and without its escapes."""
    found = set()
    for _, tree in trees():
        prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if (text := constant(node)) and id(node) not in prose:
                found |= {text, re.sub(r"\\(\W)", r"\1", text)}
    return sorted(found)
