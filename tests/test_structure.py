"""The house: what may stand on which floor."""

import re

import pytest
from conftest import ROOT

PACKAGES = ("experiment", "reporting", "evaluation", "models", "quantize", "duquant", "utils")
# a script's beginning; its flags; flags into settings; the runtime's own script
READS_FLAGS = {"experiment/cli.py", "utils/parser.py", "utils/setting_flags.py", "duquant/__main__.py"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_below_the_scripts_takes_parsed_flags(package):
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    taking = {str(path.relative_to(ROOT)) for path in paths if re.search(r"\bNamespace\b", path.read_text())}
    assert taking <= READS_FLAGS
