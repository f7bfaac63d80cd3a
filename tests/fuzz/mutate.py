"""Damage to the files of a checkpoint, drawn from a seeded generator.

Four kinds: bytes (flips, cuts, splices, a header length that lies), JSON (a value, a key or a
number that does not belong there), tensors (shapes of the same size, other dtypes, borrowed names:
damage that often still opens) and files (links, pipes, folders, nothing).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Any

Files = dict[str, "bytes | Special"]


@dataclass(frozen=True)
class Special:
    """A file that is none: ``kind`` is link, pipe or folder."""

    kind: str
    target: str = ""


class Raw(str):
    """JSON text to be written as it stands."""


class Pairs(list):
    """The pairs of a JSON object in which a key may come twice."""


NUMBERS = [0, 1, -1, 2, 3, 5, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400]
NUMBERS += [0.5, -0.0, 1e-320, 1e308, -1e308, *map(Raw, ("1e999", "NaN", "-Infinity", "9" * 5000))]
NAMES = ["", "\0", "a\x1b[31mb", "\u202ex", "=1+1", "..", "../x", "/etc/passwd", "x" * 2000]
NAMES += [".".join("a" * 400), "weight", "a.weight", "__metadata__", "ß" * 300, "a\nb", "%s{0}"]
NAMES += ["lora_A", "x.lora_A.weight", "x.lora_B", "a.base_layer.weight", Raw('"\\ud800.weight"')]
PATTERNS = ["(", "(a|a|aa)+x", "(" * 3000, "(?R)", "a{9999}", ".*", "x|" * 5000, "(?i).*", "["]
DTYPES = ["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I16", "F16", "BF16", "I32", "F32"]
DTYPES += ["I64", "F64", "C64", "F4", "F6_E2M3", "Q4"]
NESTED = [[], {}, [[]], [0], [1, 2], [0, 0], [2**62, 4], [1] * 9, {"a": 1}, {"": {}}, ["x"] * 50]
NESTED += [Raw("[" * n + "]" * n) for n in (940, 960, 975, 985)]
NESTED += [Raw("[" * 100_000), Raw("[" * 900 + "]" * 900), Raw('{"a":' * 700 + "1" + "}" * 700)]
ATOMS = [None, True, False, *NUMBERS, *NAMES, *PATTERNS, *DTYPES, *NESTED]
# fields of an adapter's configuration that are not copied from it but acted upon
GRAFTS: list[tuple[str, Callable[[Random], Any]]] = [
    ("rank_pattern", lambda rng: {rng.choice(PATTERNS): rng.choice(NUMBERS), ".*": 2}),
    ("alpha_pattern", lambda rng: {rng.choice(PATTERNS): rng.choice(NUMBERS), "q": 1e308}),
    ("alpha_pattern", lambda rng: dict.fromkeys([rng.choice(PATTERNS), *NAMES, *PATTERNS], 1)),
    ("lora_alpha", lambda rng: rng.choice(NUMBERS)),
    ("r", lambda rng: rng.choice(NUMBERS)),
    ("target_parameters", lambda rng: [rng.choice(NAMES), "h.0.q.weight"]),
    ("init_lora_weights", lambda rng: rng.choice(ATOMS)),
    ("peft_version", lambda rng: rng.choice(ATOMS)),
]
FLOATS = ["<f", "<d", "<e"]
EXTREMES = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, 6e4, -6e4, 1e-7]


def dump(node: Any) -> bytes:
    """JSON text of a tree that may hold ``Raw`` and ``Pairs``."""
    return _text(node).encode("utf-8", "surrogatepass")


def _text(node: Any) -> str:
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, dict | Pairs):
        pairs = node.items() if isinstance(node, dict) else node
        return "{" + ", ".join(f"{_key(k)}: {_text(v)}" for k, v in pairs) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(_text, node)) + "]"
    return json.dumps(node, ensure_ascii=False)


def _key(key: Any) -> str:
    return str(key) if isinstance(key, Raw) else json.dumps(str(key), ensure_ascii=False)


# ---- JSON


def damage_json(tree: Any, rng: Random) -> Any:
    """Change one place of a tree, the top of it as often as all the rest."""
    if isinstance(tree, dict) and "peft_type" in tree and rng.random() < 0.3:
        field, value = rng.choice(GRAFTS)
        tree[field] = deepcopy(value(rng))
        return tree
    if isinstance(tree, dict) and "quantization_config" in tree and rng.random() < 0.2:
        size = [rng.choice([0, 1, 3, 10**9, 10**12, 10**400, 1.0, -4, "x"]) for _ in range(2)]
        tree["quantization_config"] = {"weight_block_size": size}
        return tree
    places = list(_places(tree))
    if rng.random() < 0.5:
        places = [(parent, key) for parent, key in places if parent is tree]
    if not places:
        return _odd(rng)
    parent, key = rng.choice(places)
    change = rng.choice(
        [_replace, _replace, _replace, _nudge, _rename, _drop, _double, _swap, _add]
    )
    change(parent, key, rng)
    return tree


def _places(node: Any):
    """Every container with one of its keys."""
    if isinstance(node, dict | list) and not isinstance(node, Pairs):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from _places(node[key])


def _odd(rng: Random) -> Any:
    """Any value; a copy, since it may be damaged in its turn."""
    return deepcopy(rng.choice(rng.choice([ATOMS, NUMBERS, NAMES, DTYPES, NESTED])))


def _replace(parent: Any, key: Any, rng: Random) -> None:
    parent[key] = _odd(rng)


def _nudge(parent: Any, key: Any, rng: Random) -> None:
    """A number a little off, text with a letter changed, anything else wrapped."""
    value = parent[key]
    if isinstance(value, bool) or value is None:
        parent[key] = not value
    elif isinstance(value, int | float):
        parent[key] = rng.choice(
            [value + 1, value - 1, -value, value * 2, float(value), str(value)]
        )
    elif isinstance(value, str) and not isinstance(value, Raw):
        at = rng.randrange(len(value) + 1)
        parent[key] = value[:at] + rng.choice(["", "x", ".", "é", "\x7f", "\0"]) + value[at + 1 :]
    else:
        parent[key] = [value]


def _rename(parent: Any, key: Any, rng: Random) -> None:
    if isinstance(parent, dict):
        parent[rng.choice(NAMES + PATTERNS)] = parent.pop(key)
    else:
        parent.reverse()


def _drop(parent: Any, key: Any, rng: Random) -> None:
    del parent[key]


def _double(parent: Any, key: Any, rng: Random) -> None:
    """The key twice, in an object put where the value was."""
    if isinstance(parent, dict):
        parent[key] = Pairs([(key, parent[key]), (key, _odd(rng))])
    else:
        parent.append(deepcopy(parent[key]))


def _swap(parent: Any, key: Any, rng: Random) -> None:
    other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    parent[key], parent[other] = parent[other], parent[key]


def _add(parent: Any, key: Any, rng: Random) -> None:
    if isinstance(parent, dict):
        parent[rng.choice(NAMES + PATTERNS)] = _odd(rng)
    else:
        parent.insert(rng.randrange(len(parent) + 1), _odd(rng))


# ---- safetensors: header and bytes


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header tree and tensor bytes; a ValueError where they are not told apart any more."""
    length = int.from_bytes(content[:8], "little")
    tree = json.loads(content[8 : 8 + length]) if length < 2**30 else None
    if not isinstance(tree, dict) or not tree:
        raise ValueError
    return tree, content[8 + length :]


