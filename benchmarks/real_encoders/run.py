"""Trains the variants and baselines of a plan with several seeds on cached feature maps, and writes a dated record.

    python -m benchmarks.real_encoders.run PLAN OUT --record benchmarks/results/NAME.md

OUT keeps feature maps, weights, figures and ranks; what is there is not computed again.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_model, save_model

from benchmarks.ratios import header
from benchmarks.real_encoders import search
from benchmarks.real_encoders.embedders import AutoencoderCodes, Captions, Dense, Embedder, Largest, Late, SpliceCodes
from benchmarks.real_encoders.features import split
from benchmarks.real_encoders.measure import WEIGHED, measure
from benchmarks.real_encoders.model import Data, Model, Settings
from benchmarks.real_encoders.train import Teacher, train
from stair.files import atomic_write
from stair.vocabulary import Vocabulary

_RESAMPLES = 2000
_EMBEDDERS = {"stair": Embedder, "clip": Dense, "late": Late}
_BASELINES = {"largest": Largest, "splice": SpliceCodes, "autoencoder": AutoencoderCodes}
_RECALLS = [f"{way}@{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)]
_COLUMNS = {
    "t→i R@1 / 5 / 10": _RECALLS[:3],
    "i→t R@1 / 5 / 10": _RECALLS[3:],
    "sum": ["sum"],
    "terms image / text": ["terms_image", "terms_text"],
    "heaviest right (baseline)": ["heaviest", "heaviest_baseline"],
    "grounding@10": ["grounding"],
    "image weight grounded / related / unproven / code / stop word, %": [f"weight {name}" for name in WEIGHED],
    "64 terms: t→i, i→t R@1 kept": ["kept t2i@1 of 64", "kept i2t@1 of 64"],
    "16 terms": ["kept t2i@1 of 16", "kept i2t@1 of 16"],
    "minutes": ["minutes"],
}


def read_plan(path: Path) -> dict[str, Any]:
    """A plan with `$NAME` replaced from the environment, and `shared` settings put into every variant that is trained."""
    text = os.path.expandvars(path.read_text(encoding="utf-8"))
    if "${" in text:
        sys.exit(f"{path}: set the environment variable {text.split('${')[1].split('}')[0]}")
    plan: dict[str, Any] = yaml.safe_load(text)
    variants = plan["variants"].items()
    plan["variants"] = {name: own if "baseline" in own else {**plan["shared"], **own} for name, own in variants}
    return plan


class Runs:
    """Data of a plan in memory, and its runs on disk."""

    def __init__(self, plan: dict[str, Any], out: Path) -> None:
        self.plan, self.out = plan, out
        size, spec = plan["size"], plan["data"]
        splits = {
            name: split(out / "maps", plan["image"], spec[name], size, plan["views"] if name == "train" else 1)
            for name in spec
        }
        self.data = Data(splits, Vocabulary(plan["text"]), plan["tokens"])
        self.sets = [name for name in spec if name != "train"]

    def run(self, name: str, seed: int) -> None:
        """Trains and measures one variant with one seed, unless it was; before it, the variant that it is made `of`."""
        folder = self.folder(name) / f"seed{seed}"
        own = self.plan["variants"][name]
        wanted = {**own, "tokens": self.plan["tokens"], "size": self.plan["size"]}
        if "of" in own:
            wanted["of"] = self.plan["variants"][own["of"]]
        for file in folder.glob("*.json"):
            if json.loads(file.read_text())["settings"] != wanted:
                sys.exit(f"{folder} was run with other settings; delete it")
        if (folder / "figures.json").is_file():
            return
        embedder, minutes = self._embedder(name, seed, folder, wanted)
        figures, ranks = {}, {}
        for part in self.sets:
            figures[part], found = measure(embedder, part)
            figures[part]["minutes"] = minutes
            ranks |= {f"{part} {way}": value.numpy() for way, value in found.items()}
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "ranks.npz", **ranks)
        if seed == self.plan["seeds"][0]:
            search.save(folder / "search.pt", embedder, self.sets[0])
        _write(folder / "figures.json", {"settings": wanted, "figures": figures})
        print(f"{name}, seed {seed}: " + ", ".join(f"{k} {figures['val'][k]:.1f}" for k in _RECALLS), flush=True)

    def _embedder(self, name: str, seed: int, folder: Path, wanted: dict[str, Any]) -> tuple[Embedder, float]:
        """A variant with one seed, and how many minutes it took; its weights are kept."""
        weights, facts = folder / "model.safetensors", folder / "trained.json"
        if facts.is_file():
            return self._loaded(name, seed), json.loads(facts.read_text())["minutes"]
        make = self.maker(name, seed)
        torch.manual_seed(seed)
        started = time.perf_counter()
        embedder = make()
        minutes = (time.perf_counter() - started) / 60
        if embedder.model is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save_model(embedder.model, str(weights))
            _write(facts, {"settings": wanted, "minutes": minutes})
        return embedder, minutes

    def _loaded(self, name: str, seed: int) -> Embedder:
        model = Model(settings := self._settings(name), self.data, self.plan["text"]).requires_grad_(False)
        load_model(model, str(self.folder(name) / f"seed{seed}" / "model.safetensors"))
        return _EMBEDDERS[settings.kind](model, self.data)

    def maker(self, name: str, seed: int) -> Callable[[], Embedder]:
        """Trains a variant with one seed, or makes a baseline; models that it needs are made at once."""
        own, text = self.plan["variants"][name], self.plan["text"]
        if own.get("baseline") == "bm25":
            return lambda: Captions(self.data)
        if "of" in own:
            self.run(own["of"], seed)
            model = self._loaded(own["of"], seed)
            options = {key: value for key, value in own.items() if key not in ("of", "baseline")}
            return lambda: _BASELINES[own["baseline"]](model, **options)
        teachers = [self._teacher(own["teachers"], s) for s in own.get("teacher_seeds", [])]
        settings = self._settings(name)
        return lambda: _EMBEDDERS[settings.kind](train(settings, self.data, seed, text, teachers), self.data)

    def _settings(self, name: str) -> Settings:
        own = self.plan["variants"][name]
        return Settings(**{key: value for key, value in own.items() if key not in ("teachers", "teacher_seeds")})

    def _teacher(self, name: str, seed: int) -> Teacher:
        """The dense model's embeddings, from disk or of a new run."""
        own = self.plan["variants"][name]
        stated = hashlib.sha256(json.dumps([own, self.plan["tokens"], self.plan["size"]], sort_keys=True).encode())
        path = self.folder(name) / f"teacher{seed}_{stated.hexdigest()[:8]}.npz"
        if not path.is_file():
            model = train(Settings(**own), self.data, seed, self.plan["text"])
            path.parent.mkdir(parents=True, exist_ok=True)
            Teacher.of(model, self.data).save(path)
        return Teacher.load(path)

    def seeds_of(self, name: str) -> list[Path]:
        """Folders of the seeds that are done."""
        return sorted(path.parent for path in self.folder(name).glob("seed*/figures.json"))

    def folder(self, name: str) -> Path:
        """Of a variant."""
        return self.out / name.replace(" ", "_")


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write_text(json.dumps(content, indent=2) + "\n")


