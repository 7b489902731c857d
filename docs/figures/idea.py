"""Draws `docs/figures/idea.svg` from the model of `make demo`: how an image and a sentence match, and the three stages.

python docs/figures/idea.py            # after make demo
"""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor

from stair.data.pairs import EvaluationPairs
from stair.images import MAX_PIXELS
from stair.model import Stair

RUN = Path("runs/demo")
TARGET = Path(__file__).with_suffix(".svg")
SCENE, SHOWN = 2, 9  # which held-out scene; terms of each side
SHARED, OTHER, INK = "#0f766e", "#b8c4ce", "#1f2933"
STAGES = (
    ("1  Grounding", "Both encoders train.\nText: in-caption tokens only."),
    ("2  Expansion", "The image encoder is frozen.\nText: any token of the vocabulary."),
    ("3  Fine-tuning", "Both encoders train.\nText: any token of the vocabulary."),
)


def main() -> None:
    """Encodes one held-out scene and its first caption, and draws both embeddings."""
    model = Stair.from_pretrained(RUN / "stage3" / "stair")
    pair = EvaluationPairs(str(RUN / "data" / "val-*.tar"), model.config.image.image_size, MAX_PIXELS)[SCENE]
    caption = pair.captions[0]
    image_V, text_V = (
        model.comparable(side)[0] for side in (model.encode_image(pair.pixels[None]), model.encode_text([caption]))
    )
    with rc_context({"font.family": "DejaVu Sans", "svg.fonttype": "none", "svg.hashsalt": "idea", "text.color": INK}):
        figure = Figure(figsize=(10, 5.6))
        draw(figure, model, pair.pixels, caption, image_V, text_V)
        FigureCanvasSVG(figure).print_svg(str(TARGET), metadata={"Date": None})


def draw(figure: Figure, model: Stair, pixels_CHW: Tensor, caption: str, image_V: Tensor, text_V: Tensor) -> None:
    """The whole picture: inputs, embeddings, score, stages."""
    place = {"picture": (0.02, 0.52, 0.17, 0.36), "image": (0.33, 0.42, 0.17, 0.48), "text": (0.82, 0.42, 0.17, 0.48)}
    axes = {name: figure.add_axes(box) for name, box in place.items()}
    axes["picture"].imshow(pixels_CHW.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes["picture"].axis("off")
    product_V = image_V * text_V
    shared = set(product_V.nonzero()[:, 0].tolist())
    for name, side_V in (("image", image_V), ("text", text_V)):
        bars(axes[name], model, side_V, shared)
        axes[name].set_title(f"{name} embedding\n{int(side_V.count_nonzero())} of {len(side_V):,} terms", fontsize=10)
    figure.text(0.105, 0.93, "image", ha="center", fontsize=10)
    figure.text(0.60, 0.93, "caption", ha="center", fontsize=10)
    figure.text(0.60, 0.84, wrapped(caption, 20), ha="center", va="top", fontsize=10, style="italic")
    for start, end, height in ((0.195, 0.235, 0.70), (0.695, 0.735, 0.70)):
        figure.text((start + end) / 2, height, "→", ha="center", va="center", fontsize=18)
    terms = product_V.topk(3).indices.tolist()
    parts = " + ".join(
        f"{product_V[term]:.2f} {word}" for term, word in zip(terms, model.vocabulary.tokens_of(terms), strict=True)
    )
    figure.text(
        0.5,
        0.325,
        f"score = Σ image · text = {parts} + … = {product_V.sum():.2f}",
        ha="center",
        fontsize=11,
        color=SHARED,
    )
    stages(figure)


def bars(axes: Axes, model: Stair, side_V: Tensor, shared: set[int]) -> None:
    """The heaviest terms of an embedding; those that the other side has too in another colour."""
    weights, terms = side_V.topk(min(SHOWN, int(side_V.count_nonzero())))
    rows = range(len(terms))
    axes.barh(rows, weights.tolist(), color=[SHARED if term in shared else OTHER for term in terms.tolist()])
    axes.set_yticks(rows, model.vocabulary.tokens_of(terms.tolist()), fontsize=9)
    axes.set_ylim(SHOWN - 0.5, -0.5)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for edge in axes.spines.values():
        edge.set_visible(False)


def stages(figure: Figure) -> None:
    """One box for each training stage."""
    for number, (title, what) in enumerate(STAGES):
        axes = figure.add_axes((0.02 + 0.33 * number, 0.03, 0.29, 0.22))
        axes.set(xticks=[], yticks=[])
        axes.text(0.05, 0.78, title, fontsize=11, weight="bold", va="center")
        axes.text(0.05, 0.36, what, fontsize=10, va="center")
        if number:
            figure.text(0.33 * number, 0.14, "→", ha="center", va="center", fontsize=18)


def wrapped(text: str, width: int) -> str:
    """Lines of at most `width` characters, broken between words."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


if __name__ == "__main__":
    main()