def join(tree: Any, data: bytes) -> bytes:
    text = dump(tree)
    return struct.pack("<Q", len(text)) + text + data


def damage_metadata(tree: dict[str, Any], data: bytes, rng: Random) -> bytes:
    """The text of the metadata, and the JSON that is in some of it."""
    metadata = tree.setdefault("__metadata__", {})
    key = rng.choice([*metadata, "lora_adapter_metadata"])
    try:
        metadata[key] = _text(damage_json(json.loads(metadata[key]), rng))
    except ValueError:
        metadata[key] = rng.choice(
            ["{", "[]", "{}", "\ud800", "null", '{"unet.r": 10}', "[" * 5000]
        )
    return join(tree, data)


def damage_tensors(tree: dict[str, Any], data: bytes, rng: Random) -> bytes:
    """Another shape, dtype or name of a tensor; the header still adds up more often than not."""
    names = [name for name in tree if name != "__metadata__"]
    if not names:
        return join(tree, data)
    name = rng.choice(names)
    entry = tree[name]
    rng.choice([_reshape, _retype, _take_name, _rewrap, _empty, _append, _flatten])(
        tree, name, entry, rng
    )
    if rng.random() < 0.3:
        data += bytes(rng.randrange(1, 64))
    return join(tree, data)


def _reshape(tree: Any, name: str, entry: Any, rng: Random) -> None:
    shape = entry["shape"]
    size = 1
    for n in shape:
        size *= n
    entry["shape"] = rng.choice(
        [
            [2**40, 0, 3],
            [0, *shape],
            shape[::-1],
            [size],
            [1, size],
            [size, 1],
            [*shape, 1],
            [1, *shape],
            [1] * 7 + [size],
            [],
        ]
    )


