"""The report's figures, as matplotlib `Figure`s without pyplot's global state.

What is drawn and saved within `style` looks the same for every user, and no text of a user is taken
for mathematics.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.lines
import matplotlib.patches
import matplotlib.ticker
import numpy as np
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure

from adv2_jax.validate import printable
from adv2_jax.workdir.store import NOT_PERTURBED

# One colour per attack everywhere; told apart with the usual colour-vision deficiencies, and
# readable on white and on black.
COLOURS = {
  'benign': '#2a9d6f',
  'again': '#5fae8f',
  'other': '#8b93a1',
  'pgd': '#e0752d',
  'adv2': '#3f7fe8',
  'adv2_joint': '#a05fe0',
}
LABELS = {
  'benign': 'benign',
  'again': 'other random numbers',
  'other': 'another image',
  'pgd': 'PGD',
  'adv2': 'ADV²',
  'adv2_joint': 'ADV² (joint)',
}
INTERPRETERS = {'grad': '#e0752d', 'cam': '#3f7fe8', 'mask': '#2a9d6f', 'rts': '#a05fe0'}
INK = '#010203'  # all text and axes; the report turns it into the page's own text colour
GRID = '#80808040'
_STYLE: Any = {
  'font.size': 10,
  'font.family': ['DejaVu Sans'],
  'text.parse_math': False,
  'axes.titlesize': 11,
  'axes.titleweight': 'bold',
  'axes.titlelocation': 'left',
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': INK,
  'axes.labelcolor': INK,
  'axes.titlecolor': INK,
  'text.color': INK,
  'xtick.color': INK,
  'ytick.color': INK,
  'axes.linewidth': 0.8,
  'axes.grid': True,
  'axes.axisbelow': True,
  'grid.color': GRID,
  'legend.frameon': False,
  'svg.hashsalt': 'adv2',  # the same bytes every time
}
_LINES = ('-', '--', ':', '-.')


@contextlib.contextmanager
def style() -> Iterator[None]:
  """The context in which figures are made and saved; a user's matplotlibrc does not reach it."""
  with matplotlib.rc_context(), warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Glyph .* missing from')  # of a class's name; boxes are drawn
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(_STYLE)
    yield


def png(figure: Figure) -> bytes:
  """The figure as a PNG file, the same bytes every time."""
  buffer = io.BytesIO()
  with style():
    figure.savefig(buffer, format='png', facecolor='white', metadata={'Software': None})
  return buffer.getvalue()


def colour(attack: str) -> str:
  """The attack's colour; grey for one that is not known."""
  return COLOURS.get(attack, '#8b93a1')


def label(attack: str) -> str:
  """The attack's name for people."""
  return LABELS.get(attack, attack)


class Panel(NamedTuple):
  """One picture of a gallery: u8[H,W,3], what stands above it, and in which colour."""

  image: np.ndarray
  caption: str
  attack: str = ''


def gallery(title: str, columns: Sequence[str], rows: Sequence[Sequence[Panel | None]]) -> Figure:
  """Pictures side by side: one row per example, one column per kind of picture."""
  # One axis in inches with all pictures in it: far quicker than an axis for each.
  side, gap, caption, top = 1.5, 0.06, 0.2, 0.75
  width, height = (side + gap) * len(columns) + gap, top + (side + caption) * len(rows) + gap
  figure = Figure(figsize=(width, height), dpi=160)
  axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
  axis.set_axis_off()
  axis.text(gap, 0.2, title, fontsize=12, fontweight='bold', va='center')
  for column, name in enumerate(columns):
    x = gap + column * (side + gap)
    axis.text(x, 0.57, name, fontsize=8.5, fontweight='bold', va='center')
    for row, panels in enumerate(rows):
      panel = panels[column]
      if panel is None:
        continue
      y = top + row * (side + caption) + caption
      axis.imshow(panel.image, extent=(x, x + side, y + side, y), interpolation='nearest')
      ink = colour(panel.attack) if panel.attack else INK
      axis.text(x, y - 0.03, _short(panel.caption), fontsize=6.5, color=ink, va='bottom')
  axis.set(xlim=(0, width), ylim=(height, 0))
  return figure


def _short(caption: str, width: int = 30) -> str:
  """What fits above a picture: a long name loses its middle, not the figures after it."""
  caption = printable(caption)
  return caption if len(caption) <= width else f'{caption[: width - 15]}…{caption[-14:]}'


_CURVES = {
  'success': ('Success rate (dot: as delivered)', 'linear'),
  'prediction': ('Prediction loss', 'log'),
  'interpretation': ('Interpretation loss', 'log'),
}

FLOOR = 1e-3  # a hinged loss reaches 0, which a logarithmic axis cannot show


