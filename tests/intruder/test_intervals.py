"""From evidence made by hand to intervals, and what a search makes of them."""

import pytest
import torch

from bulkedge.intruder import Verdict
from bulkedge.intruder._clusters import Cluster, Clusters
from bulkedge.intruder._evidence import CountBound, Evidence, Proofs, Question, known_clusters
from bulkedge.intruder._intervals import (
    chord_of,
    cosine_interval,
    extreme_norms,
    helpful_min_sigma,
    overlap_interval,
    score_interval,
)
from bulkedge.intruder._search import assess, provable_cuts
from bulkedge.triplet import Ritz, Unseen
from bulkedge.triplet._rounding import Rounding

WIDE = torch.float64
VALUES = [4.0, 2.0, 1.0, 0.5]


def evidence_of(coordinates, residual=1e-9, probes=3, proofs=None, *, exhausted=False):
    """Four Ritz vectors with these residuals, and directions with these coordinates on them."""
    s, eye = torch.tensor(VALUES, dtype=WIDE), torch.eye(4, dtype=WIDE)
    lacking = residual * eye
    drawn = torch.ones(4, probes, dtype=WIDE)
    ritz = Ritz(s, eye, eye, lacking[:0] if exhausted else lacking)
    unseen = Unseen(ritz, drawn, 0.0, Rounding(1e-12), 5.0, 9, 1e-9)
    t = torch.tensor(coordinates, dtype=WIDE).mT
    return Evidence(unseen, t, (9, 9), 4, exhausted, proofs or Proofs())


def question(k=1, epsilon=0.5, error=0.0, groups=None, subspace=2):
    errors = torch.full((k,), error, dtype=WIDE)
    return Question(epsilon, errors, torch.tensor(groups or list(range(k))), subspace)


def clusters_of(*ends, complete=True, norm_bound=5.0):
    """Exact clusters that end at these Ritz vectors, cut between their values."""
    cuts = [float("inf"), *(0.75 * VALUES[end - 1] for end in ends)]
    first = [0, *ends]
    found = [Cluster(first[i], end, cuts[i + 1], cuts[i], 0.0, 0.0) for i, end in enumerate(ends)]
    return Clusters(found, [complete] * len(ends), norm_bound)


@pytest.mark.parametrize("complete", [True, False])
def test_a_component_on_a_converged_vector_bounds_the_score_on_both_sides(complete):
    evidence = evidence_of([[0.6, 0.8, 0.0, 0.0]])
    score = score_interval(question(), evidence, clusters_of(1, 2, complete=complete))
    assert score.lower.item() == pytest.approx(0.8 if complete else 0.0)
    assert score.upper.item() == pytest.approx(0.8)


def test_of_a_cluster_of_two_one_vector_has_half_of_the_square():
    score = score_interval(question(), evidence_of([[0.6, 0.8, 0.0, 0.0]]), clusters_of(2))
    assert score.lower.item() == pytest.approx(0.5**0.5)
    assert score.upper.item() == pytest.approx(1.0)


def test_the_error_of_a_direction_widens_its_interval():
    evidence, clusters = evidence_of([[0.6, 0.8, 0.0, 0.0]]), clusters_of(1, 2)
    score = score_interval(question(error=0.1), evidence, clusters)
    chord = float(chord_of(torch.tensor(0.1, dtype=WIDE)))
    assert chord == pytest.approx(0.1, rel=2e-3)
    assert score.lower.item() == pytest.approx(0.8 - chord)
    assert score.upper.item() == pytest.approx(0.8 + chord)
    overlap = overlap_interval(question(error=0.1), evidence, clusters)
    assert [end.item() for end in overlap] == pytest.approx([1.0 - chord, 1.0])


def test_a_group_is_bounded_by_every_vector_of_its_span():
    """Two directions in one plane: some vector of it has nothing of the leading base vector."""
    evidence = evidence_of([[0.6, 0.8, 0.0, 0.0], [-0.8, 0.6, 0.0, 0.0]])
    score = score_interval(question(2, groups=[0, 0]), evidence, clusters_of(1, 2))
    assert score.lower.tolist() == pytest.approx([0.0])
    overlap = overlap_interval(question(2, groups=[0, 0]), evidence, clusters_of(2))
    assert overlap.lower.tolist() == pytest.approx([1.0, 1.0])


def test_extreme_norms_of_a_group():
    rows = torch.tensor([[0.6, -0.8, 0.0], [0.8, 0.6, 0.5]], dtype=WIDE)
    least, largest = extreme_norms(rows[:1], torch.tensor([0, 0, 1]))
    assert least.tolist() == pytest.approx([0.0, 0.0])
    assert largest.tolist() == pytest.approx([1.0, 0.0])
    least, largest = extreme_norms(rows, torch.tensor([0, 0, 1]))
    assert least.tolist() == pytest.approx([1.0, 0.5])
    assert largest.tolist() == pytest.approx([1.0, 0.5])


