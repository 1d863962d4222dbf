"""A quantized model as a folder that loads again: codes, scales, zeros and transforms under their modules' names.

    config.json                        with `quantization_config`: every setting, what is rounded to what, and what
                                       modules there are, so that transformers can make them (see `duquant.hub`)
    model-00001-of-00033.safetensors   one file per decoder layer, then one for everything else
    model.safetensors.index.json       which tensor is where
    tokenizer.json, …

It is written next to its place, layer by layer while the walk goes on, and gets its name when it is whole. Folders of
earlier versions are read too (see `models.earlier`).
"""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from duquant.hub import METHOD, VERSION, DuQuantConfig
from duquant.scheme import number_format
from duquant.skeleton import drop_repeated_, fit_, make_quantized_, read_headers, set_matrices_
from duquant.structure import LayerStructure, ModelStructure, describe_layer
from models import decoder_spec
from models.earlier import (
    DESCRIBED_BY_SETTINGS,
    FIRST_VERSION_TRANSFORMS,
    first_settings,
    load_first_version,
    packed_headers,
    packed_tensors,
    structure_of,
)
from models.load import ModelSource, pick_attention
from models.streaming import parameters_on_meta, set_tensor_
from quantize.settings import QuantSettings
from quantize.spec import DecoderSpec
from utils.errors import InputError
from utils.io import read_tensors, write_json, write_tensors
from utils.settings import from_dict, to_dict

INDEX = "model.safetensors.index.json"


class ModelWriter:
    """The passenger behind the quantization that writes every layer into `folder`, which is new or empty.

    `spec` is of the model, which has so many decoder `layers`. Everything is in a folder beside it until `finish` gives
    it its name. Raises InputError where it cannot be written.
    """

    FLAG: ClassVar[str] = "--save_model"
    DONE: ClassVar[str] = "saved"  # in the log

    def __init__(self, folder: Path, spec: DecoderSpec, layers: int):
        require_empty(folder, self.FLAG)
        self.folder, self.spec, self.layers = folder, spec, layers
        self.unfinished = folder.with_name(f".{folder.name}.unfinished")
        self.places: dict[str, str] = {}
        self.bytes = 0
        self.kinds: list[LayerStructure] = []
        self.layer_kinds: dict[int, int] = {}
        try:
            shutil.rmtree(self.unfinished, ignore_errors=True)  # of a run that was killed
            self.unfinished.mkdir(parents=True)
        except OSError as error:
            raise self._cannot(error) from None

    def visit(self, index: int, layer: nn.Module) -> None:
        """Write `layer`, number `index`, which is quantized; what its linears share is written once."""
        tensors = layer.state_dict()
        drop_repeated_(layer, tensors)
        self._write(index, {f"{self.spec.layers}.{index}.{name}": tensor for name, tensor in tensors.items()})
        names = {path: group.name for group in self.spec.at(index).groups for path in group.linears}
        kind = describe_layer(layer, self.spec.attention, names)
        if kind not in self.kinds:
            self.kinds.append(kind)
        self.layer_kinds[index] = self.kinds.index(kind)

    @property
    def structure(self) -> ModelStructure:
        """What modules the layers that were visited have."""
        paths = (self.spec.layers, self.spec.attention, self.spec.experts)
        order = tuple(kind for _, kind in sorted(self.layer_kinds.items()))
        return ModelStructure(*paths, tuple(self.kinds), order)

    def description(self, settings: QuantSettings) -> dict:
        """The `quantization_config` of what was written."""
        return saved_settings(settings, self.structure)

    def finish(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: QuantSettings) -> None:
        """Write everything beside the layers, and give the folder its name."""
        inside = f"{self.spec.layers}."
        shell = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
        self._write(self.layers, without_tied(shell))
        model.config.quantization_config = self.description(settings)
        named, model.config.dtype = model.config.dtype, model.dtype  # of what is in the files; --dtype may be narrower
        try:
            model.config.save_pretrained(self.unfinished)
            if model.can_generate():
                model.generation_config.save_pretrained(self.unfinished)
            tokenizer.save_pretrained(self.unfinished)
            write_json(self.unfinished / INDEX, {"metadata": {"total_size": self.bytes}, "weight_map": self.places})
            if self.folder.exists():
                self.folder.rmdir()
            self.unfinished.replace(self.folder)
        except OSError as error:
            raise self._cannot(error) from None
        finally:
            del model.config.quantization_config
            model.config.dtype = named

    def __enter__(self) -> "ModelWriter":
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def _write(self, number: int, tensors: dict[str, Tensor]) -> None:
        name = f"model-{number + 1:05d}-of-{self.layers + 1:05d}.safetensors"
        self.places |= dict.fromkeys(tensors, name)
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        try:
            write_tensors(self.unfinished / name, tensors, {"format": "pt"})
        except OSError as error:
            raise self._cannot(error) from None

    def _cannot(self, error: OSError) -> InputError:
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return InputError(f"{self.FLAG} {self.folder}: cannot be written ({error.strerror or error})")