def log_axis(axis: XAxis | YAxis) -> None:
  """A logarithmic axis with plain numbers, at two places or more, whatever its range."""
  axis.axes.set(**{f'{axis.axis_name}scale': 'log'})
  low, high = axis.get_view_interval()
  marks = [
    m * 10.0**k
    for k in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for m in (1, 2, 5)
  ]
  decades = marks[::3]
  if sum(low <= mark <= high for mark in decades) > 2:
    marks = decades
  while sum(low <= mark <= high for mark in marks) < 2:  # the nearest one comes into view
    below, above = max(m for m in marks if m < low), min(m for m in marks if m > high)
    low, high = (below, high) if low / below < above / high else (low, above)
    axis.axes.set(**{f'{axis.axis_name}lim': (low, high)})
  axis.set_major_locator(matplotlib.ticker.FixedLocator(marks))
  axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f'{v:g}'))
  axis.set_minor_locator(matplotlib.ticker.NullLocator())


def curves(
  history: Mapping[str, Mapping[str, Sequence[float | None]]], rows: Sequence[Mapping[str, Any]]
) -> Figure:
  """Success and both losses of the current image, over gradient evaluations.

  Colour is the attack, line style the interpreter; a dot at a line's end is the success of the
  images delivered, from the table's rows. A quantity that no run recorded is left out.
  """
  names = [n for n in _CURVES if any(_known(c.get(n, ())) for c in history.values())]
  names = names or ['success']
  interpreters = list(dict.fromkeys(key.partition('/')[2] for key in history))
  delivered = {f'{row["attack"]}/{row["interpreter"]}': row.get('asr') for row in rows}
  figure = Figure(figsize=(max(5, 3.6 * len(names)), 3.7), dpi=140, layout='constrained')
  axes = figure.subplots(1, len(names), squeeze=False)[0]
  for axis, name in zip(axes, names, strict=False):
    title, scale = _CURVES[name]
    for key, curve in history.items():
      attack, _, interpreter = key.partition('/')
      floor = FLOOR if scale == 'log' else -np.inf
      points = [
        (s, max(v, floor))
        for s, v in zip(curve['step'], curve.get(name, ()), strict=False)
        # A warm-up, like plain PGD, has no interpretation loss.
        if v is not None and (v > 0 or name != 'interpretation')
      ]
      if any(v > floor for _, v in points):
        axis.plot(
          *zip(*points, strict=True),
          color=colour(attack),
          linestyle=_LINES[interpreters.index(interpreter) % len(_LINES)],
          linewidth=2,
          label=f'{label(attack)} · {interpreter.upper()}',
        )
      if name == 'success' and delivered.get(key) is not None:
        end = curve['step'][-1], delivered[key]
        axis.plot(*end, 'o', color=colour(attack), markersize=7, markeredgecolor='white')
    axis.set_title(title)
    if scale == 'log' and axis.lines:
      log_axis(axis.yaxis)
    axis.set_xlabel('gradient evaluations per example')
    axis.set_xlim(left=0)
    if name == 'success':
      axis.set_ylim(-0.03, 1.03)
  handles, labels = axes[0].get_legend_handles_labels()
  if handles:
    figure.legend(handles, labels, loc='outside lower center', ncols=min(4, len(labels)))
  return figure


def _known(values: Sequence[float | None]) -> bool:
  return any(v is not None for v in values)


class Line(NamedTuple):
  """A line of a panel: its points [(x, y)], and how it looks."""

  label: str
  points: Sequence[tuple[float, float]]
  colour: str
  style: str = '-'


class Plot(NamedTuple):
  """Lines of shares, drawn from 0 to 1, over a quantity; `log`: over radii."""

  title: str
  across: str
  lines: Sequence[Line]
  log: bool = False


def plots(rows: Sequence[Sequence[Plot]]) -> Figure:
  """Lines with a mark at each point, plots beside and below one another, with one legend."""
  wide = max(map(len, rows))
  figure = Figure(
    figsize=(max(5.0, 3.2 * wide), 3.2 * len(rows) + 0.6), dpi=140, layout='constrained'
  )
  handles: dict[str, Any] = {}
  for axes, row in zip(figure.subplots(len(rows), wide, squeeze=False), rows, strict=True):
    for axis in axes[len(row) :]:
      axis.set_axis_off()
    for axis, plot in zip(axes, row, strict=False):
      drawn = [line for line in plot.lines if line.points]
      for line in drawn:
        (handles[line.label],) = axis.plot(
          *zip(*sorted(line.points), strict=True),
          color=line.colour,
          linestyle=line.style,
          marker='o',
          markersize=4,
          linewidth=2,
        )
      axis.set_title(plot.title)
      axis.set_xlabel(plot.across)
      if plot.log and drawn:
        _radius_axis(axis.xaxis, sorted({x for line in drawn for x, _ in line.points}))
      elif all(float(x).is_integer() for line in drawn for x, _ in line.points):
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
      axis.set_ylim(0, 1.03)
  if handles:
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=min(4, len(handles)))
  return figure


