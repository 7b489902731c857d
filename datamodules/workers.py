"""What a reading process does before it reads: it leaves signals to the training process, and ends with it.

Under SLURM a signal to the job reaches every process of it. A reader that ended at once would take away the batches that
the training process still needs to come to the point where it saves.
"""

import os
import signal
import threading


def begin(worker: int) -> None:
    """For `worker_init_fn`: heeds SIGTERM only from the training process, and no SIGUSR1; tokenises without threads."""
    # a tokenizer that starts threads in a forked worker can lock up
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process when the parent says so, or is gone: it may have been killed with no time for farewells."""
    while True:
        received = signal.sigtimedwait({signal.SIGTERM}, 2)
        if os.getppid() != parent or (received is not None and received.si_pid == parent):
            os._exit(0)
