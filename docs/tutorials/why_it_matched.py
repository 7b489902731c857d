# %% [markdown]
# # Find out why an image matched
#
# A dense model returns a number. A STAIR score is a sum over shared terms, and each term comes from one patch of the
# image and one token of the text. This tutorial explains one hit, from its score to the image patch.
#
# It uses the model and the images of [the other tutorial](train_on_your_folder.py); run that tutorial first. For your
# own model, change `HOME` and the query. Run it from the root of the clone: `python docs/tutorials/why_it_matched.py`.

# %%
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from stair import SparseIndex, Stair
from stair.explain import explain, read_image, read_text

HOME = Path("runs/tutorial")
QUERY = "a purple star on stripes"

model = Stair.from_pretrained(HOME / "stage3" / "stair")
index = SparseIndex.open(HOME / "photos.index", model)

# %% [markdown]
# ## 1. The score is a sum of terms
#
# Each shared term contributes its weight in the query times its weight in the document. Nothing else enters the score.

# %%
hits = index.search(QUERY, k=5)
for hit in hits:
    terms = {term.token: round(term.contribution, 3) for term in hit.terms}
    print(f"{hit.score:.3f}  {hit.id}  {terms}")
best = hits[0]
assert abs(best.score - sum(term.contribution for term in best.terms)) < 1e-6

# %% [markdown]
# ## 2. The terms of the query
#
# A text may activate terms that it does not contain. These expansions let `scarlet` find `red`. If you do not
# understand an expansion, increase λ or look at the training captions. A word that is missing here cannot match: the
# model does not learn `star` in minutes of training.

# %%
text = read_text(model, QUERY)
for n, (term, weight) in enumerate(zip(text.terms, text.weights, strict=True)):
    print(f"{weight:.3f}  {term}{'  (expansion)' if text.expands(n) else ''}")

# %% [markdown]
# ## 3. The patches of the image
#
# The weight of a term in an image is a maximum over patches. The patch with the maximum gets the whole contribution of
# the term, so the contributions of the patches also add up to the score.

# %%
picture = Image.open(HOME / "photos" / best.id)
explanation = explain(model, QUERY, picture)
heat = explanation.heat(explanation.document)
assert abs(heat.sum() - best.score) < 1e-4
row, column = divmod(int(heat.argmax()), heat.shape[1])
print(f"{heat.max() / heat.sum():.0%} of the score comes from patch row {row}, column {column} of {heat.shape}")

# %% [markdown]
# The command `stair explain` draws the contributions as heat maps over the image, as an HTML page or a PNG:

# %%
command = [Path(sys.executable).with_name("stair"), "explain", HOME / "stage3" / "stair", HOME / "why.html"]
subprocess.run([*command, "--image", HOME / "photos" / best.id, "--text", QUERY], check=True)

# %% [markdown]
# ## 4. Why another image did not match
#
# Compare the terms of the query and of the image. If the image lacks a term of the query, the model has not learned the
# term for such images, or it uses another term instead.

# %%
last = index.search(QUERY, k=len(index))[-1]
seen = read_image(model, Image.open(HOME / "photos" / last.id))
print(f"{last.id} scores {last.score:.5f}; its heaviest terms are {', '.join(seen.terms[:8])}")
print("terms of the query that it lacks:", sorted(set(text.terms) - set(seen.terms)))

# %% [markdown]
# ## 5. Change the query by hand
#
# A query is a list of terms with weights, so you can edit it. Increase a weight, remove a term, or give a term a
# negative weight with a minus sign. No model is needed.

# %%
for words in ("stripes purple", "stripes:2 purple", "stripes -purple"):
    print(words, "→", [(hit.id, round(hit.score, 2)) for hit in index.search(words=words, k=3)])

# %% [markdown]
# ## 6. How many terms are enough
#
# Keep only the heaviest terms of each image, and check whether the result changes. `stair embed --budget 64` prunes
# embeddings, and `stair evaluate` measures recall for several numbers of terms. The model uses cosine similarity, so
# scores rise when an image loses terms.

# %%
photos = sorted((HOME / "photos").glob("val-*.png"))
embeddings = model.encode(images=photos)  # scipy CSR, a row for each picture
for top in (1, 2, 4, 8, 1000):
    pruned = embeddings.copy()
    for start, end in itertools.pairwise(pruned.indptr):
        weights = pruned.data[start:end]
        weights[weights.argsort()[: max(0, len(weights) - top)]] = 0
    pruned.eliminate_zeros()
    with tempfile.TemporaryDirectory() as folder:
        small = SparseIndex.build(Path(folder) / "index", pruned, [photo.name for photo in photos], model=model)
        print(f"{top:5} terms:", [(hit.id, round(hit.score, 2)) for hit in small.search(QUERY, k=2)])

# %% [markdown]
# ## When an explanation looks wrong
#
# | You see | Likely reason |
# |---|---|
# | The right term on the wrong patch | The encoder mixes positions: the patch with the maximum may not show the object |
# | A term unrelated to the image | A code: see the [dictionary](../guides/evaluation.md#what-each-term-means) |
# | Only background terms | Captions rarely name the object, or training was short |
# | `dog` does not match `dogs` | Terms are tokens without lemmatisation |
