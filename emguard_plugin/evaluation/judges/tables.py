"""Tables of judged answers that others wrote: one row an answer, with the two scores of arXiv 2502.17424."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from emguard_plugin.evaluation.judges.base import MALFORMED, SCORED, UNSCORED, Judgment
from emguard_plugin.evaluation.judges.outcomes import outcome
from emguard_plugin.evaluation.judges.scales import WORDS, Reading, combine
from emguard_plugin.files import read_objects, read_text, shown

COLUMNS = ("question", "answer", "aligned", "coherent")
DELIMITERS = {".tsv": "\t"}
EMPTY = frozenset(("", "nan", "none", "null", "na", "n/a", "<na>"))
"""What stands for no score; pandas writes the first two."""
LONGEST_CELL = 2**30
OTHER_SCALE = 10
"""Where no score of a whole table is above this, the table has another scale, such as 0 to 1 or 1 to 5."""

Key = tuple[str, str]


def is_table(file: str | Path) -> bool:
    """Return whether a file is a table by its name."""
    return str(file).removesuffix(".gz").endswith((".csv", ".tsv"))


def same(question: str, answer: str) -> Key:
    """Return what an answer is found by: what was asked and answered, whatever the line ends and the blanks around."""
    asked, said = (text.replace("\r\n", "\n").strip() for text in (question, answer))
    return asked, said


def read_table(file: str | Path, columns: Mapping[str, str]) -> dict[Key, Judgment]:
    """Return the judgment of each answer of a table.

    A score is a number from 0 to 100. An empty cell, `NaN`, text or another number is unscored with the reason; `REFUSAL` and
    `CODE` are read as of every judge: a refusal, and an answer that makes no sense. Of rows about one answer the mean is
    taken where they fall into one class; where they do not, the answer is unscored.

    Args:
        file: `.csv` or `.tsv`, packed as `.gz` or not; else rows of JSON.
        columns: Names of the columns that are called otherwise than `question`, `answer`, `aligned` and `coherent`.

    Raises:
        ValueError: If it cannot be read, lacks a column, has no row or plainly another scale.
    """
    names = {column: columns.get(column, column) for column in COLUMNS}
    rows = list(_cells(file, names) if is_table(file) else _values(file, names))
    if not rows:
        raise ValueError(f"{file} holds no judged answer.")
    found: dict[Key, list[Judgment]] = {}
    highest = 0.0
    for where, row in rows:
        for column in ("question", "answer"):
            if not isinstance(row[column], str):
                raise ValueError(f"{where}: `{names[column]}` is {shown(row[column])}, not a text.")
        readings = {column: _reading(row[column], names[column]) for column in ("aligned", "coherent")}
        highest = max([highest, *(reading.value for reading in readings.values() if reading.value is not None)])
        found.setdefault(same(row["question"], row["answer"]), []).append(combine(**readings))
    if 0 < highest <= OTHER_SCALE:
        raise ValueError(
            f"{file}: no score is above {highest:g}, so its scale is another one. `{names['aligned']}` and `{names['coherent']}` must "
            "be numbers from 0 to 100."
        )
    return {key: _together(judgments) for key, judgments in found.items()}


def _cells(file: str | Path, names: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    text = read_text(file)
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text, names), strict=True)
        header = [cell.strip() for cell in next(reader, [])]
        for wanted in names.values():
            if header.count(wanted) != 1:
                found = "no column" if wanted not in header else "two columns"
                raise ValueError(
                    f"{file} has {found} `{wanted}`; it has {', '.join(header) or 'none'}. Name the columns under `columns:`, such as "
                    "`columns: {question: prompt, answer: response}`."
                )
        places = {column: header.index(name) for column, name in names.items()}
        for cells in reader:
            where = f"{file}, line {reader.line_num}"
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise ValueError(f"{where} has {len(cells)} cells, the header {len(header)}.")
            yield where, {column: cells[place] for column, place in places.items()}
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num} is no row of a table: {error}.") from None
    finally:
        csv.field_size_limit(limit)


def _delimiter(text: str, names: Mapping[str, str]) -> str:
    """Return which sign parts the header into all the columns; a comma where none does."""
    first = text.lstrip().partition("\n")[0].strip()
    for sign in (",", ";", "\t", "|"):
        try:
            header = [cell.strip() for cell in next(csv.reader([first], delimiter=sign), [])]
        except csv.Error:
            continue
        if set(names.values()) <= set(header):
            return sign
    return ","


def _values(file: str | Path, names: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, value, _ in read_objects(file):
        for name in names.values():
            if name not in value:
                raise ValueError(f"{where} has no `{name}`; it has {', '.join(value) or 'nothing'}. Name the keys under `columns:`.")
        yield where, {column: value[name] for column, name in names.items()}


def _reading(cell: Any, name: str) -> Reading:
    if isinstance(cell, str):
        plain = cell.strip()
        if plain.upper() in WORDS:
            return Reading(word=plain.upper())
        if plain.lower() in EMPTY:
            cell = None
        else:
            try:
                cell = float(plain)
            except ValueError:
                return Reading(problem=MALFORMED, detail=f"`{name}` is {shown(plain)}, not a number")
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return Reading(problem=UNSCORED, detail=f"`{name}` is empty")
    if isinstance(cell, bool) or not isinstance(cell, Real):
        return Reading(problem=MALFORMED, detail=f"`{name}` is {shown(cell)}, not a number")
    if not 0 <= float(cell) <= 100:
        return Reading(problem=MALFORMED, detail=f"`{name}` is {shown(cell)}, not within 0 to 100")
    return Reading(float(cell))


def _together(judgments: list[Judgment]) -> Judgment:
    if len(judgments) == 1:
        return judgments[0]
    classes = sorted({outcome(j.aligned, j.coherent, j.status) for j in judgments})
    if len(classes) > 1:
        return Judgment.unscored(f"{len(judgments)} rows are about this answer and call it {' and '.join(classes)}")
    if judgments[0].status != SCORED or len({(j.aligned, j.coherent) for j in judgments}) == 1:
        return judgments[0]
    aligned, coherent = (_mean([getattr(j, name) for j in judgments]) for name in ("aligned", "coherent"))
    return Judgment(aligned, coherent, detail=f"mean of {len(judgments)} rows")


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
