"""Updates whose tuned weight is a closed form of stored numbers and of the base's weight W0.

IA³: ``diag(l) W0`` or ``W0 diag(l)`` (arXiv:2205.05638).  OFT: ``W0 Rᵀ`` with R block-diagonal,
each block the Cayley transform of a skew matrix Q, or its series (arXiv:2306.07280).  BOFT:
``diag(s) W0 R₁ᵀ R₂ᵀ …``, each R block-diagonal in an order of the inputs of its own
(arXiv:2311.06243).  HRA: W0 times a few Householder reflections
(arXiv:2405.17484).  FourierFT: ``W0 + α Re F⁻¹(E)``, E sparse, its places drawn from a stored seed
(arXiv:2405.03003).  Trainable tokens: W0 with other rows at some places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bulkedge._errors import AdapterError

from .elements import read_tensor
from .header import FLOATING, TensorInfo
from .update import Correctable, Rows

if TYPE_CHECKING:  # listing names needs no torch
    from torch import Tensor

FIXED = "an update computed from the base's weight: merge it into the model, and repair that"
NOTE = {
    "IA3": "IA³: outputs or inputs are scaled, and so is the bias of scaled outputs",
    "OFT": "OFT: the inputs are rotated, the update is of full rank",
    "BOFT": "BOFT: the inputs are rotated and the outputs scaled, the update is of full rank",
    "HRA": "HRA: the inputs are reflected",
    "FOURIERFT": "FourierFT: a few frequencies, the update is of full rank",
    "TRAINABLE_TOKENS": "trainable tokens: some rows are replaced",
}
"""What to know of an update, by its method as PEFT spells it."""


def replaced_rows(info: TensorInfo, tokens: Any) -> OfBase | str:
    """Trainable tokens: rows of an embedding that are stored in the place of the base's.

    Args:
        info: The rows, shape ``(tokens, dim)``.
        tokens: What the configuration says of their indices.

    Returns:
        The update, or why it cannot be used.
    """
    if info.dtype not in FLOATING or len(info.shape) != 2:
        return f"trainable tokens: {info.dtype} of shape {info.shape}, expected rows of numbers"
    whole = isinstance(tokens, list) and all(type(i) is int and 0 <= i < 2**40 for i in tokens)
    if not whole or len(set(tokens)) != len(tokens) or len(tokens) != info.shape[0]:
        return (
            f"trainable tokens: {info.shape[0]} rows, but the configuration does not name as many "
            "different tokens; take the one that was saved with them"
        )
    parts = {"trainable_tokens_delta": info}
    return OfBase("TRAINABLE_TOKENS", parts, (0, info.shape[1]), {"tokens": tuple(tokens)})


@dataclass(frozen=True)
class OfBase:
    """A tuned weight that follows from stored tensors and the base's weight.

    Attributes:
        method: As PEFT spells it.
        parts: The stored tensors by the names of their parts.
        sides: ``(out, in)`` of the weight as far as the tensors have them; 0 where only the base
            has it.
        settings: What the configuration says besides.
        fan_in_fan_out: Whether it says that the base stores the weight as ``(in, out)``: a hint.
        part_rows: The output rows that are meant; None for all.
    """

    method: str
    parts: Mapping[str, TensorInfo] = field(hash=False)
    sides: tuple[int, int]
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    fan_in_fan_out: bool = False
    part_rows: Rows | None = None
    rank = None
    scale = None

    @property
    def kind(self) -> str:
        """The method in lower case."""
        return self.method.lower()

    @property
    def note(self) -> str:
        """What the method does."""
        return NOTE[self.method]

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """The stored tensors."""
        return tuple(self.parts.values())

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight; 0 for a side that only the base shows (see :meth:`on`)."""
        rows, columns = self.sides
        return (rows if self.part_rows is None else self.part_rows[1] - self.part_rows[0], columns)

    @property
    def embedding(self) -> bool:
        """Of tokens alone."""
        return self.method == "TRAINABLE_TOKENS"

    @property
    def scaled_outputs(self) -> TensorInfo | None:
        """The factors of the outputs (IA³), with which PEFT scales the layer's bias, too."""
        scales = self.parts.get("ia3_l")
        return scales if scales is not None and scales.shape[1] == 1 else None

    def fits(self, stored: tuple[int, ...]) -> bool:
        """Whether a base tensor of the shape ``stored`` can be what it updates."""
        return len(stored) == 2 and (
            self._may_be(stored) or (self.may_turn and self._may_be(stored[::-1]))
        )

    @property
    def may_turn(self) -> bool:
        """Whether PEFT knows of weights stored as ``(in, out)``."""
        return self.method in ("IA3", "FOURIERFT")

    def _may_be(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight ``(out, in)`` of this shape can be what it updates."""
        rows, columns = shape
        known = all(mine in (0, its) for mine, its in zip(self.sides, shape, strict=True))
        if self.method == "FOURIERFT":
            return known and rows * columns >= self.parts["fourierft_spectrum"].size
        return known and columns % int(self.settings.get("block", 1)) == 0

    def on(self, stored: tuple[int, ...], *, transposed: bool | None = None) -> OfBase:
        """The same, once the base tensor is known.

        Args:
            stored: Its shape in the file.
            transposed: Whether it is stored as ``(in, out)``; None for yes if that may be.

        Returns:
            The update with both sides.
        """
        if len(stored) != 2:  # another layer of this name, as the check of shapes says
            return self
        may_turn = self.may_turn and self._may_be(stored[::-1])
        if transposed is None or not self._may_be(stored):  # the check of shapes says what is wrong
            transposed = may_turn
        rows, columns = stored[::-1] if transposed else stored
        return replace(self, sides=(rows, columns))

    def of(self, *, expert: int | None = None, rows: Rows | None = None) -> OfBase:
        """The update of a range of output rows."""
        return self if rows is None else replace(self, part_rows=rows)

    def tuned(self, weight: Tensor) -> Tensor:
        """The tuned weight.

        Args:
            weight: The base's, shape :attr:`shape`, in float64.

        Returns:
            The same shape, a new tensor in float64.

        Raises:
            CheckpointError: If a file cannot be read any more, or the base lacks a row that is
                replaced.
        """
        import torch

        read = {name: read_tensor(info).double() for name, info in self.parts.items()}
        found = {name: tensor.to(weight.device) for name, tensor in read.items()}
        first = 0 if self.part_rows is None else self.part_rows[0]
        with torch.no_grad():
            return FORMS[self.method](self, found, weight, first)

    def read(self) -> tuple[Tensor, Tensor, float]:
        """Nothing: :meth:`tuned` gives the weight.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(
            f"{self.infos[0].file}: tensor {self.infos[0].name!r}: the update is computed from the "
            "base's weight, and is not a product of stored factors; audit it with its base"
        )

    def read_magnitude(self) -> None:
        """None: nothing is scaled besides."""

    def correctable(self) -> Correctable | str:
        """Why not."""
        return FIXED


Parts = Mapping[str, "Tensor"]


def _ia3(update: OfBase, t: Parts, W: Tensor, first: int) -> Tensor:
    scales = t["ia3_l"]
    return W * (scales if scales.shape[0] == 1 else scales[first : first + len(W)])


def _oft(update: OfBase, t: Parts, W: Tensor, first: int) -> Tensor:
    import torch

    settings, block = update.settings, int(update.settings["block"])
    above = torch.triu_indices(block, block, 1, device=W.device)
    Q = W.new_zeros(len(t["oft_R"]), block, block)
    Q[:, above[0], above[1]] = t["oft_R"]
    Q = Q - Q.mT
    if settings["coft"]:
        limit = float(settings["eps"]) / math.sqrt(len(Q))
        norms = torch.linalg.matrix_norm(Q, keepdim=True)
        Q = torch.where(norms <= limit, Q, limit * (Q / norms))
    terms = settings["terms"]
    return _rotated(W, _cayley(Q) if terms is None else _cayley_series(Q, terms))


def _boft(update: OfBase, t: Parts, W: Tensor, first: int) -> Tensor:
    blocks = t["boft_R"]
    for level, R in enumerate(_cayley(0.5 * (blocks - blocks.mT))):
        if level == 0:
            W = _rotated(W, R)
            continue
        order = _butterfly(W.shape[1], R.shape[-1], level).to(W.device)
        W = _rotated(W[:, order.argsort()], R)[:, order]
    return W * t["boft_s"][first : first + len(W)]


def _butterfly(columns: int, block: int, level: int) -> Tensor:
    """The order in which a butterfly factor takes the inputs."""
    import torch

    # as PEFT: of every 2^(level + 1) halves of blocks, first those in even places
    halves = torch.arange(columns).reshape(-1, 2 ** (level + 1), block // 2)
    return torch.cat((halves[:, 0::2], halves[:, 1::2]), dim=1).flatten()


def _cayley(Q: Tensor) -> Tensor:
    """``(I − Q)(I + Q)⁻¹``."""
    import torch

    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(eye + Q, eye - Q, left=False)


def _cayley_series(Q: Tensor, terms: int) -> Tensor:
    """``I + 2Q + 2Q² + …``, the last power once, as PEFT sums it."""
    import torch

    R = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q).clone()
    power, last = Q, terms - 1 if terms < 3 else max(3, terms - 1)
    for i in range(1, last + 1):
        R += power if i == last > 2 else 2 * power
        power = power @ Q
    return R


def _rotated(W: Tensor, R: Tensor) -> Tensor:
    """``W Rᵀ`` for a block-diagonal R; one block stands for all."""
    blocks = W.unflatten(1, (-1, R.shape[-1])).transpose(0, 1)
    return (blocks @ R.mT).transpose(0, 1).flatten(1)


def _hra(update: OfBase, t: Parts, W: Tensor, first: int) -> Tensor:
    import torch

    U = t["hra_u"] / torch.linalg.vector_norm(t["hra_u"], dim=0)
    if update.settings["orthogonal"]:  # reflections that commute: of the space that they span
        Q = torch.linalg.qr(U)[0]
        return W - 2 * (W @ Q) @ Q.mT
    for u in U.unbind(1):
        W = W - 2 * torch.outer(W @ u, u)
    return W


def _fourier(update: OfBase, t: Parts, W: Tensor, first: int) -> Tensor:
    import torch

    rows, columns = update.sides
    spectrum = t["fourierft_spectrum"]
    drawn = torch.Generator().manual_seed(update.settings["seed"])
    places = torch.randperm(rows * columns, generator=drawn)[: len(spectrum)].to(W.device)
    dense = W.new_zeros(rows * columns)
    dense[places] = spectrum
    change = torch.fft.ifft2(dense.reshape(rows, columns)).real
    return W + update.settings["scaling"] * change[first : first + len(W)]


def _tokens(update: OfBase, t: Parts, W: Tensor, first: int) -> Tensor:
    import torch

    (rows,) = t.values()
    indices = torch.tensor(update.settings["tokens"], device=W.device)
    if (highest := int(indices.max())) >= update.sides[0]:
        raise AdapterError(
            f"{update.infos[0].file}: tensor {update.infos[0].name!r} replaces row {highest}, "
            f"where the base has {update.sides[0]}; give the base with the trained vocabulary"
        )
    here = (indices >= first) & (indices < first + len(W))
    return W.index_copy(0, indices[here] - first, rows[here])


FORMS = {
    "IA3": _ia3,
    "OFT": _oft,
    "BOFT": _boft,
    "HRA": _hra,
    "FOURIERFT": _fourier,
    "TRAINABLE_TOKENS": _tokens,
}
"""The tuned weight by method: of the update, its tensors, W0, and the first row that is meant."""
