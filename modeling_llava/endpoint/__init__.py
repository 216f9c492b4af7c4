"""The client of OpenAI-compatible endpoints: limits, retries, budget and the append-only ledger.

A leaf of the package: the data engine and the judges of the benchmarks both stand on it, and it imports neither.
"""

from .chat import ChatModel, EndpointFault, FatalFault, Message, PassingFault, Reply, RequestFault, Usage


__all__ = [
    "ChatModel",
    "EndpointFault",
    "FatalFault",
    "Message",
    "PassingFault",
    "Reply",
    "RequestFault",
    "Usage",
]
