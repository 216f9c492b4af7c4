"""The data engine's tests ask the endpoint's fault server, and the real one of the evaluation's tests."""

import sys
from pathlib import Path


for folder in ("endpoint", "evaluation"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