def _radius_axis(axis: XAxis | YAxis, radii: Sequence[float]) -> None:
  """A logarithmic axis with a mark at each radius, as a fraction of 255 where it is one."""
  axis.axes.set_xscale('log')
  levels = [255 * r for r in radii]
  names = [
    f'{k:.0f}/255' if abs(k - round(k)) < 1e-3 else f'{r:.3g}'
    for k, r in zip(levels, radii, strict=True)
  ]
  axis.set_major_locator(matplotlib.ticker.FixedLocator(radii))
  axis.set_major_formatter(matplotlib.ticker.FixedFormatter(names))
  axis.set_minor_locator(matplotlib.ticker.NullLocator())


_OVER_RADII = {
  'asr': 'Success rate',
  'mc_all': 'Probability of the target class',
  'map_iou_all': 'Map IoU with the target map',
}


def over_radii(rows: Sequence[Mapping[str, Any]]) -> Figure:
  """Success, p(target) and map IoU over all images, against ε.

  Colour is the attack, line style the interpreter.
  """
  kinds = dict.fromkeys((r['attack'], r['interpreter']) for r in rows)
  kinds = {k: None for k in kinds if k[0] not in NOT_PERTURBED}
  names = list(dict.fromkeys(name for _, name in kinds))
  row = []
  for field, title in _OVER_RADII.items():
    drawn = []
    for attack, name in kinds:
      own = [r for r in rows if (r['attack'], r['interpreter']) == (attack, name)]
      points = [(r['epsilon'], r[field]) for r in own if r.get(field) is not None]
      style = _LINES[names.index(name) % len(_LINES)]
      drawn.append(Line(f'{label(attack)} · {name.upper()}', points, colour(attack), style))
    row.append(Plot(title, 'ε', drawn, log=True))
  return plots([row])


def dots(
  named: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]], fields: Mapping[str, str]
) -> Figure:
  """Figures of several rows beside one another: a line for each, a dot for each attack.

  Args:
    named: (name, attack -> row).
    fields: field -> title of its panel.
  """
  attacks = [a for a in COLOURS if any(a in rows for _, rows in named)]
  n = len(named)
  figure = Figure(figsize=(2.2 + 3.0 * len(fields), 1.2 + 0.27 * n), dpi=140, layout='constrained')
  axes = figure.subplots(1, len(fields), squeeze=False, sharey=True)[0]
  for axis, (field, title) in zip(axes, fields.items(), strict=True):
    right = 0.0
    for k, (_, rows) in enumerate(named):
      for attack in attacks:
        value = figure_of(rows[attack], field) if attack in rows else None
        if value is not None:
          axis.plot(value, k, 'o', color=colour(attack), markersize=6.5, alpha=0.9)
          right = max(right, value)
    axis.set_title(title)
    axis.set_xlim(0, 1.05 * right or 1)
  axes[0].set_yticks(range(n), [name for name, _ in named])
  axes[0].set_ylim(n - 0.5, -0.5)
  handles = [
    matplotlib.lines.Line2D([], [], marker='o', linestyle='', color=colour(a), label=label(a))
    for a in attacks
  ]
  figure.legend(handles=handles, loc='outside lower center', ncols=max(1, len(handles)))
  return figure


def is_away(rows: Sequence[Mapping[str, Any]]) -> bool:
  """Whether the benign map was to be left, so that far is what was wanted."""
  return any(str(row.get('target_map')).startswith('away') for row in rows)


def figure_of(row: Mapping[str, Any], field: str) -> Any:
  """A figure of the table; of images nobody attacked over all of them, for want of successes."""
  value = row.get(field)
  if value is None and row['attack'] in NOT_PERTURBED:
    return row.get(f'{field}_all')
  return value


