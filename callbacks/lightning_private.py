"""Private parts of Lightning that have no public equivalent (tested with 2.6.6). No other callback uses any."""

from typing import Any

from lightning import Trainer


def stop_own_requeueing(trainer: Trainer) -> None:
    """Lightning saves inside the signal handler, which can deadlock (upstream issue 21406), and has no switch (21404)."""
    environment: Any = trainer._accelerator_connector.cluster_environment
    if hasattr(environment, "auto_requeue"):
        environment.auto_requeue = False


def restore_at_end(trainer: Trainer, handlers: dict[int, Any]) -> None:
    """At every end of a fit Lightning restores the signal handlers that it found (upstream pull request 10611)."""
    trainer._signal_connector._original_handlers.update(handlers)


def validation_is_due(trainer: Trainer) -> bool:
    """Whether a validation follows this batch (upstream has no issue)."""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def validation_seconds(trainer: Trainer) -> float | None:
    """`trainer.val_check_interval` as seconds, None if it is no time; Lightning keeps only this."""
    seconds: float | None = trainer._val_check_time_interval
    return seconds
