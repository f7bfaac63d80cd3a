"""Convolutions as maps, against the module applied to every unit input."""

import itertools
import math

import pytest
import torch
from torch import nn

from bulkedge import InputError
from bulkedge.spectral.certificate import Probable, Rigorous
from bulkedge.spectral.convolution import Convolution
from bulkedge.triplet import singular_triplet
from cases import gaussian, generator

MODULES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (11,), 2: (7, 6), 3: (5, 4, 5)}
SETTINGS = [
    {"dims": dims, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    for dims, stride, padding, dilation, groups in itertools.product(
        (1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2), (1, 2)
    )
    if not (dims == 3 and dilation == 2 and padding == 0)  # the kernel would not fit
]
SAME = [
    {"dims": dims, "padding": "same", "kernel": kernel, "dilation": dilation}
    for dims, kernel, dilation in itertools.product((1, 2, 3), (2, 3, 4), (1, 3))
]
MIXED = [
    {"dims": 2, "kernel": (1, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"dims": 2, "kernel": (4, 2), "stride": (3, 4), "padding": (3, 1)},
    {"dims": 3, "kernel": (2, 1, 3), "stride": (1, 2, 3), "padding": (1, 0, 2)},
    {"dims": 1, "padding": "valid", "kernel": 2, "stride": 4},
    {"dims": 1, "kernel": 1, "stride": 5, "padding": 3},
]


def make(dims, kernel=3, **settings):
    module = MODULES[dims](4, 2, kernel, **settings).double()
    with torch.no_grad():
        module.weight.copy_(torch.randn(module.weight.shape, generator=generator(dims)))
    return module, SIZES[dims]


def matrix_of(module, size):
    """One column for each unit input, by the module itself."""
    columns = []
    shape = (1, module.in_channels, *size)
    for i in range(math.prod(shape)):
        unit = torch.zeros(math.prod(shape), dtype=torch.float64)
        unit[i] = 1
        out = module(unit.reshape(shape))
        columns.append((out - module(torch.zeros(shape).double())).flatten())
    return torch.stack(columns, dim=1).detach()


def name(settings):
    return "-".join(f"{key}{value}".replace(" ", "") for key, value in settings.items())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # the module's
@pytest.mark.parametrize("settings", SETTINGS + SAME + MIXED, ids=name)
def test_products_and_their_adjoints(settings):
    module, size = make(**settings)
    with torch.no_grad():
        A = Convolution.of(module, size)
        matrix = matrix_of(module, size)
        assert A.shape == matrix.shape
        X, Y = gaussian(A.shape[1], 3), gaussian(A.shape[0], 2)
        torch.testing.assert_close(A.matmat(X), matrix @ X)
        torch.testing.assert_close(A.rmatmat(Y), matrix.T @ Y)
        torch.testing.assert_close(A.to_dense(), matrix)
        torch.testing.assert_close(Y.T @ A.matmat(X), A.rmatmat(Y).T @ X)
        out = module(X.T.reshape(3, *A.input_shape))
        assert out.shape == (3, *A.output_shape)


def test_dense_matrix_is_exact():
    """Each entry is a tap of the kernel or 0, so that a proof about it is one about the layer."""
    for size in ((9, 8), (3, 3)):
        A = Convolution(gaussian(6, 9).reshape(3, 2, 3, 3), size, stride=2, padding=1)
        taps = set(A.kernel.flatten().tolist()) | {0.0}
        assert set(A.to_dense().flatten().tolist()) <= taps
        assert set(A.T.to_dense().flatten().tolist()) <= taps
        assert torch.equal(A.to_dense(), A.rmatmat(torch.eye(A.shape[0]).double()).mT)


def test_transposed_layer_is_the_transposed_map():
    A = Convolution(gaussian(6, 9).reshape(3, 2, 3, 3), (7, 9), stride=2, padding=1)
    layer = nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(A.kernel)
        Y = gaussian(A.shape[0], 1)
        out = layer(Y.T.reshape(1, *A.output_shape)).reshape(-1, 1)
    torch.testing.assert_close(A.T.matmat(Y), out)


def test_no_columns():
    A = Convolution(torch.ones(2, 1, 3), 8)
    assert A.matmat(torch.ones(8, 0)).shape == (12, 0)
    assert A.rmatmat(torch.ones(12, 0)).shape == (8, 0)


@pytest.mark.parametrize(
    "settings", [SETTINGS[20], SETTINGS[60], SETTINGS[-1], SAME[6], MIXED[1]], ids=name
)
def test_norm_equals_that_of_the_dense_matrix(settings):
    module, size = make(**settings)
    A = Convolution.of(module, size)
    sigma = torch.linalg.svdvals(matrix_of(module, size))
    found = singular_triplet(A, k=2)
    torch.testing.assert_close(found.sigma, sigma[:2])
    norm = float(sigma[0])
    proved = Rigorous().bound(A, found.v[:, 0])
    assert proved.lower <= norm * (1 + 1e-13)
    assert norm * (1 - 1e-13) <= proved.upper <= norm * (1 + 1e-7)
    likely = Probable().bound(A)
    assert likely.lower <= norm * (1 + 1e-13)
    assert norm * (1 - 1e-13) <= likely.upper <= norm * 1.0101


def test_certificates_of_a_float32_layer():
    layer = nn.Conv2d(3, 5, 3, padding=1)
    dense = matrix_of(layer.double(), (6, 6))
    norm = float(torch.linalg.matrix_norm(dense, 2))
    for bound in (Rigorous(), Probable()):
        found = bound.bound(Convolution.of(layer.float(), (6, 6)))
        assert found.lower <= norm * (1 + 1e-13)
        assert norm * (1 - 1e-13) <= found.upper <= norm * 1.0101


# --- the derivative in the kernel ---------------------------------------------------------------


def grouped(kernel):
    return Convolution(kernel, (6, 5), stride=2, padding=1, dilation=(1, 2), groups=2)


def test_pullback_is_the_gradient():
    kernel = gaussian(4 * 2, 6).reshape(4, 2, 2, 3).requires_grad_()
    A = grouped(kernel)
    L, R = gaussian(A.shape[0], 3), gaussian(A.shape[1], 3)
    (expected,) = torch.autograd.grad((L * A.matmat(R)).sum(), kernel)
    torch.testing.assert_close(A.pullback(L, R), (expected,))
    assert torch.autograd.gradcheck(lambda k: grouped(k).matmat(R), kernel)
    assert torch.autograd.gradcheck(lambda k: grouped(k).rmatmat(L), kernel)
    L.requires_grad_(), R.requires_grad_()
    assert torch.autograd.gradcheck(lambda L, R: grouped(kernel).pullback(L, R), (L, R))
    assert torch.autograd.gradcheck(lambda k: grouped(k).to_dense(), kernel)


def test_pushforward_is_the_convolution_with_the_tangent():
    kernel, tangent = gaussian(4 * 2, 12).reshape(2, 4, 2, 2, 3)
    A, R = grouped(kernel), gaussian(60 * 2, 2)
    step = 2.0**-20  # the map is linear in its kernel: no error but rounding
    difference = (grouped(kernel + step * tangent).matmat(R) - A.matmat(R)) / step
    torch.testing.assert_close(A.pushforward(tangent).matmat(R), difference, rtol=1e-6, atol=1e-7)


def test_gradients_reach_the_layer():
    layer = nn.Conv2d(2, 3, 3, padding="same")
    A = Convolution.of(layer, 8)
    assert A.tensors[0] is layer.weight
    found = singular_triplet(A.with_tensors(*(t.detach() for t in A.tensors)))
    (gradient,) = A.pullback(found.u, found.v)  # of σ₁
    step = 1e-2 * gradient / torch.linalg.vector_norm(gradient)
    lowered = singular_triplet(A.with_tensors((layer.weight - step).detach())).sigma
    assert float(lowered) < float(found.sigma)


# --- the norm of a layer is not that of its reshaped kernel -------------------------------------


def norms(A):
    reshaped = torch.linalg.matrix_norm(A.kernel.flatten(1), 2)
    return float(singular_triplet(A).sigma), float(reshaped)


def test_reshaped_kernel_underestimates():
    """Overlapping windows add up: a layer "normalised" by it still amplifies nearly threefold."""
    true, reshaped = norms(Convolution(torch.ones(1, 1, 3, 3).double(), (32, 32), padding=1))
    assert reshaped == pytest.approx(3)
    assert 8.9 < true < 9  # the limit of a large image is the sum of the taps
    random, reshaped = norms(Convolution(gaussian(8, 72).reshape(8, 8, 3, 3), 12, padding=1))
    assert random > 1.2 * reshaped
    assert true <= 3 * 3  # never more than √taps times the reshaped norm


def test_reshaped_kernel_overestimates():
    """Taps that meet only padding do nothing: a 1×1 image sees the middle of a 3×3 kernel."""
    kernel = torch.ones(1, 1, 3, 3).double()
    true, reshaped = norms(Convolution(kernel, (1, 1), padding=1))
    assert true == pytest.approx(1)
    assert reshaped == pytest.approx(3)


@pytest.mark.parametrize("stride", [2, 3])
def test_windows_that_do_not_overlap_have_the_reshaped_norm(stride):
    kernel = gaussian(5, 3 * stride**2).reshape(5, 3, stride, stride)
    true, reshaped = norms(Convolution(kernel, (6, 6), stride=stride))
    assert true == pytest.approx(reshaped, rel=1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_tap_is_a_matrix(dims):
    weight = gaussian(5, 3)
    A = Convolution(weight.reshape(5, 3, *[1] * dims), SIZES[dims])
    expected = torch.linalg.matrix_norm(weight, 2)
    torch.testing.assert_close(singular_triplet(A).sigma[0], expected)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_other_padding_is_refused_by_name(mode):
    with pytest.raises(InputError, match=f"padding_mode='zeros', got '{mode}'"):
        Convolution.of(nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode), (8, 8))


@pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.ConvTranspose2d(2, 2, 3)])
def test_other_layers_are_refused_by_name(layer):
    with pytest.raises(
        InputError, match=f"expected nn.Conv1d, Conv2d or Conv3d, got {type(layer).__name__}"
    ):
        Convolution.of(layer, (8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": torch.ones(3, 3)}, r"kernel of shape .* got shape \(3, 3\)"),
        (
            {"kernel": torch.ones(1, 1, 3, 3, 3, 3)},
            r"kernel of shape .* got shape \(1, 1, 3, 3, 3, 3\)",
        ),
        (
            {"kernel": torch.ones(1, 1, 3, 3, dtype=torch.int64)},
            "floating-point kernel of shape .* of torch.int64",
        ),
        ({"kernel": torch.ones(1, 0, 3, 3)}, "kernel with entries"),
        ({"input_size": (8,)}, r"input_size of 2 integers ≥ 1, got \(8,\)"),
        ({"input_size": (8, 0)}, "input_size of 2 integers"),
        ({"input_size": (2, 8)}, r"padded input \(2, 8\), got one that extends over \(3, 3\)"),
        (
            {"input_size": (3, 4), "dilation": 2, "padding": (1, 0)},
            r"padded input \(5, 4\), got one that .*\(5, 5\)",
        ),
        ({"groups": 3}, "groups ≥ 1 that divide the 4 output channels, got groups=3"),
        ({"groups": 0}, "output channels, got groups=0"),
        ({"stride": 0}, "stride of 2 integers ≥ 1"),
        ({"stride": (1, 1, 1)}, "stride of 2 integers"),
        ({"padding": -1}, "padding of 2 integers ≥ 0"),
        ({"padding": 0.5}, "padding of 2 integers"),
        ({"padding": "full"}, "'same', 'valid' or numbers, got 'full'"),
        ({"padding": "same", "stride": 2}, "stride 1 with padding='same'"),
        ({"dilation": 0}, "dilation of 2 integers ≥ 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    good = {"kernel": torch.ones(4, 2, 3, 3), "input_size": (8, 8)}
    assert Convolution(**good).shape == (144, 128)
    with pytest.raises(InputError, match=message):
        Convolution(**good | arguments)
