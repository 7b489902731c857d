# %% [markdown]
# # Find out why a picture matched
#
# A dense model returns a number. A STAIR score is a sum over shared terms, and each term comes from one patch of the
# picture and one token of the text. This tutorial takes a hit apart, from the score to the patch, in under a minute.
#
# It uses the model and the pictures of [the other tutorial](train_on_your_folder.py); run that one first. For your own
# model change `HOME` and the query. Run it from the root of the clone: `python docs/tutorials/why_it_matched.py`.

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
# ## 2. What the query says
#
# A text may activate terms that it does not contain: expansions. They let `scarlet` find `red`. An expansion that you do
# not understand is a reason to raise λ or to look at the training captions. A word that is missing here cannot match:
# minutes of training do not teach `star`.

# %%
text = read_text(model, QUERY)
for n, (term, weight) in enumerate(zip(text.terms, text.weights, strict=True)):
    print(f"{weight:.3f}  {term}{'  (expansion)' if text.expands(n) else ''}")

# %% [markdown]
# ## 3. Where in the picture
#
# A picture's weight of a term is a maximum over patches. The patch of the maximum gets the whole contribution. So the
# contributions of the patches add up to the score too.

# %%
picture = Image.open(HOME / "photos" / best.id)
explanation = explain(model, QUERY, picture)
heat = explanation.heat(explanation.document)
assert abs(heat.sum() - best.score) < 1e-4
row, column = divmod(int(heat.argmax()), heat.shape[1])
print(f"{heat.max() / heat.sum():.0%} of the score comes from patch row {row}, column {column} of {heat.shape}")

# %% [markdown]
# The command draws the same as heat maps over the picture, as a page or as a PNG:

# %%
command = [Path(sys.executable).with_name("stair"), "explain", HOME / "stage3" / "stair", HOME / "why.html"]
subprocess.run([*command, "--image", HOME / "photos" / best.id, "--text", QUERY], check=True)

# %% [markdown]
# ## 4. Why another picture did not match
#
# Compare the terms of both sides. A term of the query that the picture lacks has either not been learned for such pictures,
# or another term took its place.

# %%
last = index.search(QUERY, k=len(index))[-1]
seen = read_image(model, Image.open(HOME / "photos" / last.id))
print(f"{last.id} scores {last.score:.5f}; its heaviest terms are {', '.join(seen.terms[:8])}")
print("terms of the query that it lacks:", sorted(set(text.terms) - set(seen.terms)))

# %% [markdown]
# ## 5. Change the query by hand
#
# Terms are weights, so a query can be edited. Raise a term, drop one, or forbid one with a minus: no model is needed.

# %%
for words in ("stripes purple", "stripes:2 purple", "stripes -purple"):
    print(words, "→", [(hit.id, round(hit.score, 2)) for hit in index.search(words=words, k=3)])

# %% [markdown]
# ## 6. How few terms are enough
#
# Keep only the heaviest terms of each picture, and see whether the result changes. `stair embed --top 64` prunes
# embeddings, and `stair evaluate` measures the loss of recall for several cuts. The model compares by cosine, so scores
# rise when a picture loses terms.

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
# | The right term on the wrong patch | The encoder mixes positions: the patch of a maximum need not show the object |
# | A term that means nothing | A code: see the [vocabulary probe](../guides/evaluation.md#vocabulary-probe) |
# | Only background terms | Captions rarely name the object, or training was short |
# | `dog` does not match `dogs` | Terms are tokens without lemmatisation |
