"""Tiny checkpoints in the form of what is published: see `forms.py`."""

from .forms import *  # noqa: F403
from .forms import __all__  # noqa: F401
