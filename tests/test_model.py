"""The model: vocabulary, towers from published files, saving and loading, what can and cannot light up."""

import copy
import hashlib
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from tokenizers import AddedToken
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, DistilBertConfig, DistilBertForMaskedLM

from lightning_modules.optimizer import Optimizer
from stair import Stair, Vocabulary
from stair.encoders import ImageTower, TextEncoder, TextTower
from stair.errors import FileError, SettingError
from tests.support.models import IMAGE_TOWERS, TEXT_OPTIONS, WORDS, tiny_config, write_vocabulary


def test_vocabulary_keeps_special_and_unused_pieces_out(vocab_file):
    vocabulary = Vocabulary(vocab_file)
    assert [vocabulary.tokens[i] for i in vocabulary.never_active] == [
        "[PAD]", "[unused0]", "[unused1]", "[unused2]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    ]  # fmt: skip
    assert len(vocabulary) == 8 + len(WORDS)


def test_own_words_are_the_captions_pieces_and_no_others(vocab_file):
    vocabulary = Vocabulary(vocab_file)
    ids, mask = vocabulary.tokenize(["Red DOGS dog", "zzz"], 12)
    own = [vocabulary.tokens_of(row.nonzero().flatten().tolist()) for row in vocabulary.in_caption_terms(ids, mask)]
    assert [sorted(words) for words in own] == [["##s", "dog", "red"], []]


def test_captions_are_cut_at_max_tokens(vocab_file):
    ids, mask = Vocabulary(vocab_file).tokenize(["a red dog on the green sea", "a"], 5)
    assert ids.shape == (2, 5) and mask.sum(1).tolist() == [5, 3]


def test_another_order_of_words_is_another_fingerprint(vocab_file, tmp_path):
    lines = vocab_file.read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*lines[:-2], lines[-1], lines[-2]]) + "\n")
    assert Vocabulary(tmp_path).fingerprint != Vocabulary(vocab_file).fingerprint


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("just\nsome\nwords\nof\nno\nuse\nat\nall\nhere\n")
    with pytest.raises(ValueError, match=r"not a WordPiece vocabulary.*without \['\[PAD\]'"):
        Vocabulary(tmp_path / "vocab.txt")


