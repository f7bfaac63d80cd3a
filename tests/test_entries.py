"""Every public function that takes numbers, under every condition that numbers can be in.

Each gives what it gives otherwise, or one error of ours: never NaN, an error of LAPACK, or the
digits of bfloat16.
"""

import contextlib
import dataclasses
import importlib
import inspect
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bulkedge
from bulkedge import BulkedgeError, InputError
from bulkedge import triplet as t
from bulkedge.intruder import BaseVectors, base_vectors, certify, judge, scores, ties
from bulkedge.rmt import (
    count_outliers,
    d_transform,
    edge_test,
    fit_bulk,
    fit_edge,
    fit_lower_edge,
    lower_edge_test,
    resolvent_traces,
    spacing_test,
    spike,
    stieltjes,
    stieltjes_inversion,
    strength,
    unfold,
    vector_test,
)
from bulkedge.spectral import (
    Convolution,
    Probable,
    Rigorous,
    cap,
    hold_spectral_ball,
    normalize,
    project_spectral_ball,
    spectral_cap,
    spectral_norm,
)
from bulkedge.triplet import resolution
from bulkedge.tune import (
    AdaptedMatrix,
    IntruderPenalty,
    LeadingTriplets,
    Monitor,
    OrthonormalFactors,
    RankController,
    SpikeClip,
    hold_update,
)
from bulkedge.update import (
    BaseSpectrum,
    ConjugateGradients,
    Secular,
    budget,
    effective_rank,
    eigen_perturbation,
    eigenvalue_perturbation,
    predict,
    predict_spikes,
    resolvent_update,
    resolvent_update_low_rank,
    secular_function,
    singular_perturbation,
    update_svd,
)
from helpers import some

M, N = 40, 30


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def values_of(A):
    """What stands for singular values in the row of a function of these."""
    v = A.flatten()[:N]
    sizes = (v.real if v.is_complex() else v).abs().sort(descending=True).values
    return torch.complex(sizes, v.imag) if v.is_complex() else sizes


def like(x, A):
    return x.to(A.dtype) if A.is_floating_point() else x


def symmetric(A):
    return A[:N] + A[:N].mT if A.shape == (M, N) else A


def square_and_vectors(A):
    return (A[:N], A[0], A[1]) if A.shape == (M, N) else (A, A, A)


def factors(A, r=2):
    return (A[:, :r], A[:r]) if A.ndim == 2 else (A, A)


def interval(bound):
    return [bound.lower, bound.upper]


def held(A, bound, method):
    weight = nn.Parameter(A.clone(), requires_grad=A.is_floating_point() or A.is_complex())
    hold_spectral_ball(torch.optim.SGD([weight], lr=0.1), bound, method=method)
    return weight.detach()


def of_module(change):
    """A function of a module's weight: what is read afterwards."""

    def entry(A):
        layer = nn.Linear(N, M)
        layer.weight = nn.Parameter(A.clone(), requires_grad=A.is_floating_point())
        return change(layer)

    return entry


def adapted(A):
    size = float(A.abs().max().clamp_max(1)) if A.numel() and A.is_floating_point() else 1.0
    B = size * draw(M, 2, seed=3).to(A)
    return [AdaptedMatrix("layer", A, 0.1 * draw(2, N, seed=2).to(A), B)]


def with_factors(A):
    """The same where A is what is trained: its columns are B."""
    W0 = draw(M, N, seed=4)
    return [
        AdaptedMatrix("layer", W0, draw(3, N, seed=5).to(A), A.clone()[:, :3] if A.ndim == 2 else A)
    ]


def clipped(A):
    matrices = with_factors(A)
    SpikeClip(matrices, thresholds={"layer": 1.0}).step()
    return list(matrices[0].factors)


def controlled(A):
    matrices = with_factors(A)
    RankController(matrices, thresholds={"layer": 1.0}).step()
    return list(matrices[0].factors)


def retracted(A):
    matrices = with_factors(A)
    OrthonormalFactors(matrices).step()
    return list(matrices[0].factors)


