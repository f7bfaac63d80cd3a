"""torch.func.functionalize has no rule for custom functions: one clear error, whatever is asked."""

import pytest
import torch
from torch.func import functionalize, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from bulkedge import InputError, spectral_norm
from bulkedge.spectral import cap, normalize
from bulkedge.triplet import Dense, LowRank, singular_triplet, truncate
from cases import gaussian

A = gaussian(6, 5)
FUNCTIONS = {
    "spectral_norm": spectral_norm,
    "spectral_norm of a map": lambda A: spectral_norm(Dense(A) + LowRank(A[:, :2], A[:2])),
    "singular_triplet": lambda A: singular_triplet(A, 2).u.square().sum(),
    "truncate": lambda A: truncate(A, 2).sum(),
    "normalize": lambda A: normalize(A).sum(),
    "cap": lambda A: cap(A, 0.5).sum(),
}
CALLS = {
    "alone": lambda f: functionalize(f)(A),
    "around a gradient": lambda f: functionalize(grad(f))(A),
    "inside a gradient": lambda f: grad(functionalize(f))(A),
    "around forward mode": lambda f: functionalize(lambda A: jvp(f, (A,), (A,))[1])(A),
    "around vmap": lambda f: functionalize(vmap(f))(torch.stack([A, A + 1])),
    "views, too": lambda f: functionalize(f, remove="mutations_and_views")(A),
    "traced": lambda f: make_fx(lambda A: functionalize(f)(A))(A),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functionalize_is_refused(function, call):
    with pytest.raises(InputError, match=r"torch\.func\.functionalize has no rule"):
        CALLS[call](FUNCTIONS[function])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_beside_it_nothing_is_refused(function):
    inside = functionalize(lambda A: A.clone().add_(1.0))(A)
    torch.testing.assert_close(FUNCTIONS[function](inside), FUNCTIONS[function](A + 1))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_functionalize_is_refused_when_compiled(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda A: functionalize(spectral_norm)(A), backend=backend)
    with pytest.raises(InputError, match=r"torch\.func\.functionalize has no rule"):
        compiled(A)
