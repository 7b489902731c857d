"""What `predict` computes, on any number of devices, as the files that `stair index` takes.

    lightning predict --config configs/stage3.yaml --run runs/mine --data.test '{coco: val/*.tar}' \
        --trainer.callbacks+=callbacks.embedding_writer.EmbeddingWriter --trainer.callbacks.folder embeddings \
        --return_predictions false

C captions, V words.
"""

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
        top: keep only so many words of each, the heaviest.
        threshold: keep only weights above this.
    """

    def __init__(self, folder: str, top: int | None = None, threshold: float = 0.0) -> None:
        self.folder, self.top, self.threshold = Path(folder), top, threshold
        self._space: EmbeddingSpace | None = None
        self._rows: dict[tuple[str, str], tuple[list[sparse.csr_matrix], list[str]]] = {}

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses models without words, and a folder that holds embeddings already; takes the model's fingerprint.

        Here and not at the end, where embeddings could be lost for it; on all ranks, as a sharded model wants it.

        Raises:
            SettingError: if the model is dense.
            FileError: if there are embeddings.
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
        keys = dict(zip(outputs["image_id"].tolist(), outputs["key"], strict=True))
        self._keep(name, "images", outputs["image_BV"], outputs["image_id"].tolist(), list(outputs["key"]))
        image_of_C = outputs["caption_image"].tolist()
        numbers = [image_of_C[:c].count(image) for c, image in enumerate(image_of_C)]
        names = [f"{keys[image]}#{number}" for image, number in zip(image_of_C, numbers, strict=True)]
        self._keep(name, "texts", outputs["text_CV"], image_of_C, names)

    def _keep(self, name: str, side: str, embedding: Any, images: list[int], ids: list[str]) -> None:
        # rows of image -1 only even out the ranks
        kept = [n for n, image in enumerate(images) if image >= 0]
        rows, names = self._rows.setdefault((name, side), ([], []))
        rows.append(to_csr(embedding, self.top, self.threshold)[kept])
        names += [ids[n] for n in kept]

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes this rank's parts."""
        space = self._space
        assert space is not None  # since `on_predict_start`
        for (name, side), (rows, ids) in self._rows.items():
            folder = self.folder / name / side
            part = Embeddings(sparse.vstack(rows, format="csr"), ids, space)
            part.save(folder / f"part-{trainer.global_rank:05}.safetensors")
            if trainer.is_global_zero:
                plan = {"model": space.model, "similarity": space.similarity, "side": side, "parts": trainer.world_size}
                write_json(folder / PLAN, plan)
        self._rows.clear()
