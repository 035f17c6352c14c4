"""SIGTERM and SIGINT as a request to stop where it does no harm, instead of wherever the program is."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stop:
  """Whether a signal has asked to stop: `name` is that of the signal, and "" before."""

  def __init__(self) -> None:
    self.name = ""

  @contextlib.contextmanager
  def listening(self) -> Iterator[None]:
    """Takes note of SIGTERM and SIGINT; a second SIGINT raises `KeyboardInterrupt`.

    Outside the main thread, which alone can handle signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
      yield
      return

    def note(number: int, _: Any) -> None:
      if self.name and number == signal.SIGINT:
        raise KeyboardInterrupt
      self.name = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)
      if self.name:  # too late to stop anything here, perhaps, but whoever listened before may still want to
        handler = before[signal.Signals[self.name]]
        if callable(handler) and handler is not signal.default_int_handler:
          handler(signal.Signals[self.name], None)
