"""Runs a coroutine from plain code, also inside a notebook's loop, with a Ctrl-C that lets it finish."""

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any


logger = logging.getLogger(__name__)


def run_blocking(
    main: Callable[[], Coroutine[Any, Any, Any]], stop: Callable[[], None], raise_interrupt: bool = True
) -> Any:
    """Runs a coroutine and returns its result; inside a running loop, in a thread with a loop of its own.

    There the first Ctrl-C (a notebook's stop button) calls `stop`, the second one cancels. `raise_interrupt`: raise the
    `KeyboardInterrupt` once the coroutine has ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    begun: list[tuple[asyncio.AbstractEventLoop, asyncio.Task]] = []
    result: list[Any] = []
    ready, ended = threading.Event(), threading.Event()

    async def announced() -> Any:
        begun.append((asyncio.get_running_loop(), asyncio.current_task()))
        ready.set()
        return await main()

    def inside() -> None:
        try:
            result.append(asyncio.run(announced()))
        except BaseException as error:
            result.append(error)
        ready.set()
        ended.set()

    thread = threading.Thread(target=inside)
    thread.start()
    ready.wait()
    interrupted = None
    while not ended.is_set():
        try:
            ended.wait()  # after an interrupted `join` a thread counts as ended
        except KeyboardInterrupt as error:
            loop, task = begun[0]
            with suppress(RuntimeError):  # it has ended meanwhile
                loop.call_soon_threadsafe(stop if interrupted is None else task.cancel)
            interrupted = error
    thread.join()
    if interrupted is not None and (raise_interrupt or isinstance(result[0], asyncio.CancelledError)):
        raise interrupted
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


@contextmanager
def gentle_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """In the main thread's loop, the first Ctrl-C calls `stop`, the second one interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGINT)
    stopping = False

    def interrupted(*_: Any) -> None:
        nonlocal stopping
        if stopping:
            signal.signal(signal.SIGINT, before)
            signal.raise_signal(signal.SIGINT)
            return
        stopping = True
        logger.warning("Stopping: requests in flight are finished first. Ctrl-C again stops at once.")
        loop.call_soon_threadsafe(stop)

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


__all__ = ["gentle_interrupt", "run_blocking"]
