"""Methods of PEFT of our own: importing this module registers them.

    import bulkedge.tune.peft
    model = get_peft_model(model, bulkedge.tune.peft.SpectralConfig(r=8, variant="additive"))

Stock PEFT loads a saved adapter if this module was imported before.  For programs that know LoRA
alone, :func:`export_lora` writes the same update as a LoRA, exactly.
"""

from bulkedge._errors import MissingExtraError, install

try:
    from peft.utils.peft_types import register_peft_method  # noqa: F401 — not in every version
except ImportError as error:
    raise MissingExtraError(f"bulkedge.tune.peft needs PEFT: {install('hf')}") from error

from .config import FactoredConfig
from .export import export_lora, lora_factors
from .layer import FactoredLayer
from .model import FactoredModel
from .spectral import SpectralConfig, SpectralLayer, SpectralModel

__all__ = [
    "FactoredConfig",
    "FactoredLayer",
    "FactoredModel",
    "SpectralConfig",
    "SpectralLayer",
    "SpectralModel",
    "export_lora",
    "lora_factors",
]
