"""Worker processes of data loaders."""

from __future__ import annotations

import signal


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the main process, which ends its workers; for `worker_init_fn`.

    A terminal sends it to all of them. A worker that it stops hands on no more samples, is not
    told to end, and is waited for.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
