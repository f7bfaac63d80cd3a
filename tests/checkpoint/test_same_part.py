"""Two tensors of an adapter that are one part of an update: the error names both."""

import pytest

from bulkedge import AdapterError
from bulkedge.checkpoint import open_adapter
from helpers import save_adapter, some, weights

Q = "base_model.model.layers.0.q"
PAIR = {f"{Q}.lora_A.weight": weights(2, 8), f"{Q}.lora_B.weight": weights(8, 2)}
AGAIN = {
    "lora_A": {f"{Q}.lora_A.default.weight": weights(2, 8)},
    "layers.0.q.weight": {
        f"{Q}.base_layer.lora_A.weight": weights(2, 8),
        f"{Q}.base_layer.lora_B.weight": weights(8, 2),
    },
    "lm_head.weight": {
        "base_model.model.lm_head.weight": weights(9, 8),
        "base_model.model.lm_head.modules_to_save.weight": weights(9, 8),
    },
}


@pytest.mark.parametrize("part", AGAIN)
def test_both_are_named_and_nothing_else(part, tmp_path):
    folder = save_adapter(tmp_path / "a", PAIR | AGAIN[part])
    with pytest.raises(AdapterError, match=f"are the same part '{part}'.*; keep one") as raised:
        open_adapter(folder)
    for name in some(AGAIN[part]):
        assert repr(name) in str(raised.value)
    assert "TensorInfo" not in str(raised.value)
