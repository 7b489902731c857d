"""What `predict` computes, on any number of devices, as the files that `stair index` takes.

    lightning predict --config configs/stage3.yaml --run runs/mine --data.test '{coco: val/*.tar}' \
        --trainer.callbacks+=callbacks.embedding_writer.EmbeddingWriter --trainer.callbacks.folder embeddings \
        --return_predictions false
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
from scipy import sparse

from stair.embeddings import PLAN, Embeddings, EmbeddingSpace, to_csr
from stair.errors import FileError, SettingError
from stair.files import write_json
from stair.model import Stair


class EmbeddingWriter(L.Callback):
    """Writes `folder/SET/images` and `folder/SET/texts`, a part a rank; every image and caption once.

    An image's id is `SHARD/KEY`, as from `stair embed`; its captions' are the same with `#0`, `#1`, ….

    Args:
        folder: where.
        top: keep at most this many terms of each, the heaviest.
        threshold: keep only weights above this.
    """

    def __init__(self, folder: str, top: int | None = None, threshold: float = 0.0) -> None:
        self.folder, self.top, self.threshold = Path(folder), top, threshold
        self._space: EmbeddingSpace | None = None
        self._rows: dict[tuple[str, str], list[tuple[sparse.csr_matrix, list[str]]]] = defaultdict(list)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the model's fingerprint, on all ranks, as a sharded model needs it.

        Raises:
            SettingError: if the model is dense.
            FileError: if the folder holds embeddings.
        """
        if not isinstance(getattr(pl_module, "stair", None), Stair):
            raise SettingError("EmbeddingWriter writes sparse embeddings; this model's are dense", "model.class_path")
        if trainer.is_global_zero and any(self.folder.glob(f"*/*/{PLAN}")):
            raise FileError(f"{self.folder} holds embeddings; give another folder", self.folder)
        self._space = pl_module.stair.space

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Any],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the non-zeros of a batch."""
        name = list(trainer.datamodule.test_names)[dataloader_idx]
        images, owners = outputs["image_id"].tolist(), outputs["caption_image"].tolist()
        keys = dict(zip(images, outputs["key"], strict=True))
        texts = [f"{keys[image]}#{owners[:c].count(image)}" for c, image in enumerate(owners)]
        for side, embedding, image_ids, ids in (
            ("images", outputs["image_BV"], images, list(outputs["key"])),
            ("texts", outputs["text_CV"], owners, texts),
        ):
            real = [n for n, image in enumerate(image_ids) if image >= 0]  # the others only even out the ranks
            rows = to_csr(embedding, self.top, self.threshold)[real]
            self._rows[name, side].append((rows, [ids[n] for n in real]))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes this rank's parts."""
        space = self._space
        assert space is not None  # since `on_predict_start`
        for (name, side), parts in self._rows.items():
            folder = self.folder / name / side
            vectors = sparse.vstack([rows for rows, _ in parts], format="csr")
            part = Embeddings(vectors, [name for _, ids in parts for name in ids], space)
            part.save(folder / f"part-{trainer.global_rank:05}.safetensors")
            if trainer.is_global_zero:
                plan = {"model": space.model, "similarity": space.similarity, "side": side, "parts": trainer.world_size}
                write_json(folder / PLAN, plan)
        self._rows.clear()
