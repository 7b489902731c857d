"""The vocabulary: every dimension of an embedding is one word piece of it.

A BERT WordPiece vocabulary (30,522 pieces for bert-base-uncased). Some pieces can never be active in any embedding, in
any stage (docs/method/paper.md): the special tokens and BERT's `[unusedN]` place holders, which name nothing.
"""

import copy
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers.models import WordPiece
from torch import Tensor

from stair.errors import SettingError
from stair.files import folder_or_hub_name, read_json
from stair.plain import one_line

_UNUSED = re.compile(r"\[unused\d+\]")
_FILE, _TOKENIZER, _SETTINGS = "vocab.txt", "tokenizer.json", "tokenizer_config.json"
_MAX_BYTES = 64 << 20  # of a json file; that of 120,000 pieces has 3 MB
# what tokenizer_config.json calls it, what tokenizer.json does, and what neither of them says
_NORMALISER = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),  # if lower-casing
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}


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

    Nothing in it changes after construction, so any number of threads can use one.

    V is the vocabulary size, B captions, T token positions.

    Args:
        source: a `vocab.txt`, which is lower-casing; a folder that holds one or a `tokenizer.json`, whose tokenizer files
            say whether it is; or the name of a model on the hub.

    Attributes:
        tokens: V strings, `tokens[v]` is the piece of dimension v; pieces that continue a word begin with `##`.
        pad_id: id of the padding token.
        never_active: sorted ids of the pieces that are excluded from every embedding.
        fingerprint: sha256 of the pieces in order, and of how texts are normalised where they are not lower-cased; two
            models are comparable only if theirs agree.

    Raises:
        ValueError: if the source is no WordPiece vocabulary with the special tokens of BERT, or its tokenizer files are
            damaged or say what no BERT tokenizer does.
        OSError: if there is no such file, or a hub name can neither be found in the cache nor fetched.
    """

    def __init__(self, source: str | Path) -> None:
        from transformers import BertTokenizer  # a second, which reading processes need not wait

        path = Path(source)
        if path.is_dir():
            self._tokenizer = _of_folder(path)
        elif path.is_file():
            # `vocab_file=` is silently ignored by transformers 5 and gives a vocabulary of 5 words
            self._tokenizer = BertTokenizer(vocab=str(path))
        elif not path.exists() and (path.is_absolute() or path.suffix == ".txt"):
            raise FileNotFoundError(f"{source} does not exist; give a BERT vocab.txt, a folder with one, or a hub name")
        else:
            with folder_or_hub_name(source):
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
        # length is a matter of each call: set here, it would be shared by all threads
        self._backend = self._tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self.pad_id: int = by_token["[PAD]"]
        self.unknown_id: int = by_token["[UNK]"]
        special = set(self._tokenizer.all_special_ids)
        self.never_active: list[int] = [
            i for i, token in enumerate(self.tokens) if i in special or _UNUSED.fullmatch(token)
        ]
        facts = "\n".join(self.tokens)
        normaliser = self._tokenizer.backend_tokenizer.normalizer
        if not normaliser.lowercase:  # of the others it is what it was before there were any such
            strip, chinese = bool(normaliser.strip_accents), normaliser.handle_chinese_chars
            facts += f"\0cased, strip_accents={strip}, handle_chinese_chars={chinese}"
        self.fingerprint: str = hashlib.sha256(facts.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.tokens)

    def tokenize(self, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """Turns captions into ids, cut at `max_tokens`, padded to the longest of them.

        Args:
            captions: B strings.
            max_tokens: longest length kept, [CLS] and [SEP] included; at least 2.

        Returns:
            `ids_BT` int64 and `mask_BT` bool (True at real tokens, [CLS] and [SEP] included).

        Raises:
            ValueError: if a caption holds half of a character, or there is no room for a token.
        """
        return self.pad(self.encode(captions), max_tokens)

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """The ids of each caption at full length, [CLS] and [SEP] included.

        Raises:
            ValueError: if a caption holds half of a character.
        """
        refuse_halves(captions)
        # the fast tokenizer itself: what wraps it takes longer than it does
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(captions))]

    def pad(self, encoded: Sequence[list[int]], max_tokens: int) -> tuple[Tensor, Tensor]:
        """Cuts and pads what `encode` gave; see `tokenize`."""
        if max_tokens < 2:
            raise SettingError(f"max_tokens is {max_tokens}; give 2 or more: [CLS] and [SEP] take two", "max_tokens")
        cut = [ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]] for ids in encoded]
        lengths_B = torch.tensor([len(ids) for ids in cut], dtype=torch.int64)
        mask_BT = torch.arange(max(map(len, cut), default=0)) < lengths_B[:, None]
        ids_BT = torch.full(mask_BT.shape, self.pad_id)
        ids_BT[mask_BT] = torch.tensor([i for ids in cut for i in ids], dtype=torch.int64)
        return ids_BT, mask_BT

    def pieces(self, text: str) -> list[int]:
        """Ids of a text's word pieces without special tokens, in order, those never active left out.

        Raises:
            ValueError: if the text holds half of a character.
        """
        refuse_halves([text])
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        never = set(self.never_active)
        return [i for i in ids if i not in never]

    def in_caption_terms(self, ids: Tensor, mask: Tensor) -> Tensor:
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

    def for_reading(self) -> "Vocabulary":
        """A copy that cannot be saved: a process that only makes ids does not import transformers for it."""
        reader = copy.copy(self)
        del reader._tokenizer
        return reader

    def save(self, folder: Path) -> None:
        """Writes `vocab.txt` and the tokenizer's own files, from which `Vocabulary(folder)` is built again."""
        (folder / _FILE).write_text("\n".join(self.tokens) + "\n", encoding="utf-8")
        self._tokenizer.save_pretrained(str(folder))


