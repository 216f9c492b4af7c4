"""One lock per model: while a predictor computes, its model attends in another way and some layers compute less."""

import threading
from weakref import WeakKeyDictionary

from torch import nn


_LOCKS: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()
_MAKING = threading.Lock()


def model_lock(model: nn.Module):
    """
    The lock that every predictor over a model holds while it computes a token. Hold it for other uses of the model in
    another thread, such as `generate`:

    ```python
    >>> with model_lock(model):
    ...     model.generate(**inputs)
    ```

    Args:
        model: A LLaVA, or a `PeftModel` around it: both are one model.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    with _MAKING:
        return _LOCKS.setdefault(model, threading.RLock())


__all__ = ["model_lock"]
