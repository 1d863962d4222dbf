"""Loading with transformers: `import duquant`, and from_pretrained loads what the suite's --save_model wrote.

config.json says what modules the model has. They are made, empty, on the meta device, the headers of the files are
held against them, and transformers fills them as it fills any model's.
"""

from pathlib import Path

from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from duquant.attention import soft_capping
from duquant.runtime import Expand, Runtime, require_known, set_runtime_
from duquant.scheme import Scheme
from duquant.skeleton import fit_, make_quantized_, name_shared_once_, read_headers, set_matrices_
from duquant.structure import ModelStructure

METHOD, VERSION = "duquant", 4


class DuQuantConfig(QuantizationConfigMixin):
    """The `quantization_config` of a saved model: every setting, what is rounded to what, and what modules there are.

    To be given to from_pretrained it needs only what is said on loading, which is no part of the saved model:
    `runtime`, what the linears multiply, and `expand`, when that is made of packed weights: see `set_runtime_`. Raises
    ValueError for other values.
    """

    def __init__(
        self,
        version: int = VERSION,
        settings: dict | None = None,
        scheme: dict | None = None,
        structure: dict | None = None,
        runtime: Runtime = "integer",
        expand: Expand = "per_call",
        quant_method: str = METHOD,
        **unknown: object,
    ):
        self.quant_method, self.version = METHOD, version
        self.settings, self.scheme, self.structure = settings, scheme, structure
        self.runtime, self.expand = runtime, expand
        require_known(runtime, expand)
        if unknown and version == VERSION:
            raise ValueError(f"quantization_config: does not know {min(unknown)!r}")

    def get_loading_attributes(self) -> dict[str, str]:
        """What may be said again on every loading."""
        return {"runtime": self.runtime, "expand": self.expand}

    def to_dict(self) -> dict:
        """What config.json keeps."""
        made = {"settings": self.settings, "scheme": self.scheme, "structure": self.structure}
        return {"quant_method": METHOD, "version": self.version, **made}

    def parts(self) -> tuple[Scheme, ModelStructure]:
        """What is rounded to what, and the modules. Raises ValueError if either is damaged or of another version."""
        if self.version != VERSION:
            later = isinstance(self.version, int) and self.version > VERSION
            advice = "update duquant" if later else "its modules are not described there; save the model again"
            raise ValueError(f"quantization_config: of version {self.version}, and this is {VERSION}; {advice}")
        if not isinstance(self.scheme, dict) or not isinstance(self.structure, dict):
            raise ValueError("quantization_config: lacks its scheme or structure; save the model again")
        try:
            return Scheme.from_dict(self.scheme), ModelStructure.from_dict(self.structure)
        except (TypeError, ValueError) as error:
            raise ValueError(f"quantization_config: is damaged ({error}); save the model again") from None


class DuQuantQuantizer(HfQuantizer):
    """Makes the empty modules before transformers reads the weights, and what is not in files after it."""

    def validate_environment(self, *args, **kwargs) -> None:
        """Raise ValueError for a config that is damaged, and for a model that is not quantized."""
        if not self.pre_quantized:
            raise ValueError("duquant loads models that were quantized with main.py --save_model, and quantizes none")
        self.quantization_config.parts()

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs
    ) -> None:
        scheme, structure = self.quantization_config.parts()
        capable = soft_capping(model.config._attn_implementation, model.config)
        if capable != model.config._attn_implementation:
            model.set_attn_implementation(capable)
        make_quantized_(model, structure, scheme)
        name_shared_once_(model)
        if checkpoint_files:  # not where tensors were given instead
            fit_(
                model,
                read_headers(checkpoint_files),
                set(model.all_tied_weights_keys),
                Path(checkpoint_files[0]).parent,
            )

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> None:
        set_matrices_(model)  # transformers leaves memory as it is where no file has a buffer
        set_runtime_(model, self.quantization_config.runtime, self.quantization_config.expand)

    def is_serializable(self, *args, **kwargs) -> bool:
        """save_pretrained writes a folder that loads again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False


def register() -> None:
    """Tell transformers of `duquant`. Idempotent."""
    if METHOD in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    auto.register_quantization_config(METHOD)(DuQuantConfig)
    auto.register_quantizer(METHOD)(DuQuantQuantizer)
    # what from_pretrained(quantization_config=…) says is heeded for the classes listed there only
    heeded = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", ())
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*heeded, DuQuantConfig)


register()
