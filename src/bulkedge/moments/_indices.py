"""Which indices an embedding looks up, where a forward of its own computes them.

OPT's table of positions is called with a mask, BART's with the tokens: what such a layer is called
with says nothing of what it looks up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def computes_indices(layer: nn.Module) -> bool:
    """Whether a layer is an embedding with a forward of its own.

    Args:
        layer: A module.

    Returns:
        Whether it is.

    Example:
        >>> computes_indices(nn.Embedding(2, 2))
        False
    """
    return isinstance(layer, nn.Embedding) and type(layer).forward is not nn.Embedding.forward


class Lookups(TorchFunctionMode):
    """Notes what is looked up in a table while it is entered.

    Args:
        layer: The embedding.

    Attributes:
        found: The indices of each call of ``functional.embedding`` with its weight.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self._layer = layer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Note the indices, and go on."""
        kwargs = kwargs or {}
        if func is functional.embedding:
            indices, weight, *_ = (*args, *(kwargs[n] for n in ("input", "weight") if n in kwargs))
            if weight is self._layer.weight:
                self.found.append(indices)
        return func(*args, **kwargs)