def test_the_overlap_is_known_where_the_leading_space_ends_at_a_cut():
    evidence = evidence_of([[0.6, 0.0, 0.8, 0.0]])
    overlap = overlap_interval(question(), evidence, clusters_of(1, 2, 3))
    assert [end.item() for end in overlap] == pytest.approx([0.6, 0.6])
    # without a cut there the next vectors may belong to it
    overlap = overlap_interval(question(), evidence, clusters_of(1, 3))
    assert overlap.lower.item() == pytest.approx(0.6)
    assert 0.6 < overlap.upper.item() <= 1.0


def test_cosines_are_those_of_the_spaces():
    evidence = evidence_of([[1.0, 0.0, 0.0, 0.0], [0.0, 0.6, 0.8, 0.0]])
    lower, upper = cosine_interval(question(2), evidence, clusters_of(1, 2))
    assert lower.tolist() == pytest.approx([1.0, 0.6])
    assert upper.tolist() == pytest.approx([1.0, 0.6])


def test_a_vector_of_the_kernel_needs_a_bound_of_the_smallest_value():
    """It is in no Ritz vector with a value: only σ near 0 leaves room for it."""
    ritz = Ritz(
        torch.tensor([2.0, 1.0, 0.0], dtype=WIDE),
        torch.eye(3, dtype=WIDE),
        torch.eye(2, dtype=WIDE),
        torch.zeros(0, 2, dtype=WIDE),
    )
    unseen = Unseen(ritz, torch.ones(3, 2, dtype=WIDE), 0.0, Rounding(1e-12), 2.3, 3, 1e-9)
    evidence = Evidence(unseen, torch.tensor([[0.0], [0.0], [1.0]], dtype=WIDE), (3, 2), 3)
    before = score_interval(question(), evidence, known_clusters(evidence))
    assert before.upper.item() == pytest.approx(1.0)
    x = helpful_min_sigma(question(), evidence, before, provable=0.7)
    assert 0 < x <= 0.7
    assert helpful_min_sigma(question(), evidence, before, provable=0.0) == 0.0
    proved = Evidence(unseen, evidence.coordinates, (3, 2), 3, proofs=Proofs(min_sigma=x))
    after = score_interval(question(), proved, known_clusters(proved))
    assert after.upper.item() < 0.5


def test_counts_make_clusters_complete():
    proofs = Proofs(counts=(CountBound(0, 4.5), CountBound(2, 1.2)))
    clusters = clusters_of(1, 2, 3).found
    assert proofs.complete_vectors(clusters) == 2
    assert Proofs(counts=(CountBound(2, 1.8),)).complete_vectors(clusters) == 0  # above the cut
    assert proofs.norm_bound(5.0) == 4.5
    assert Proofs().norm_bound(5.0) == 5.0


def test_what_is_assumed_is_not_what_is_proved():
    """Without probes to speak of nothing is proved; and all is assumed."""
    evidence = evidence_of([[0.6, 0.8, 0.0, 0.0]], probes=2)
    assumed = known_clusters(evidence, assume_complete=True)
    assert [cluster.end for cluster in assumed.leading] == [1, 2, 3]
    assert assumed.norm_bound == pytest.approx(4.0)
    few = Evidence(
        Unseen(evidence.ritz, torch.ones(4, 0, dtype=WIDE), 0.0, Rounding(1e-12), 5.0, 9, 1e-9),
        evidence.coordinates, (9, 9), 4,
    )  # fmt: skip
    assert known_clusters(few).leading == []
    assert known_clusters(few).norm_bound == 5.0
    counted = Evidence(
        few.unseen, few.coordinates, (9, 9), 4, proofs=Proofs(counts=(CountBound(2, 1.2),))
    )
    assert [cluster.end for cluster in known_clusters(counted).leading] == [1, 2]


def test_an_exhausted_space_needs_no_proof():
    evidence = evidence_of([[0.0, 0.0, 0.8, 0.6]], probes=0, exhausted=True)
    found = assess(question(), evidence)
    assert [cluster.end for cluster in found.clusters.leading] == [1, 2, 3, 4]
    assert found.verdicts == (Verdict.ALIGNED,)
    assert found.undecided == 0


def test_an_assessment_is_open_until_it_is_proved():
    evidence = evidence_of([[0.6, 0.8, 0.0, 0.0]], probes=0)
    assert assess(question(), evidence).undecided == 1
    evidence = evidence_of([[0.6, 0.8, 0.0, 0.0]], probes=2)
    assert assess(question(), evidence, assume_complete=True).verdicts == (Verdict.ALIGNED,)


def test_cuts_to_be_proved_keep_away_from_values():
    evidence = evidence_of([[1.0, 0.0, 0.0, 0.0]])
    assert [bound.number for bound in provable_cuts(evidence, 0.1)] == [1, 2, 3]
    assert [bound.number for bound in provable_cuts(evidence, 1.0)] == [1, 2]
    assert provable_cuts(evidence, 10.0) == []
