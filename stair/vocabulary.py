"""The vocabulary: each dimension of an embedding is one token of a BERT WordPiece vocabulary.

Some tokens are never active in any embedding: the special ones, and BERT's `[unusedN]` placeholders (docs/method/paper.md).
"""

import copy
import hashlib
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers.models import WordPiece
from torch import Tensor

from stair.errors import SettingError
from stair.files import folder_or_hub_name, read_json
from stair.plain import one_line

#: function words of English: the list of scikit-learn 1.9
STOP_WORDS = frozenset((files("stair") / "stop_words.txt").read_text(encoding="utf-8").split())
_UNUSED, _LETTER = re.compile(r"\[unused\d+\]"), re.compile(r"[^\W\d_]")
_FILE, _TOKENIZER, _SETTINGS = "vocab.txt", "tokenizer.json", "tokenizer_config.json"
_MAX_BYTES = 64 << 20  # of a JSON file; that of 120,000 tokens has 3 MB
# name in tokenizer_config.json: name in tokenizer.json, default
_NORMALISER = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),  # None: if lower-casing
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}


def check_surrogates(texts: Iterable[str]) -> None:
    """Rejects lone surrogates, which JSON and command lines can contain and no tokenizer takes.

    Raises:
        ValueError: naming the text.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{one_line(text[:80])!r} holds half of a character; give text in valid UTF-8") from error


def is_stop_word(token: str) -> bool:
    """Whether a token is a function word of English, or has no letter."""
    return token in STOP_WORDS or not _LETTER.search(token)


class Vocabulary:
    """WordPiece tokenizer, and what the embedding space needs to know of its tokens. Immutable, so thread-safe.

    V is the vocabulary size, B captions, T positions.

    Args:
        source: a `vocab.txt`, which is lower-casing; a folder that holds one or a `tokenizer.json`, whose tokenizer files
            state whether it is; or the name of a model on the hub.

    Attributes:
        tokens: V strings, `tokens[v]` is the token of dimension v; tokens that continue a word begin with `##`.
        pad_id: id of [PAD].
        unknown_id: id of [UNK].
        never_active: sorted ids of the tokens that are excluded from every embedding.
        fingerprint: sha256 of the tokens in order, and of the normalisation unless it is lower-casing; two models are
            comparable only if theirs agree.

    Raises:
        ValueError: if the source is not a WordPiece vocabulary with the special tokens of BERT, or its tokenizer files are
            damaged or describe no BERT tokenizer.
        OSError: if there is no such file, or a hub name is neither in the cache nor downloadable.
    """

    def __init__(self, source: str | Path) -> None:
        from transformers import BertTokenizer  # takes a second, and data workers do not need it

        path = Path(source)
        if path.is_dir():
            self._tokenizer = _from_folder(path)
        elif path.is_file():
            # transformers 5 silently ignores `vocab_file=`
            self._tokenizer = BertTokenizer(vocab=str(path))
        elif not path.exists() and (path.is_absolute() or path.suffix == ".txt"):
            raise FileNotFoundError(f"{source} does not exist; give a BERT vocab.txt, a folder with one, or a hub name")
        else:
            # transformers makes an empty tokenizer where it cannot download
            with folder_or_hub_name(source, "the path of its vocab.txt as the vocabulary"):
                from huggingface_hub import snapshot_download

                path = Path(snapshot_download(str(source), allow_patterns=[_FILE, _TOKENIZER, _SETTINGS]))
            self._tokenizer = _from_folder(path)
        self._backend = self._tokenizer.backend_tokenizer
        # without added tokens: the tokenizer adds special ones that a file lacks
        by_token: dict[str, int] = self._backend.get_vocab(with_added_tokens=False)
        self.tokens: list[str] = sorted(by_token, key=by_token.__getitem__)
        missing = [t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if t not in by_token]
        dense = list(range(len(self.tokens))) == sorted(by_token.values())
        if missing or not dense or len(self.tokens) < 8:
            raise ValueError(
                f"{source} is not a WordPiece vocabulary: {len(self.tokens)} tokens"
                + (f", without {missing}" if missing else "" if dense else ", with holes between their ids")
                + "; give a BERT vocab.txt, a folder with one, or a hub name"
            )
        # `pad` cuts and pads: here, all threads would share the length
        self._backend.no_padding()
        self._backend.no_truncation()
        self.pad_id, self.unknown_id = by_token["[PAD]"], by_token["[UNK]"]
        special = set(self._tokenizer.all_special_ids)
        self.never_active = [i for i, token in enumerate(self.tokens) if i in special or _UNUSED.fullmatch(token)]
        content, normaliser = "\n".join(self.tokens), self._backend.normalizer
        if not normaliser.lowercase:
            strip, chinese = bool(normaliser.strip_accents), normaliser.handle_chinese_chars
            content += f"\0cased, strip_accents={strip}, handle_chinese_chars={chinese}"
        self.fingerprint: str = hashlib.sha256(content.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def normalisation(self) -> dict[str, bool]:
        """Whether texts are lower-cased, lose their accents, and have spaces put around Chinese characters."""
        of = self._backend.normalizer
        strip = of.lowercase if of.strip_accents is None else of.strip_accents
        return {"lowercase": of.lowercase, "strip": strip, "chinese": of.handle_chinese_chars}

    def tokenize(self, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """Token ids of captions, cut at `max_tokens`, padded to the longest of them.

        Args:
            captions: B strings.
            max_tokens: longest length kept, [CLS] and [SEP] included; at least 2.

        Returns:
            `ids_BT` int64 and `mask_BT` bool (True at real tokens, [CLS] and [SEP] included).

        Raises:
            ValueError: if a caption holds half of a character, or `max_tokens` is below 2.
        """
        return self.pad(self.encode(captions), max_tokens)

    def encode(self, captions: Sequence[str]) -> list[list[int]]:
        """The ids of each caption at full length, [CLS] and [SEP] included; ValueError as in `tokenize`."""
        check_surrogates(captions)
        # the fast tokenizer itself: its wrapper takes longer than it does
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(captions))]

    def pad(self, encoded: Sequence[list[int]], max_tokens: int) -> tuple[Tensor, Tensor]:
        """Cuts and pads the output of `encode`; see `tokenize`."""
        if max_tokens < 2:
            raise SettingError(f"max_tokens is {max_tokens}; give 2 or more: [CLS] and [SEP] take two", "max_tokens")
        cut = [ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]] for ids in encoded]
        lengths_B = torch.tensor([len(ids) for ids in cut], dtype=torch.int64)
        mask_BT = torch.arange(max(map(len, cut), default=0)) < lengths_B[:, None]
        ids_BT = torch.full(mask_BT.shape, self.pad_id)
        ids_BT[mask_BT] = torch.tensor([i for ids in cut for i in ids], dtype=torch.int64)
        return ids_BT, mask_BT

    def token_ids(self, text: str) -> list[int]:
        """Ids of a text's tokens in order, without those that are never active; ValueError as in `tokenize`."""
        check_surrogates([text])
        never = set(self.never_active)
        return [i for i in self._backend.encode(text, add_special_tokens=False).ids if i not in never]

    def words(self, text: str) -> dict[str, list[int]]:
        """The words of a text as typed, with the `token_ids` of each; ValueError as in `tokenize`."""
        check_surrogates([text])
        encoding, never = self._backend.encode(text, add_special_tokens=False), set(self.never_active)
        words: dict[int, list[int]] = {}
        for v, word in zip(encoding.ids, encoding.word_ids, strict=True):
            words.setdefault(word, []).extend([v] if v not in never else [])
        return {text[slice(*encoding.word_to_chars(word))]: ids for word, ids in words.items()}

    def tokens_of(self, ids: Iterable[int]) -> list[str]:
        """The tokens with these ids."""
        return [self.tokens[i] for i in ids]

    def in_caption_terms(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The mask of stage 1: (B, V) bool, True where a token occurs in the caption and can be active.

        Args:
            ids: (B, T) int64.
            mask: (B, T) bool.
        """
        own_BV = torch.zeros(ids.shape[0], len(self), dtype=torch.bool, device=ids.device)
        # padding is written too, and cleared with the never-active tokens
        own_BV.scatter_(1, ids.masked_fill(~mask, self.pad_id), True)
        own_BV[:, self.never_active] = False
        return own_BV

    def for_reading(self) -> "Vocabulary":
        """A copy without `save`: a process that only tokenizes does not import transformers for it."""
        reader = copy.copy(self)
        del reader._tokenizer
        return reader

    def save(self, folder: Path) -> None:
        """Writes `vocab.txt` and the tokenizer's own files, from which `Vocabulary(folder)` is built again."""
        (folder / _FILE).write_text("\n".join(self.tokens) + "\n", encoding="utf-8")
        self._tokenizer.save_pretrained(str(folder))


def _from_folder(folder: Path) -> Any:
    """The tokenizer of a folder's files, as transformers would build it.

    Only plain values are read, and `vocab.txt` has precedence for the tokens: transformers would also open other files that
    these name.
    """
    from transformers import BertTokenizer

    described, settings = _json(folder / _TOKENIZER), _json(folder / _SETTINGS)
    if not (folder / _FILE).is_file() and not described:
        raise FileNotFoundError(f"{folder} has neither {_FILE} nor {_TOKENIZER}; give a folder with one of them")
    normaliser = _normaliser(folder, described, settings)
    try:
        special = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        special = [token["content"] if isinstance(token, dict) else token for token in special]
        if (folder / _FILE).is_file():
            vocab = WordPiece.read_file(str(folder / _FILE))
        else:
            vocab = {**described["model"]["vocab"]}  # a string would be opened as a file
            check_surrogates(vocab)
        added = {  # tokens that are never split; beyond the vocabulary they would have no dimension
            vocab[token["content"]]: AddedToken(**{key: value for key, value in token.items() if key != "id"})
            for token in described.get("added_tokens", [])
            if token["content"] in vocab
        }
        special = [token for token in special if token in vocab]
        return BertTokenizer(vocab=vocab, added_tokens_decoder=added, extra_special_tokens=special, **normaliser)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder / _TOKENIZER}, or {_SETTINGS} beside it, describes no BERT tokenizer ({type(error).__name__}: "
            f"{one_line(str(error))[:200]}); save the tokenizer again"
        ) from error


def _normaliser(folder: Path, described: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The normalisation of texts: that of the settings, as in transformers, else of `tokenizer.json`."""
    stated = described.get("normalizer")
    stated = stated if isinstance(stated, dict) else {"type": stated}
    is_bert = stated.get("type") == "BertNormalizer"
    if described and not is_bert and "do_lower_case" not in settings:
        raise ValueError(
            f"{folder / _TOKENIZER} has the normalizer {one_line(str(stated.get('type')))[:80]}; use BertNormalizer, or "
            f"set do_lower_case and strip_accents in {_SETTINGS}"
        )
    values = {}
    for name, (in_tokenizer, default) in _NORMALISER.items():
        value = settings.get(name, stated.get(in_tokenizer, default) if is_bert else default)
        if not isinstance(value, bool) and (value, name) != (None, "strip_accents"):
            raise ValueError(
                f"{folder}: {name} is {one_line(repr(value))[:80]} in {_SETTINGS} or {_TOKENIZER}; give true or false"
            )
        values[name] = value
    return values


def _json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty without one."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a tokenizer's file has at most {_MAX_BYTES}")
    return read_json(path)
