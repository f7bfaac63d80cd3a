import pytest

from bulkedge import CheckpointError
from bulkedge.checkpoint import infer_rule

BERT = {
    "embeddings.word.weight": (50, 8),
    "encoder.layer.0.dense.weight": (8, 8),
    "encoder.layer.1.dense.weight": (8, 8),
    "pooler.dense.weight": (8, 8),
}


def fitting(tuned):
    return lambda name, shape: tuned[name] == shape


def rule_for(tuned, base=BERT):
    return infer_rule(tuned, base, fitting(tuned))


def prefixed(prefix, names=BERT):
    return {prefix + name: shape for name, shape in names.items()}


def test_equal_names_need_no_rule():
    rule = rule_for(BERT)
    assert (rule.strip, rule.add) == ("", "")
    assert [rule.find(name) for name in BERT] == list(BERT)


@pytest.mark.parametrize("prefix", ["bert.", "model.bert."])
def test_a_prefix_is_taken_off(prefix):
    tuned = prefixed(prefix) | {"classifier.dense.weight": (8, 8), "classifier.weight": (2, 8)}
    rule = rule_for(tuned)
    assert [rule.find(prefix + name) for name in BERT] == list(BERT)
    # a head is no layer of the base, however alike its name and shape
    assert rule.find("classifier.dense.weight") is None
    assert rule.find("classifier.weight") is None


def test_a_prefix_is_added():
    base = prefixed("model.")
    rule = rule_for(BERT, base)
    assert [rule.find(name) for name in BERT] == list(base)


def test_a_part_of_the_names_is_enough():
    tuned = {"bert.encoder.layer.1.dense.weight": (8, 8)}
    assert rule_for(tuned).find(next(iter(tuned))) == "encoder.layer.1.dense.weight"


def test_shapes_tell_two_towers_apart():
    base = prefixed("vision.") | {f"text.{name}": (4, 4) for name in BERT}
    rule = rule_for(BERT, base)
    assert rule.add == "vision."


def test_two_towers_alike_are_ambiguous():
    with pytest.raises(CheckpointError, match=r"in two ways, with '(vision|text)\.' in front"):
        rule_for(BERT, prefixed("vision.") | prefixed("text."))


def test_shapes_that_never_fit_still_tell_the_names():
    tuned = {f"bert.{name}": (3, 3) for name in BERT}
    assert rule_for(tuned).find("bert.pooler.dense.weight") == "pooler.dense.weight"


def test_foreign_names_match_nothing_and_get_the_nearest():
    tuned = {"model.layers.0.mlp.weight": (8, 8)}
    rule = rule_for(tuned)
    assert rule.find(next(iter(tuned))) is None
    assert "'encoder.layer.0.dense.weight'" in rule.nearest("model.layer.0.dense.weight")
    assert rule.nearest("zzz") == "none is similar"
