"""Spectral adapters as a method of PEFT: importing this module registers it.

    import bulkedge.tune.peft
    model = get_peft_model(model, bulkedge.tune.peft.SpectralConfig(r=8, variant="additive"))

Stock PEFT loads a saved adapter if this module was imported before.  For programs that know LoRA
alone, :func:`export_lora` writes the same update as a LoRA, exactly.
"""

from bulkedge._errors import MissingExtraError

try:
    import peft
    from peft.utils.peft_types import PeftType, register_peft_method
except ImportError as error:
    raise MissingExtraError("bulkedge.tune.peft needs PEFT: pip install 'bulkedge[hf]'") from error

from .config import NAME, SpectralConfig
from .export import export_lora, lora_factors
from .layer import SpectralLayer, SpectralLinear
from .model import SpectralModel

if PeftType[NAME] not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=NAME.lower(), config_cls=SpectralConfig, model_cls=SpectralModel)

__all__ = [
    "SpectralConfig",
    "SpectralLayer",
    "SpectralLinear",
    "SpectralModel",
    "export_lora",
    "lora_factors",
]
