"""The vocabulary: every dimension of an embedding is one word piece of it.

A BERT WordPiece vocabulary (30,522 pieces for bert-base-uncased). Some pieces can never be active in any embedding, in
any stage (docs/paper.md): the special tokens and BERT's `[unusedN]` place holders, which name nothing.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertTokenizer

from stair.plain import one_line

_UNUSED = re.compile(r"\[unused\d+\]")
_FILE = "vocab.txt"


def refuse_halves(texts: Iterable[str]) -> None:
    """Refuses what no tokeniser takes: halves of characters, as json and command lines can hold them.

    Raises:
        ValueError: naming the text.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{one_line(text[:80])!r} holds half of a character: give text that utf-8 can write"
            ) from error


class Vocabulary:
    """WordPiece tokeniser plus what the embedding space needs to know of its words.

    V is the vocabulary size, B captions, T token positions.

    Args:
        source: a `vocab.txt`, a folder that holds one (or a `tokenizer.json`), or the name of a model on the hub.

    Attributes:
        tokens: V strings, `tokens[v]` is the piece of dimension v; pieces that continue a word begin with `##`.
        pad_id: id of the padding token.
        never_active: sorted ids of the pieces that are excluded from every embedding.
        fingerprint: sha256 of the pieces in order; two models are comparable only if theirs agree.

    Raises:
        ValueError: if the source is no WordPiece vocabulary with the special tokens of BERT.
        OSError: if there is no such file, or a hub name can neither be found in the cache nor fetched.
    """

    def __init__(self, source: str | Path) -> None:
        path = Path(source)
        if path.is_dir() and (path / _FILE).is_file():
            path = path / _FILE
        if path.is_file():
            # `vocab_file=` is silently ignored by transformers 5 and gives a vocabulary of 5 words
            self._tokenizer = BertTokenizer(vocab=str(path))
        elif not path.exists() and (path.is_absolute() or path.suffix == ".txt"):
            raise FileNotFoundError(f"{source} does not exist; give a BERT vocab.txt, a folder with one, or a hub name")
        else:
            self._tokenizer = BertTokenizer.from_pretrained(str(source), trust_remote_code=False)
        # without added tokens: the tokeniser adds special ones that a file lacks
        by_token: dict[str, int] = self._tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        self.tokens: list[str] = sorted(by_token, key=by_token.__getitem__)
        missing = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if t not in by_token]
        dense = list(range(len(self.tokens))) == sorted(by_token.values())
        if missing or not dense or len(self.tokens) < 8:
            raise ValueError(
                f"{source} is no WordPiece vocabulary: {len(self.tokens)} pieces, missing {missing or 'none'}, "
                f"ids {'dense' if dense else 'with holes'}; give a BERT vocab.txt, a folder with one, or a "
                "hub name (which needs the network once, or HF_HUB_CACHE with a copy)"
            )
        self.pad_id: int = by_token["[PAD]"]
        special = set(self._tokenizer.all_special_ids)
        self.never_active: list[int] = [
            i for i, token in enumerate(self.tokens) if i in special or _UNUSED.fullmatch(token)
        ]
        self.fingerprint: str = hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.tokens)

    def tokenize(self, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """Turns captions into ids, cut at `max_tokens`, padded to the longest of them.

        Args:
            captions: B strings.
            max_tokens: longest length kept, [CLS] and [SEP] included.

        Returns:
            `ids_BT` int64 and `mask_BT` bool (True at real tokens, [CLS] and [SEP] included).

        Raises:
            ValueError: if a caption holds half of a character.
        """
        refuse_halves(captions)
        # the fast tokenizer itself: what wraps it takes longer than it does
        tokenizer = self._tokenizer.backend_tokenizer
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
        encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(captions))]
        lengths_B = torch.tensor([len(ids) for ids in encoded])
        mask_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
        ids_BT = torch.full(mask_BT.shape, self.pad_id)
        ids_BT[mask_BT] = torch.tensor([i for ids in encoded for i in ids])
        return ids_BT, mask_BT

    def pieces(self, text: str) -> list[int]:
        """Ids of a text's word pieces without special tokens, in order, those never active left out.

        Raises:
            ValueError: if the text holds half of a character.
        """
        refuse_halves([text])
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        never = set(self.never_active)
        return [i for i in ids if i not in never]

    def own_words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The stage-1 mask: which dimensions are words of the caption itself.

        Args:
            ids: (B, T) int64.
            mask: (B, T) bool.

        Returns:
            (B, V) bool, True where the piece occurs in the caption and can be active.
        """
        own_BV = torch.zeros(ids.shape[0], len(self), dtype=torch.bool, device=ids.device)
        # padding is written too, and cleared with the never-active pieces
        own_BV.scatter_(1, ids.masked_fill(~mask, self.pad_id), True)
        own_BV[:, self.never_active] = False
        return own_BV

    def words(self, ids: Iterable[int]) -> list[str]:
        """The pieces with these ids."""
        return [self.tokens[i] for i in ids]

    def save(self, folder: Path) -> None:
        """Writes `vocab.txt` and the tokenizer's own files, from which `Vocabulary(folder)` is built again."""
        (folder / _FILE).write_text("\n".join(self.tokens) + "\n", encoding="utf-8")
        self._tokenizer.save_pretrained(str(folder))