def _flatten(tree: Any, name: str, entry: Any, rng: Random) -> None:
    """Every tensor with one dimension less, or more."""
    for other in tree.values():
        if "shape" in other:
            head, *rest = other["shape"] or [1]
            more = [1, head, *rest]
            other["shape"] = [head * rest[0], *rest[1:]] if rest and rng.random() < 0.5 else more


def _retype(tree: Any, name: str, entry: Any, rng: Random) -> None:
    same = [["I64", "F64", "C64"], ["F32", "I32", "U32"], ["F16", "BF16", "I16"], ["U8", "F8_E4M3"]]
    entry["dtype"] = rng.choice(next((g for g in same if entry["dtype"] in g), DTYPES))


def _take_name(tree: Any, name: str, entry: Any, rng: Random) -> None:
    """The names of two tensors exchanged: their shapes no longer fit their places."""
    other = rng.choice([key for key in tree if key != "__metadata__"])
    tree[name], tree[other] = tree[other], tree[name]


def _rewrap(tree: Any, name: str, entry: Any, rng: Random) -> None:
    """What training frameworks do to names, and what they do not."""
    infix = rng.choice([".default", ".base_layer", "._orig_mod", ".0", ".lora_A", ".weight", ""])
    prefix = rng.choice(["base_model.model.", "model.", "module.", "lora_unet_", "..", ""])
    head, dot, tail = name.rpartition(".")
    tree[prefix + head + infix + dot + tail] = tree.pop(name)


def _empty(tree: Any, name: str, entry: Any, rng: Random) -> None:
    where = entry["data_offsets"][rng.randrange(2)]
    tree[rng.choice([*NAMES, "m.experts.down_proj"])] = {
        "dtype": "F32",
        "shape": rng.choice([[0], [0, 5], [2**40, 0], [2**40, 0, 4], [3, 2**40, 0]]),
        "data_offsets": [where, where],
    }  # fmt: skip


def _append(tree: Any, name: str, entry: Any, rng: Random) -> None:
    """A second tensor over the same bytes."""
    tree[rng.choice([*NAMES, name + ".weight_scale_inv", "b.weight"])] = deepcopy(entry)


