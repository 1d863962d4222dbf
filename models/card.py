"""The card of a saved model, README.md in its folder: what the hub shows, and `python -m duquant bench` reads."""

import json
from collections.abc import Mapping
from pathlib import Path

from duquant.formats import BLOCK_FORMATS
from duquant.loading import BASE_LINE
from duquant.scheme import Scheme, TensorScheme
from utils.errors import InputError
from utils.io import write_text

CARD = "README.md"
Perplexities = Mapping[str, tuple[float | None, float]]  # dataset → of full precision, if measured, and of this model
USE = """## Use

Install the runtime, the package `duquant`, from the suite's folder, and import it before the model is loaded:

```
pip install path/to/the/suite accelerate
```

```python
import duquant  # tells transformers what `quant_method: duquant` is
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

From the shell: `python -m duquant FOLDER --prompt "Once upon a time"`; its speed: `python -m duquant bench FOLDER`.

Without `import duquant`, transformers warns that it does not know the quantization type and goes on with random
weights: what the model writes then means nothing.
"""


EXPORTED = """## Use

With transformers, on any device (it rounds as other engines do and then multiplies floats, so it shows what a model
writes and not how fast):

```
pip install path/to/the/suite compressed-tensors==0.20.0
```

```python
from duquant.exported import load  # transformers leaves out the rotations in front of the linears; this puts them in
from transformers import AutoTokenizer

model = load("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

Without `load`, transformers says that the rotations' matrices are unexpected, and what the model writes means nothing.

With vLLM, on a GPU (from its source; this folder was not run by it):

```
VLLM
```
"""
VLLM_INTEGERS = "vllm serve FOLDER --linear-backend humming"  # 4-bit inputs, on GPUs of compute capability 8.0
VLLM_PLAIN = "vllm serve FOLDER"


def export_card(
    base: str, title: str, label: str, scheme: Scheme, command: str, perplexities: Perplexities, recipe: Mapping
) -> str:
    """The card of a model for other engines; `recipe`: every setting of the method by name."""
    lines = [
        "",
        "## Recipe",
        "",
        "Every setting of the method; `main.py --help` says what each is.",
        "",
        "| setting | |",
    ]
    lines += ["|---|---|", *(f"| `{name}` | {value} |" for name, value in recipe.items()), ""]
    integers = scheme.input.quantized and scheme.input.format == "int"
    use = EXPORTED.replace("VLLM\n", (VLLM_INTEGERS if integers else VLLM_PLAIN) + "\n")
    card = model_card(base, title, label, scheme, command, perplexities, use, "compressed-tensors")
    return card.rstrip("\n") + "\n" + "\n".join(lines)


def model_card(
    base: str,
    title: str,
    label: str,
    scheme: Scheme,
    command: str,
    perplexities: Perplexities,
    use: str = USE,
    tag: str = "duquant",
) -> str:
    """The card of the model `base` quantized by the method `title` with bits `label` (w4a4), made by `command`.

    `use`: how it is loaded. `tag`: what loads it.
    """
    lines = ["---"]
    if not is_folder(base):  # the hub refuses what is not one of its models
        lines += [f"base_model: {json.dumps(base)}", "base_model_relation: quantized"]
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {each}" for each in dict.fromkeys(("duquant", tag, "quantized", label))]
    lines += ["---", "", f"# {Path(base).name}, {title}", "", f"{BASE_LINE}`{base}`", ""]
    lines += ["| tensor | bits | range | shared by |", "|---|---|---|---|"]
    lines += [f"| {role} | {bits_row(role, each)} |" for role, each in scheme.roles.items()]
    lines += ["", *perplexity_lines(perplexities), "", "Made with", "", "```", command, "```", "", use]
    return "\n".join(lines)


def is_folder(base: str) -> bool:
    """Whether a model's name is a folder's, and not that of a model on the hub."""
    return Path(base).is_dir() or base.startswith((".", "/", "~")) or base.count("/") > 1


def bits_row(role: str, scheme: TensorScheme) -> str:
    """Bits, kind of range and what shares one, as cells of the table."""
    if not scheme.quantized:
        return f"{scheme.bits} | – | –"
    if scheme.format in BLOCK_FORMATS:
        return f"{scheme.bits} ({scheme.format}) | symmetric | {scheme.group_size} channels"
    vector = {"weight": "an output channel", "input": "a token"}.get(role, "a token and head")
    shared = vector if scheme.group_size is None else f"{scheme.group_size} channels of {vector}"
    return f"{scheme.bits} | {scheme.kind_of_range} | {shared}"


def perplexity_lines(perplexities: Perplexities) -> list[str]:
    """The table of perplexities, or how they are measured."""
    if not perplexities:
        return ["Its perplexity was not measured when it was made; `python main.py --model FOLDER --eval_ppl` does it."]
    lines = ["| perplexity | full precision | this model |", "|---|---|---|"]
    for name, (full, own) in perplexities.items():
        lines.append(f"| {name} | {'–' if full is None else f'{full:.4f}'} | {own:.4f} |")
    return lines


def write_card(folder: Path, card: str, flag: str = "--save_model") -> None:
    """Write a card into a saved model's folder. Raises InputError where it cannot be written."""
    try:
        write_text(folder / CARD, card)
    except OSError as error:
        raise InputError(f"{flag} {folder}: its card cannot be written ({error.strerror or error})") from None
