r"""The tables of the evaluation programme: `python -m experiments.tables --table E1,E2`.

    python -m experiments.tables --table all --scale cpu
    python -m experiments.tables --table E1,E2 --on 'cifar10 200/64 --dataset packed \
      --data_path cifar10_test.npz --model cifar_resnet20 --weights cifar_resnet20.npz'

Each table is a declared list of runs of experiments.attack, on the built-in scenes and on whatever
--on adds: a name, how many images (and of those how many where MASK is among the interpreters), and
flags of experiments.attack. Every run is a process of its own with a working directory below
--workdir that is named after its flags: what is finished is used again, by other tables too, and
what was killed goes on. A run that fails costs the tables that need it, not the others. Writes
E1.csv, .md, .tex and .png, the Markdown with the commands.
"""

import concurrent.futures
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from adv2_jax import images
from adv2_jax.types import InputError
from adv2_jax.workdir import figures, results, store
from experiments import _flags, _matrix, _printed, _programme
from experiments._printed import Column, Grid
from experiments._programme import JOINT, Cases, Run, Subject

Row = dict[str, Any]


# From the runs to rows.


def read(subject: Subject, case: str, folder: pathlib.Path) -> list[Row]:
  """The rows of a run, each with what it is of and how it compares with others of its run."""
  found = results.read_results(folder).rows
  plain = {(r['interpreter'], r.get('epsilon')): r for r in found if r['attack'] == 'pgd'}
  single = {r['interpreter']: r['map_iou'] for r in found if r['attack'] == 'adv2'}
  rows = []
  for row in found:
    own = {'data': subject.name, 'case': case, **row}
    before = plain.get((row['interpreter'], row.get('epsilon')), {})
    for field in ('map_l1', 'l2_mean'):
      value, scale = row.get(field), before.get(field)
      own[f'{field}_of_pgd'] = value / scale if value is not None and scale else None
    if row['attack'] == 'adv2_joint' and (alone := single.get(row['interpreter'])):
      iou = row['map_iou']
      own['map_iou_of_single'] = None if iou is None else iou / alone
    if row.get('seconds') is not None and row['n']:
      own['seconds_per_image'] = row['seconds'] / row['n']
    rows.append(own)
  return rows


def read_shown(subject: Subject, case: str, folder: pathlib.Path) -> list[Row]:
  """What all interpreters saw; images made for all but one are named after that one."""
  file = folder / 'transfer' / 'transfer.json'
  found = store.read_json(file, 'is damaged; remove it')['rows']
  without = [name for name in subject.joint if case and name not in case.split(JOINT)]
  made_for = {'made_for': f'joint without {without[0]}'} if without else {}
  return [{'data': subject.name, 'case': case, **made_for, **row} for row in found]


# What they look like.


ASR = Column('asr', 'ASR')
WHO = (
  Column('data', 'data'),
  Column('case', 'case'),
  Column('interpreter', 'interpreter'),
  Column('attack', 'attack'),
  Column('n', 'n'),
)
L1, IOU = Column('map_l1', 'map L1'), Column('map_iou', 'IoU')
OF_PGD = Column('map_l1_of_pgd', 'L1 / PGD’s')
MEDIAN = Column('map_l1_median', 'median L1')
EPSILON = Column('epsilon', 'ε', '.4f')
TWO_CLASS = Column('two_class_l1', 'two-class L1')


class Table(NamedTuple):
  """A table: its title, its runs, the rows it shows of them, its columns and its figure."""

  title: str
  cases: Callable[[Subject], Cases]
  attacks: tuple[str, ...]
  columns: tuple[Column, ...]
  draw: Callable[['Table', Sequence[Row]], Figure]
  dotted: tuple[Column, ...] = ()  # of the figure, where it has all data; else it has one for each
  read: Callable[[Subject, str, pathlib.Path], list[Row]] = read


def draw_dots(table: Table, rows: Sequence[Row]) -> Figure:
  """A line per interpreter, data and case, a dot per attack."""
  several = len({row['data'] for row in rows}) > 1
  named: dict[str, dict[str, Row]] = {}
  for row in rows:
    parts = [row['interpreter'].upper(), row['case'], row['data'] if several else '']
    named.setdefault(' · '.join(p for p in parts if p), {})[row['attack']] = row
  return figures.dots(list(named.items()), {c.field: c.title for c in table.dotted})


def draw_heat(table: Table, rows: Sequence[Row]) -> Figure:
  """The heat maps of experiments.transfer."""
  del table
  return _matrix.draw(rows, _matrix.classifier_of(rows[0]))