@pytest.mark.parametrize("name", ["vocab.txt", "folder"])
def test_a_vocabulary_that_is_not_there_is_named_and_not_asked_for_at_the_hub(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{name} does not exist; give a BERT vocab"):
        Vocabulary(tmp_path / name)


CASED = "[PAD] [UNK] [CLS] [SEP] [MASK] [DOM] Apple apple Éa éa ea A a e p ##é ##e 中".split()
TEXTS = ["Apple apple", "Éa éa aé", "[DOM] a [MASK]", "中中 a"]


def published_tokenizer(folder, left_out=(), **settings):
    """A folder as the hub holds it, of pieces of which no two are one but for case and accents."""
    (folder / "vocab.txt").write_text("\n".join(CASED) + "\n")
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"), **settings)
    tokenizer.save_pretrained(folder)
    for name in left_out:
        (folder / name).unlink()
    return tokenizer


def cut(tokenizer):
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def cut_by(vocabulary):
    return [row[real].tolist() for text in TEXTS for row, real in zip(*vocabulary.tokenize([text], 20), strict=True)]


FORMS = {
    "uncased": {},
    "cased": {"do_lower_case": False},
    "cased, no accents": {"do_lower_case": False, "strip_accents": True},
    "uncased, accents": {"strip_accents": False},
    "Chinese as other letters": {"do_lower_case": False, "tokenize_chinese_chars": False},
    "a special token more": {"extra_special_tokens": ["[DOM]"]},
}


@pytest.mark.parametrize(
    "left_out",
    [(), ("vocab.txt",), ("tokenizer.json",), ("tokenizer_config.json",)],
    ids=lambda left_out: str(*left_out),
)
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_cuts_texts_as_its_tokenizer_files_say_also_when_saved_again(tmp_path, form, left_out):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    published = published_tokenizer(tmp_path / "a", left_out, **FORMS[form])
    loaded = Vocabulary(tmp_path / "a")
    loaded.save(tmp_path / "b")
    again = Vocabulary(tmp_path / "b")
    assert cut_by(loaded) == cut_by(again) == cut(published)
    assert (again.never_active, again.fingerprint) == (loaded.never_active, loaded.fingerprint)
    if left_out != ("tokenizer_config.json",):  # only there stands that a token is special
        assert loaded.tokens[5] == "[DOM]" and (5 in loaded.never_active) == ("special" in form)


def test_a_cased_hub_vocabulary_is_cased_after_saving_too(tmp_path, monkeypatch):
    published = published_tokenizer(tmp_path, do_lower_case=False)
    published.add_tokens([AddedToken("[DOM]", special=True), AddedToken("aé", normalized=False)])
    published.save_pretrained(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: tmp_path / "hub")
    vocabulary = Vocabulary("somebody/cased")
    vocabulary.save(tmp_path)
    saved = Vocabulary(tmp_path)
    assert (
        saved.tokens[saved.tokenize(["Apple"], 9)[0][0, 1]] == "Apple" and saved.fingerprint == vocabulary.fingerprint
    )
    # a token beyond the vocabulary would be no dimension
    assert [5 in row for row in cut_by(saved)] == [False, False, True, False]
    assert max(max(row) for row in cut_by(saved)) < len(saved)


def test_a_vocabulary_that_cannot_be_downloaded_is_named_at_once():
    with pytest.raises(FileError, match="could not be fetched") as refused:
        Vocabulary("bert-base-uncased-that-nobody-made")
    assert refused.value.path == Path("bert-base-uncased-that-nobody-made")


def test_fingerprints_of_cased_vocabularies_say_so_and_of_others_are_as_ever(tmp_path):
    found = {}
    for form in ("uncased", "cased", "cased, no accents", "Chinese as other letters"):
        (tmp_path / form).mkdir()
        published_tokenizer(tmp_path / form, **FORMS[form])
        found[form] = Vocabulary(tmp_path / form).fingerprint
    assert len(set(found.values())) == 4
    expected = hashlib.sha256("\n".join(CASED).encode()).hexdigest()
    assert found["uncased"] == Vocabulary(tmp_path / "cased" / "vocab.txt").fingerprint == expected
    published_tokenizer(tmp_path / "cased", do_lower_case=False, strip_accents=False)  # what null means there
    assert Vocabulary(tmp_path / "cased").fingerprint == found["cased"]


def written(name, **changes):
    """Puts values in the place of those of a tokenizer's file."""

    def change(folder):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "tokenizer.json").write_text("{"), r"tokenizer\.json is not JSON"),
        (lambda d: (d / "tokenizer_config.json").write_text("[" * 100_000), r"tokenizer_config\.json is not JSON"),
        (lambda d: (d / "tokenizer_config.json").write_text("[]"), r"tokenizer_config\.json holds a list"),
        (lambda d: os.truncate(d / "tokenizer_config.json", (64 << 20) + 1), "has at most 67108864"),
        (written("tokenizer_config.json", do_lower_case="no"), "do_lower_case is 'no' in .*; give true or false"),
        (written("tokenizer_config.json", extra_special_tokens=[{}]), "describes no BERT tokenizer .KeyError"),
        (written("tokenizer.json", added_tokens=[{"content": ["a"]}]), "describes no BERT tokenizer .TypeError"),
        (written("tokenizer.json", added_tokens=[{"content": "a", "special": 3}]), "describes no BERT tokenizer"),
        (lambda d: [(d / name).unlink() for name in ("vocab.txt", "tokenizer.json")], "has neither vocab.txt nor"),
    ],
)
def test_tokenizer_files_that_are_damaged_are_refused_by_name(tmp_path, change, message):
    published_tokenizer(tmp_path)
    change(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Vocabulary(tmp_path)


def test_pieces_are_taken_from_no_file_that_a_folder_names(tmp_path):
    published_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").rename(tmp_path / "other.txt")
    other = str(tmp_path / "other.txt")
    written("tokenizer_config.json", vocab=other, vocab_file=other, tokenizer_file=other, gguf_file=other)(tmp_path)
    assert Vocabulary(tmp_path).tokens == CASED
    for vocab in (other, {"a": "b"}, {"\ud800": 0}):
        written("tokenizer.json", model={"type": "WordPiece", "vocab": vocab})(tmp_path)
        with pytest.raises(ValueError, match=r"describes no BERT tokenizer|half of a character"):
            Vocabulary(tmp_path)


def test_a_normaliser_that_is_not_berts_is_refused_unless_the_settings_say_what_to_do(tmp_path):
    published_tokenizer(tmp_path, do_lower_case=False)
    written("tokenizer.json", normalizer={"type": "Lowercase"})(tmp_path)
    assert Vocabulary(tmp_path).tokenize(["Apple"], 9)[0].tolist() == [[2, 6, 3]]
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has the normalizer Lowercase; use BertNormalizer, or set do_lower_case"):
        Vocabulary(tmp_path)


def test_padding_and_never_active_terms_never_fire(tiny_stair, captions, pixels):
    ids, mask = tiny_stair.vocabulary.tokenize(captions, 12)
    with torch.no_grad():
        for head in (tiny_stair.text_head, tiny_stair.image_head):
            head.bias.fill_(5.0)  # everything that can fire does
        out = tiny_stair(pixels, ids, mask)
        longer = tiny_stair(pixels, *(torch.nn.functional.pad(x, (0, 2)) for x in (ids, mask)))
    never = tiny_stair.vocabulary.never_active
    assert (out["text_CV"][:, never] == 0).all() and (out["image_BV"][:, never] == 0).all()
    assert (out["text_CV"] > 0).sum(1).tolist() == [len(WORDS)] * 4
    torch.testing.assert_close(out["text_CV"], longer["text_CV"])


def test_the_stage_1_mask_lets_only_own_words_through(tiny_stair, captions, pixels):
    tiny_stair.config.text_form = "masked"
    ids, mask = tiny_stair.vocabulary.tokenize(captions, 12)
    with torch.no_grad():
        tiny_stair.text_head.bias.fill_(5.0)
        fast = tiny_stair(pixels, ids, mask)
        both = tiny_stair(pixels, ids, mask, {"text_full", "text_masked"})
    own = tiny_stair.vocabulary.in_caption_terms(ids, mask)
    assert ((fast["text_CV"] > 0) == own).all()
    torch.testing.assert_close(fast["text_CV"], both["text_masked"])
    assert (both["text_full"] > 0).sum() > own.sum()


def test_patches_only_are_read_from_the_image(vocab_file):
    config = tiny_config(vocab_file)
    patches = Stair(config).image_encoder(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    config.image.positions = "full"
    assert (patches.shape[1], Stair(config).image_encoder(torch.zeros(1, 3, 32, 32)).shape[1]) == (16, 17)


def test_a_saved_model_answers_the_same_after_loading(tiny_stair, captions, pixels, tmp_path):
    tiny_stair.config.similarity = "cosine"
    tiny_stair.save_pretrained(tmp_path / "m", {"stage": 3})
    loaded = Stair.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(loaded.encode_image(pixels), tiny_stair.encode_image(pixels), atol=0, rtol=0)
    torch.testing.assert_close(loaded.encode_text(captions), tiny_stair.encode_text(captions), atol=0, rtol=0)
    assert loaded.config.similarity == "cosine" and not loaded.training
    loaded.save_pretrained(tmp_path / "again")
    assert Stair.from_pretrained(tmp_path / "again").recorded == {"stage": 3}
    assert loaded.text_head.word_embeddings is loaded.text_encoder.word_embeddings.weight
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert names >= {"model.safetensors", "config.json", "vocab.txt"} and not [
        n for n in names if "bin" in n or "pt" in n
    ]


def test_a_model_saved_over_a_folder_leaves_everything_else_there(tiny_stair, tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    (tmp_path / "thesis.tex").write_text("two years")
    for _ in range(2):
        tiny_stair.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        ".git",
        "thesis.tex",
        "model.safetensors",
        "config.json",
        "vocab.txt",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (tmp_path / ".git" / "HEAD").read_text() == "ref"
    Stair.from_pretrained(tmp_path)


def test_a_model_saved_over_one_of_another_library_is_refused(tiny_stair, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_text("theirs")
    with pytest.raises(FileError) as caught:
        tiny_stair.save_pretrained(tmp_path)
    assert caught.value.path == tmp_path
    assert (tmp_path / "model.safetensors").read_text() == "theirs"


def test_cosine_scores_are_of_length_one_and_dot_scores_are_not(tiny_stair, captions, pixels):
    image, text = tiny_stair.encode_image(pixels), tiny_stair.encode_text(captions)
    torch.testing.assert_close(tiny_stair.score(image, text), image @ text.T)
    tiny_stair.config.similarity = "cosine"
    want = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(tiny_stair.score(image, text), want)
    assert (tiny_stair.score(torch.zeros(1, image.shape[1]), text) == 0).all()


def test_pictures_of_any_size_are_encoded(tiny_stair):
    out = tiny_stair.encode_image([Image.new("RGB", (50, 40), "red"), Image.new("L", (16, 90))])
    assert out.shape == (2, len(tiny_stair.vocabulary)) and (out >= 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors.* missing"),
        (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
        (lambda d: edit(d, format=99), "format 99"),
        (lambda d: edit(d, model={"surprise": 1}), "unknown fields"),
        (lambda d: edit_model(d, name="hf-hub:someone/else"), "weights elsewhere"),
        (lambda d: write_vocabulary(d / "vocab.txt", unused=2), "vocabulary|knows"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused(tiny_stair, tmp_path, change, message):
    tiny_stair.save_pretrained(tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Stair.from_pretrained(tmp_path / "m")


def edit(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def edit_model(folder, **image):
    model = json.loads((folder / "config.json").read_text())["model"]
    edit(folder, model={**model, "image": {**model["image"], **image}})


def published_bert(folder, vocab_file, family="bert"):
    """Writes a folder as the hub holds it: config.json, model.safetensors, vocab.txt."""
    V = len(vocab_file.read_text().splitlines())
    torch.manual_seed(3)
    if family == "bert":
        model = BertForMaskedLM(BertConfig(vocab_size=V, **TEXT_OPTIONS))
    else:
        model = DistilBertForMaskedLM(
            DistilBertConfig(vocab_size=V, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=16)
        )
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text(vocab_file.read_text())
    return model.eval()


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_published_text_weights_and_masked_lm_head_are_loaded(tmp_path, vocab_file, family, captions):
    published = published_bert(tmp_path, vocab_file, family)
    config = tiny_config(tmp_path)
    config.text = TextTower(str(tmp_path), True, 12)
    stair = Stair(config).eval()
    ids, mask = stair.vocabulary.tokenize(captions, 12)
    with torch.no_grad():
        logits = published(input_ids=ids, attention_mask=mask.long()).logits
        want = torch.log1p(torch.relu(logits.masked_fill(~mask[..., None], -1).amax(1)))
    want[:, stair.vocabulary.never_active] = 0
    torch.testing.assert_close(stair.encode_text(captions), want, atol=1e-5, rtol=1e-5)
    # the image head starts from the same words and bias, in a matrix of its own
    torch.testing.assert_close(stair.image_head.word_embeddings, stair.text_head.word_embeddings)
    torch.testing.assert_close(stair.image_head.bias, stair.text_head.bias)
    assert stair.image_head.word_embeddings.data_ptr() != stair.text_head.word_embeddings.data_ptr()
    # and what was loaded can be saved and loaded without the folder it came from
    stair.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        Stair.from_pretrained(tmp_path / "saved").encode_text(captions), stair.encode_text(captions)
    )


def test_a_published_encoder_without_a_masked_lm_head_gives_its_words_and_says_so(tmp_path, vocab_file):
    published = published_bert(tmp_path / "whole", vocab_file)
    published.bert.save_pretrained(tmp_path / "encoder")
    config = tiny_config(tmp_path / "whole", text_bias_start=0.25)
    config.text = TextTower(str(tmp_path / "encoder"), True, 12)
    with pytest.warns(UserWarning, match="was published without a masked-LM head"):
        stair = Stair(config)
    words = published.bert.embeddings.word_embeddings.weight
    for head in (stair.text_head, stair.image_head):
        torch.testing.assert_close(head.word_embeddings, words, check_stride=False)
    assert set(stair.text_head.bias.tolist()) == {0.25}  # from scratch, as the settings say


def test_a_text_tower_whose_layers_were_not_published_is_refused_by_name(tmp_path, vocab_file):
    published_bert(tmp_path, vocab_file)
    config = tiny_config(tmp_path)
    config.text = TextTower(str(tmp_path), True, 12, {"num_hidden_layers": 2})
    with pytest.raises(ValueError, match=r"has no bert.encoder.layer.1.* more weights .*num_hidden_layers"):
        Stair(config)


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_published_image_weights_and_normalisation_are_loaded(tmp_path, vocab_file, pixels, kind):
    name, options = IMAGE_TOWERS[kind]
    published = timm.create_model(name, **options, **({"img_size": 32} if kind == "vit" else {})).eval()
    published.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_for_hf(published, tmp_path / "timm", safe_serialization=True)  # as timm's hub repositories are
    config = tiny_config(vocab_file)
    config.image = ImageTower(f"local-dir:{tmp_path / 'timm'}", True, 32, options=options)
    stair = Stair(config).eval()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    with torch.no_grad():
        want = published.forward_features((pixels / 255 - mean) / std)
        want = want[:, 1:] if kind == "vit" else want.flatten(2).transpose(1, 2)
        torch.testing.assert_close(stair.image_encoder(pixels), want, atol=1e-5, rtol=1e-5)
    stair.save_pretrained(tmp_path / "saved")
    loaded = Stair.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded.encode_image(pixels), stair.encode_image(pixels))


@torch.no_grad()
def test_positions_are_the_cells_of_an_image_from_the_top_left(any_stair, pixels, tmp_path):
    encoder = any_stair.image_encoder
    hidden_BTD = encoder(pixels)
    features = encoder.backbone.forward_features((pixels / 255 - encoder.mean) / encoder.deviation)
    rows, columns = encoder.grid
    assert (rows, columns) == (4, 4) and hidden_BTD.shape == (len(pixels), 16, encoder.width)
    for row, column in [(0, 0), (0, 3), (2, 1), (3, 3)]:
        if features.ndim == 3:
            want = features[:, 1 + row * columns + column]
        else:
            want = features[:, :, row, column] if features.shape[1] == encoder.width else features[:, row, column]
        torch.testing.assert_close(hidden_BTD[:, row * columns + column], want)
    any_stair.save_pretrained(tmp_path / "saved")
    assert Stair.from_pretrained(tmp_path / "saved").fingerprint == any_stair.fingerprint


@pytest.mark.parametrize(
    ("kind", "until", "frozen"),
    [("vit", "blocks.0", "blocks.1"), ("cnn", "layer2.0", "layer3"), ("swin", "norm", None)],
)
def test_an_encoder_is_frozen_up_to_a_module_with_its_statistics(vocab_file, pixels, kind, until, frozen, tmp_path):
    config = tiny_config(vocab_file, kind)
    config.image.freeze_until = until
    stair = Stair(config).train()
    names = list(stair.image_encoder.backbone.state_dict())
    first = len(names) if frozen is None else next(n for n, name in enumerate(names) if name.startswith(frozen))
    before = copy.deepcopy(stair.image_encoder.backbone.state_dict())
    optimizer = Optimizer(lr=0.1).build(stair)
    stair.encode_image(pixels)
    stair.embed_pixels(pixels).square().sum().backward()
    optimizer.step()
    after = stair.image_encoder.backbone.state_dict()
    moved = {name for name in names if not torch.equal(before[name], after[name])}
    assert not moved & set(names[:first])
    # all that follows moves, the batch-norm statistics too
    assert moved >= {name for name in names[first:] if name.endswith(("norm1.weight", "bn2.weight", "running_mean"))}
    stair.save_pretrained(tmp_path / "saved")
    loaded = Stair.from_pretrained(tmp_path / "saved")
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_module_that_an_encoder_lacks_is_refused_with_those_it_has(vocab_file):
    config = tiny_config(vocab_file, "cnn")
    config.image.freeze_until = "blocks.5"
    with pytest.raises(SettingError, match=r"layer1\.0.*layer4\.0") as error:
        Stair(config)
    assert error.value.setting == "stair.image.freeze_until"


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (ImageTower("no_such_model", False, 32), None, "timm cannot build.*no_such_model"),
        (ImageTower("crossvit_tiny_240", False, 240), None, "crossvit_tiny_240.*several tensors"),
        (ImageTower("pit_ti_224", False, 224), None, "pit_ti_224.*not form a square"),
        (ImageTower("resnet18", False, 32, options={"layer": [1]}), None, "resnet18.*layer"),
        (None, TextTower("no-such-type", False, 12), "no model type 'no-such-type'"),
        (None, TextTower("bert", False, 99, TEXT_OPTIONS), "max_tokens is 99.*16 positions"),
        (None, TextTower("bert", False, 12, {**TEXT_OPTIONS, "vocab_size": 7}), "has 7 tokens"),
    ],
)
def test_towers_that_cannot_be_built_are_named(vocab_file, image, text, message):
    config = tiny_config(vocab_file)
    config.image, config.text = image or config.image, text or config.text
    with pytest.raises(ValueError, match=message):
        Stair(config)


def test_own_words_lead_by_what_others_are_lowered(vocab_file, captions):
    torch.manual_seed(0)
    plain = Stair(tiny_config(vocab_file, text_bias_start=0.7)).eval()
    leading = Stair(tiny_config(vocab_file, text_bias_start=0.7, in_caption_margin=0.7)).eval()
    leading.load_state_dict(plain.state_dict())
    whole_CV, own_CV = (
        plain.encode_text(captions),
        plain.vocabulary.in_caption_terms(*plain.vocabulary.tokenize(captions, 12)),
    )
    with torch.no_grad():
        plain.text_head.bias -= 0.7
    lowered_CV = plain.encode_text(captions)
    assert (lowered_CV > 0).any() and ((whole_CV > 0) & ~own_CV).any(), "the test would say nothing"
    torch.testing.assert_close(leading.encode_text(captions), torch.where(own_CV, whole_CV, lowered_CV))


def test_a_negative_lead_of_own_words_is_refused(vocab_file):
    with pytest.raises(SettingError) as refused:
        tiny_config(vocab_file, in_caption_margin=-1.0)
    assert refused.value.setting == "stair.in_caption_margin"


@pytest.mark.parametrize("name", ["no/such", "./no/such", "/no/such/folder"])
def test_a_folder_that_does_not_exist_is_named(name, vocab_file, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment when imported
    config = tiny_config(vocab_file)
    config.text.pretrained, config.text.name = True, name
    for load in (lambda: Stair.from_pretrained(name), lambda: Stair(config)):
        with pytest.raises(FileError, match="no such folder") as refused:
            load()
        assert refused.value.path == Path(name)


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "roberta"])
def test_a_mask_of_pairs_gives_the_hidden_states_of_a_mask_of_positions(family):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    if family == "distilbert":
        sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    tower = TextTower(family, False, 12, options={**sizes, "max_position_embeddings": 16})
    encoder = TextEncoder.build(tower, 50)[0].eval()
    ids, mask = torch.randint(2, 50, (3, 7)), torch.arange(7) < torch.tensor([[7], [3], [5]])
    assert encoder.attends_everywhere
    got = encoder.bert(input_ids=ids, attention_mask=mask[:, None, None, :].expand(-1, 1, 7, -1)).last_hidden_state
    torch.testing.assert_close(got[mask], encoder(ids, mask)[mask])
