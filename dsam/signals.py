"""SIGTERM and Ctrl-C noted in place of acted on, so that work ends where it can go on from."""

import signal
import time


class StopSignals:
    """Inside, SIGTERM and SIGINT are only noted in `signum`.

    Args:
        patience: asked again after so many seconds, it raises KeyboardInterrupt; None: it goes on noting.
    """

    signum: int | None = None
    noted = 0.0

    def __init__(self, patience: float | None = 2.0):
        self.patience = patience

    def __enter__(self) -> "StopSignals":
        self.earlier = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _note(self, signum, frame) -> None:
        # A scheduler and the sweep passing on the same request are one.
        if self.signum is not None and self.patience is not None and time.monotonic() - self.noted > self.patience:
            raise KeyboardInterrupt
        if self.signum is None:
            self.signum, self.noted = signum, time.monotonic()
