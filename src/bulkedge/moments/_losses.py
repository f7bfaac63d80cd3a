"""Losses whose gradients say how much each output of a layer matters; texts need no labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Any, Mapping[str, Tensor], torch.Generator], Tensor]
"""Runs a model on padded tokens, and returns a sum over the texts of a batch."""
CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How the names of the classes of causal models end."""


def loss_of(network: Any) -> Loss:
    """The loss of a model of transformers, by its class.

    Args:
        network: The model.

    Returns:
        :func:`drawn_tokens` of a causal model, :func:`moved_states` of any other.
    """
    return drawn_tokens if type(network).__name__.endswith(CAUSAL) else moved_states


def drawn_tokens(network: Any, inputs: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Cross-entropy of the next token, drawn from the model's own distribution.

    With drawn tokens ``E[g gᵀ]`` is that of Fisher's information.  With those of the text it would
    vanish where the model has learned them by heart.

    Args:
        network: A causal model.
        inputs: Tokens, and the mask of what is text.
        generator: On the model's device.

    Returns:
        The sum over the tokens of all texts.
    """
    logits = network(**inputs).logits[inputs["attention_mask"].bool()].float()
    chances = logits.detach().softmax(-1)
    drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
    return functional.cross_entropy(logits, drawn, reduction="sum")


def moved_states(network: Any, inputs: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """``⟨z, h⟩`` with h the last hidden states of all tokens, and z a random sign for each number.

    Over the signs ``E[g gᵀ] = E[Jᵀ J]``, J the derivative of the states by a layer's output: what
    they move by, in all directions.  (The squared norm of states behind a norm is constant, its
    gradient zero.)

    Args:
        network: Any encoder.
        inputs: Tokens, and the mask of what is text.
        generator: On the model's device.

    Returns:
        The sum over the tokens of all texts.
    """
    states = network(**inputs, output_hidden_states=True).hidden_states[-1].float()
    signs = torch.randint(0, 2, states.shape, generator=generator, device=states.device) * 2 - 1
    return (signs * states * inputs["attention_mask"][..., None]).sum()