def bars(rows: Sequence[Mapping[str, Any]]) -> Figure:
  """Map L1 and IoU to the target map per interpreter: another image, PGD, ADV² side by side."""
  interpreters = list(dict.fromkeys(row['interpreter'] for row in rows))
  attacks = [a for a in COLOURS if a != 'benign' and any(row['attack'] == a for row in rows)]
  figure = Figure(figsize=(10, 3.6), dpi=140, layout='constrained')
  panels = {
    'map_l1': 'Map L1 to the target map (lower: better hidden)',
    'map_iou': 'Map IoU with the target map (higher: better hidden)',
  }
  if is_away(rows):
    panels = {
      'map_l1': 'Map L1 to the benign map (higher: further away)',
      'map_iou': 'Map IoU with the benign map (lower: further away)',
    }
  for axis, (field, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
    width = 0.8 / max(1, len(attacks))
    for k, attack in enumerate(attacks):
      heights = {r['interpreter']: figure_of(r, field) for r in rows if r['attack'] == attack}
      for i, interpreter in enumerate(interpreters):
        height = heights.get(interpreter)
        if height is None:
          continue
        x = i + (k - (len(attacks) - 1) / 2) * width
        axis.bar(x, height, width * 0.9, color=colour(attack))
        axis.annotate(
          f'{height:.{3 if field == "map_l1" else 2}f}'.lstrip('0'),
          (x, height),
          xytext=(0, 2),
          textcoords='offset points',
          ha='center',
          fontsize=7.5,
        )
    axis.set_xticks(range(len(interpreters)), [name.upper() for name in interpreters])
    axis.set_xlim(-0.5, len(interpreters) - 0.5)  # also where no success leaves no bar
    axis.set_title(title)
    axis.grid(False, axis='x')
    axis.set_ylim(bottom=0)
    axis.margins(y=0.12)
  handles = [matplotlib.patches.Patch(color=colour(a), label=label(a)) for a in attacks]
  if handles:
    figure.legend(handles=handles, loc='outside lower center', ncols=len(handles))
  return figure


def scatter(pairs: Mapping[str, np.ndarray], away: bool = False) -> Figure:
  """Each example's map L1 [n,2] under PGD (across) and under ADV² (up), a panel per interpreter."""
  figure = Figure(figsize=(max(5.0, 3.2 * len(pairs)), 3.5), dpi=140, layout='constrained')
  axes = figure.subplots(1, max(1, len(pairs)), squeeze=False)[0]
  for axis, (interpreter, points) in zip(axes, pairs.items(), strict=False):
    across, up = points.T
    top = 1.05 * max(across.max(), up.max(), 1e-3)
    axis.plot([0, top], [0, top], color=INK, linewidth=0.8, linestyle=':')
    axis.scatter(across, up, s=22, alpha=0.65, color=colour('adv2'), linewidths=0)
    axis.set(xlim=(0, top), ylim=(0, top), aspect='equal')
    axis.set_title(interpreter.upper())
    axis.set_xlabel('map L1 under PGD')
    better = int((up > across).sum() if away else (up < across).sum())
    aim = 'further from the benign' if away else 'closer to the target'
    note = f'ADV² {aim}\nmap: {better} of {len(points)}'
    axis.text(0.04, 0.96, note, transform=axis.transAxes, va='top', fontsize=8)
  axes[0].set_ylabel('map L1 under ADV²')
  if not pairs:
    axes[0].set_axis_off()
  return figure


class Heat(NamedTuple):
  """A table of numbers [rows, columns], NaN where there is none; which of them have a frame.

  limits: the numbers where the colour is palest and darkest; None: the largest of each column.
  """

  values: np.ndarray
  framed: np.ndarray
  limits: tuple[float | None, float | None]


def heat_maps(panels: Mapping[str, Heat], down: Sequence[str], across: Sequence[str]) -> Figure:
  """Annotated tables side by side, a title above each; dark is where an attack is hidden well."""
  letters = max(len(line) for name in across for line in name.splitlines())
  n, wide = len(panels), max(3.6, max(0.85, 0.1 * letters) * len(across))
  tall = 1.5 + 0.5 * len(down) + 0.15 * max(name.count('\n') for name in across)
  figure = Figure(figsize=(n * wide + 0.8, tall), dpi=140, layout='constrained')
  for axis, (title, heat) in zip(
    figure.subplots(1, n, squeeze=False)[0], panels.items(), strict=True
  ):
    top = np.nan_to_num(heat.values).max(0) + 1e-6
    low, high = (top if limit is None else limit for limit in heat.limits)
    depth = np.clip((heat.values - low) / (high - low), 0, 1)
    axis.imshow(np.ma.masked_invalid(depth), cmap='Blues', vmin=0, vmax=1.15, aspect='auto')
    for (row, column), value in np.ndenumerate(heat.values):
      text = '–' if np.isnan(value) else f'{value:.3f}'.removeprefix('0')
      ink = 'white' if depth[row, column] > 0.6 else INK
      axis.text(column, row, text, ha='center', va='center', color=ink)
      if heat.framed[row, column]:
        corner = (column - 0.46, row - 0.44)
        axis.add_patch(
          matplotlib.patches.Rectangle(corner, 0.92, 0.88, fill=False, ec=colour('pgd'), lw=2)
        )
    axis.set_xticks(range(len(across)), across)
    axis.set_yticks(range(len(down)), down if axis.get_subplotspec().is_first_col() else [])
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set_title(title)
    axis.set_xlabel('seen by (framed: attacked)')
  figure.axes[0].set_ylabel('attacked')
  return figure
