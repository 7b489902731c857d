"""A model's card in Markdown, whoever writes it: `stair push` for the hub, `stair evaluate` beside its figures."""

from collections.abc import Mapping, Sequence

SPARSE = (
    "Sparse, readable embeddings of images and texts: one weight for each word of a vocabulary, nearly all of them zero "
    "(method of Chen et al., EMNLP 2023, arXiv 2301.13081; an independent implementation)."
)
DENSE = "Dense embeddings of images and texts (CLIP)."
_LIMITS = (
    "What it has seen decides what it knows: biases of the training pairs are in it, and nobody has audited them here.",
    "Not for identifying people, nor for decisions about them.",
)


def card(
    name: str,
    about: Sequence[str],
    training: Mapping[str, object],
    results: Sequence[str],
    data: str = "",
    limits: Sequence[str] = (),
) -> str:
    """The card.

    Args:
        name: its heading.
        about: paragraphs that say what it is.
        training: what is recorded with the weights.
        results: paragraphs and tables; none say that nothing was measured.
        data: what it was trained on, in a sentence or two.
        limits: lines of a list, before those that hold for every model.
    """
    recorded = ", ".join(f"{key}: {value}" for key, value in training.items()) or "not recorded"
    parts = [
        f"# {name}",
        *about,
        "## Training",
        f"{data or 'What it was trained on is not stated.'} Recorded with the weights: {recorded}.",
        "## Results",
        *(results or ["Nothing was measured for this card."]),
        "## Limits",
        "\n".join(f"- {limit}" for limit in (*limits, *_LIMITS)),
    ]
    return "\n\n".join(parts) + "\n"


def markdown_table(heads: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    """A table; numbers with four digits, to the right, and the first column to the left."""
    rule = ["---", *("--:" for _ in heads[1:])]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in [heads, rule, *lines])


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
