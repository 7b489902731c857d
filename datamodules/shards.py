"""Image-text pairs for the trainer: WebDataset shards for training, evaluation sets read exactly.

All checks are made in `setup`, so that a run fails with a reason before its first step. `sources.py` finds the shards,
`order.py` says which sample is seen when, `dataset.py` reads it, `reading.py` hands out batches and resumes.
"""

import hashlib
import logging
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from datamodules.augment import Augment
from datamodules.dataset import CollatePairs, IndexedPairs, PairMaker, ShardTable, Source, StreamedPairs
from datamodules.order import Order
from datamodules.reading import TrainingLoader, evaluation_loader
from datamodules.sources import file_name, find
from datamodules.workers import start_server
from stair.data.diagnostics import Requirements, probe
from stair.data.pairs import EvaluationPairs
from stair.data.remote import Remote, check_cache
from stair.data.shard_index import SampleReader
from stair.data.tars import Shards, mixture
from stair.errors import SettingError, errors_name, require
from stair.images import MAX_PIXELS
from stair.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


class ImageTextShards(LightningDataModule):
    """Image-text pairs from WebDataset shards, in batches of `stair.batch.Batch` (docs/guides/data.md).

    Training samples one caption of an image, or joins several; evaluation uses all. An epoch is floor(samples /
    global_batch_size) steps on every rank. It depends on `seed` and not on global random state, and resumes inside an
    epoch from Lightning's checkpoints on any number of ranks and workers, with the same batch size, shuffling and shards.

    A shard spec is a path, a glob (`data/*.tar`), a brace pattern (`data/train-{0000..0004}.tar`), a URL (http, https, or
    what fsspec opens), and for training also a `pipe:` command.

    Args:
        train: shard spec, list of specs, or mixture: a mapping of source names to a spec, or to `shards` and
            `weight`. Without weights, an epoch has every sample once. With weights (all or none), every batch has the
            sources in this proportion, and a source repeats after all its samples were used. None: no training.
        val: names and shard specs of the validation sets; `val/recall` is that of the first. Uncompressed tars.
        test: names and shard specs of the test sets, also used by `predict`. Uncompressed tars.
        vocabulary: a `vocab.txt`, a folder with one, or the name of a model on the hub.
        image_size: side of the square images, in pixels, at least 1.
        max_tokens: maximum length of a caption in tokens, including [CLS] and [SEP]; at least 3.
        global_batch_size: pairs per step over all ranks; a multiple of the number of ranks.
        eval_batch_size: images per batch and rank in evaluation, with all their captions.
        workers: data-loading processes per rank; 0 loads in the training process.
        shuffle: size of the windows in which samples are shuffled; 0 keeps their order. Shards are always shuffled.
        resample: draw shards with replacement, for data of unknown size or too large for a full epoch. An epoch then has
            `train_samples` samples.
        crop_scale: minimum and maximum share of an image's area that the training crop keeps, in (0, 1]; the crop's
            aspect ratio is 3/4 to 4/3. (1, 1) is the centre crop of evaluation.
        flip: mirror half of the training images; unsuitable if captions say left and right.
        color_jitter: brightness, contrast and saturation of a training image are each multiplied by a factor uniform in
            1 ± this, in [0, 1].
        grayscale: share of the training images that are converted to grey, in [0, 1].
        max_pixels: largest width × height that is decoded; larger images are bad samples.
        max_bad_share: maximum share of bad samples, in [0, 1). Above it, training stops. Checked on each rank after 200
            samples, or after an epoch if it is shorter.
        seed: seed of shard order, shuffling, captions and crops; each stage shuffles differently with the same seed.
        train_samples: pairs per epoch with `resample`; None: as many as the shards have.
        caption_fields: relative probability that a field of the JSON (a string or a list of strings), or `txt`, gives
            the caption: `{caption: 0.7, alt: 0.3}`. The share of a missing field goes to the others. None: `captions`
            of the JSON, else its `caption`, else the `.txt`.
        join_captions: number of captions of an image that are joined, in random order, to the text of a training pair; at
            least 1. Stage 1 then grounds an image in the terms of all of them. `max_tokens` must leave room for them.
        remote: timeout, retries and local copies of remote shards.

    Attributes:
        val_names: names of the validation sets, in the order of their loaders; `test_names` of the test sets.
        source_names: names of the sources of a mixture; empty where there is but one.

    Raises:
        SettingError: if an argument is out of its range.
    """

    def __init__(
        self,
        train: str | list[str] | dict[str, str | list[str] | Shards] | None = None,
        val: dict[str, str] | None = None,
        test: dict[str, str] | None = None,
        *,
        vocabulary: str,
        image_size: int,
        max_tokens: int,
        global_batch_size: int = 256,
        eval_batch_size: int = 64,
        workers: int = 4,
        shuffle: int = 2000,
        resample: bool = False,
        crop_scale: tuple[float, float] = (0.9, 1.0),
        flip: bool = False,
        color_jitter: float = 0.0,
        grayscale: float = 0.0,
        max_pixels: int = MAX_PIXELS,
        max_bad_share: float = 0.1,
        seed: int = 0,
        train_samples: int | None = None,
        caption_fields: dict[str, float] | None = None,
        join_captions: int = 1,
        remote: Remote = Remote(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        least = {"image_size": (image_size, 1), "max_tokens": (max_tokens, 3), "workers": (workers, 0)}
        least |= {"global_batch_size": (global_batch_size, 2), "eval_batch_size": (eval_batch_size, 1)}
        least |= {"shuffle": (shuffle, 0), "max_pixels": (max_pixels, 1), "join_captions": (join_captions, 1)}
        for name, (value, bound) in least.items():
            require(value >= bound, name, value, f"{bound} or more")
        require(0 < crop_scale[0] <= crop_scale[1] <= 1, "crop_scale", crop_scale, "0 < least <= greatest <= 1")
        require(0 <= color_jitter <= 1, "color_jitter", color_jitter, "0 to 1")
        require(0 <= grayscale <= 1, "grayscale", grayscale, "0 to 1")
        require(0 <= max_bad_share < 1, "max_bad_share", max_bad_share, "0 or more and less than 1")
        require(train_samples is None or train_samples >= 1, "train_samples", train_samples, "at least 1, or none")
        for name, share in (caption_fields or {}).items():
            require(0 < share < float("inf"), f"caption_fields[{name!r}]", share, "more than 0")
        self.train, self.caption_fields = mixture(train), dict(caption_fields or {})
        self.join_captions = join_captions
        self.val, self.test = val or {}, test or {}
        self.val_names, self.test_names = list(self.val), list(self.test)
        self.source_names = [name for name in self.train if name]
        self.global_batch_size, self.eval_batch_size, self.workers = global_batch_size, eval_batch_size, workers
        self.shuffle, self.max_pixels, self.max_bad_share, self.seed = shuffle, max_pixels, max_bad_share, seed
        self.resample, self.train_samples, self.remote = resample, train_samples, remote
        self.augment = Augment(image_size, (crop_scale[0], crop_scale[1]), flip, max_pixels, color_jitter, grayscale)
        self.collate = CollatePairs(Vocabulary(vocabulary).for_reading(), max_tokens)
        self._loader: TrainingLoader | None = None
        self._sets: dict[str, list[EvaluationPairs]] = {}
        if workers:  # it imports while this process builds the model and looks at the shards
            start_server(*["torchvision.transforms.v2"] * bool(color_jitter or grayscale))

    # what this rank has met so far: bad samples, and images that were not plain 8-bit grayscale or RGB. By cause or kind
    # and, in a mixture, also by `source/cause`; or by source
    skipped = property(lambda self: self._loader.counter.by_cause() if self._loader else {})
    skipped_by_source = property(lambda self: self._loader.counter.by_source() if self._loader else {})
    converted = property(lambda self: self._loader.counter.by_cause(converted=True) if self._loader else {})
    converted_by_source = property(lambda self: self._loader.counter.by_source(converted=True) if self._loader else {})

    def setup(self, stage: str) -> None:
        """Finds, counts and checks all that a stage (`fit`, `validate`, `test`, `predict`) reads."""
        if stage == "fit" and self.train:
            self._loader = self._training(*self._rank_of())
        part, specs = ("val", self.val) if stage in ("fit", "validate") else ("test", self.test)
        self._sets[part] = []
        for name, spec in specs.items():
            with errors_name(f"set {name!r}"):
                self._sets[part].append(EvaluationPairs(spec, self.augment.size, self.max_pixels, self.remote))

    def _training(self, rank: int, ranks: int) -> TrainingLoader:
        self._check_settings(ranks)
        check_cache(self.remote)
        sources, broken = find(self.train, self.resample, self.remote.at_first(), rank, ranks)
        samples = self._epoch_samples(sources)
        for source in sources:
            self._check_samples(source, rank)
        groups = [sources] if sources[0].weight is None else [[source] for source in sources]
        tables = [ShardTable(group) for group in groups]
        seed, shuffle, remote = self._stage_seed(), self.shuffle, self.remote
        names, weights = [group[0].name for group in groups], [float(group[0].weight or 1) for group in groups]
        counts = [table.counts for table in tables]
        order = Order(counts, names, weights, seed, self.global_batch_size, samples, shuffle, self.resample)
        make = PairMaker(self.augment, self.collate, self.caption_fields, self.join_captions)
        dataset: IndexedPairs | StreamedPairs = IndexedPairs(tables, make, seed, SampleReader(remote))
        if not sources[0].counts:
            dataset = StreamedPairs(tables, order.shares, make, seed, rank, ranks, shuffle, remote)
            if rank == 0:
                logger.warning(
                    "some shards can only be read sequentially: samples are drawn by each data-loading process, and a "
                    "resumed run continues with new draws"
                )
        shards = [(source.name, [file_name(shard) for shard in source.shards]) for source in sources]
        fingerprint = {
            "seed": seed,
            "global_batch_size": self.global_batch_size,
            "steps": order.steps,
            "weights": [round(share, 12) for share in order.shares.of_all],
            "sizes": f"{sum(int(each.sum()) for each in counts)} samples, {_digest(b''.join(map(bytes, counts)))}",
            "shards": f"{sum(len(names) for _, names in shards)} shards, {_digest(repr(shards).encode(errors='replace'))}",
            **{name: getattr(self, name) for name in ("shuffle", "resample", "caption_fields", "join_captions")},
        }
        # an epoch that the trainer cuts short is complete, and a resumed run must begin the next one
        limit = self.trainer.limit_train_batches if self.trainer is not None else 1.0
        batches = min(order.steps, limit) if isinstance(limit, int) else int(order.steps * limit)
        loader = TrainingLoader(dataset, order, rank, ranks, self.workers, batches, self.max_bad_share, fingerprint)
        loader.counter.add(0, broken if rank == 0 else [])  # nobody reads these again, and all ranks know of them
        return loader

    def _check_settings(self, ranks: int) -> None:
        if (batch := self.global_batch_size) % ranks:
            nearest = batch + ranks - batch % ranks
            raise SettingError(
                f"data.global_batch_size={batch} is not a multiple of {ranks} ranks; use "
                f"--data.global_batch_size {nearest}; or start another number of ranks", "data.global_batch_size",
            )  # fmt: skip
        if self.train_samples and not self.resample:
            raise SettingError(
                f"train_samples={self.train_samples} is the length of a resampled epoch: set data.resample: true, or leave "
                "it out, as shards are counted", "data.train_samples",
            )  # fmt: skip

    def _epoch_samples(self, sources: list[Source]) -> int:
        counted = sum(sum(source.counts) for source in sources)
        if not counted and not (self.resample and self.train_samples):
            raise SettingError(
                f"some of {sources[0].shards[:3]} and others can only be read sequentially: set data.resample: true, and "
                "data.train_samples to the pairs of an epoch; or give uncompressed tars with an index", "data.resample",
            )  # fmt: skip
        samples = self.train_samples or counted
        if samples < self.global_batch_size:
            raise SettingError(
                f"{samples} pairs in all shards ({sources[0].shards[0]}, ...), fewer than global_batch_size="
                f"{self.global_batch_size}. Lower it or add shards", "data.global_batch_size",
            )  # fmt: skip
        return samples

    def _stage_seed(self) -> int | str:
        # else each stage would show the first stage's beginning again: its samples, captions and crops
        module = self.trainer.lightning_module if self.trainer is not None else None
        stage = getattr(module, "stage", None) or 1
        return self.seed if stage == 1 else f"{self.seed}, stage {stage}"

    def _check_samples(self, source: Source, rank: int) -> None:
        bounds = (self.max_pixels, self.max_bad_share, self.augment.flip)
        needs = Requirements(self.collate.vocabulary, self.collate.max_tokens, self.augment.size, *bounds)
        for finding in probe(source.name or source.shards[0], source.shards, needs, self.remote.at_first()):
            if finding.severity == "stops":
                raise ValueError(f"{finding.source}: {finding.what}; {finding.mend}")
            if finding.severity == "warns" and rank == 0:
                logger.warning("%s: %s; fix: %s", finding.source, finding.what, finding.mend)

    def _rank_of(self) -> tuple[int, int]:
        """This process, and the number of processes."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    def train_dataloader(self) -> TrainingLoader:
        """The resumable loader; the same object each time, so that a reload goes on with the next epoch."""
        if self._loader is None:
            raise ValueError("nothing to train on: give shards, as in --data.train 'shards/*.tar'")
        return self._loader

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader a validation set, in the order of `val_names`."""
        return self._evaluation_loaders("val")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """One loader a test set, in the order of `test_names`."""
        return self._evaluation_loaders("test")

    def _evaluation_loaders(self, part: str) -> list[DataLoader[Any]]:
        options = self.collate, self.eval_batch_size, self.workers, *self._rank_of()
        return [evaluation_loader(pairs, *options) for pairs in self._sets[part]]

    predict_dataloader = test_dataloader

    def state_dict(self) -> dict[str, Any]:
        """The loader's state; Lightning gives it back also after a whole epoch, where it leaves loaders as new."""
        return self._loader.state_dict() if self._loader else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Places the loader; without one (validation, test) there is nothing to place."""
        if self._loader and state_dict:
            self._loader.load_state_dict(state_dict)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
