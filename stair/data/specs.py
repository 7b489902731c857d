"""What a user gives as training data: shard specs, or a mixture of named sources with weights."""

from dataclasses import dataclass

from stair.errors import require


@dataclass(frozen=True)
class Shards:
    """A source of a mixture.

    Args:
        shards: shard spec, or a list of them.
        weight: share of the pairs, relative to the other sources' weights; more than 0.
    """

    shards: str | list[str]
    weight: float | None = None


def mixture(train: str | list[str] | dict[str, str | list[str] | Shards] | None) -> dict[str, Shards]:
    """The sources by name, "" of an only one; ValueError if some have no weight, or a mapping was not understood as one."""
    given = list(train.values()) if isinstance(train, dict) else [train] if isinstance(train, str) else train or []
    for spec in given:
        if isinstance(spec, str) and spec.startswith("{") and ": " in spec:
            raise ValueError(
                f"data.train={spec!r} cannot be read as a mapping: expected {{NAME: SPEC, ...}} or {{NAME: {{shards: SPEC, "
                "weight: NUMBER}, ...}; patterns with braces stand between quotes, as in {name: 'data/{00..09}.tar'}"
            )
    if not isinstance(train, dict):
        return {"": Shards(train)} if train else {}
    mixed = {name: given if isinstance(given, Shards) else Shards(given) for name, given in train.items()}
    without = [name for name, given in mixed.items() if given.weight is None]
    if without and len(without) < len(mixed):
        raise ValueError(f"sources {without} have no weight and others have: give all of them one, or none")
    if "" in mixed:
        raise ValueError("a source of the mixture has an empty name")
    for name, source in mixed.items():
        weight = source.weight
        is_weight = weight is None or 0 < weight < float("inf")
        require(is_weight, f"weight of source {name!r}", weight, "more than 0, or none")
    return mixed
