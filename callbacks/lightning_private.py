"""Private parts of Lightning that have no public equivalent (tested with 2.6.6). No other callback uses any."""

from typing import Any

import lightning as L


def stop_own_requeueing(trainer: L.Trainer) -> None:
    """Lightning saves inside the signal handler, which can deadlock (upstream issue 21406). It has no switch where the
    environment is detected (21404)."""
    environment: Any = trainer._accelerator_connector.cluster_environment
    if hasattr(environment, "auto_requeue"):
        environment.auto_requeue = False


def restore_at_end(trainer: L.Trainer, handlers: dict[int, Any]) -> None:
    """At every end of a fit Lightning restores the signal handlers that it found (upstream pull request 10611)."""
    trainer._signal_connector._original_handlers.update(handlers)


def validation_is_due(trainer: L.Trainer) -> bool:
    """Whether a validation follows this batch. Hooks of a batch are not told (upstream has no issue)."""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def validation_seconds(trainer: L.Trainer) -> float | None:
    """`trainer.val_check_interval` as seconds, None where it is no time; Lightning parses it and keeps only this."""
    return trainer._val_check_time_interval
