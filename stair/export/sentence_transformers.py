"""A folder that sentence-transformers' `SparseEncoder` loads: with this package, and `trust_remote_code=True`."""

from pathlib import Path

from stair.errors import import_extra
from stair.export.target import engine_errors, new_target
from stair.model import Stair


def sentence_transformers(model: str, out: Path) -> None:
    """Writes a folder for `SparseEncoder(folder, trust_remote_code=True)`, which encodes texts and PIL images.

    Args:
        model: folder of an exported model, or its name on the hub.
        out: a new folder.
    """
    library = import_extra("sentence_transformers", "sentence-transformers", "export")
    from stair.export.st_module import StairModule

    with engine_errors("sentence-transformers"), new_target(out, folder=True) as part:
        stair = Stair.from_pretrained(model)
        encoder = library.SparseEncoder(modules=[StairModule(stair)], similarity_fn_name=stair.similarity)
        encoder.save(str(part), create_model_card=False)
