"""molora: fine-tune a frozen language model with a mixture of LoRA experts, the PEFT way.

Importing this package registers the method `MOLORA` with PEFT. After that everything PEFT, transformers and TRL do
with adapters works for mixtures: `get_peft_model`, `PeftModel.from_pretrained`, `AutoPeftModelForCausalLM`, …
The trainers are in `molora.trainers`.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from molora._version import __version__
from molora.calls import take_routing_keywords
from molora.config import MoLoraConfig
from molora.errors import ConfigError, DataError, MergeError, MoloraError, TargetModulesError
from molora.model import MoLoraModel
from molora.peft_type import MOLORA
from molora.presets import available_presets
from molora.routing.inputs import routing_inputs
from molora.routing.record import record_routing

# PEFT asks transformers by a name that is going away, whenever an adapter is loaded or generates; nothing that a user
# could change.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

if MOLORA not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="molora", config_cls=MoLoraConfig, model_cls=MoLoraModel, prefix="molora_")
    take_routing_keywords()

_HOMES = {
    "calibrate_routers": "molora.calibration",
    "export_adapter": "molora.export.job",
    "import_adapter": "molora.imported.foreign",
    "slim_adapter": "molora.slim.job",
}
"""Functions by the module they are imported from when first asked for: they bring much that few programs need."""

if TYPE_CHECKING:
    from molora.calibration import calibrate_routers
    from molora.export.job import export_adapter
    from molora.imported.foreign import import_adapter
    from molora.slim.job import slim_adapter


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


__all__ = [
    "ConfigError",
    "DataError",
    "MergeError",
    "MoLoraConfig",
    "MoLoraModel",
    "MoloraError",
    "TargetModulesError",
    "__version__",
    "available_presets",
    "calibrate_routers",
    "export_adapter",
    "import_adapter",
    "record_routing",
    "routing_inputs",
    "slim_adapter",
]