def _line(name: str, rows: Iterable[Row], x: Callable[[Row], float], field: str) -> figures.Line:
  own = [r for r in rows if r['interpreter'] == name and r.get(field) is not None]
  points = [(x(r), r[field]) for r in own]
  return figures.Line(name.upper(), points, figures.INTERPRETERS.get(name, figures.INK))


def _plot(
  title: str, across: str, rows: Sequence[Row], x: Callable[[Row], float], field: str
) -> figures.Plot:
  names = list(dict.fromkeys(row['interpreter'] for row in rows))
  return figures.Plot(title, across, [_line(name, rows, x, field) for name in names])


def _levels(row: Row) -> float:
  return round(255 * row['epsilon'], 3)


RADIUS, WAY = 'ε in grey levels', 'share of the way'


def draw_gap(table: Table, rows: Sequence[Row]) -> Figure:
  """Both experiments against ε, and along the path of target maps."""
  del table
  held, moved, path = (
    [r for r in rows if r['attack'] == 'adv2' and r['case'].startswith(case)]
    for case in ('class held', 'map held', 'path')
  )
  share = lambda r: float(r['case'].split()[1])  # noqa: E731
  return figures.plots(
    [
      [
        _plot('Class held: IoU with the benign', RADIUS, held, _levels, 'map_iou_all'),
        _plot('Map held: p(target)', RADIUS, moved, _levels, 'mc_all'),
        _plot('Along the path: p(target)', WAY, path, share, 'mc_all'),
      ],
      [
        _plot('Class held: top-k in common', RADIUS, held, _levels, 'map_topk_all'),
        _plot('Map held: IoU', RADIUS, moved, _levels, 'map_iou_all'),
        _plot('Along the path: IoU', WAY, path, share, 'map_iou_all'),
      ],
    ]
  )


def draw_joint(table: Table, rows: Sequence[Row]) -> Figure:
  """IoU against the number of interpreters attacked, and against ε."""
  del table
  within = [r for r in rows if r['case'] == 'radii' and r['attack'] == 'adv2_joint']
  several = [r for r in rows if r['case'] != 'radii']
  names = list(dict.fromkeys(row['interpreter'] for row in several))

  def size(row: Row) -> int:
    return 1 if row['attack'] == 'adv2' else row['case'].count(JOINT) + 1

  def means(name: str) -> list[tuple[float, float]]:
    found: dict[int, list[float]] = {}
    for row in several:
      hides = row['attack'] in ('adv2', 'adv2_joint') and row['map_iou'] is not None
      if hides and row['interpreter'] == name:
        found.setdefault(size(row), []).append(row['map_iou'])
    return [(k, sum(v) / len(v)) for k, v in found.items()]

  drawn = [
    figures.Line(n.upper(), means(n), figures.INTERPRETERS.get(n, figures.INK)) for n in names
  ]
  across = 'interpreters attacked at once'
  return figures.plots(
    [
      [
        figures.Plot('Map IoU, means over the subsets', across, drawn),
        _plot('All at once: map IoU, all images', RADIUS, within, _levels, 'map_iou_all'),
      ]
    ]
  )


