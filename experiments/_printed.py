"""A table as Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Column(NamedTuple):
  """A column of a printed table."""

  field: str
  title: str
  form: str = '.3f'


class Grid(NamedTuple):
  """A table as it is printed."""

  head: list[str]
  lines: list[list[str]]
  is_text: list[bool]


def cell(value: Any, form: str) -> str:
  """A value as it is printed."""
  if value is None:
    return '–'
  if isinstance(value, list | tuple):
    return '–'.join(cell(v, form) for v in value)
  return format(value, form) if isinstance(value, float) else str(value)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """In Markdown."""
  row = lambda cells: f'| {" | ".join(cells)} |'  # noqa: E731
  return '\n'.join([row(head), '|---' * len(head) + '|', *map(row, lines)])


def markdown(title: str, found: Grid, commands: Sequence[str], machines: Sequence[str]) -> str:
  """The table for a README, and the commands that made its runs on which machines."""
  made = f'Made on {"; ".join(machines)} by'
  lines = [f'# {title}', '', table(found.head, found.lines), '', made, '', '```']
  return '\n'.join([*lines, *commands, '```']) + '\n'


_TEX = {'&': r'\&', '%': r'\%', '_': r'\_', '#': r'\#', '²': r'\textsuperscript{2}'} | {
  '–': '--',
  'ε': r'$\varepsilon$',
  '’': "'",
}


def latex(title: str, found: Grid) -> str:
  """The same with the rules of LaTeX's booktabs."""
  tex = lambda text: ''.join(_TEX.get(letter, letter) for letter in text)  # noqa: E731
  row = lambda cells: ' & '.join(map(tex, cells)) + r' \\'  # noqa: E731
  return '\n'.join(
    [
      f'% {title}; needs \\usepackage{{booktabs}}',
      r'\begin{tabular}{' + ''.join('l' if text else 'r' for text in found.is_text) + '}',
      r'\toprule',
      row(found.head),
      r'\midrule',
      *map(row, found.lines),
      r'\bottomrule',
      r'\end{tabular}',
      '',
    ]
  )


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
  """All fields of all rows."""
  fields = list(dict.fromkeys(field for row in rows for field in row))
  text = io.StringIO()
  writer = csv.DictWriter(text, fields, restval='', lineterminator='\n')
  writer.writeheader()
  for row in rows:
    writer.writerow(
      {k: '–'.join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
    )
  return text.getvalue().encode()
