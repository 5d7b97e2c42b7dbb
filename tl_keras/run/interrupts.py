"""Interrupts: Ctrl-C, and SIGTERM, which Slurm, Kubernetes and spot instances send before they kill a process."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from tl_keras.errors import LostRunError, UserError


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

        Raises:
            KeyboardInterrupt: an interrupt arrived within the block, and a RuntimeError or the like followed.
        """
        cls.arrived = False
        try:
            yield
        except KeyboardInterrupt:
            cls.arrived = False
            raise
        except (UserError, LostRunError, OSError, MemoryError):
            raise
        except Exception as error:
            if cls.arrived:
                cls.arrived = False
                raise KeyboardInterrupt from error
            raise

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
