"""The benchmark with real encoders runs from its plan to its record, once for each variant and seed."""

import json
import subprocess
import sys
from pathlib import Path

import timm
import torch
import yaml
from timm.models import save_for_hf
from transformers import BertConfig, BertForMaskedLM

from tests.support.files import members_of, noise_png, write_tar
from tests.support.models import TEXT_OPTIONS, WORDS, write_vocabulary

ROOT = Path(__file__).parents[1]


def encoders(folder: Path) -> dict[str, str]:
    torch.manual_seed(0)
    save_for_hf(timm.create_model("tf_efficientnet_lite0", pretrained=False), folder / "image", safe_serialization=True)
    (folder / "text").mkdir()
    vocabulary = write_vocabulary(folder / "text" / "vocab.txt").read_text().split()
    BertForMaskedLM(
        BertConfig(vocab_size=len(vocabulary), **{**TEXT_OPTIONS, "max_position_embeddings": 40})
    ).save_pretrained(folder / "text")
    return {"image": f"local-dir:{folder / 'image'}", "text": str(folder / "text")}


def shard(path: Path, samples: int) -> str:
    words = [word for word in WORDS if word.isalpha()]
    rows = {
        f"{i:03}": {
            "png": noise_png(i),
            "json": json.dumps({"captions": [f"a {words[i]}", f"the {words[i + 1]}"]}).encode(),
        }
        for i in range(samples)
    }
    return str(write_tar(path, members_of(rows)))


def test_the_plan_of_real_encoders_runs_from_end_to_end(tmp_path):
    shared = {"steps": 8, "batch": 4, "captions": 2, "views": 2, "warmup": 1}
    variants = {
        "dense CLIP": {"kind": "clip"},
        "three stages": {"teacher": 0.5, "teachers": "dense CLIP", "teacher_seeds": [7]},
        "hard mask": {"hard_mask": True, "slope": 0.0},
        "late interaction": {"kind": "late"},
        "BM25": {"baseline": "bm25"},
        "largest": {"baseline": "largest", "of": "three stages", "terms": 3},
        "SpLiCE": {"baseline": "splice", "of": "dense CLIP", "terms": 1},
        "CSR": {
            "baseline": "autoencoder",
            "of": "dense CLIP",
            "terms": 2,
            "steps": 8,
            "budgets": [[2, 1.0], [4, 0.1]],
            "contrast": 1.0,
        },
    }
    plan = {
        **encoders(tmp_path),
        "title": "Tiny",
        "note": "Two seeds.",
        "data": {"train": shard(tmp_path / "train.tar", 9), "val": shard(tmp_path / "val.tar", 4)},
        "size": 64,
        "views": 2,
        "tokens": "train",
        "seeds": [0, 1],
        "shared": shared,
        "variants": variants,
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    command = [sys.executable, "-m", "benchmarks.real_encoders.run", str(tmp_path / "plan.yaml"), str(tmp_path / "out")]
    command += ["--record", str(tmp_path / "record.md")]
    for _ in range(2):  # the second time, nothing is trained
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "seed 0:" not in done.stdout
    text = (tmp_path / "record.md").read_text()
    assert "| dense CLIP (2) |" in text and "| three stages | val | " in text
    figures = json.loads((tmp_path / "out" / "three_stages" / "seed1" / "figures.json").read_text())["figures"]["val"]
    assert figures["terms_image"] <= len(WORDS) and 0 <= figures["t2i@1"] <= 100
    assert all(text.count(f"| {name} (2) |") == 1 for name in variants)
    searched = text.split("## Search: 9 training images")[1].split("##")[0]
    size = {name: float(searched.split(f"| {name} | ")[1].split(" |")[0]) for name in variants}
    positions = 2 * 2  # 64 px and a stride of 32
    assert size["dense CLIP"] == 4 * 512 and size["late interaction"] == 4 * 128 * positions
    codes = json.loads((tmp_path / "out" / "CSR" / "seed1" / "figures.json").read_text())["figures"]["val"]
    assert codes["terms_image"] <= 2 and "grounding" not in codes
