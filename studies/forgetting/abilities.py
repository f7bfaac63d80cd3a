"""What a model still does: its tasks, and what the base could do and nobody trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from learner import Head, load_encoder, matrices, pooled, tokenizer
from material import pairs, settings, task
from protect_model import Batches, spearman
from torch import Tensor

PROBE_RIDGE = 1.0
"""Added to the Gram matrix of the probe's embeddings, which have length one."""


class Evaluator:
    """One model into which updates are put.

    In bfloat16, which is twice as fast here; every cell alike.
    """

    def __init__(self) -> None:
        self.model = load_encoder().eval()
        self.base = {n: m.weight.detach().clone() for n, m in matrices(self.model).items()}
        self.model.to(torch.bfloat16)
        drawn = pairs("test")[: settings()["pairs"]]
        self.parts = [part for part, _, _ in drawn]
        some = drawn[: settings()["few"]["pairs"]]
        self.pairs = {few: _sides(rows) for few, rows in ((False, drawn), (True, some))}
        self.tests: dict[tuple[str, bool], tuple[Batches, Tensor]] = {}
        self.put({})
        self.likeness = {
            few: self._likeness(self._embed(both[0])) for few, both in self.pairs.items()
        }

    @torch.no_grad()
    def put(self, updates: Mapping[str, Tensor]) -> None:
        """Give the model its base weights and updates."""
        for name, module in matrices(self.model).items():
            W0 = self.base[name]
            module.weight.copy_(W0 + updates[name].float() if name in updates else W0)

    def row(self, heads: Mapping[str, Head], *, few: bool = False) -> dict[str, float]:
        """All figures of the model as it is now; of interventions on fewer texts.

        *recall*, *mrr*: finding example sentences by definitions; *structure*: Spearman's
        correlation of cosines with the base's; *probe*: balanced accuracy of parts of speech;
        *task X*: accuracy with the head of X.
        """
        definitions, sentences = (self._embed(side) for side in self.pairs[few])
        likeness = definitions @ sentences.mT
        ranks = 1 + (likeness > likeness.diagonal()[:, None]).sum(1)
        found = {
            "recall": float((ranks == 1).double().mean()),
            "mrr": float((1 / ranks).double().mean()),
            "structure": spearman(self._likeness(definitions), self.likeness[few]),
        }
        if not few:
            found["probe"] = probe(definitions, self.parts)
        for name, head in heads.items():
            found[f"task {name}"] = self._accuracy(name, head, few=few)
        return {name: round(value, 5) for name, value in found.items()}

    @torch.no_grad()
    def _embed(self, texts: Batches) -> Tensor:
        """Mean-pooled embeddings of unit length."""
        found = [
            pooled(self.model(**tokens).last_hidden_state, tokens["attention_mask"])
            for tokens in texts.tokens
        ]
        return texts.rows([torch.nn.functional.normalize(rows, dim=1) for rows in found])

    @torch.no_grad()
    def _accuracy(self, name: str, head: Head, *, few: bool) -> float:
        """Share of test glosses filed under their own category."""
        if (name, few) not in self.tests:
            its = task(name)
            rows = its.test[: settings()["few"]["test"]] if few else its.test
            labels = torch.tensor([its.categories.index(category) for category, _ in rows])
            self.tests[name, few] = Batches(tokenizer(), [gloss for _, gloss in rows]), labels
        batches, labels = self.tests[name, few]
        found = [
            head(self.model(**tokens).last_hidden_state).argmax(-1) for tokens in batches.tokens
        ]
        return float((batches.rows(found) == labels).double().mean())

    def _likeness(self, embeddings: Tensor) -> Tensor:
        """Cosines of all pairs of the first definitions."""
        some = embeddings[: settings()["structure"]]
        above = torch.triu_indices(len(some), len(some), offset=1)
        return (some @ some.mT)[above[0], above[1]]


def _sides(rows: list[tuple[str, str, str]]) -> tuple[Batches, Batches]:
    definitions, sentences = [row[1] for row in rows], [row[2] for row in rows]
    return Batches(tokenizer(), definitions), Batches(tokenizer(), sentences)


def probe(embeddings: Tensor, labels: list[str]) -> float:
    """Balanced accuracy of a ridge regression, fitted to every other row and tested on the rest."""
    names = sorted(set(labels))
    truth = torch.tensor([names.index(label) for label in labels])
    X = torch.cat([embeddings, torch.ones(len(embeddings), 1)], dim=1).double()
    Y = torch.nn.functional.one_hot(truth).double()
    fit, test = X[::2], X[1::2]
    gram = fit.mT @ fit + PROBE_RIDGE * torch.eye(X.shape[1]).double()
    found = (test @ torch.linalg.solve(gram, fit.mT @ Y[::2])).argmax(1)
    right = (found == truth[1::2]).double()
    return float(torch.stack([right[truth[1::2] == i].mean() for i in range(len(names))]).mean())