TABLES = {
  'E1': Table(
    'Effect on the prediction',
    _programme.effect,
    ('pgd', 'adv2'),
    (ASR, Column('asr_ci95', '95 %'), Column('mc', 'MC')),
    draw_dots,
    (ASR, Column('mc', 'MC (confidence of the successes)')),
  ),
  'E2': Table(
    'Effect on the interpretation',
    _programme.effect,
    ('other', 'pgd', 'adv2'),
    (
      L1,
      MEDIAN,
      OF_PGD,
      Column('map_l2', 'map L2'),
      IOU,
      Column('map_spearman', 'Spearman'),
      TWO_CLASS,
    ),
    draw_dots,
    (L1, MEDIAN, IOU),
  ),
  'E3': Table(
    'Random patches and random classes as target maps',
    _programme.other_maps,
    ('pgd', 'adv2'),
    (ASR, Column('patch_iou', 'patch IoU'), L1, MEDIAN, OF_PGD, IOU),
    draw_dots,
    (ASR, IOU, Column('patch_iou', 'IoU with the patch')),
  ),
  'E4': Table(
    'Other frameworks: StAdv and C&W',
    _programme.other_frameworks,
    ('pgd', 'adv2'),
    (
      ASR,
      Column('mc', 'MC'),
      L1,
      OF_PGD,
      IOU,
      Column('l2_mean', 'L2', '.2f'),
      Column('l2_mean_of_pgd', 'L2 / plain’s', '.2f'),
      Column('flow_max', 'max px', '.1f'),
      Column('gradient_evaluations', 'evals'),
      Column('seconds_per_image', 's/image', '.2f'),
    ),
    draw_dots,
    (ASR, L1, Column('gradient_evaluations', 'Gradient evaluations')),
  ),
  'E6': Table(
    'Transfer between interpreters',
    _programme.looking_on,
    (),
    (),
    draw_heat,
    read=read_shown,
  ),
  'E7': Table(
    'The gap between prediction and interpretation',
    _programme.gap,
    ('pgd', 'adv2'),
    (
      EPSILON,
      ASR,
      Column('mc_all', 'p(target)'),
      Column('map_l1_all', 'map L1, all'),
      Column('map_iou_all', 'IoU, all'),
      Column('map_topk_all', 'top-k, all'),
    ),
    draw_gap,
  ),
  'speed': Table(
    'Gradient evaluations and seconds: fast beside authors',
    _programme.speed,
    ('pgd', 'adv2'),
    (
      ASR,
      L1,
      IOU,
      Column('gradient_evaluations', 'evals'),
      Column('network_passes', 'passes'),
      Column('seconds_per_image', 's/image', '.2f'),
    ),
    draw_dots,
    (L1, IOU, Column('gradient_evaluations', 'Gradient evaluations')),
  ),
  'literature': Table(
    'Attacks of the literature, beside ours',
    _programme.literature,
    ('pgd', 'adv2'),
    (
      ASR,
      Column('mc', 'MC'),
      L1,
      MEDIAN,
      IOU,
      Column('map_topk', 'top-k'),
      Column('gradient_evaluations', 'evals'),
    ),
    draw_dots,
    (ASR, L1, IOU),
  ),
  'joint': Table(
    'All interpreters at once',
    _programme.joint,
    ('pgd', 'adv2', 'adv2_joint'),
    (
      EPSILON,
      ASR,
      Column('mc', 'MC'),
      L1,
      MEDIAN,
      IOU,
      Column('map_iou_of_single', 'IoU / single'),
      TWO_CLASS,
    ),
    draw_joint,
  ),
}


def grid(table: Table, rows: Sequence[Row]) -> Grid:
  """The columns that are neither empty nor the same word everywhere."""
  if table.read is read_shown:
    return _transfer_grid(rows)
  columns = [
    c
    for c in (*WHO, *table.columns)
    if any(r.get(c.field) not in (None, '') for r in rows)
    and (c.field not in ('data', 'case') or len({r[c.field] for r in rows}) > 1)
  ]
  is_text = [any(isinstance(r.get(c.field), str) for r in rows) for c in columns]
  lines = [
    [
      figures.label(r['attack']) if c.field == 'attack' else _printed.cell(r.get(c.field), c.form)
      for c in columns
    ]
    for r in rows
  ]
  return Grid([c.title for c in columns], lines, is_text)


def _transfer_grid(rows: Sequence[Row]) -> Grid:
  """IoU: what was attacked down, who looks across, data after data."""
  found = {}
  for name in dict.fromkeys(row['data'] for row in rows):
    own = [row for row in rows if row['data'] == name]
    found[name] = _matrix.matrix(own, 'map_iou', _matrix.classifier_of(own[0]))
  across = list(dict.fromkeys(who for m in found.values() for who in m.across))
  lines = []
  for name, m in found.items():
    for down, numbers in zip(m.down, m.numbers(), strict=True):
      cells = dict(zip(m.across, numbers, strict=True))
      lines.append([name, down, *(cells.get(who, '–') for who in across)])
  head = ['data', 'attacked', *(f'IoU, seen by {who}' for who in across)]
  return Grid(head, lines, [True, True] + [False] * len(across))


# The command.


def command_of(module: str, flags: Mapping[str, str]) -> list[str]:
  """A command line, from python on."""
  words = [f'--{k}' if v == 'true' else f'--{k}={v}' for k, v in flags.items()]
  return ['python', '-m', f'experiments.{module}', *words]


