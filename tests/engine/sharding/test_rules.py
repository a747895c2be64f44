"""Logical axes to mesh axes: what is divided, and what is refused."""

import pytest
from jax.sharding import PartitionSpec
from twinmesh.engine.sharding.rules import TENSOR_PARALLEL, TP, ShardingRules


def test_a_dimension_without_a_name_or_a_rule_is_whole():
    assert TENSOR_PARALLEL.spec((None, "embed", "mlp")) == PartitionSpec(None, None, TP)
    assert ShardingRules().spec(("vocab", "experts")) == PartitionSpec(None, None)


def test_other_rules_divide_other_axes():
    rules = ShardingRules(experts="ep", mlp=TP)
    assert rules.spec(("experts", "embed", "mlp")) == PartitionSpec("ep", None, TP)
    assert list(rules.over(TP)) == ["mlp"]
    assert list(rules.over("ep")) == ["experts"]


@pytest.mark.parametrize(
    ("axes", "words"),
    [(("heads",), "called 'heads': known are vocab, "), (("q_heads", "mlp"), "a mesh axis divides one of them only")],
)
def test_unknown_names_and_an_axis_used_twice_are_refused(axes, words):
    with pytest.raises(ValueError, match=words):
        TENSOR_PARALLEL.spec(axes)
