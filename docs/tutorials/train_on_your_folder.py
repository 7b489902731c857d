# %% [markdown]
# # Train on your own captioned folder
#
# This tutorial trains a searchable model from a folder of images and a table of captions. The images are generated, so
# that the tutorial runs offline on two CPU cores. Install with
# `pip install -e '.[train,search,evaluate]'`. Run it from the root of the clone:
# `python docs/tutorials/train_on_your_folder.py`. With your own data, start at step 2.

# %% [hidden]
import csv
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from datamodules.synthetic import write_scenes

os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def sh(commands: str) -> None:
    """Runs commands of the shell; stops at the first that fails."""
    print(commands, flush=True)
    subprocess.run(["bash", "-ec", commands], check=True)


# %% [markdown]
# ## 1. Create an example folder
#
# `photos/` holds images. `train.csv` and `val.csv` have one line per caption: `image,caption`. An image can have
# several lines. Keep images of the same thing in one split.

# %%
HOME = Path("runs/tutorial")
(HOME / "photos").mkdir(parents=True, exist_ok=True)
write_scenes(HOME / "scenes", train=1600, val=100)  # generated scenes with captions, and a vocabulary of their words
for split in ("train", "val"):
    with open(HOME / f"{split}.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for path in sorted((HOME / "scenes").glob(f"{split}-*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    content = tar.extractfile(member).read()
                    if member.name.endswith(".json"):
                        captions = json.loads(content)["captions"]
                        table.writerows([member.name.replace(".json", ".png"), caption] for caption in captions)
                    else:
                        (HOME / "photos" / member.name).write_bytes(content)

# %% [markdown]
# ## 2. Make shards and check them
#
# Training reads WebDataset tars with an index. `stair prepare` writes both and reports what it skipped. `stair doctor`
# reads samples with the settings of the run and names the setting that fixes each problem.

# %%
sh(r"""
cd runs/tutorial
stair prepare folder train.csv photos/ shards/
stair prepare folder val.csv photos/ shards/ --split val
stair doctor 'shards/train-*.tar' --vocabulary scenes/vocab.txt --image_size 64 --global_batch_size 64
""")

# %% [markdown]
# ## 3. Write a config file
#
# Settings are read from several files; later files take precedence. `configs/stage1.yaml` is the recipe for millions of
# pairs and pretrained encoders. `configs/model/tiny.yaml` replaces the encoders with small ones from scratch.
# `configs/paper/` selects the hard mask of the paper, which suits these 244 terms and few steps. `mine.yaml` has the
# settings for your data.
#
# For photographs, use `configs/small/` (pretrained encoders, soft mask) instead of `tiny.yaml` and `configs/paper/`, and
# omit `vocabulary` and `in_caption_margin`: the default is BERT's vocabulary, and each of its 30,522 tokens is a
# dimension ([commands](../start/own-data.md#2-train)).

# %%
(HOME / "mine.yaml").write_text("""\
model:
  init_args:
    stair:
      vocabulary: runs/tutorial/scenes/vocab.txt
      in_caption_margin: 3.0   # from scratch under the hard mask; otherwise texts stay dense in stage 2
data:
  train: runs/tutorial/shards/train-*.tar
  val: {mine: runs/tutorial/shards/val-*.tar}   # the first validation set decides which checkpoint is best
  global_batch_size: 64
trainer: {enable_progress_bar: false}
""")

# %% [markdown]
# ## 4. Train three stages
#
# Stage 1 masks each text to its in-caption tokens, so that terms keep their meaning. Stage 2 freezes the image encoder
# and lets texts activate other terms. Stage 3 trains both. Each stage exports `runs/tutorial/stageK/stair` after
# `trainer.max_steps`, and the next stage starts from it. Set `max_steps` to a multiple of `val_check_interval`, so that
# the last step is validated.
#
# λ (`objective.flops_image`, `flops_text`) is the weight of the sparsity loss: increase it until embeddings are sparse
# enough.

# %%
sh(r"""
stage() { # number, settings of this stage
    lightning fit --run runs/tutorial --config configs/stage$1.yaml --config configs/paper/stage$1.yaml \
        --config configs/model/tiny.yaml --config runs/tutorial/mine.yaml --ckpt_path last "${@:2}"
}
objective=--model.init_args.objective
stage 1 $objective.flops_image 3e-3 $objective.flops_text 0 $objective.flops_ramp_steps 100 \
    --trainer.max_steps 200 --trainer.val_check_interval 200
stage 2 $objective.flops_text 3e-3 --model.init_args.optimizer.lr 1e-3 --model.init_args.optimizer.warmup_steps 10 \
    --trainer.max_steps 30 --trainer.val_check_interval 30
stage 3 --model.init_args.optimizer.warmup_steps 10 --trainer.max_steps 100 --trainer.val_check_interval 100
""")

# %% [markdown]
# `--ckpt_path last` resumes an interrupted stage and skips a finished one. If you run the script again, it does only
# the missing work.
#
# ## 5. Measure
#
# The validation images were not used for training. Ties and empty embeddings count as misses. `frequency baseline` in
# the report is the score that the most common terms alone would reach.

# %%
sh(r"""
stair evaluate runs/tutorial/stage3/stair mine='runs/tutorial/shards/val-*.tar' --no_probe
""")

# %% [markdown]
# ## 6. Search
#
# `--words` and `--like` need no model. [The next tutorial](why_it_matched.py) shows the parts of a hit's score.

# %%
sh(r"""
cd runs/tutorial
stair embed stage3/stair photos embeddings
stair index photos.index embeddings --replace
stair search photos.index --model stage3/stair --text "a purple star on stripes" --k 3
stair search photos.index --words "stripes:2 purple" --k 3
""")

# %% [markdown]
# ## What to change for your data
#
# | You have | Change |
# |---|---|
# | A GPU and photographs | Only `configs/stageK.yaml` and your data; [commands](../start/own-data.md#2-train) |
# | A CPU and photographs | `configs/small/` as in step 3; [commands](../start/own-data.md#2-train) |
# | Too little memory | `--model.init_args.micro_batch_size 128`: the loss is the same; pairs are encoded in parts |
# | Recall at chance | Train longer, or decrease λ; see [alarms](../operations/errors.md#alarms) |
# | Embeddings that are not sparse | Increase λ |
# | Several sources | A mixture in `data.train` ([data](../guides/data.md#epochs-and-mixtures)) |