def record(runs: Runs) -> str:
    """Tables of all sets, search of the first seed, and ratios to the first variant with intervals."""
    lines = [header(runs.plan["title"], torch.device("cpu"))]
    lines += [f"{runs.plan['note'].strip()}\n"]
    done = {name: folders for name in runs.plan["variants"] if (folders := runs.seeds_of(name))}
    for part in runs.sets:
        lines += [
            f"## {part}\n",
            "| variant (seeds) | " + " | ".join(_COLUMNS) + " |",
            "|---" * (len(_COLUMNS) + 1) + "|",
        ]
        for name, folders in done.items():
            found = [json.loads((folder / "figures.json").read_text())["figures"][part] for folder in folders]
            cells = [" / ".join(_cell([each.get(key) for each in found]) for key in keys) for keys in _COLUMNS.values()]
            lines.append(f"| {name} ({len(folders)}) | " + " | ".join(cells) + " |")
        lines.append("")
    first = f"seed{runs.plan['seeds'][0]}/search.pt"
    files = {name: path for name in done if (path := runs.folder(name) / first).is_file()}
    return "\n".join([*lines, *search.table(files), *_ratios(runs, done)]) + "\n"


def _cell(values: list[Any]) -> str:
    if None in values:
        return "–"
    spread = f"±{np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def _ratios(runs: Runs, done: dict[str, list[Path]]) -> list[str]:
    (base, *others), sets = done, runs.sets
    lines = [
        f"## Ratio to {base}: mean of the variant's seeds, 95 % interval of a paired bootstrap over images\n",
        "| variant | set | t→i R@1 | i→t R@1 | t→i R@10 | i→t R@10 |",
        "|---|---|---|---|---|---|",
    ]
    for name in others:
        seeds = {folder.name for folder in done[name]}
        same = [folder for folder in done[base] if folder.name in seeds]
        for parts in ([[part] for part in sets] + [sets])[: 1 if len(sets) == 1 else None]:
            cells = []
            for k in (1, 10):
                for way in ("t2i", "i2t"):
                    ours, theirs = (_hits(folders, parts, way, k) for folders in (done[name], same))
                    cells.append(_interval(ours, theirs))
            lines.append(f"| {name} | {' + '.join(parts)} | {' | '.join(cells)} |")
    return lines


def _hits(folders: list[Path], parts: list[str], way: str, k: int) -> np.ndarray:
    """(N,) share of hits of each image's queries, mean over seeds."""
    seeds = []
    for folder in folders:
        with np.load(folder / "ranks.npz", allow_pickle=False) as ranks:
            found = [(ranks[f"{part} {way}"] <= k).astype(float) for part in parts]
            images = [len(ranks[f"{part} i2t"]) for part in parts]
        seeds.append(np.concatenate([hit.reshape(n, -1).mean(1) for hit, n in zip(found, images, strict=True)]))
    return np.mean(seeds, axis=0)


def _interval(ours_N: np.ndarray, theirs_N: np.ndarray) -> str:
    draw = np.random.default_rng(0).integers(len(ours_N), size=(_RESAMPLES, len(ours_N)))
    low, high = np.percentile(ours_N[draw].mean(1) / theirs_N[draw].mean(1).clip(1e-9), [2.5, 97.5])
    return f"{ours_N.mean() / max(theirs_N.mean(), 1e-9):.2f} ({low:.2f}–{high:.2f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--only", nargs="*", help="names of variants; all by default")
    parser.add_argument("--seeds", nargs="*", type=int, help="seeds; those of the plan by default")
    args = parser.parse_args()
    sys.argv[0] = "-m benchmarks.real_encoders.run"  # for the record's header
    plan = read_plan(args.plan)
    runs = Runs(plan, args.out)
    for seed in args.seeds or plan["seeds"]:
        for name in args.only or plan["variants"]:
            runs.run(name, seed)
    text = record(runs)
    print(text)
    if args.record:
        args.record.write_text(text, encoding="utf-8")
