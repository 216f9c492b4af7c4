"""The client of OpenAI-compatible endpoints: limits, retries, budget and the append-only ledger.

The data engine and the judges of the benchmarks build on it; of the package it imports `io` alone.
"""

from .batch import BatchSummary, forget_batch, read_batch, write_batch
from .chat import (
    ChatModel,
    EndpointFault,
    FatalFault,
    PassingFault,
    Reply,
    RequestFault,
    Usage,
    remove_thoughts,
)
from .ledger import Ledger
from .limits import BATCH_PRICE, Backoff, Budget, Prices, TokenBucket
from .openai_model import OpenAIModel
from .runner import RunSettings, RunSummary, run_tasks
from .task import REFUSED, Task, Verdict


__all__ = [
    "BATCH_PRICE",
    "Backoff",
    "BatchSummary",
    "Budget",
    "ChatModel",
    "EndpointFault",
    "FatalFault",
    "Ledger",
    "OpenAIModel",
    "PassingFault",
    "Prices",
    "REFUSED",
    "Reply",
    "RequestFault",
    "RunSettings",
    "RunSummary",
    "Task",
    "TokenBucket",
    "Usage",
    "Verdict",
    "forget_batch",
    "read_batch",
    "remove_thoughts",
    "run_tasks",
    "write_batch",
]
