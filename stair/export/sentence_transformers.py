"""A folder that sentence-transformers' `SparseEncoder` loads, texts and pictures both.

Loading it needs this package, and `trust_remote_code=True`: since release 6 sentence-transformers wants that word for any
module that is not its own, also where it is installed and nothing is fetched.
"""

from pathlib import Path

from stair.model import Stair


def sentence_transformers(model: str, out: Path) -> None:
    """Writes a folder for `SparseEncoder(folder, trust_remote_code=True)`: encode texts or PIL images, similarity as here.

    Args:
        model: folder of a saved model, or its name on the hub.
        out: folder to write.
    """
    try:
        from sentence_transformers import SparseEncoder
    except ImportError as error:
        raise ValueError("needs sentence-transformers: `pip install 'sentence-transformers>=6'`") from error
    from stair.export.st_module import StairModule

    stair = Stair.from_pretrained(model)
    encoder = SparseEncoder(modules=[StairModule(stair)], similarity_fn_name=stair.similarity)
    encoder.save(str(out), create_model_card=False)