def _of_folder(folder: Path) -> Any:
    """The tokenizer that a folder's files describe, as transformers would build it.

    Only plain values are taken from the files, and `vocab.txt` counts for the pieces: transformers would also open other
    files that they name.
    """
    from transformers import BertTokenizer

    described, settings = _json(folder / _TOKENIZER), _json(folder / _SETTINGS)
    if not (folder / _FILE).is_file() and not described:
        raise FileNotFoundError(f"{folder} has neither {_FILE} nor {_TOKENIZER}; give a folder with one of them")
    normaliser = _normaliser(folder, described, settings)
    try:
        listed = {token["content"]: token for token in described.get("added_tokens", [])}
        special = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        special = [token["content"] if isinstance(token, dict) else token for token in special]
        if (folder / _FILE).is_file():
            pieces = WordPiece.read_file(str(folder / _FILE))
        else:
            pieces = {**described["model"]["vocab"]}  # the name of a file would be opened
            refuse_halves(pieces)
        # tokens that are never cut; beyond the vocabulary they would be no dimension
        added = {pieces[content]: _added(token) for content, token in listed.items() if content in pieces}
        return BertTokenizer(
            vocab=pieces,
            added_tokens_decoder=added,
            extra_special_tokens=[token for token in special if token in pieces],
            **normaliser,
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder / _TOKENIZER}, or {_SETTINGS} beside it, describes no BERT tokenizer ({type(error).__name__}: "
            f"{one_line(str(error))[:200]}); save the tokenizer anew"
        ) from error


def _added(token: dict[str, Any]) -> AddedToken:
    return AddedToken(**{key: value for key, value in token.items() if key != "id"})


def _normaliser(folder: Path, described: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """How texts are normalised: what the settings say, as for transformers, else what `tokenizer.json` says."""
    said = described.get("normalizer")
    said = said if isinstance(said, dict) else {"type": said}
    kind = said.get("type")
    if described and kind != "BertNormalizer" and "do_lower_case" not in settings:
        raise ValueError(
            f"{folder / _TOKENIZER} has the normalizer {one_line(str(kind))[:80]}, wanted BertNormalizer: say in "
            f"{_SETTINGS} what BERT's is to do (do_lower_case, strip_accents)"
        )
    values = {}
    for name, (theirs, otherwise) in _NORMALISER.items():
        value = settings.get(name, said.get(theirs, otherwise) if kind == "BertNormalizer" else otherwise)
        if not isinstance(value, bool) and (value, name) != (None, "strip_accents"):
            raise ValueError(
                f"{folder}: {name} is {one_line(repr(value))[:80]} in {_SETTINGS} or {_TOKENIZER}; wanted true or false"
            )
        values[name] = value
    return values


def _json(path: Path) -> dict[str, Any]:
    """What a json file says; nothing if there is none."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a tokenizer's file has at most {_MAX_BYTES}")
    return read_json(path)
