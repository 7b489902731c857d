"""Batches of evaluation sets, the same number on every rank. B images, C captions."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, default_collate

from datamodules.workers import ReadingLoader
from stair.batch import Batch
from stair.data.pairs import EvaluationPairs, Pair
from stair.vocabulary import Vocabulary


class RankShare(DistributedSampler[int]):
    """Indices r, r + ranks, r + 2·ranks, ...: as many on every rank, so the last ones may lie past the set's end.

    A `DistributedSampler`, because Lightning puts its own, which repeats samples unmarked, in the place of any other.
    """

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


@dataclass(frozen=True)
class CollatePairs:
    """Makes a batch of B pairs with C captions.

    Attributes:
        vocabulary: makes ids of captions.
        max_tokens: longest caption kept, in tokens.
    """

    vocabulary: Vocabulary
    max_tokens: int

    def __call__(self, pairs: list[Pair], pixels: Tensor | None = None) -> Batch:
        """The batch of B pairs; `pixels` are theirs, (B, 3, S, S) uint8, if they lie together already."""
        encoded = self.vocabulary.encode([text for pair in pairs for text in pair.captions])
        ids_CT, mask_CT = self.vocabulary.pad(encoded, self.max_tokens)
        return Batch(
            pixels=default_collate([pair.pixels for pair in pairs]) if pixels is None else pixels,
            ids=ids_CT,
            mask=mask_CT,
            cut=torch.tensor([len(ids) > self.max_tokens for ids in encoded], dtype=torch.bool),
            image_id=torch.tensor([pair.image_id for pair in pairs]),
            caption_image=torch.tensor([pair.image_id for pair in pairs for _ in pair.captions]),
            key=[pair.key for pair in pairs],
            source=[pair.source for pair in pairs],
        )


def evaluation_loader(
    pairs: EvaluationPairs, collate: CollatePairs, batch_size: int, workers: int, rank: int, ranks: int
) -> ReadingLoader:
    """A loader of this rank's share of a set: the same number of batches, of the same sizes, on every rank."""
    sampler = RankShare(pairs, ranks, rank, shuffle=False)
    return ReadingLoader(pairs, batch_size=batch_size, sampler=sampler, workers=workers, collate_fn=collate)
