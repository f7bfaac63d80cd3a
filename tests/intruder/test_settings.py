"""Settings of a certificate that make no sense are refused; verdicts must not come of them."""

import numpy
import pytest
import torch

from bulkedge import InputError
from bulkedge._linmap import Dense, LowRank
from bulkedge.intruder import certify


def matrices():
    generator = torch.Generator().manual_seed(0)
    W0 = torch.randn(60, 40, generator=generator)
    return W0, torch.linalg.svd(W0).U[:, :2].contiguous()


NAN = float("nan")
BAD = {
    "epsilon above 1": ({"epsilon": 2.0}, "expected epsilon between 0 and 1"),
    "epsilon nan": ({"epsilon": NAN}, "expected epsilon between 0 and 1"),
    "negative errors": ({"errors": torch.tensor([-0.5, 0.1])}, "errors as a tensor of 2"),
    "nan errors": ({"errors": torch.tensor([NAN, 0.1])}, "errors as a tensor of 2"),
    "three errors": ({"errors": torch.zeros(3)}, "errors as a tensor of 2"),
    "a list of errors": ({"errors": [0.0, 0.0]}, "errors as a tensor of 2"),
    "a gap in groups": ({"groups": torch.tensor([0, 5])}, "groups as a tensor of 2"),
    "descending groups": ({"groups": torch.tensor([1, 0])}, "groups as a tensor of 2"),
    "one group": ({"groups": torch.tensor([0])}, "groups as a tensor of 2"),
    "groups below 0": ({"groups": torch.tensor([-1, -1])}, "groups as a tensor of 2"),
    "subspace 0": ({"subspace": 0}, "expected subspace ≥ 1"),
    "half a subspace": ({"subspace": 2.5}, "expected subspace ≥ 1"),
    "no steps": ({"max_steps": 0}, "expected max_steps ≥ 1"),
    "negative probes": ({"probes": -1}, "expected probes ≥ 0"),
    "half a probe": ({"probes": 2.5}, "expected probes ≥ 0"),
    "no generator": ({"generator": 3}, "expected generator to be a torch.Generator"),
    "negative norm": ({"frobenius": -1.0}, "expected frobenius to be positive"),
    "false norm": ({"frobenius": 1e-3}, "expected frobenius to be"),
}


@pytest.mark.parametrize("case", BAD)
def test_nonsense_is_refused(case):
    settings, message = BAD[case]
    with pytest.raises(InputError, match=message):
        certify(*matrices(), **settings)


def test_vectors_must_be_a_tensor_of_real_numbers():
    W0, Y = matrices()
    with pytest.raises(InputError, match="expected Y as a tensor of real vectors"):
        certify(W0, numpy.asarray(Y))
    with pytest.raises(InputError, match="expected Y as a tensor of real vectors"):
        certify(W0, Y.to(torch.complex64))


def test_a_space_that_sees_nothing_of_the_base_is_refused():
    outside = torch.eye(30)[:, -1:]
    with pytest.raises(InputError, match=r"got none: give more probes"):
        certify(torch.eye(30, 20), outside, probes=0)  # outside its range
    assert float(certify(torch.eye(30, 20), outside, probes=1).lower) == 0.0
    g = torch.Generator().manual_seed(0)
    W, B, A = (torch.randn(shape, generator=g) for shape in [(200, 150), (200, 2), (2, 150)])
    update = LowRank(1e6 * B, A)
    with pytest.raises(InputError, match=r"if it is a sum of maps that cancel, the sum in float64"):
        certify(Dense(W) + update - update, torch.eye(200)[:, :1])
    wide = Dense(W).to(torch.float64) + update.to(torch.float64) - update.to(torch.float64)
    assert len(certify(wide, torch.eye(200)[:, :1]).verdicts) == 1


def test_a_base_that_is_trained_is_no_trouble(recwarn):
    W0, Y = matrices()
    assert certify(W0.requires_grad_(), Y).verdicts == certify(W0.detach(), Y).verdicts
    assert not recwarn.list