def without_tied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, each piece of memory under its first name only."""
    unique: dict[tuple, str] = {}
    for name, tensor in tensors.items():
        unique.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
    return {name: tensors[name] for name in unique.values()}


def require_empty(folder: Path, flag: str = ModelWriter.FLAG) -> None:
    """Raise InputError if `folder`, which `flag` names, is something that a model would overwrite."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{flag} {folder}: is there already and not empty; choose another folder")


def saved_settings(settings: QuantSettings, structure: ModelStructure) -> dict:
    """The `quantization_config` of a model with these settings and modules."""
    return DuQuantConfig(VERSION, to_dict(settings), settings.scheme.to_dict(), structure.to_dict()).to_dict()


def read_settings(config: PretrainedConfig) -> QuantSettings | None:
    """The settings of a model that was saved here, from its config; None for any other model.

    Raises InputError if they are damaged, or of a later version.
    """
    saved = getattr(config, "quantization_config", None)
    if not isinstance(saved, dict) or saved.get("quant_method") != METHOD:
        return None
    version = saved.get("version", 1)
    if version not in (1, *DESCRIBED_BY_SETTINGS, VERSION):
        raise InputError(f"--model: saved by a later version of this suite (format {version}); update it")
    try:
        if version == 1:
            return first_settings(saved)
        settings = from_dict(QuantSettings, saved["settings"])
        if version not in DESCRIBED_BY_SETTINGS:
            require_described(DuQuantConfig(**saved), settings, decoder_spec(config), config.num_hidden_layers)
        return settings
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"--model: quantization_config in its config.json is damaged ({error})") from None


def require_described(described: DuQuantConfig, settings: QuantSettings, spec: DecoderSpec, layers: int) -> None:
    """Raise ValueError if a config's scheme or modules are not those of its settings and its family."""
    scheme, structure = described.parts()
    if scheme != settings.scheme:
        raise ValueError("its scheme is not that of its settings")
    if (structure.layers, structure.attention, structure.experts) != (spec.layers, spec.attention, spec.experts):
        raise ValueError("structure: has not the paths of this family of models")
    if len(structure.layer_kinds) != layers:
        raise ValueError(f"structure: of {len(structure.layer_kinds)} layers, and the model has {layers}")
    for index in range(layers):
        groups = {group.name: set(group.linears) for group in spec.at(index).groups}
        if {group.name: set(group.linears) for group in structure.at(index).groups} != groups:
            raise ValueError(f"structure: layer {index} has not the linears of this family of models")


def load_saved_model(
    source: ModelSource,
    config: PretrainedConfig,
    spec: DecoderSpec,
    settings: QuantSettings,
    dtype: torch.dtype,
    attention: str,
) -> nn.Module:
    """The model in the folder, on the host, ready for inference; `config` is without its `quantization_config`.

    Raises InputError for a file or tensor that is missing or damaged.
    """
    folder = Path(source.name)
    if (folder / FIRST_VERSION_TRANSFORMS).exists():
        return load_first_version(source, config, spec, settings, dtype, attention)
    places = read_index(folder)
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=pick_attention(attention, config),
            trust_remote_code=source.trust_remote_code,
        )
    version, described = read_description(folder)
    form = number_format(settings.scheme.weight) if version == 2 else None
    try:
        stored = read_headers([str(folder / file) for file in sorted(set(places.values()))])
        stored = stored if form is None else packed_headers(stored, form)
        if described is None:
            described = structure_of(stored, spec, config.num_hidden_layers)
        make_quantized_(model, described, settings.scheme)
        fit_(model, stored, set(model.all_tied_weights_keys), folder)
    except ValueError as error:
        raise InputError(f"--model: {error}") from None
    for file in sorted(set(places.values())):
        tensors, _ = read_tensors(folder / file)
        expected = {name for name, place in places.items() if place == file}
        if set(tensors) != expected:
            name = min(set(tensors) ^ expected)
            raise InputError(f"{folder / file}: does not hold what {INDEX} says ({name}); save the model again")
        for name, tensor in (tensors if form is None else packed_tensors(tensors, form)).items():
            set_tensor_(model, name, tensor)
    set_matrices_(model, torch.device("cpu"))
    model.tie_weights(missing_keys={name for name in model.state_dict() if name not in places}, recompute_mapping=False)
    return model.eval().requires_grad_(False)


def read_description(folder: Path) -> tuple[int, ModelStructure | None]:
    """The version of a saved model's format, and its modules if they are described; the config was checked before."""
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    structure = saved.get("structure")
    return saved["version"], None if structure is None else ModelStructure.from_dict(structure)


def read_index(folder: Path) -> dict[str, str]:
    """Tensor's name → its file. Raises InputError if the index is missing or damaged, or names other folders."""
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if any(Path(place).name != place for place in places.values()):
            raise ValueError("it names a file outside of its folder")
        return dict(places)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / INDEX}: cannot be read ({error}); save the model again") from None
