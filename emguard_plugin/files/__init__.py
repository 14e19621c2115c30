r"""From the bytes of a file to values: the one place that reads JSON Lines, JSON and YAML, others' and our own.

What is not what was expected is a `ValueError` of one sentence that names the file and, where there is one, the line.

JSON Lines are cut at `\n` alone, as JSON defines it: U+2028, U+2029, U+0085 and form feeds are text. A BOM, CRLF and blank
lines are no fault, a JSON list in place of lines or the reverse is read, and `.gz` is unpacked. A key that occurs twice in
one object is a fault: one of the two values would be lost.
"""

from emguard_plugin.files.json_files import (
    EXACT,
    Row,
    parsed,
    read_json,
    read_objects,
    read_record,
    read_records,
    read_rows,
    seal_of,
)
from emguard_plugin.files.text import first_line, read_text, shown
from emguard_plugin.files.yaml_files import read_yaml

__all__ = [
    "EXACT", "Row", "first_line", "parsed", "read_json", "read_objects", "read_record", "read_records", "read_rows", "read_text", "read_yaml", "seal_of", "shown",
]  # fmt: skip
