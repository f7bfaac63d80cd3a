"""Which matrices a checkpoint holds, under the names that a model's layers go by.

Most names stand for one matrix.  Some stand for several: the experts stacked in one tensor, or the
blocks of a fused projection that are to be judged apart.  And some matrices have another name than
the layer.  A mixture of experts is often stored as one tensor per expert (``experts.3.w1.weight``)
where the model holds one for all of them (``experts.gate_up_proj``).  Such a parameter is listed
here, too, with the tensors that it is made of.  So is a fused projection that is stored in pieces.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bulkedge._errors import RecipeError
from bulkedge._globs import matches

from .codec import Codec
from .fused import fused_from
from .matrix import StoredMatrix
from .names import of_experts
from .read import Checkpoint

Shape = tuple[int, ...]
Rows = tuple[int, int]
Split = Mapping[str, Sequence[int]]

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D_LAYERS = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "q_attn.weight")
"""The layers that these models store as ``(in, out)``: transformers' Conv1D."""

IN_OUT_EXPERTS = ("aria", "gpt_oss", "llama4", "openai_privacy_filter")
"""Models that store each expert as ``(in, out)``."""

WIDTH_COMES_OUT = ("down", "output_linear", "fc2", "w2")
"""Parts of the names of expert layers whose output has the model's width."""

FUSED = (
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("down_proj", ("down_proj",)),
    ("down_proj", ("w2",)),
)
"""The names of stacked parameters, and of the layers of one expert whose rows they hold."""

MAX_EXPERTS = 4096
MAX_KERNEL = 255
"""The largest size of a kernel along an axis."""

ONE_EXPERT = re.compile(r"(?P<stem>.*\bexperts)\.(?P<expert>\d{1,6})\.(?P<layer>\w+)\.weight")


@dataclass(frozen=True)
class Part:
    """One matrix of a parameter.

    Attributes:
        matrix: Where it is stored.
        expert: Which expert's it is; None if the parameter is not stacked.
        rows: Which of the parameter's output rows it holds; None for all.
    """

    matrix: StoredMatrix
    expert: int | None = None
    rows: Rows | None = None

    @property
    def suffix(self) -> str:
        """Its suffix in a name, which distinguishes it from other parts; empty for the only one."""
        return replace(self.matrix, expert=self.expert, rows=self.rows, alias=None).suffix


class Layout:
    """The parameters of a checkpoint and the matrices that they are made of.

    Args:
        checkpoint: Its headers.
        model: The model's configuration, which gives some orientations.
        split: Globs of fused parameters that are to be split, and the rows of each block.
        other: The tensor names of the other side, which may fuse some that are separate here.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Mapping[str, Any],
        split: Split,
        other: Collection[str] = (),
    ) -> None:
        self.model, self.split = model, split
        self.weights = checkpoint.weights
        self.stacks = _stacks(self.weights)
        stored = {name: codec.shape for name, codec in self.weights.items()}
        self.fused = {
            name: pieces
            for name, pieces in fused_from(self.weights, other).items()
            if name not in stored
        }
        self.shapes: dict[str, Shape] = {
            **{name: _stacked_shape(experts) for name, experts in self.stacks.items()},
            **{name: _stacked_shape([pieces])[1:] for name, pieces in self.fused.items()},
            **stored,
        }

    def parts(self, name: str, *, transposed: bool | None = None) -> list[Part]:
        """The matrices of a parameter, in order.

        Args:
            name: One of :attr:`shapes`.
            transposed: Whether it is stored as ``(in, out)``; None to go by the model.

        Returns:
            At least one part.

        Raises:
            RecipeError: If the blocks of ``split`` do not add up to its rows.
        """
        codec = self.weights.get(name)
        if codec is None and name in self.fused:
            pieces = self.fused[name]
            return [
                Part(StoredMatrix(piece), None, rows)
                for piece, rows in zip(pieces, _places(pieces), strict=True)
            ]
        if codec is None:
            return [
                Part(StoredMatrix(piece), e, rows)
                for e, pieces in enumerate(self.stacks[name])
                for piece, rows in zip(pieces, _places(pieces), strict=True)
            ]
        if transposed is None:
            transposed = self.transposed(name)
        whole = StoredMatrix(codec, transposed)
        if not is_stack(name, codec.shape):
            return self._split(name, Part(whole))
        experts = (replace(whole, expert=e) for e in range(codec.shape[0]))
        return [
            part for e, matrix in enumerate(experts) for part in self._split(name, Part(matrix, e))
        ]

    def part(
        self, name: str, expert: int | None = None, rows: Rows | None = None
    ) -> StoredMatrix | None:
        """One matrix of a parameter.

        Args:
            name: One of :attr:`shapes`.
            expert: Which one of a stack.
            rows: Which of its output rows; None for all.

        Returns:
            The matrix; None if it is not stored on its own, or there is none.
        """
        codec = self.weights.get(name)
        if codec is None and name in self.fused:
            return _piece([self.fused[name]], expert or 0, rows)
        if codec is None:
            return _piece(self.stacks[name], expert, rows)
        stacked = is_stack(name, codec.shape)
        if stacked != (expert is not None) or (stacked and expert not in range(codec.shape[0])):
            return None
        matrix = StoredMatrix(codec, self.transposed(name), expert)
        if rows is None or rows == (0, matrix.acts_as[0]):
            return matrix
        return replace(matrix, rows=rows) if rows[1] <= matrix.acts_as[0] else None

    def transposed(self, name: str) -> bool:
        """Whether a parameter is stored as ``(in, out)``, as far as the model's type says."""
        shape, stored = self.shapes[name], self.weights.get(name)
        if stored is not None and stored.upright:
            return False
        if is_stack(name, shape):
            return _experts_transposed(name, shape, self.model)
        return self.model.get("model_type") in CONV1D_MODELS and name.endswith(CONV1D_LAYERS)

    def pieces(self, name: str) -> list[Codec]:
        """The stored weights that hold a parameter, as a whole or in pieces.

        Args:
            name: One of :attr:`shapes`.

        Returns:
            At least one.
        """
        if name in self.weights:
            return [self.weights[name]]
        experts = [self.fused[name]] if name in self.fused else self.stacks[name]
        return [piece for pieces in experts for piece in pieces]

    def _split(self, name: str, part: Part) -> list[Part]:
        """The blocks that the recipe asks for; the part itself if it asks for none."""
        sizes = next((sizes for glob, sizes in self.split.items() if matches([name], [glob])), None)
        if sizes is None:
            return [part]
        rows = part.matrix.acts_as[0]
        if sum(sizes) != rows:
            raise RecipeError(
                f"split: the blocks {list(sizes)} of {name!r} in {part.matrix.info.file} have "
                f"{sum(sizes)} rows together, it has {rows}; give the rows of each block"
            )
        return [
            Part(replace(part.matrix, rows=block), part.expert, block) for block in _blocks(sizes)
        ]


