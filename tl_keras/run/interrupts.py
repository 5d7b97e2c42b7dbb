"""Interrupts: Ctrl-C, and SIGTERM, which Slurm, Kubernetes and spot instances send before they kill a process."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

from tl_keras.errors import LostRunError, UserError

_REPEAT_SECONDS = 0.05  # until what swallowed it has returned


class Interrupts:
    """The signal handlers of the command line: both signals end a run in the same way.

    Attributes:
        arrived: whether an interrupt arrived that nobody has handled yet.
    """

    arrived = False

    @classmethod
    def listen(cls) -> None:
        """Installs the signal handlers."""
        cls.arrived = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, cls._forward)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, cls._interrupt)

    @classmethod
    @contextlib.contextmanager
    def restored(cls) -> Iterator[None]:
        """Raises an interrupt again that TensorFlow has turned into a RuntimeError, as it does while it traces.

        Blocks may be nested: an interrupt that ended an inner block with an error of another kind is left to the outer
        block.

        Raises:
            KeyboardInterrupt: an interrupt arrived within the block, and a RuntimeError or the like followed.
        """
        outer, cls.arrived = cls.arrived, False
        try:
            yield
        except (UserError, LostRunError, OSError, MemoryError):
            outer = outer or cls.arrived
            raise
        except Exception as error:
            if cls.arrived:
                raise KeyboardInterrupt from error
            raise
        finally:
            cls.arrived = outer

    @classmethod
    def _forward(cls, number: int, frame: Any) -> None:
        """Hands SIGTERM to the current handler of SIGINT; a shell starts background jobs with SIGINT ignored."""
        handler = signal.getsignal(signal.SIGINT)
        (handler if callable(handler) else cls._interrupt)(number, frame)

    @classmethod
    def _interrupt(cls, number: int, frame: Any) -> None:
        del number, frame
        cls.arrived = True
        raise KeyboardInterrupt


def repeat_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    """Python drops a Ctrl-C that comes while a destructor or a callback runs, of which TensorFlow has many."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(_REPEAT_SECONDS, _interrupt_main_thread).start()
    else:
        sys.__unraisablehook__(unraisable)


def repeat_printed_interrupt(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """TensorFlow's C++ code prints an exception that it can't raise; an interrupt behind it is raised again."""
    if Interrupts.arrived:
        Interrupts.arrived = False
        threading.Timer(_REPEAT_SECONDS, _interrupt_main_thread).start()
    else:
        sys.__excepthook__(kind, error, trace)


def _interrupt_main_thread() -> None:
    """Ctrl-C once more, also for a system call that waits; Windows can't interrupt one."""
    main_thread = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main_thread is not None:
        signal.pthread_kill(main_thread, signal.SIGINT)
    else:
        _thread.interrupt_main()