def watched(A):
    monitor = Monitor(adapted(A), top_k=2, thresholds={"layer": 1.0})
    monitor.check()
    figures = monitor.metrics()
    timed = ("overhead", "seconds")
    return [value for name, value in figures.items() if not any(word in name for word in timed)]


def penalty(A):
    return IntruderPenalty(adapted(A), k=2)()


def certificate_of(A):
    Y = torch.linalg.qr(draw(M, 2, seed=1)).Q
    found = certify(A, like(Y, A))
    return [found.lower, found.upper]


def judged(A):
    found = judge(A, like(draw(M, N, seed=3), A), 2, sides=("left", "right"))
    return [torch.tensor([row.score, row.subspace_overlap]) for row in found.directions]


def capped(A):
    return spectral_cap(nn.Linear(1, 1).requires_grad_(False), bound=1.0)(A)


def tied(A):
    found = t.singular_triplet(A, 2)
    return ties(found)


ENTRIES = {
    "singular_triplet": lambda A: t.singular_triplet(A, 2),
    **{
        f"singular_triplet({kind.__name__})": lambda A, kind=kind: (
            t.singular_triplet(A, 1, solver=kind()).sigma
        )
        for kind in (
            t.Auto,
            t.BlockKrylov,
            t.DenseSVD,
            t.GolubKahan,
            t.GradientAscent,
            t.Lanczos,
            t.Newton,
            t.Power,
            t.RayleighQuotient,
            t.Refined,
            t.Riemannian,
        )
    },
    "truncate": lambda A: t.truncate(A, 2),
    "thin_svd": lambda A: t.thin_svd(A),
    "resolution": lambda A: t.resolution(values_of(A), (M, N)),
    "Dense": lambda A: t.singular_triplet(t.Dense(A)).sigma,
    "LowRank": lambda A: t.singular_triplet(t.LowRank(*factors(A))).sigma,
    "Sum": lambda A: t.singular_triplet(t.Dense(A) + A).sigma,
    "Scaled": lambda A: t.singular_triplet(2.0 * t.Dense(A)).sigma,
    "Adjoint": lambda A: t.singular_triplet(t.Dense(A).T).sigma,
    "spectral_norm": spectral_norm,
    "spectral_norm(Rigorous)": lambda A: interval(spectral_norm(A, certified=True)),
    "spectral_norm(Probable)": lambda A: interval(spectral_norm(A, certified=Probable())),
    "Rigorous": lambda A: interval(Rigorous().bound(t.Dense(A))),
    "Probable": lambda A: interval(Probable().bound(t.Dense(A))),
    "normalize": normalize,
    "cap": cap,
    "project_spectral_ball": project_spectral_ball,
    "project_spectral_ball(rescale)": lambda A: project_spectral_ball(A, 1.0, "rescale"),
    "hold_spectral_ball": lambda A: held(A, 1.0, "clip"),
    "hold_spectral_ball(rescale)": lambda A: held(A, 1.0, "rescale"),
    "spectral_cap": of_module(lambda layer: spectral_cap(layer).weight),
    "spectral_cap(certified)": of_module(lambda layer: spectral_cap(layer, certified=True).weight),
    "Convolution": lambda A: spectral_norm(
        Convolution(A.reshape(-1, 2, 3, 5) if A.ndim == 2 else A, (8, 8))
    ),
    "edge_test": lambda A: edge_test(values_of(A), (M, N), sigma=1.0),
    "fit_bulk": lambda A: fit_bulk(values_of(A), (M, N)),
    "fit_edge": lambda A: fit_edge(values_of(A)),
    "count_outliers": lambda A: count_outliers(values_of(A)),
    "spike": lambda A: spike(values_of(A) + 20, shape=(M, N)),
    "strength": lambda A: strength(values_of(A) + 20, shape=(M, N)),
    "lower_edge_test": lambda A: lower_edge_test(values_of(A), (M, N), sigma=1.0),
    "fit_lower_edge": lambda A: fit_lower_edge(values_of(A), (M, N)),
    "spacing_test": lambda A: spacing_test(values_of(A)),
    "unfold": lambda A: unfold(values_of(A)),
    "vector_test": lambda A: vector_test(A.flatten() if A.ndim == 2 else A, beta=2),
    "stieltjes": lambda A: stieltjes(values_of(A), 9.3),
    "stieltjes_inversion": lambda A: stieltjes_inversion(lambda z: 1 / z, values_of(A), width=0.1),
    "resolvent_traces": lambda A: resolvent_traces(values_of(A), (M, N), 9.3),
    "d_transform": lambda A: d_transform(values_of(A), (M, N), 9.3),
    "update_svd": lambda A: update_svd(*factors(A), 1.0, (M, N)).gamma,
    "budget": lambda A: budget(A, 2),
    "BaseSpectrum": lambda A: BaseSpectrum.of(A).values,
    "predict": lambda A: predict(A, *factors(A)).location,
    "predict_spikes": lambda A: (
        predict_spikes(BaseSpectrum.of(draw(M, N, seed=1)), values_of(A)).location
    ),
    "singular_perturbation": lambda A: singular_perturbation(A, A),
    "eigen_perturbation": lambda A: eigen_perturbation(symmetric(A), symmetric(A)),
    "eigenvalue_perturbation": lambda A: eigenvalue_perturbation(symmetric(A), symmetric(A)),
    "resolvent_update": lambda A: resolvent_update(*square_and_vectors(A), 0.5),
    "resolvent_update_low_rank": lambda A: resolvent_update_low_rank(
        square_and_vectors(A)[0], *factors(A[:N])
    ),
    "secular_function": lambda A: secular_function(*square_and_vectors(A), 0.5),
    "Secular": lambda A: Secular.from_svd(*t.thin_svd(draw(M, N)), *factors(A)).singular_values(2),
    "Secular(solves)": lambda A: Secular.from_solves(A, *factors(draw(M, N))).singular_values(1),
    "Secular(iterative)": lambda A: Secular.from_solves(
        A, *factors(draw(M, N)), solver=ConjugateGradients()
    ).singular_values(1),
    "certify": certificate_of,
    "judge": judged,
    "base_vectors": lambda A: base_vectors(A, values_of(A), (M, N)),
    "scores": lambda A: scores(factors(A)[0], BaseVectors(like(draw(M, 4), A), torch.arange(4)), 2),
    "ties": tied,
    "effective_rank": lambda A: effective_rank(values_of(A)),
    "LeadingTriplets": lambda A: LeadingTriplets([A])()[0].sigma,
    "SpikeClip": clipped,
    "OrthonormalFactors": retracted,
    "RankController": controlled,
    "Monitor": watched,
    "IntruderPenalty": penalty,
    "hold_update": of_module(lambda layer: hold_update(layer, threshold=1.0).weight),
}
"""Each public function, and what of it is compared; in brackets, an option with its own path."""
OTHERS = {
    "neighbour_gaps": "takes values that a solver has found",
    "verdict": "takes numbers, one at a time",
    "judge_vectors": "takes triplets that a solver has found",
    "measure_base": "takes values that judge has found",
    "measure": "takes a matrix as it is stored, tried in update/test_products.py",
    "moment_misfit": "takes the values of measure",
    "critical_scale": "takes a base that was measured",
    "generic_scale": "takes a base that was measured",
    "aligned_scale": "takes triplets that a solver has found",
    "aligned_scores": "takes triplets that a solver has found",
    "bracket_scale": "takes a function that says what is new",
    "compute_anew": "takes a function that computes",
    "svd_is_cheap": "takes a shape",
    "adapted_matrices": "finds layers; what uses them is above",
    "full_matrices": "finds layers",
    "AdaptedMatrix": "holds layers",
    "FullMatrix": "holds a weight",
    "SpectralCap": "is what spectral_cap registers",
    "Secular": "is above, by its two forms",
}
MODULES = ("triplet", "spectral", "rmt", "update", "intruder", "tune")


