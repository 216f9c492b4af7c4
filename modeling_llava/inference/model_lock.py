"""One at a time: while a predictor computes, its model attends in another way, and some layers do less than their own work."""

import threading
from weakref import WeakKeyDictionary

from torch import nn


_LOCKS: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()
_MAKING = threading.Lock()


def turns_of(model: nn.Module):
    """
    The lock of a model, which every predictor over it holds while it computes (a token at a time), so that predictors in
    threads take turns by themselves. Whoever else uses the model meanwhile, `generate` for one, holds it as well:

    ```python
    >>> with turns_of(model):
    ...     model.generate(**inputs)
    ```

    Args:
        model: A LLaVA, or a `PeftModel` around it: both are one model.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    with _MAKING:
        return _LOCKS.setdefault(model, threading.RLock())


__all__ = ["turns_of"]
