"""Rows of hub data sets and of folders from datasets' save_to_disk. Imports datasets on first use."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import first_line
from launcher.prepare.arrow_rows import content_columns, empty_rows, table_rows, table_summary
from launcher.prepare.read_files import file_reader
from launcher.prepare.rows import BadFile, FileSummary, Row, RowReader
from launcher.prepare.sources import hub_hint, saved_splits

_FILE_BUILDERS = ("json", "csv", "parquet")
_IRRELEVANT_OPTIONS = ("name", "version", "data_dir", "data_files", "description", "features")
_BATCH = 256


class StoredTable:
    """One split that the datasets library stores as Arrow."""

    def __init__(self, name: str, dataset: Any) -> None:
        self.name = name
        self._dataset = dataset

    def summary(self) -> FileSummary:
        return table_summary(self.name, len(self._dataset), self._dataset.features.arrow_schema)

    def rows(self) -> Iterator[Row]:
        columns = content_columns(self._dataset.column_names)
        if not columns:
            yield from empty_rows(self.name, len(self._dataset))
            return
        table = self._dataset.select_columns(columns).with_format("arrow")
        yield from table_rows(self.name, table.iter(_BATCH), table.features.arrow_schema)


class Slice:
    """Rows `start` to `stop` (excluded) of the files of one split."""

    def __init__(self, name: str, files: Sequence[RowReader], start: int, stop: int) -> None:
        self.name = name
        self._files, self._start, self._stop = files, start, stop

    def summary(self) -> FileSummary:
        summaries = [file.summary() for file in self._files]
        columns = dict.fromkeys(itertools.chain.from_iterable(summary.columns for summary in summaries))
        notes = tuple(note for summary in summaries for note in summary.notes)
        return FileSummary(self._stop - self._start, tuple(columns), notes)

    def rows(self) -> Iterator[Row]:
        rows = itertools.chain.from_iterable(file.rows() for file in self._files)
        yield from itertools.islice(rows, self._start, self._stop)


def hub_readers(name: str, config: str | None, split: str) -> list[RowReader]:
    """The readers of a hub data set's split, which may be a slice such as train[:1000]. Raises BadFile.

    Hub files are read like local ones: the datasets library would read text that is JSON as an object, and a cell with
    NA as missing.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(name, config)
        if (files := _files_of(builder)) is not None:
            return _slices(name, files, split)
        return [StoredTable(f"{name} ({split})", datasets.load_dataset(name, config, split=split))]
    except BadFile:
        raise
    except Exception as error:  # each builder raises its own types for a broken file
        raise BadFile(name, f"cannot be read: {first_line(error.__cause__ or error)}", hub_hint(name)) from None


def saved_reader(folder: Path, split: str) -> RowReader:
    """The reader of a folder from save_to_disk: of its `split` if it has several. Raises BadFile."""
    import datasets

    splits = saved_splits(folder)
    if splits is not None and split not in splits:
        raise BadFile(str(folder), f"has no split {split}", f"data.split or data.eval_split: {', '.join(splits)}")
    path = folder if splits is None else folder / split
    try:
        return StoredTable(str(path), datasets.load_from_disk(str(path)))
    except Exception as error:  # Arrow and datasets raise many types
        raise BadFile(str(path), f"cannot be read: {first_line(error)}") from None


def _files_of(builder: Any) -> dict[str, list[RowReader]] | None:
    """Readers of the downloaded files of each split; None if the data set needs a script or reading options."""
    from datasets import DownloadManager

    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in _FILE_BUILDERS or not builder.config.data_files or _has_options(builder.config):
        return None
    manager = DownloadManager()
    files: dict[str, list[RowReader]] = {}
    for split, paths in builder.config.data_files.items():
        fetched = manager.download(list(paths))
        files[str(split)] = [file_reader(Path(path), kind) for path in fetched]
    return files


def _has_options(config: Any) -> bool:
    """Whether the data set has reading options (another delimiter, a field)."""
    default = type(config)()
    names = [field.name for field in dataclasses.fields(config) if field.name not in _IRRELEVANT_OPTIONS]
    return any(getattr(config, name) != getattr(default, name) for name in names)


def _slices(name: str, files: dict[str, list[RowReader]], split: str) -> list[RowReader]:
    from datasets import ReadInstruction

    counts = {each: sum(file.summary().rows for file in readers) for each, readers in files.items() if each in split}
    if not counts:
        raise BadFile(name, f"has no split {split}", f"data.split or data.eval_split: {', '.join(files)}")
    parts = ReadInstruction.from_spec(split).to_absolute(counts)
    return [
        Slice(f"{name} ({split})", files[p.splitname], p.from_ or 0, _stop(p.to, counts[p.splitname])) for p in parts
    ]


def _stop(to: int | None, count: int) -> int:
    return count if to is None else min(to, count)
