"""Training data: conversations from any source, their tokens and labels, their pixels, and batches of them."""

import importlib
from typing import TYPE_CHECKING


_PUBLIC_NAMES = {
    "BadSampleError": "schema",
    "Conversation": "schema",
    "ConversationDataset": "sources",
    "ConversationStream": "sources",
    "LlavaDataCollator": "collator",
    "conversation_length": "labels",
    "encode_conversation": "labels",
    "from_llava_row": "schema",
    "from_messages_row": "schema",
    "load_conversations": "sources",
    "load_image": "schema",
}

if TYPE_CHECKING:
    from .collator import LlavaDataCollator  # noqa: F401
    from .labels import conversation_length, encode_conversation  # noqa: F401
    from .schema import BadSampleError, Conversation, from_llava_row, from_messages_row, load_image  # noqa: F401
    from .sources import ConversationDataset, ConversationStream, load_conversations  # noqa: F401


def __getattr__(name: str):
    # Imported when first used: the data engine needs the schema only, and should not wait for the rest.
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC_NAMES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_PUBLIC_NAMES])


__all__ = sorted(_PUBLIC_NAMES)
