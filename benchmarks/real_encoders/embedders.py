"""Rows of images and texts of a split, from a trained model or a baseline.

N images, C captions, T tokens, P positions, V terms, codes, or the width of a dense embedding, W words, D and E as in
baselines.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from benchmarks.real_encoders.baselines import BM25, Autoencoder, Splice, max_sim
from benchmarks.real_encoders.model import Data, Model, images_of, texts_of, unit
from benchmarks.real_encoders.train import Teacher
from stair.ranking import SparseRows
from stair.regularisers import within_budget


class Embedder:
    """Of a sparse model.

    Attributes:
        columns: `terms` of the vocabulary, `codes` without names, or `dense`.
        similarity: `cosine`, or `dot`.
    """

    columns, similarity = "terms", "cosine"
    model: Model | None = None  # of a baseline

    def __init__(self, model: Model, data: Data) -> None:
        self.model, self.data = model.eval(), data

    def captions(self, split: str) -> list[list[int]]:
        """C."""
        return list(chain.from_iterable(self.data.ids[split]))

    def images(self, split: str) -> Tensor:
        """(N, V), without augmentation."""
        return images_of(self.model, self.data.maps[split][0]).float()

    def texts(self, split: str) -> Tensor:
        """(C, V)."""
        return texts_of(self.model, self.data, self.captions(split)).float()

    def scores(self, split: str) -> Tensor | None:
        """(N, C), where they are no products of rows."""
        return None

    def words(self) -> tuple[SparseRows, Tensor] | None:
        """Of a dense model: each whole word of the vocabulary, embedded as a text, with its id."""
        return None


class Dense(Embedder):
    """Of dense CLIP."""

    columns = "dense"

    @cached_property
    def word_rows(self) -> tuple[Tensor, Tensor]:
        """(W, D) unit rows of the whole words of the vocabulary, embedded as texts, and their ids."""
        never, tokens = set(self.data.never), self.data.tokens
        ids = [v for v, token in enumerate(tokens) if v not in never and not token.startswith("##")]
        first, last = (tokens.index(token) for token in ("[CLS]", "[SEP]"))
        return unit(texts_of(self.model, self.data, [[first, v, last] for v in ids])), torch.tensor(ids)

    def words(self) -> tuple[SparseRows, Tensor] | None:
        """(W, V) and (W,)."""
        rows_WD, id_W = self.word_rows
        return SparseRows.of(rows_WD), id_W


class Late(Embedder):
    """Of late interaction: (N, P, E) and (C, T, E)."""

    columns = "dense"

    def texts(self, split: str) -> Tensor:
        """(C, T, E)."""
        ids_CT, mask_CT = self.data.pad(self.captions(split))
        parts = zip(ids_CT.split(256), mask_CT.split(256), strict=True)
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cat([self.model.texts(*part) for part in parts]).float()

    def scores(self, split: str) -> Tensor | None:
        """(N, C) max-sim."""
        image_NPE = self.images(split)
        return torch.cat([max_sim(image_NPE, part) for part in self.texts(split).split(64)], 1)


class Captions(Embedder):
    """Of BM25 over captions, without a model."""

    columns, similarity = "codes", "dot"

    def __init__(self, data: Data) -> None:
        self.data = data

    def _bm25(self, split: str) -> BM25:
        never = set(self.data.never)
        images = [[[v for v in ids if v not in never] for ids in image] for image in self.data.ids[split]]
        return BM25(images, len(self.data.kept))

    def images(self, split: str) -> Tensor:
        """(N, V) weights."""
        return self._bm25(split).documents_NV

    def texts(self, split: str) -> Tensor:
        """(C, V) counts."""
        return self._bm25(split).queries()

    def scores(self, split: str) -> Tensor | None:
        """(N, C), a caption left out of the document of its own image."""
        return self._bm25(split).scores()


class Largest(Embedder):
    """The largest weights of each row of a sparse model.

    Args:
        of: the model.
        terms: k.
    """

    def __init__(self, of: Embedder, terms: int) -> None:
        self.of, self.data, self.terms = of, of.data, terms

    def images(self, split: str) -> Tensor:
        """(N, V)."""
        return within_budget(self.of.images(split), self.terms)

    def texts(self, split: str) -> Tensor:
        """(C, V)."""
        return within_budget(self.of.texts(split), self.terms)


class Codes(Embedder):
    """Sparse codes of a dense model's embeddings, without the mean of their side.

    Args:
        of: the model.
    """

    def __init__(self, of: Dense) -> None:
        self.of, self.data = of, of.data
        trained = Teacher.of(of.model, of.data)
        images_LND, texts_NKD = trained.images_LNV.float(), trained.texts_NKV.float()
        self.mean_D = {"images": images_LND[0].mean(0), "texts": texts_NKD.mean((0, 1))}
        self.trained = unit(images_LND - self.mean_D["images"]), unit(texts_NKD - self.mean_D["texts"])

    def codes(self, rows_ND: Tensor) -> Tensor:
        """(N, V) of unit rows."""
        raise NotImplementedError

    def images(self, split: str) -> Tensor:
        """(N, V)."""
        return self.codes(unit(unit(self.of.images(split)) - self.mean_D["images"]))

    def texts(self, split: str) -> Tensor:
        """(C, V)."""
        return self.codes(unit(unit(self.of.texts(split)) - self.mean_D["texts"]))


class AutoencoderCodes(Codes):
    """Those of `baselines.Autoencoder`, with as many codes as the vocabulary has terms.

    Args:
        of: the model.
        terms: k.
        steps, budgets, contrast: of the autoencoder.
    """

    columns = "codes"

    def __init__(
        self, of: Dense, terms: int, steps: int, budgets: Sequence[tuple[int, float]], contrast: float = 0.0
    ) -> None:
        super().__init__(of)
        images_LND, texts_NKD = self.trained
        self.terms, self.coder = terms, Autoencoder(images_LND.shape[2], len(self.data.kept), budgets, contrast)
        self.coder.fit(images_LND, texts_NKD, steps)

    def codes(self, rows_ND: Tensor) -> Tensor:
        """(N, V), k of them active or fewer."""
        return within_budget(self.coder(rows_ND).relu(), self.terms)


class SpliceCodes(Codes):
    """Those of `baselines.Splice`, with the words of the vocabulary.

    Args:
        of: the model.
        terms: k.
    """

    def __init__(self, of: Dense, terms: int) -> None:
        super().__init__(of)
        rows_WD, self.id_W = of.word_rows
        self.terms, self.coder = terms, Splice(unit(rows_WD - rows_WD.mean(0)))

    def codes(self, rows_ND: Tensor) -> Tensor:
        """(N, V), k of them active or fewer."""
        codes_NV = torch.zeros(len(rows_ND), len(self.data.kept))
        codes_NV[:, self.id_W] = self.coder.codes(rows_ND, self.terms)
        return codes_NV
