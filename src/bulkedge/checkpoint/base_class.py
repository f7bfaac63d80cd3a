"""The class of transformers with which the base of an adapter of PEFT is loaded.

Of another class the names of its modules differ: PEFT then warns of missing keys, adds nothing, and
a "merged" model equals the base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .header import TensorInfo

BY_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
"""By PEFT's ``task_type``."""
NAME = re.compile(r"[A-Za-z]\w{0,99}", re.ASCII)
HEAD = re.compile(r"(^|\.)(classifier|score)\.(?!.*lora_)")
"""A head that is trained in full beside an adapter, by the name of its tensor."""


@dataclass(frozen=True)
class BaseClass:
    """How a base is loaded.

    Attributes:
        name: A class of transformers.
        labels: How many labels its head has, where an adapter holds one; None for no such head.
    """

    name: str
    labels: int | None = None


def base_class(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> BaseClass | None:
    """The class that an adapter's configuration names, by its task or as it is.

    Args:
        settings: The content of ``adapter_config.json``.
        tensors: What is stored beside it.

    Returns:
        The class; None where it names none of transformers.

    Example:
        >>> base_class({"task_type": "CAUSAL_LM"}, {})
        BaseClass(name='AutoModelForCausalLM', labels=None)
    """
    name = BY_TASK.get(str(settings.get("task_type"))) or _mapped(settings.get("auto_mapping"))
    if name is None:
        return None
    heads = [info.shape[0] for key, info in tensors.items() if _is_head(key, info)]
    labels = min(heads, default=None) if name.endswith("Classification") else None
    return BaseClass(name, labels)


def _mapped(mapping: object) -> str | None:
    """The class of a model without a task, which PEFT writes down."""
    if not isinstance(mapping, dict):
        return None
    name, library = (str(mapping.get(key)) for key in ("base_model_class", "parent_library"))
    known = library.partition(".")[0] == "transformers" and NAME.fullmatch(name)
    return name if known else None


def _is_head(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is the matrix of a head, one row for each label."""
    return len(info.shape) == 2 and HEAD.search(name) is not None