COMPLEX = (
    "stieltjes", "resolvent_update", "resolvent_update_low_rank", "secular_function",
    "vector_test",
)  # fmt: skip
"""What has a meaning for complex numbers."""


def values_only(name):
    """Whether a function takes numbers, not a matrix."""
    places = ("rmt",)
    plain_name = name.partition("(")[0]
    return any(
        plain_name in importlib.import_module(f"bulkedge.{place}").__all__ for place in places
    ) or plain_name in ("resolution", "predict_spikes", "effective_rank")


def plain():
    return draw(M, N)


CONDITIONS = {
    "NaN": lambda A: A.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float("nan"))),
    "Inf": lambda A: A.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float("inf"))),
    "-Inf": lambda A: A.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(-float("inf"))),
    "integers": lambda A: (10 * A).round().long(),
    "complex": lambda A: A + 1j * A.flip(0),
    "empty": lambda A: A[:0],
    "1-D": lambda A: A[0],
}


@contextlib.contextmanager
def precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "medium": lambda: precision("medium"),
    "high": lambda: precision("high"),
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "addmm_", "dot"}


class Watch(TorchDispatchMode):
    """Sees every product, and in what precision it is done: on any machine, whatever it can do."""

    def __init__(self):
        super().__init__()
        self.low = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            dtypes = {x.dtype for x in args if isinstance(x, torch.Tensor)}
            if torch.bfloat16 in dtypes or torch.float16 in dtypes:
                self.low.append((name, dtypes))
            if torch.float32 in dtypes and torch.get_float32_matmul_precision() != "highest":
                self.low.append((name, torch.get_float32_matmul_precision()))
        return func(*args, **(kwargs or {}))


