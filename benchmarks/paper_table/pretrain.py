"""Pretrains both encoders, for plans that measure what published encoders would change.

    python benchmarks/paper_table/pretrain.py PLAN DENSE OUT [--steps 3000]

OUT/text is a BERT with its masked-LM head, trained on the captions of the plan's training shards. As for BERT, 15 % of the
tokens are masked: 80 % of these by [MASK], 10 % by a random token, 10 % stay. OUT/image is the ViT of DENSE, a dense CLIP
model of a seed that the plan does not use. Set `stair.text.name` to OUT/text, and `stair.image.name` to
`local-dir:OUT/image`. Sizes are those of DENSE. The captions do not replace BERT's billions of words.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from run import HOME, read_plan
from timm.models import save_for_hf
from transformers import BertConfig, BertForMaskedLM

sys.path.insert(0, str(HOME))
from stair.clip import DenseClip
from stair.data.pairs import entries, read_entry
from stair.data.samples import CAPTION_TYPES, captions

_BATCH, _RATE, _HIDDEN = 256, 2e-3, 0.15


def pretrain(plan_path: Path, dense: Path, out: Path, steps: int) -> None:
    """Writes both encoders."""
    torch.manual_seed(0)
    clip = DenseClip.from_pretrained(dense)
    save_for_hf(clip.image_encoder.backbone, out / "image", safe_serialization=True)
    samples = entries(read_plan(plan_path)["train"], CAPTION_TYPES)
    texts = [text for entry in samples for text in captions(read_entry(entry).members)]
    settings = {k: v for k, v in clip.text_encoder.config.to_diff_dict().items() if k != "model_type"}
    bert = BertForMaskedLM(BertConfig(**settings)).train()
    optimizer = torch.optim.AdamW(bert.parameters(), _RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, steps)
    hidden_id = clip.vocabulary.tokens.index("[MASK]")
    never = torch.tensor(clip.vocabulary.never_active)
    rng = random.Random(0)
    for step in range(steps):
        ids, mask = clip.vocabulary.tokenize(rng.sample(texts, _BATCH), clip.config.text.max_tokens)
        chosen = (torch.rand(ids.shape) < _HIDDEN) & mask & ~torch.isin(ids, never)
        way, others = torch.rand(ids.shape), torch.randint(len(clip.vocabulary), ids.shape)
        shown = torch.where(chosen & (way < 0.8), hidden_id, torch.where(chosen & (way > 0.9), others, ids))
        hidden_HD = bert.bert(input_ids=shown, attention_mask=mask.long()).last_hidden_state[chosen]  # H masked tokens
        loss = torch.nn.functional.cross_entropy(bert.cls(hidden_HD), ids[chosen])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss of masked tokens {loss.item():.2f}", flush=True)
    bert.eval().save_pretrained(out / "text")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("dense", type=Path, help="a folder that `lightning fit --config configs/clip.yaml` exported")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    pretrain(arguments.plan, arguments.dense, arguments.out.resolve(), arguments.steps)
