"""A model on the Hugging Face hub: its files, and a card that says what it is, what was measured, and what it cannot do.

`Stair.from_pretrained("name/model")` reads it back.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stair.files import read_json
from stair.index.calibration import FILE as CALIBRATION
from stair.pages import render
from stair.report.tables import Table, dictionary_table, protocol, tables
from stair.towers import FILES, folder_of, read_description


def model_card(
    folder: Path,
    licence: str,
    name: str = "",
    data: str = "",
    results: Mapping[str, Any] | None = None,
    dictionary: Mapping[str, Any] | None = None,
) -> str:
    """The README.md of a model.

    Args:
        folder: of a saved model.
        licence: of the weights, by its identifier (`apache-2.0`, `cc-by-nc-4.0`, ...); depends on the training data.
        name: under which it is loaded.
        data: what it was trained on, in a sentence or two.
        results: what was measured: numbers or texts by name, or what `stair evaluate` writes as evaluation.json; left out,
            the card says that nothing was.
        dictionary: what `stair dictionary` writes as dictionary.json.

    Raises:
        FileNotFoundError, ValueError: if the folder contains no saved model, or results or dictionary are neither.
    """
    about = read_description(folder)
    values = {key: about[key] for key in ("model", "vocabulary_fingerprint", "training")} | _measured(results or {})
    if dictionary is not None:
        if missing := {"summary", "terms", "classes"} - dictionary.keys():
            raise ValueError(
                f"dictionary: {sorted(missing)[0]!r} is missing; give dictionary.json of `stair dictionary`"
            )
        values["tables"].append(dictionary_table(dictionary))
    names = {"name": name or folder.name, "source": name or folder}
    return render("card.md", **values, **names, sparse=True, licence=licence, data=data) + "\n"


def _measured(results: Mapping[str, Any]) -> dict[str, Any]:
    if {"model", "sets"} <= results.keys():
        return {"protocols": [protocol(*each) for each in results["sets"].items()], "tables": list(tables(results))}
    if odd := [name for name, value in results.items() if not isinstance(value, (str, int, float))]:
        raise ValueError(
            f"results: {odd[0]!r} is neither a number nor a text; give an object of metrics by name, or evaluation.json"
        )
    rows = [[name, f"{value:.4g}" if isinstance(value, float) else str(value)] for name, value in results.items()]
    return {"protocols": [], "tables": [Table("", ["measure", "value"], rows)] if rows else []}


def push(
    model: str,
    name: str,
    licence: str,
    data: str = "",
    results: Path | None = None,
    dictionary: Path | None = None,
    private: bool = False,
    message: str = "Upload a STAIR model",
) -> None:
    """Uploads an exported model with its model card to the hub, with your own login (`hf auth login`).

    Args:
        model: folder of an exported model.
        name: USER/MODEL on the hub; created if it does not exist.
        licence: licence of the weights, such as apache-2.0 or cc-by-nc-4.0; depends on the training data.
        data: description of the training data, in one or two sentences.
        results: JSON file for the card: the evaluation.json of `stair evaluate`, or an object of metrics by name.
        dictionary: the dictionary.json of `stair dictionary`, for the card.
        private: whether a newly created model is private.
        message: commit message.
    """
    if name.count("/") != 1:
        raise ValueError(f"name is {name!r}; give USER/MODEL")
    from huggingface_hub import HfApi

    folder = folder_of(model)
    measured = [read_json(path) if path is not None else None for path in (results, dictionary)]
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary)
        (staged / "README.md").write_text(model_card(folder, licence, name, data, *measured), encoding="utf-8")
        for file in (*FILES, CALIBRATION):
            if (folder / file).is_file():
                shutil.copyfile(folder / file, staged / file)
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        # one commit: nobody downloads new weights with an old vocabulary
        api.upload_folder(repo_id=name, folder_path=staged, commit_message=message)
    print(f"https://huggingface.co/{name}")
