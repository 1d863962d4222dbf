"""The runtime by itself: installed into an empty folder, it needs nothing else of this repository."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import OURS, ROOT

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import duquant
names = [each.name for each in pkgutil.walk_packages(duquant.__path__, "duquant.")]
for name in names:
    importlib.import_module(name)
print(json.dumps({"file": duquant.__file__, "imported": names, "loaded": sorted(sys.modules)}))
"""


def modules(package: Path) -> set[str]:
    """The dotted names of everything in it, itself included."""
    paths = [path.relative_to(package.parent).with_suffix("").parts for path in package.rglob("*.py")]
    return {".".join(parts).removesuffix(".__init__") for parts in paths}


def test_one_package_is_installed(target):
    assert sorted(path.name for path in target.iterdir() if path.suffix != ".dist-info") == ["duquant"]
    assert modules(target / "duquant") == modules(ROOT / "duquant")


def test_all_of_it_is_imported_from_an_empty_folder_and_brings_in_nothing_else_of_ours(target, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IMPORT_ALL]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["file"]).is_relative_to(target)
    assert modules(ROOT / "duquant") - {"duquant"} == set(found["imported"])
    assert not {name.split(".")[0] for name in found["loaded"]} & set(OURS)


def test_its_files_name_no_other_package_of_ours_and_neither_do_those_of_a_function():

    for path in (ROOT / "duquant").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & set(OURS), path.name