def damage_numbers(tree: Any, data: bytes, rng: Random) -> bytes:
    """NaN, infinities and extremes in the weights."""
    code = rng.choice(FLOATS)
    extreme = struct.pack(code, rng.choice(EXTREMES))
    step = len(extreme)
    changed = bytearray(data)
    places = range(0, len(data) - step + 1, step)
    many = rng.choice([1, 1, 3, len(places)])
    for at in rng.sample(places, min(many, len(places))):
        changed[at : at + step] = extreme
    return join(tree, bytes(changed))


# ---- bytes


def damage_bytes(content: bytes, rng: Random) -> bytes:
    """Change bytes without a look at what they mean."""
    at, to = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    if rng.random() < 0.5:  # where the meaning is
        at, to = min(at, 200), min(to, 200)
    junk = rng.randbytes(rng.choice([1, 2, 8, 64]))
    return rng.choice(
        [
            lambda: _flip(content, at),
            lambda: _flip(_flip(content, at), to),
            lambda: content[:at],
            lambda: content[:at] + content[to:],
            lambda: content[:to] + content[at:],
            lambda: content[:at] + junk + content[at:],
            lambda: content[:at] + junk + content[at + len(junk) :],
            lambda: content[:at] + bytes(to - at) + content[to:],
            lambda: content + junk,
        ]
    )()


def _flip(content: bytes, at: int) -> bytes:
    if at >= len(content):
        return content
    return content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]


def damage_length(content: bytes, rng: Random) -> bytes:
    """A header length that lies."""
    true = int.from_bytes(content[:8], "little")
    size = len(content)
    lies = [0, 1, 2, true - 1, true + 1, true + 8, size - 8, size - 7, size, 25 * 2**20 + 1]
    lies += [100 * 2**20 + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    return struct.pack("<Q", rng.choice(lies) % 2**64) + content[8:]


# ---- whole files


def damage_file(files: Files, name: str, rng: Random) -> None:
    """Something else in the place of a file."""
    special = [
        Special("link", "/etc/passwd"), Special("link", "/dev/zero"), Special("link", "."),
        Special("link", name.rpartition("/")[2]), Special("link", "nowhere"), Special("pipe"),
        Special("folder"), b"", b"{}", b"version https://git-lfs.github.com/spec/v1\n",
    ]  # fmt: skip
    change = rng.randrange(4)
    if change == 0:
        del files[name]
    elif change == 1:  # the content of another
        files[name] = files[rng.choice(list(files))]
    elif change == 2:
        folder = name.rpartition("/")[0]
        more = ["model.safetensors", "config.json", "adapter_config.json", "x.safetensors"]
        files[f"{folder}/{rng.choice(more)}".lstrip("/")] = files[name]
    else:
        files[name] = rng.choice(special)


def mutate(files: Files, rng: Random) -> Files:
    """One to three wounds.

    Args:
        files: Contents by path; not changed.
        rng: Where chance comes from.

    Returns:
        The damaged files.
    """
    files = dict(files)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        whole = [name for name, content in files.items() if isinstance(content, bytes) and content]
        if not whole:
            break
        name = rng.choice(whole)
        if rng.random() < 0.05:
            damage_file(files, name, rng)
        else:
            files[name] = _damage(name, files[name], rng)
    return files


def _damage(name: str, content: Any, rng: Random) -> bytes:
    """One wound of one file."""
    try:
        tree, data = (json.loads(content), b"") if name.endswith(".json") else split(content)
        if rng.random() < 0.15:
            return damage_bytes(content, rng)
        if name.endswith(".json"):
            return dump(damage_json(tree, rng))
        ways: list[Callable[[], bytes]] = [
            lambda: damage_length(content, rng),
            lambda: join(damage_json(tree, rng), data),
            lambda: join(damage_json(tree, rng), data),
            lambda: damage_tensors(tree, data, rng),
            lambda: damage_tensors(tree, data, rng),
            lambda: damage_numbers(tree, data, rng),
            lambda: damage_metadata(tree, data, rng),
        ]
        return rng.choice(ways)()
    # too badly hurt already to be hurt so
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return damage_bytes(content, rng)
