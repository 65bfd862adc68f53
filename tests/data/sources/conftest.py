"""Makes the writers of foreign layouts importable."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
