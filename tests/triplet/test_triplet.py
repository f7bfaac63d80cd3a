import pytest
import torch

from bulkedge import ConvergenceError, InputError
from bulkedge.triplet import BlockKrylov, Status, singular_triplet
from cases import gaussian, nearly_degenerate

BAD = {
    "k_zero": (gaussian(4, 3), 0, "expected 1 ≤ k ≤ 3"),
    "k_too_large": (gaussian(4, 3), 4, "expected 1 ≤ k ≤ 3 for shape .4, 3., got k=4"),
    "empty": (torch.zeros(0, 3), 1, "expected a matrix with entries, got shape .0, 3."),
    "list": ([[1.0]], 1, "expected a torch tensor or a LinearMap, got list"),
    "vector": (torch.zeros(3), 1, "got shape .3,."),
    "half": (torch.zeros(3, 3, dtype=torch.float16), 1, "float32 or float64"),
    "complex": (torch.zeros(3, 3, dtype=torch.complex64), 1, "real floating-point"),
    "nan": (torch.tensor([[1.0, torch.nan]]), 1, "NaN or Inf"),
    "inf": (torch.tensor([[1.0, torch.inf]]), 1, "NaN or Inf"),
    "cancelling_infs": (torch.tensor([[-torch.inf, torch.inf]]), 1, "NaN or Inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_error(case):
    A, k, message = BAD[case]
    with pytest.raises(InputError, match=message):
        singular_triplet(A, k)


def test_stopping_short_raises_with_the_partial_result():
    A = nearly_degenerate(200, 200)
    solver = BlockKrylov(max_steps=2)
    with pytest.raises(ConvergenceError, match="raise max_steps") as caught:
        singular_triplet(A, 3, solver=solver)
    partial = singular_triplet(A, 3, solver=solver, strict=False)
    assert partial.status is Status.MAX_STEPS
    assert torch.equal(caught.value.partial.u, partial.u)


def test_input_is_left_alone():
    A = gaussian(30, 20).requires_grad_()
    before = A.detach().clone()
    result = singular_triplet(A, 2)
    assert torch.equal(A.detach(), before)
    assert not result.sigma.requires_grad
