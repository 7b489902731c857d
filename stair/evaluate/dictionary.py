"""The command `stair dictionary`: each term of a model, with evidence of what it means."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from tqdm import tqdm

from stair.data.samples import caption_lines, captions
from stair.data.tars import expand, read_samples
from stair.errors import SettingError, require
from stair.evaluate.open_set import open_set
from stair.evaluate.output import print_table
from stair.evaluate.sets import EvaluationSet, Sample
from stair.evaluate.term_evidence import CLASSES, Evidence, Lemmas, describe, summary
from stair.explain import ImageReading, read_image
from stair.files import write_json
from stair.model import Stair
from stair.pages import image_source, render, write_html
from stair.plain import counted, one_line
from stair.report.tables import dictionary_table
from stair.report.terms import encode_png

_SIDE = 72  # pixels of a thumbnail
_FORM = 'wanted [{"names": ["dog", ...], "box": [left, top, right, bottom]}, ...] with numbers in 0 to 1'


def dictionary(
    model: str,
    data: str,
    output: str | None = None,
    split: str | None = None,
    cooccurrence: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Tests what each term of a model means, on images with captions.

    Prints a summary, and writes dictionary.json and dictionary.html, in which terms can be searched and sorted.

    The precision of a term is the share of its images whose captions contain its word, or one of the same lemma. A term
    is grounded if its precision is at least 50 %, or twice the same share among all images. The lower end of the 95 %
    Wilson interval of the precision must also exceed the share among all images. A term is related if this holds for words
    that co-occur with it. A term is a code if both intervals end below these limits, and unproven otherwise. A word that no
    caption has, and a term that every image has, count as below. With `boxes` in the JSON of samples, the share of argmax
    patches in a box of the word is measured. The form is `[{"names": ["dog"], "box": [left, top, right, bottom]}]`, with
    numbers in 0 to 1.

    Args:
        model: the folder of an exported model, or its name on the hub.
        data: images with captions: tars (a path, a glob, a brace pattern), or a folder of tars.
        output: folder for the results; by default `MODEL-dictionary` next to the model, or in the working directory.
        split: the part of a folder to use; by default the first of test, val, train that exists, else all.
        cooccurrence: shards whose captions state which words co-occur, such as those of training; by default DATA.
        limit: use the first N images; by default all.
        batch_size: number of captions encoded at a time.

    Raises:
        FileNotFoundError: if the model or the data is missing.
        SettingError: if a set has no captions.
        ValueError: if a sample is damaged, or its boxes have another form.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        require(value is None or value >= 1, name, value, "at least 1")
    what = open_set(data, split)
    if not what.samples[0].captions:
        raise SettingError(f"data: set {what.name!r} has no captions. Give tars of images with captions", "data")
    stair = Stair.from_pretrained(model).eval()
    lemmas = Lemmas(stair.vocabulary)
    home = Path(model).resolve() if Path(model).exists() else Path.cwd() / model.replace("/", "-")
    folder = Path(output) if output else home.with_name(f"{home.name}-dictionary")
    folder.mkdir(parents=True, exist_ok=True)  # fails before minutes of measuring
    corpus = lemmas.held(_captions(cooccurrence)) if cooccurrence else None
    evidence, keys, thumbnails = gather(stair, lemmas, what, limit, batch_size)
    terms = describe(lemmas, evidence, evidence.held_NV if corpus is None else corpus, stair.similarity)
    result = {
        "model": model,
        "data": data,
        "cooccurrence": cooccurrence or data,
        "images": len(keys),
        "captions": len(evidence.owner_C),
        "classes": CLASSES,
        "summary": summary(terms, len(stair.vocabulary)),
        "terms": [{**term, "top": [keys[n] for n in term["top"]]} for term in terms],
    }
    print_table(dictionary_table(result))
    write_json(folder / "dictionary.json", result)
    _write_page(folder / "dictionary.html", result, terms, thumbnails)
    print(f"Written: {folder}/dictionary.html, dictionary.json")
    return result


def gather(
    model: Stair, lemmas: Lemmas, what: EvaluationSet, limit: int | None, batch_size: int
) -> tuple[Evidence, list[str], list[str]]:
    """Embeds a set. Returns its evidence, and of each image its key and its thumbnail as the source of an HTML image."""
    number = {token: v for v, token in enumerate(model.vocabulary.tokens)}
    rows: list[tuple[list[int], ImageReading, dict[int, int]]] = []
    texts, keys, thumbnails = list[list[str]](), list[str](), list[str]()
    size = min(limit or len(what.samples), len(what.samples))
    for sample in tqdm((what.samples[n] for n in range(size)), what.name, size, unit="image", disable=None):
        reading = read_image(model, sample.image)
        ids = [number[term] for term in reading.terms]
        rows.append((ids, reading, _pointed(sample, reading, ids, lemmas)))
        texts.append(list(sample.captions))
        keys.append(sample.key)
        thumbnail = reading.image.copy()
        thumbnail.thumbnail((_SIDE, _SIDE))
        thumbnails.append(str(image_source(encode_png(thumbnail))))
    columns = np.concatenate([ids for ids, *_ in rows]).astype(int)
    ends = np.cumsum([0, *(len(ids) for ids, *_ in rows)])
    shape = size, len(model.vocabulary)
    pointed = [(n, v, inside) for n, (*_, found) in enumerate(rows) for v, inside in found.items()]
    row, column, inside = np.array(pointed, int).reshape(-1, 3).T
    flat = [text for own in texts for text in own]
    evidence = Evidence(
        csr_matrix((np.concatenate([each.weights for _, each, _ in rows]), columns, ends), shape),
        csr_matrix((np.concatenate([each.positions + 1 for _, each, _ in rows]), columns, ends), shape),
        csr_matrix((inside, (row, column)), shape),
        model.encode(texts=tqdm(flat, "captions", unit="caption", disable=None), batch_size=batch_size),
        np.repeat(np.arange(size), [len(own) for own in texts]),
        lemmas.held(texts),
    )
    return evidence, keys, thumbnails


def _captions(spec: str) -> list[list[str]]:
    """The captions of each usable sample of shards."""
    found, unusable = [], 0
    for shard in tqdm(expand(spec), "co-occurrence", unit="shard", disable=None):
        lines = caption_lines(shard)
        for sample in read_samples(shard):
            try:
                found.append(captions(sample.members, lines))
            except ValueError:
                unusable += 1
    print(f"co-occurrence: captions of {counted(len(found), 'image')}, without captions: {unusable}")
    return found


def _boxes(sample: Sample) -> list[tuple[list[str], list[float]]]:
    """Names and box of each object."""
    try:
        found = [
            ([str(name) for name in each["names"]], [float(side) for side in each["box"]]) for each in sample.boxes
        ]
        if any(len(box) != 4 or not all(0 <= side <= 1 for side in box) for _, box in found):
            raise ValueError("a box has 4 numbers in 0 to 1")
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{sample.key}: boxes are {one_line(repr(sample.boxes))[:80]}; {_FORM}") from error
    return found


def _pointed(sample: Sample, reading: ImageReading, ids: Sequence[int], lemmas: Lemmas) -> dict[int, int]:
    """Of the active terms whose word has a box: 1 if the argmax patch is in one, else -1."""
    boxes: dict[int, list[list[float]]] = {}
    for names, box in _boxes(sample):
        for v in lemmas.terms(names):
            boxes.setdefault(v, []).append(box)
    width, height = sample.image.size
    found = {}
    for n, v in enumerate(ids):
        if v in boxes:
            patch, inside = reading.patch(n), False
            if patch is not None:
                x, y = ((place + 0.5) / count for place, count in zip(patch[::-1], reading.grid[::-1], strict=True))
                side = min(width, height)  # of the square in the middle, which the model sees
                x, y = ((width - side) / 2 + x * side) / width, ((height - side) / 2 + y * side) / height
                inside = any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes[v])
            found[v] = 1 if inside else -1
    return found


def _write_page(path: Path, result: dict[str, Any], terms: list[dict[str, Any]], thumbnails: list[str]) -> None:
    used = sorted({n for term in terms for n in term["top"]})
    place = {n: i for i, n in enumerate(used)}
    data = {
        "terms": [{**term, "top": [place[n] for n in term["top"]]} for term in terms],
        "images": [thumbnails[n] for n in used],
    }
    content = render("dictionary.html", classes=CLASSES, summary=result["summary"], data=data)
    counts = f"{counted(result['images'], 'image')}, {counted(result['captions'], 'caption')} of {result['data']}"
    name = "/".join(Path(result["model"]).parts[-3:])
    write_html(path, f"Terms of {name}", [counts], [content], script="dictionary.js")