def flat(result):
    """All numbers of a result."""
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    if isinstance(result, np.ndarray | int | float | complex):
        wide = torch.float64 if isinstance(result, float) else None
        return [torch.as_tensor(result, dtype=wide)]
    if dataclasses.is_dataclass(result):
        return flat([getattr(result, field.name) for field in dataclasses.fields(result)])
    if isinstance(result, list | tuple):
        return [x for one in result for x in flat(one)]
    return []


def run(name, A):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flat(ENTRIES[name](A))


def test_every_public_function_is_in_the_table():
    public = {}
    for module in MODULES:
        loaded = importlib.import_module(f"bulkedge.{module}")
        public |= {name: getattr(loaded, name) for name in loaded.__all__}
    functions = {name for name, x in public.items() if inspect.isfunction(x)}
    functions |= {name for name in ("SpikeClip", "Monitor", "RankController") if name in public}
    named = {name.partition("(")[0] for name in ENTRIES} | set(OTHERS)
    assert functions <= named, functions - named
    solvers = {name for name, x in public.items() if inspect.isclass(x) and hasattr(x, "compute")}
    assert solvers - {"Solver"} <= {name.partition("(")[2][:-1] for name in ENTRIES}


ELEMENTWISE = (
    "edge_test",
    "lower_edge_test",
    "spike",
    "strength",
    "stieltjes_inversion",
    "predict_spikes",
)
"""Of no numbers they give no numbers."""


def accepted(name, A):
    """What an entry gives, all of it numbers; None if it refuses in words of ours."""
    try:
        found = run(name, A)
    except BulkedgeError as refused:
        error = refused
    else:
        error = None
    if error is not None:
        assert "expected" in str(error)
        return None
    assert all(bool(x.isfinite().all()) for x in found if x.is_floating_point()), (name, found)
    return found


@pytest.mark.parametrize("name", ENTRIES)
def test_the_plain_case_works(name):
    assert any(x.numel() for x in run(name, plain()))


@pytest.mark.parametrize("condition", ["NaN", "Inf", "-Inf"])
@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_not_finite_is_refused(name, condition):
    found = accepted(name, CONDITIONS[condition](plain()))
    # what noise reaches at infinity is a number: never from below, always from above
    known = {"edge_test": 0, "lower_edge_test": 1}
    assert found is None or (condition != "NaN" and float(found[0][0]) == known.get(name))


