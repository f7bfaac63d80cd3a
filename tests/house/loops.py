"""Loops of assertions that may run over nothing, and then assert nothing."""

import ast

PASSING_ON = {"enumerate", "sorted", "reversed", "list", "map", "pairwise", "iter", "product"}


def named(node):
    """The names that a file or function gives to what is written there."""
    return {
        target.id: statement.value
        for statement in ast.walk(node)
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def is_written_out(node, known, depth=0):
    """Whether an expression has members, as can be read off it."""
    if depth > 8:
        return False
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return bool(node.elts)
    if isinstance(node, ast.Dict):
        return bool(node.keys)
    if isinstance(node, ast.Constant):
        return bool(node.value)
    if isinstance(node, ast.Name):
        return node.id in known and is_written_out(known[node.id], known, depth + 1)
    if isinstance(node, ast.BinOp):
        return any(is_written_out(x, known, depth + 1) for x in (node.left, node.right))
    if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp):
        return all(
            not part.ifs and is_written_out(part.iter, known, depth + 1) for part in node.generators
        )
    return isinstance(node, ast.Call) and call_is_written_out(node, known, depth)


def call_is_written_out(call, known, depth):
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", "")
    if name in ("some", "range"):
        return True
    if name in ("items", "values", "keys", "splitlines", "split"):
        return is_written_out(call.func.value, known, depth + 1)
    if name == "zip":
        strict = any(k.arg == "strict" and getattr(k.value, "value", 0) for k in call.keywords)
        return (any if strict else all)(is_written_out(a, known, depth + 1) for a in call.args)
    if name in PASSING_ON:
        return bool(call.args) and is_written_out(call.args[-1], known, depth + 1)
    return False


def asserts(node):
    """Whether something in a node can fail a test."""
    for part in ast.walk(node):
        if isinstance(part, ast.Assert):
            return True
        if isinstance(part, ast.Call):
            name = getattr(part.func, "attr", None) or getattr(part.func, "id", "")
            if name.startswith("assert") or name in ("raises", "warns"):
                return True
    return False


def unsafe_loops(tree):
    """Every ``(function, loop)`` that asserts over a collection that may be empty."""
    file = named(ast.Module(body=[n for n in tree.body if isinstance(n, ast.Assign)]))
    found = []
    for function in tree.body:
        if not isinstance(function, ast.FunctionDef):
            continue
        known = file | named(function)
        for loop in ast.walk(function):
            is_loop = isinstance(loop, ast.For) and asserts(loop)
            if is_loop and not is_written_out(loop.iter, known):
                found.append((function.name, loop))
    return found
