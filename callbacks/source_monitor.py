"""What a mixture's sources give to training: pairs, loss and what is left out, source by source.

B pairs here, G pairs on all ranks, V words.
"""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from callbacks.run_monitor import logs_now
from stair.batch import Batch


class SourceMonitor(L.Callback):
    """Logs, for a `data.train` that is a mixture, at every `trainer.log_every_n_steps` and over all ranks:

    - `source/<name>/pairs`: pairs seen since the start of the run, interruptions included.
    - `source/<name>/loss`: mean contrastive loss of the source's pairs in the logged batch, each against the whole global
      batch; weighted by pairs, the sources' losses add up to `train/contrastive`.
    - `source/<name>/skipped`: samples left out since this start (`datamodule.skipped_by_source`).
    - `source/<name>/converted`: images that were converted since this start (`datamodule.converted_by_source`).

    With one source, nothing is logged and nothing computed.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._pairs: Tensor | None = None  # on the device: a count each step must not make the host wait
        self._before: dict[str, int] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the names of the sources."""
        self._names = list(getattr(trainer.datamodule, "source_names", []))
        self._pairs = torch.zeros(len(self._names), dtype=torch.int64, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Counts the step's pairs, and logs where it is time to."""
        if not self._names or self._pairs is None:
            return
        own_SB = torch.tensor([[source == name for source in batch["source"]] for name in self._names])
        own_SB = own_SB.to(pl_module.device, torch.float32)
        self._pairs += trainer.strategy.reduce(own_SB.sum(1).long(), reduce_op="sum")
        if logs_now(trainer, batch_idx):
            pl_module.log_dict(self._figures(trainer, pl_module, outputs, own_SB), batch_size=1)

    def _figures(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: dict[str, Any], own_SB: Tensor
    ) -> dict[str, float]:
        loss_B = pair_losses(pl_module, outputs)
        apart_2S = torch.stack([self._apart(trainer, what).to(own_SB) for what in ("skipped", "converted")])
        sums_4S = torch.cat([torch.stack([own_SB @ loss_B, own_SB.sum(1)]), apart_2S])
        sums_4S = trainer.strategy.reduce(sums_4S, reduce_op="sum")
        figures = {}
        for name, pairs, (loss, count, skipped, converted) in zip(
            self._names, self._counts().values(), sums_4S.T.tolist(), strict=True
        ):
            figures[f"source/{name}/pairs"] = float(pairs)
            figures[f"source/{name}/skipped"] = skipped
            figures[f"source/{name}/converted"] = converted
            if count:
                figures[f"source/{name}/loss"] = loss / count
        return figures

    def _apart(self, trainer: L.Trainer, what: str) -> Tensor:
        counts = getattr(trainer.datamodule, f"{what}_by_source", {})
        return torch.tensor([counts.get(name, 0) for name in self._names])

    def _counts(self) -> dict[str, int]:
        here = dict(zip(self._names, [] if self._pairs is None else self._pairs.tolist(), strict=True))
        return {name: self._before.get(name, 0) + int(count) for name, count in here.items()}

    def state_dict(self) -> dict[str, Any]:
        """The pairs seen of each source, the same on all ranks."""
        return {"pairs": {**self._before, **self._counts()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting."""
        self._before = dict(state_dict["pairs"])


@torch.no_grad()
def pair_losses(pl_module: L.LightningModule, outputs: dict[str, Any]) -> Tensor:
    """The symmetric InfoNCE of each pair of this rank against the pairs of all ranks.

    Args:
        pl_module: the stage; its `towers.comparable` makes embeddings what their dot products are taken of.
        outputs: of `training_step`; `compared` holds weight, images and texts of each term of `train/contrastive`.

    Returns:
        (B,) fp32; their mean over all ranks is `train/contrastive`.
    """
    scale, terms = float(outputs["scale"]), []
    for weight, *sides in outputs["compared"]:
        image_BV, text_BV = (pl_module.towers.comparable(side).float() for side in sides)
        by_image_BG = torch.cat([scale * (image_BV @ peer_BV.T) for peer_BV in _of_all_ranks(text_BV)], 1)
        by_text_BG = torch.cat([scale * (text_BV @ peer_BV.T) for peer_BV in _of_all_ranks(image_BV)], 1)
        matched_B = scale * (image_BV * text_BV).sum(1)
        terms.append(weight * ((by_image_BG.logsumexp(1) + by_text_BG.logsumexp(1)) / 2 - matched_B))
    return torch.stack(terms).sum(0)


def _of_all_ranks(rows_BV: Tensor) -> Iterator[Tensor]:
    """The (B, V) rows of each rank, one after the other: those of all at once would not fit where there are many."""
    if not dist.is_initialized():
        yield rows_BV
        return
    for rank in range(dist.get_world_size()):
        peer_BV = rows_BV.contiguous() if rank == dist.get_rank() else torch.empty_like(rows_BV)
        dist.broadcast(peer_BV, rank)
        yield peer_BV