@pytest.mark.parametrize("condition", ["empty", "1-D"])
@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_no_matrix_is_refused(name, condition):
    found = accepted(name, CONDITIONS[condition](plain()))
    assert found is None or values_only(name)
    if condition == "empty" and found is not None:
        assert name in (*ELEMENTWISE, "resolution", "effective_rank", "stieltjes")


@pytest.mark.parametrize("name", ENTRIES)
def test_integers_are_refused_or_taken_for_the_numbers_they_are(name):
    A = CONDITIONS["integers"](plain())
    found = accepted(name, A)
    if found is None:
        return
    torch.testing.assert_close(found, run(name, A.double()), check_dtype=False)


@pytest.mark.parametrize("name", ENTRIES)
def test_complex_numbers_are_refused_or_computed_with(name):
    found = accepted(name, CONDITIONS["complex"](plain().double()))
    assert found is None or name in COMPLEX
    if found is not None:
        reals = run(name, plain().double() + 0j)
        torch.testing.assert_close(reals, run(name, plain().double()), check_dtype=False)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ENTRIES)
def test_no_setting_of_the_process_changes_a_digit(name, setting):
    expected = run(name, plain())
    with SETTINGS[setting](), Watch() as watch:
        found = run(name, plain())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert not watch.low


SUBNORMAL = {"float32": (1e-39, 2e-7), "few_bits": (1e-42, 1e-3), "float64": (1e-310, 1e-11)}
INTERVALS = ("spectral_norm(Rigorous)", "spectral_norm(Probable)", "Rigorous", "Probable")
SCALES = {  # by what power of the scale a result grows
    **dict.fromkeys((name for name in ENTRIES if name.startswith("singular_triplet(")), 1),
    **dict.fromkeys(
        (
            "Dense", "Sum", "Scaled", "Adjoint", "spectral_norm", "project_spectral_ball",
            "project_spectral_ball(rescale)", "hold_spectral_ball", "cap", "BaseSpectrum",
            "LeadingTriplets", "spectral_cap", "spectral_cap(certified)", "Convolution",
        ), 1,
    ),
    "normalize": 0,
    "effective_rank": 0,
}  # fmt: skip


@pytest.mark.parametrize("kind", SUBNORMAL)
@pytest.mark.parametrize("name", ENTRIES)
def test_numbers_below_the_normal_ones(name, kind):
    """The oracle is the same matrix times a power of two, which changes no digit of it."""
    scale, digits = SUBNORMAL[kind]
    A = plain().double().mul(scale).to(torch.float64 if kind == "float64" else torch.float32)
    found = accepted(name, A)
    if found is None:
        # a subnormal norm has few digits, and what is divided by it no more: that is refused
        assert name not in (*SCALES, *INTERVALS) or kind == "float64" or name == "normalize"
        return
    if name in INTERVALS:
        lower, upper = (float(x) for x in found)
        norm = float(torch.linalg.matrix_norm(A.double() * 2.0**900, 2))
        assert lower * 2.0**900 <= norm * (1 + 1e-12) <= upper * 2.0**900 * (1 + 2e-12)
        assert upper * 2.0**900 <= 1.1 * norm
    elif name in SCALES:
        power = 2.0 ** (900 if kind == "float64" else 120)
        exact = run(name, A.double() * power)
        back = [x.double() * power ** SCALES[name] for x in found]
        numbers = [x.double() for x in exact if x.is_floating_point()]
        back = [x for x, y in zip(back, exact, strict=True) if y.is_floating_point()]
        for x, y in some(zip(back, numbers, strict=True)):
            torch.testing.assert_close(x, y, rtol=0, atol=2 * digits * float(y.abs().max()))


def test_what_an_entry_says_of_a_wrong_shape_or_dtype():
    with pytest.raises(
        InputError, match=r"entries, got shape .* of torch\.int64; reshape or convert it"
    ):
        bulkedge.project_spectral_ball(torch.ones(3, 3, dtype=torch.long))
    with pytest.raises(
        InputError, match=r"expected real floating-point values, got torch\.int64; "
    ):
        resolution(torch.ones(2, dtype=torch.long), (3, 3))