def _piece(
    experts: list[list[Codec]], expert: int | None, rows: Rows | None
) -> StoredMatrix | None:
    """The weight that holds these rows of an expert, of those stored one by one."""
    pieces = experts[expert] if expert is not None and expert < len(experts) else []
    places = zip(pieces, _places(pieces), strict=True)
    return next((StoredMatrix(piece) for piece, at in places if at == rows), None)


def is_stack(name: str, shape: Shape) -> bool:
    """Whether a tensor holds one matrix an expert."""
    # the header of an empty tensor may claim any number of experts
    many = len(shape) == 3 and 0 not in shape and shape[0] <= MAX_EXPERTS
    return many and of_experts(name)


def is_kernel(name: str, shape: Shape) -> bool:
    """Whether a tensor is a convolution kernel; a long one could be anything, so it is not."""
    sizes = shape[2:]
    small = 1 <= len(sizes) <= 3 and all(size <= MAX_KERNEL for size in sizes)
    return small and name.endswith("weight") and not of_experts(name)


def place_in_stack(name: str) -> tuple[str, int, int, int] | None:
    """Where an expert's layer would lie if the experts were stacked.

    Args:
        name: Such as ``layers.0.experts.3.w3.weight``.

    Returns:
        The parameter's name, the expert, the layer's place among the layers fused in it and how
        many these are: ``("layers.0.experts.gate_up_proj", 3, 1, 2)``; None if it is no expert's.
    """
    found = ONE_EXPERT.fullmatch(name)
    if not found:
        return None
    for parameter, layers in FUSED:
        if found["layer"] in layers:
            place = layers.index(found["layer"])
            return f"{found['stem']}.{parameter}", int(found["expert"]), place, len(layers)
    return None


def _stacks(weights: Mapping[str, Codec]) -> dict[str, list[list[Codec]]]:
    """Parameters stored an expert at a time: by name, for each expert the weights in it."""
    found: dict[str, dict[str, dict[int, Codec]]] = {}
    for name, codec in weights.items():
        if (match := ONE_EXPERT.fullmatch(name)) and len(codec.shape) == 2:
            layers = found.setdefault(match["stem"], {})
            layers.setdefault(match["layer"], {})[int(match["expert"])] = codec
    stacks = {}
    for stem, layers in found.items():
        for parameter, names in FUSED:
            columns = [layers.get(layer, {}) for layer in names]
            count = len(columns[0])
            if count and all(set(column) == set(range(count)) for column in columns):
                experts = [[column[e] for column in columns] for e in range(count)]
                if len({tuple(codec.shape for codec in pieces) for pieces in experts}) == 1:
                    stacks[f"{stem}.{parameter}"] = experts
    return stacks


def _stacked_shape(experts: list[list[Codec]]) -> Shape:
    """The shape of a parameter that is stored an expert at a time."""
    return len(experts), sum(codec.shape[0] for codec in experts[0]), experts[0][0].shape[1]


def _places(pieces: list[Codec]) -> list[Rows | None]:
    """The rows of the parameter that each tensor of an expert holds."""
    if len(pieces) == 1:
        return [None]
    return list(_blocks([codec.shape[0] for codec in pieces]))


def _blocks(sizes: Sequence[int]) -> list[Rows]:
    """From and to of blocks of these sizes, one after the other."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _experts_transposed(name: str, shape: Shape, model: Mapping[str, Any]) -> bool:
    """Whether each expert is stored as ``(in, out)``: by the model's width, else by its type."""
    text = model.get("text_config")
    width = (text if isinstance(text, dict) else model).get("hidden_size")
    first, last = shape[1:]
    if width in (first, last) and first != last:
        # the model's width is the input of gate and up, and the output of down
        layer = name.split(".")[-2:]
        return (width == first) != any(out in part for part in layer for out in WIDTH_COMES_OUT)
    return str(model.get("model_type")).startswith(IN_OUT_EXPERTS)
