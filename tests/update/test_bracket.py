"""The search for the critical scale, against SVDs on a fine grid and made-up vectors."""

import math

import pytest
import torch

from bulkedge import InputError
from bulkedge.update import ScaledDirections, bracket_scale
from bulkedge.update.bracket import REACH, WIDTH
from cases import coming_and_going
from helpers import some

K, EPSILON = 6, 0.5
FINE = 1.004


def drawn(seed):
    base, B, A = coming_and_going(seed)
    return base, B @ A


def vectors(base, update, scales):
    """The leading left vectors at scales, in the basis of the base."""
    moved = base + torch.as_tensor(scales, dtype=torch.float64)[..., None, None] * update
    return torch.linalg.svd(moved)[0][..., :K]


def look(base, update):
    def found(scale):
        turned = vectors(base, update, scale)
        scores = turned.abs().amax(0)
        return ScaledDirections(scores, scores, scores, (turned,))

    return found


@pytest.fixture(scope="module")
def cases():
    """Updates, and where on a fine grid something is new."""
    scales = [0.01 * FINE**i for i in range(1200)]
    found = []
    for seed in range(16):
        base, update = drawn(seed)
        lowest = vectors(base, update, scales).abs().amax(-2).amin(-1)
        found.append((base, update, scales, (lowest < EPSILON).tolist()))
    return found


def runs(new):
    """The first and last place of each stretch."""
    starts = [i for i, x in enumerate(new) if x and not (i and new[i - 1])]
    return [(i, next((j for j in range(i, len(new)) if not new[j]), len(new)) - 1) for i in starts]


@pytest.mark.parametrize("start", [0.05, 0.5, 1.0, 4.0])
def test_no_window_wider_than_the_width_lies_below(cases, start):
    """In many of these updates new directions come and go before they stay."""
    assert sum(len(runs(new)) > 1 for *_, new in cases) > 5
    for base, update, scales, new in some(cases):
        found = bracket_scale(look(base, update), start)
        assert found.low < found.high <= WIDTH * found.low
        assert bool((vectors(base, update, found.low).abs().amax(0) >= EPSILON).all())
        assert bool((vectors(base, update, found.high).abs().amax(0) < EPSILON).any())
        below = [(scales[i], scales[j]) for i, j in runs(new) if scales[i] <= found.low]
        assert all(last <= WIDTH * first for first, last in below), below


def test_it_takes_far_fewer_looks_than_a_grid_as_fine(cases):
    tried = [bracket_scale(look(base, update), 0.5).tried for base, update, *_ in cases]
    assert sum(tried) / len(tried) < 25  # a grid from 0.1 to 1 has 231


def test_what_is_known_to_be_new_is_not_passed_over(cases):
    base, update, *_ = cases[0]
    see, never = look(base, update), torch.ones(K).double()
    first = bracket_scale(see, 0.5).low / 3
    new = ScaledDirections(0 * never, 0 * never, 0 * never, see(first).vectors)
    found = bracket_scale(see, 0.5, {first: new})
    assert found.low < first == found.high


def steady(answer):
    """One vector that never turns, with the score of an answer: new, not, or open."""
    still = torch.eye(3).double()[:, :1]

    def found(scale):
        new = answer(scale)
        low, high = {True: (0.4, 0.4), False: (1.0, 1.0), None: (0.4, 0.6)}[new]
        one = torch.ones(1).double()
        return ScaledDirections((low + high) / 2 * one, low * one, high * one, (still,))

    return found


def test_an_end_that_is_open_widens_the_bracket():
    found = bracket_scale(steady(lambda s: None if 0.3 <= s <= 0.5 else s > 0.4))
    assert found.undecided > 0
    assert found.low < 0.3 <= WIDTH * found.low
    assert found.high / WIDTH < 0.5 < found.high


def test_what_is_out_of_reach_or_known():
    never = bracket_scale(steady(lambda s: False), 2.0)
    assert (never.low, never.high, never.undecided) == (2.0 * REACH, None, 0)
    always = bracket_scale(steady(lambda s: True), 2.0)
    assert (always.low, always.high) == (0.0, 2.0 / REACH)
    asked, see = [], steady(lambda s: s > 3)
    known = bracket_scale(lambda s: asked.append(s) or see(s), 2.0, {1.0: steady(bool)(1.0)})
    assert known.high == 1.0
    assert 1.0 not in asked


def test_a_weak_update_is_not_climbed_from_where_it_is_known_to_be_weak():
    see, start = steady(lambda s: s > 100), 90.0
    found = bracket_scale(see, start, {1.0: see(1.0)})
    assert found.low <= 100 < found.high <= WIDTH * found.low
    assert found.tried < 12


def test_a_number_of_vectors_that_changes_is_looked_into():
    """Where the rank falls at one end, what lies between is not known from both."""
    asked, full = [], torch.eye(4).double()

    def see(scale):
        asked.append(scale)
        count = 1 if scale < 0.7 else 2
        one = torch.ones(count).double()
        return ScaledDirections(one, one, one, (full[:, :count],))

    bracket_scale(see, 0.5)
    assert max(s for s in asked if s < 0.7) > 0.7 / WIDTH


def test_both_sides_count():
    """A right vector that turns away, beside a left one that stays."""

    def see(scale):
        angle = torch.tensor([scale]).double()
        scores = torch.cat([torch.ones(1).double(), angle.cos()])
        right = torch.cat([angle.cos(), angle.sin()])[:, None]
        return ScaledDirections(scores, scores, scores, (torch.eye(5).double()[:, :1], right))

    found = bracket_scale(see)
    assert found.low < math.pi / 3 <= found.high


def test_settings_that_make_no_sense():
    for start in (0, -1.0, math.inf):
        with pytest.raises(InputError, match="expected a positive finite start, got"):
            bracket_scale(steady(lambda s: True), start)
    with pytest.raises(InputError, match="expected width greater than 1"):
        bracket_scale(steady(lambda s: True), width=1.0)
    with pytest.raises(InputError, match="expected epsilon between 0, excluded, and 1"):
        bracket_scale(steady(lambda s: True), epsilon=0.0)
