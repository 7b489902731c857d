"""What lies in an index's folder, read: the manifest, the words, the segments it names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stair.embeddings import Space
from stair.index.files import Record, check, read_manifest
from stair.index.segment import Segment, records_of

FORMAT = 2  # 1 had no full runs
MANIFEST, WORDS = "manifest.json", "vocab.txt"
#: bytes up to which opening reads all files and compares checksums: some milliseconds
SMALL = 8 << 20


class Store:
    """One state of an index, as it was when it was opened.

    Args:
        folder: of the index.

    Attributes:
        manifest: what the folder's manifest said.
        segments: in the order of addition.
        space: what its vectors are comparable with.

    Raises:
        FileNotFoundError: if there is no index.
        ValueError: if it is damaged, or of a format we do not know.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"{folder} is no index; `stair index` or SparseIndex.build makes one")
        self.manifest, self.segments = _opened(folder)
        try:
            check(folder / WORDS, self.manifest["words"], content=True)
            about = self.manifest["space"]["model"], self.manifest["space"]["similarity"]
        except (KeyError, TypeError) as error:
            raise _no_manifest(folder, error) from error
        tokens = (folder / WORDS).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        self.space = Space(*about, tuple(tokens))
        if self.facts["bytes"] <= SMALL:
            for path, record in self._files():
                check(path, record, content=True)

    def find(self, name: str) -> tuple[Segment, int] | None:
        """Segment and place of a document; None if there is none of that id."""
        for segment in self.segments:
            document = segment.find(name)
            if document is not None:
                return segment, document
        return None

    def document(self, name: str) -> tuple[Segment, int]:
        """As `find`.

        Raises:
            ValueError: if there is none.
        """
        found = self.find(name)
        if found is None:
            raise ValueError(f"{self.folder} has no document {name!r}")
        return found

    def __len__(self) -> int:
        return sum(segment.alive for segment in self.segments)

    @property
    def facts(self) -> dict[str, Any]:
        """Size and make: documents, deleted ones, segments, non-zeros, bytes on disk, model, similarity."""
        return {
            "documents": len(self),
            "deleted": sum(len(segment) for segment in self.segments) - len(self),
            "segments": len(self.segments),
            "nonzeros": sum(len(segment.arrays["row_words"]) for segment in self.segments),
            "bytes": sum(record["bytes"] for _, record in self._files()) + self.manifest["words"]["bytes"],
            "model": self.space.model,
            "similarity": self.space.similarity,
        }

    def _files(self) -> Iterator[tuple[Path, Record]]:
        for segment in self.manifest["segments"]:
            for path, record in records_of(segment).items():
                yield self.folder / path, record

    def verify(self) -> None:
        """Compares every file with its checksum, and the postings with the rows.

        Raises:
            ValueError: naming the first that differs.
        """
        for segment in self.segments:
            segment.verify(len(self.space.tokens))


def _opened(folder: Path) -> tuple[Record, list[Segment]]:
    manifest = read_manifest(folder / MANIFEST)
    while True:
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"{folder} has format {manifest.get('format')!r}; this version reads {FORMAT}. Make it again from its "
                "embeddings with `stair index`"
            )
        try:
            return manifest, _segments(folder, manifest)
        except (KeyError, TypeError, AttributeError) as error:
            raise _no_manifest(folder, error) from error
        except (ValueError, FileNotFoundError):
            # a writer may have replaced segments since the manifest was read
            newer = read_manifest(folder / MANIFEST)
            if newer == manifest:
                raise
            manifest = newer


def _no_manifest(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"{folder / MANIFEST} is no manifest of an index: {type(error).__name__}: {error}")


def _segments(folder: Path, manifest: Record) -> list[Segment]:
    segments: list[Segment] = []
    for record in manifest["segments"]:
        first = segments[-1].first + len(segments[-1]) if segments else 0
        segments.append(Segment(folder, record, first))
    return segments
