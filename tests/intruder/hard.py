"""Bases whose products round worst, and vectors that only exact arithmetic tells apart.

Entries of one sign, constant, nearly duplicate or integer columns, scaled rows and columns, in
single and half precision, with singular values down to 1e-12 of the largest.  The oracle is a
float64 SVD of the matrix as it is stored, which is exact in float64; where two of its values lie so
close that float64 mixes their vectors, only what is certain of their common space counts.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import bulkedge
from bulkedge.intruder import certify

WIDE = torch.float64
EPS = torch.finfo(WIDE).eps
FAMILIES = ("constant", "one_signed", "duplicates", "integers", "scaled", "blocks")
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
SHORTER = ((24, 120), (24, 120), (24, 120), (100, 200), (200, 400), (400, 640))
"""From what to what the shorter side is; the longer one is 400 to 2500."""
VECTORS = ("least", "kernel", "changed", "mixture", "few", "random")


@dataclass(frozen=True)
class Case:
    """A base, and the rows of it where the last place of an entry was changed."""

    seed: int
    family: str
    base: Tensor
    changed: Tensor

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.family}, {tuple(self.base.shape)}, {self.base.dtype}"


def draw(g, *shape):
    return torch.randn(*shape, generator=g, dtype=WIDE)


def uniform(g, low, high):
    return low + (high - low) * float(torch.rand((), generator=g, dtype=WIDE))


def integer(g, low, high):
    return int(torch.randint(low, high + 1, (1,), generator=g))


def make_case(seed: int) -> Case:
    """The base of a seed: its family, shape, precision and orientation follow from it."""
    g = torch.Generator().manual_seed(seed)
    family, dtype = FAMILIES[seed % len(FAMILIES)], DTYPES[(seed // len(FAMILIES)) % len(DTYPES)]
    m = round(10 ** uniform(g, 2.6, 3.4))  # 400 to 2500
    low, high = SHORTER[integer(g, 0, len(SHORTER) - 1)]
    n = min(integer(g, low, high), m)
    matrix, changed = {
        "constant": constant,
        "one_signed": one_signed,
        "duplicates": duplicates,
        "integers": integers,
        "scaled": scaled,
        "blocks": blocks,
    }[family](g, m, n, dtype)
    base = matrix.to(dtype)
    if family != "integers":
        base = base * (0.25 if dtype is torch.float16 else 1.0)
    return Case(seed, family, base if seed % 5 else base.mT.contiguous(), changed)


def _last_place(g, column: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """A column as stored, with so many entries moved by a few units of the last place."""
    stored = column.to(dtype)
    bits = stored.view(torch.int32 if dtype is torch.float32 else torch.int16)
    bits[:rows] += integer(g, 1, 8)
    return stored.to(WIDE)


def constant(g, m, n, dtype):
    """Constant columns of which some entries differ in the last place, beside a Gaussian block.

    The columns are independent by that difference alone, so that the smallest singular value is
    some 1e-9 of the largest; products of theirs round in one direction.
    """
    half, few, rows = m // 2, 2, integer(g, 1, 20)
    W0 = torch.zeros(m, n, dtype=WIDE)
    for j in range(few):
        column = torch.full((half,), uniform(g, 1.0, 2.0), dtype=WIDE)
        W0[:half, j] = _last_place(g, column, rows if j else 0, dtype)
    rest = draw(g, m - half, n - few)
    least = float(torch.linalg.svdvals(rest)[-1])
    share = 10 ** uniform(g, -2.9, -2.2)
    W0[half:, few:] = rest * (share * float(W0.norm()) / least)
    return W0, torch.arange(rows)


def one_signed(g, m, n, dtype):
    """Positive entries: far from, or near to, a constant."""
    spread = 10 ** uniform(g, -3.0, 0.5)
    return 1.0 + spread * draw(g, m, n).abs(), torch.arange(integer(g, 1, 9))


def duplicates(g, m, n, dtype):
    """Columns that are others but for a small part."""
    some = max(2, n // integer(g, 2, 8))
    W0 = draw(g, m, some)[:, torch.arange(n) % some]
    part = 10 ** uniform(g, -7.0, -1.0)
    return W0 + part * draw(g, m, n), torch.arange(integer(g, 1, 9))


def integers(g, m, n, dtype):
    """Small integers, of low rank and a few more."""
    r, high = integer(g, 1, min(n, 12)), integer(g, 1, 3)
    left = torch.randint(-high, high + 1, (m, r), generator=g).to(WIDE)
    right = torch.randint(-1, 2, (r, n), generator=g).to(WIDE)
    sparse = (torch.rand(m, n, generator=g) < 10 ** uniform(g, -3.0, -0.3)).to(WIDE)
    return left @ right + integer(g, 0, 3) + sparse, torch.arange(integer(g, 1, 9))


def scaled(g, m, n, dtype):
    """Rows and columns that shrink over up to four decades each."""
    rows = torch.logspace(0, -uniform(g, 0, 4), m, dtype=WIDE)
    columns = torch.logspace(0, -uniform(g, 0, 4), n, dtype=WIDE)
    inner = draw(g, m, n) if uniform(g, 0, 1) < 0.5 else 1.0 + 0.1 * draw(g, m, n)
    return rows[:, None] * inner * columns, torch.arange(m - integer(g, 1, 9), m)


def blocks(g, m, n, dtype):
    """A few families beside each other, of very different size."""
    a, b = m // 2, n // 2
    W0 = torch.zeros(m, n, dtype=WIDE)
    makers = [constant, one_signed, duplicates, scaled]
    first, second = (makers[integer(g, 0, 3)] for _ in range(2))
    W0[:a, :b], changed = first(g, a, b, dtype)
    W0[a:, b:] = second(g, m - a, n - b, dtype)[0] * 10 ** uniform(g, -4.0, 0.0)
    return W0, changed


def directions(g, case: Case, U: Tensor, S: Tensor) -> tuple[str, Tensor]:
    """Orthonormal vectors on the left side, the first of them of some kind."""
    m, p = U.shape
    exist = int((max(case.base.shape) * EPS * S[0] < S).sum())
    kind = VECTORS[integer(g, 0, len(VECTORS) - 1)]
    if case.family == "constant" and m > p and uniform(g, 0, 1) < 0.6:
        kind = "changed"
    if kind == "kernel" and m == p:
        kind = "least"
    if kind == "least":
        y = U[:, [exist - 1 - integer(g, 0, min(3, exist - 1))]]
    elif kind == "kernel":
        y = draw(g, m, 1)
        y = y - U @ (U.mT @ y)
        y = y / y.norm() + uniform(g, 0, 0.6) * U[:, [exist - 1]]
    elif kind == "changed":
        y = torch.zeros(m, 1, dtype=WIDE)
        y[case.changed[case.changed < m]] = 1.0
    elif kind == "mixture":
        some = torch.randint(0, exist, (integer(g, 2, 8),), generator=g)
        y = U[:, some].sum(dim=1, keepdim=True)
    elif kind == "few":
        y = U[:, : min(exist, integer(g, 2, 5))].sum(dim=1, keepdim=True)
    else:
        y = draw(g, m, 1)
    others = draw(g, m, integer(g, 0, 2))
    return kind, torch.linalg.qr(torch.cat([y, others], dim=1)).Q


def truth(U: Tensor, S: Tensor, Y: Tensor, shape) -> tuple[Tensor, Tensor]:
    """What the scores are between, by a float64 SVD and its own error."""
    exist = max(shape) * EPS * S[0] < S
    U, S = U[:, exist], S[exist]
    error = 4 * EPS * S[0] * max(shape) ** 0.5
    new = torch.cat([S.new_ones(1), (S[:-1] - S[1:] > 100 * error).to(WIDE)])
    cluster = new.cumsum(0).long() - 1
    energy = (U.mT @ Y).square()
    sums = energy.new_zeros(int(cluster[-1]) + 1, Y.shape[1]).index_add_(0, cluster, energy)
    sizes = torch.bincount(cluster).to(WIDE)[:, None]
    ends = torch.cat([S.new_full((1,), torch.inf), S, S.new_zeros(1)])
    gap = (ends[:-1] - ends[1:])[torch.cat([new, new[:1]]).bool()]
    nearest = torch.minimum(gap[:-1], gap[1:])[:, None]
    slack = 1e-9 + (4 * error / nearest).clamp_max(1.0)
    low = ((sums / sizes).sqrt() - slack).amax(dim=0)
    high = (sums.sqrt() + slack).amax(dim=0)
    return low, high.clamp_max(1.0 + 1e-6)


def check(seed: int, updates: int = 5) -> dict[str, object]:
    """Certificates of one base, each side in turn, held against the oracle.

    Args:
        seed: Of the case.
        updates: Certificates on each side.

    Returns:
        What was found; ``wrong`` names every interval or verdict that the oracle contradicts.
    """
    case = make_case(seed)
    g = torch.Generator().manual_seed(10_000_019 + seed)
    U, S, Vt = torch.linalg.svd(case.base.to(WIDE), full_matrices=False)
    known, decided, wrong = 0, 0, []
    for side, vectors in (("left", U), ("right", Vt.mT)):
        W0 = case.base if side == "left" else case.base.mT
        turned = Case(case.seed, case.family, W0, case.changed)
        for _ in range(updates):
            kind, Y = directions(g, turned, vectors, S)
            work = torch.float32
            epsilon = (0.5, 0.5, 0.3, 0.8)[integer(g, 0, 3)]
            steps = integer(g, 4, 16)  # where a certificate stops it has to be right
            found = certify(W0, Y.to(work), epsilon=epsilon, generator=g, max_steps=steps)
            low, high = truth(vectors, S, Y.to(work).to(WIDE), W0.shape)
            known += len(low)
            decided += sum(verdict.value != "undecided" for verdict in found.verdicts)
            for j, verdict in enumerate(found.verdicts):
                ends = float(found.lower[j]), float(found.upper[j])
                said = verdict.value
                bad = ends[0] > high[j] + 1e-7 or ends[1] < low[j] - 1e-7
                bad |= said == "aligned" and bool(high[j] + 1e-7 < epsilon)
                bad |= said in ("intruder", "rotated") and bool(low[j] - 1e-7 >= epsilon)
                if bad:
                    wrong.append(
                        f"{case}, {side}, {kind}, ε = {epsilon}: {said} in [{ends[0]:.4f}, "
                        f"{ends[1]:.4f}], true in [{float(low[j]):.4f}, {float(high[j]):.4f}]"
                    )
    return {
        "seed": seed,
        "family": case.family,
        "dtype": str(case.base.dtype).removeprefix("torch."),
        "shape": list(case.base.shape),
        "least": float(S[-1] / S[0]),
        "certificates": 2 * updates,
        "directions": known,
        "decided": decided,
        "wrong": wrong,
    }


def digest() -> str:
    """Of the code whose results are kept: those of other code count for nothing."""
    package = Path(bulkedge.__file__).parent
    here = hashlib.sha256(Path(__file__).read_bytes())
    for folder in ("intruder", "triplet", "_linmap*"):
        for file in sorted((*package.glob(f"{folder}/*.py"), *package.glob(f"{folder}.py"))):
            here.update(file.read_bytes())
    return here.hexdigest()[:16]


def resumed(seeds: range, journal: Path) -> list[dict[str, object]]:
    """What :func:`check` finds of each seed; what the journal has is not done again."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    code = digest()
    kept = (
        [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    )
    done = {row["seed"]: row for row in kept if row["code"] == code}
    for seed in seeds:
        if seed not in done:
            done[seed] = {"code": code, **check(seed)}
            with journal.open("a") as file:
                file.write(json.dumps(done[seed]) + "\n")
    return [done[seed] for seed in seeds]