def make(run: Run, folder: pathlib.Path, cache: str | None, is_quiet: bool) -> list[str]:
  """Sees to it that the run is finished; the commands that do it."""
  commands = [command_of('attack', run.flags | {'workdir': str(folder)})]
  if not (folder / 'metrics.json').exists():
    _start([*commands[0], '--resume'], folder, cache, is_quiet)
  if run.shown_to:
    looking = {'workdir': str(folder), 'interpreters': ','.join(run.shown_to)}
    if run.decoder is not None and 'rts' in run.shown_to:
      looking['decoder'] = run.decoder
    commands.append(command_of('transfer', looking))
    if not (folder / 'transfer' / 'transfer.json').exists():
      _start(commands[1], folder, cache, is_quiet)
  return [shlex.join(command) for command in commands]


def _start(command: Sequence[str], folder: pathlib.Path, cache: str | None, is_quiet: bool) -> None:
  own = [sys.executable, *command[1:]]
  if cache is not None:
    own.append(f'--compilation_cache={cache}')
  print(shlex.join(command), file=sys.stderr, flush=True)
  folder.parent.mkdir(parents=True, exist_ok=True)
  log = folder.with_suffix('.log')
  with open(log if is_quiet else os.devnull, 'wb') as told:
    errors = told if is_quiet else None
    done = subprocess.run(own, stdout=subprocess.DEVNULL, stderr=errors, check=False)
  if done.returncode:
    where = f'see {log}' if is_quiet else 'see what it told above'
    raise InputError(f'{shlex.join(command)} ended with {done.returncode}, {where}')


def run(config: dict[str, Any]) -> pathlib.Path:
  """The whole command, once the flags are known."""
  names = list(TABLES) if config['table'] == ['all'] else config['table']
  if not names or not set(names) <= TABLES.keys():
    raise InputError(
      f'--table is {",".join(names)!r}; expected some of {", ".join(TABLES)}, or all'
    )
  if config['jobs'] < 1:
    raise InputError(f'--jobs is {config["jobs"]}; expected how many runs at a time, 1 or more')
  found = _programme.subjects(config)
  folder = store.directory(config['workdir'] or f'runs/tables-{config["scale"]}')
  declared = {
    name: [
      (subject, case, one, folder / one.folder(subject.name))
      for subject in found
      for case, one in TABLES[name].cases(subject)
    ]
    for name in names
  }
  unique = {where: one for runs in declared.values() for _, _, one, where in runs}
  cache, is_quiet = config.get('compilation_cache'), config['jobs'] > 1
  with concurrent.futures.ThreadPoolExecutor(config['jobs']) as pool:
    made = {where: pool.submit(make, one, where, cache, is_quiet) for where, one in unique.items()}
    failed: dict[str, None] = {}
    try:
      for name, runs in declared.items():
        commands, wrong = [], []
        for where in dict.fromkeys(r[-1] for r in runs):
          try:
            commands += made[where].result()
          except InputError as error:
            wrong.append(str(error))
        if not wrong:
          _write(name, runs, commands, folder)
        failed |= dict.fromkeys(f'no {name}: {text}' for text in wrong)
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
  if failed:
    raise InputError('; '.join(failed))
  return folder


def _write(
  name: str,
  runs: Sequence[tuple[Subject, str, Run, pathlib.Path]],
  commands: Sequence[str],
  folder: pathlib.Path,
) -> None:
  """A table, once its runs are there."""
  table, rows = TABLES[name], []
  machines: dict[str, None] = {}
  for subject, case, _, where in runs:
    told = results.read_results(where).environment
    machines[f'{told.get("devices", "?")}, jax {told.get("jax", "?")}'] = None
    own = table.read(subject, case, where)
    rows += [r for r in own if not table.attacks or r['attack'] in table.attacks]
  printed = grid(table, rows)
  text = _printed.markdown(table.title, printed, commands, list(machines))
  files = {f'{name}.csv': _printed.to_csv(rows), f'{name}.md': text.encode()}
  files[f'{name}.tex'] = _printed.latex(table.title, printed).encode()
  for file, of in _figures(name, table, rows):
    with figures.style():
      files[file] = figures.png(table.draw(table, of))
  with store.writing(folder, 'make room, then start it again'):
    for file, content in files.items():
      images.write_atomic(folder / file, content)
  print(text)
  print(folder / f'{name}.md')


def _figures(name: str, table: Table, rows: Sequence[Row]) -> Iterator[tuple[str, Sequence[Row]]]:
  """(file, rows): one for all data, or one for each, the first with the table's own name."""
  if table.dotted:
    yield f'{name}.png', rows
    return
  for k, data in enumerate(dict.fromkeys(row['data'] for row in rows)):
    yield f'{name}{f"-{data}" * (k > 0)}.png', [row for row in rows if row['data'] == data]


if __name__ == '__main__':
  _flags.define_tables_flags()
  _flags.start(run)
