"""Print what is still to be installed, a requirement a line as pip takes them; for tools/environment.sh.

    python tools/requirements.py [--exact] [EXTRA ...]

Of requirements.txt and of the named extras of pyproject.toml; with --exact also what is there in another version.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.packages import extras, requirements, unmet

if __name__ == "__main__":
    words = sys.argv[1:]
    listed = [*requirements(), *(line for name in words if name != "--exact" for line in extras()[name])]
    print("\n".join(unmet(listed, "--exact" in words)))
