"""The page `report.html`: one file, with pictures, curves and style inside it.

Nothing is loaded from elsewhere; whatever a run lacks (an attack, an interpreter, curves) is left
out.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from matplotlib.figure import Figure

from adv2_jax.validate import printable
from adv2_jax.workdir import figures, health
from adv2_jax.workdir.results import Results
from adv2_jax.workdir.store import part_name

_PICTURE_SIDE = 224  # larger pictures are shrunk for the page


class Gallery(NamedTuple):
  """Pictures of one interpreter: a column per kind of picture, a row per example."""

  interpreter: str
  columns: list[str]
  rows: list[tuple[figures.Panel | None, ...]]
  choice: str  # which images these are, as a sentence


class _Column(NamedTuple):
  field: str
  title: str
  form: Callable[[Any], str]
  meaning: str


def _share(v: float) -> str:
  return f'{100 * v:.1f} %'


def _three(v: float) -> str:
  return f'{v:.3f}'


def _whole(v: float) -> str:
  return f'{v:.0f}'


_TABLE = (
  _Column(
    'epsilon',
    'ε',
    lambda v: f'{v:.4g}',
    'The perturbation limit.',
  ),
  _Column(
    'n',
    'images',
    _whole,
    'How many images were attacked; all were classified correctly before.',
  ),
  _Column(
    'asr',
    'success',
    _share,
    'Share of images that the real classifier, given the saved 8-bit file, takes for the target '
    'class (with the goal map_only, the true one). Below it the 95 % interval (Wilson).',
  ),
  _Column(
    'mc',
    'confidence',
    _three,
    'Mean probability of the target class over the successes.',
  ),
  _Column(
    'map_l1',
    'map L1',
    _three,
    'Mean absolute difference between the map of the target class and the target map; 0 is '
    'identical. Below it the median, which single failures do not move.',
  ),
  _Column(
    'map_iou',
    'map IoU',
    _three,
    'Overlap of the most important fifth of the two maps; 1 is identical. Below it the median.',
  ),
  _Column(
    'map_spearman',
    'rank corr.',
    _three,
    'Spearman correlation of the two maps: whether they rank the places of the image alike; 1 '
    'is the same order, 0 unrelated.',
  ),
  _Column(
    'patch_iou',
    'patch IoU',
    _three,
    'Overlap of the patch aimed at and as many of the most important cells of the map.',
  ),
  _Column(
    'map_ssim',
    'SSIM',
    _three,
    'Structural similarity of the two maps at image size; 1 is identical.',
  ),
  _Column(
    'map_centre',
    'centre',
    _three,
    'How far apart the centres of mass of the two maps are, as a share of the diagonal.',
  ),
  _Column(
    'two_class_l1',
    'two-class L1',
    _three,
    'Change of the maps of the true and of the target class together, against the benign '
    'image; an attack that only hides in one of them shows here.',
  ),
  _Column(
    'pointing_game',
    'pointing',
    _share,
    'Share of maps whose maximum lies on the true object.',
  ),
  _Column(
    'energy_inside',
    'energy inside',
    _share,
    'Share of the map that lies on the true object.',
  ),
  _Column(
    'flow_max',
    'moved',
    lambda v: f'{v:.1f} px',
    'Largest displacement of any pixel in any image.',
  ),
  _Column(
    'l2_mean',
    'L2',
    lambda v: f'{v:.2f}',
    'Mean L2 norm of the change of an image in [0,1].',
  ),
  _Column(
    'linf_max',
    'max change',
    lambda v: f'{255 * v:.0f}/255',
    'Largest change of any pixel in any image, in grey levels.',
  ),
  _Column(
    'out_of_set',
    'outside',
    _whole,
    'Images that break the perturbation limit; must be 0.',
  ),
  _Column(
    'nonfinite',
    'not finite',
    _whole,
    'Images with a value that is not a number; counted as failures, must be 0.',
  ),
  _Column(
    'gradient_evaluations',
    'gradients',
    _whole,
    'Loss gradients per image, warm start included: the cost of the attack.',
  ),
  _Column(
    'network_passes',
    'passes',
    _whole,
    'Forward passes of the network per image, each backward pass counted as one more.',
  ),
  _Column(
    'seconds',
    'seconds',
    lambda v: f'{v:.1f}',
    'Wall time of the computation, compilation apart.',
  ),
)

# Columns that say something only where (framework, norm) is one of these.
_ONLY_WITH = {
  'flow_max': (('stadv', 'linf'),),
  'l2_mean': (('cw', 'linf'), ('pgd', 'l2')),
  'linf_max': (('pgd', 'linf'),),
}
_WITH_MEDIAN = ('map_l1', 'map_iou')

_ZERO = {
  'out_of_set': 'No image breaks the perturbation limit.',
  'nonfinite': 'Every value is a finite number.',
}


def render(results: Results, galleries: Mapping[str, Gallery], svgs: Mapping[str, str]) -> str:
  """The whole page; `galleries` by interpreter, `svgs` by the figure's name."""
  config = results.config
  title = f'ADV² on {config.get("model", "classifier")} · {config.get("dataset", "data")}'
  sections = [
    f'<header><h1>{_e(title)}</h1><p class="lead">{_lead(results)}</p></header>',
    f'<div class="cards">{"".join(_cards(results))}</div>',
    _section('Worth knowing', _health(results)),
    _section('Results', _table(results)),
    _section('What the analyst sees', ''.join(_html_gallery(g) for g in galleries.values())),
  ]
  is_away = figures.is_away(results.rows)
  texts = {
    'maps': (
      'How far the map has gone' if is_away else 'How far the map gives the attack away',
      f'Distance of the map from the {"benign" if is_away else "target"} map. “Another image” is '
      'the scale: the map of an unrelated image of the same predicted class.',
    ),
    'curves': (
      'The attack over time',
      'Lines: means over all images as they are at each gradient evaluation; what is '
      'delivered is the best of them, not the last. Dots: the success of that, as in the table. '
      'The interpretation loss is in the unit of its interpreter.',
    ),
    'radii': (
      'Against ε',
      'Over all images, whether the attack succeeded or not. Each limit has a report of its own, '
      'linked below.',
    ),
    'scatter': (
      'Image by image',
      'Each point is one image; above the dotted line ADV² leads further away than PGD.'
      if is_away
      else 'Each point is one image; below the dotted line ADV² hides better than PGD.',
    ),
  }
  for name, svg in svgs.items():
    heading, text = texts[name]
    sections.append(_section(heading, f'<p>{_e(text)}</p><div class="plot">{svg}</div>'))
  sections.append(_section('This run', _details(results)))
  body = '\n'.join(s for s in sections if s)
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<meta name="color-scheme" content="light dark"><title>{_e(title)}</title>'
    f'<style>{_CSS}</style></head>\n<body><main>\n{body}\n</main></body></html>\n'
  )


def _e(value: Any) -> str:
  return html.escape(printable(str(value)))


def _section(heading: str, content: str) -> str:
  return f'<section><h2>{_e(heading)}</h2>{content}</section>' if content else ''


def _lead(results: Results) -> str:
  config, rows = results.config, [r for r in results.rows if r.get('n')]
  n = max((r['n'] for r in rows), default=0)
  epsilon = config.get('epsilon')
  limit = {
    'stadv': ', by moving their pixels (StAdv),',
    'cw': ', by as small a change in L2 as could be found (C&W),',
  }.get(config.get('framework', 'pgd'), '')
  if results.radii:
    radii = ', '.join(f'{epsilon:.4g}' for epsilon in results.radii)
    limit = f', with one limit of their change after the other (ε {radii}),'
  elif not limit and isinstance(epsilon, int | float):
    limit = (
      f', by a change of at most {epsilon:g} in L2,'
      if config.get('norm') == 'l2'
      else f', changing no pixel by more than {math.floor(255 * epsilon + 0.5)} of 255 grey levels,'
    )
  skipped = max((r.get('n_skipped') or 0 for r in rows), default=0)
  more = f' Skipped besides: {skipped}, classified wrongly, or of the target class already.'
  return _e(
    f'{n} correctly classified images were attacked{limit} so that {_aim(config)}. All figures are '
    'for the saved 8-bit images, the real network and '
    f'freshly computed maps.{more if skipped else ""}'
  )


def _aim(config: Mapping[str, Any]) -> str:
  """What the run was after, to follow "so that"."""
  any_wrong = config.get('target_label') == 'untargeted'
  wrong = f'the classifier reports {"any" if any_wrong else "a chosen"} wrong class'
  if config.get('goal') == 'class_only':
    return f'{wrong}; their maps were not aimed at'
  if config.get('goal') != 'map_only':
    return (
      f'{wrong}. PGD cares about the class only; ADV² also makes the interpreter draw the map the '
      'analyst expects'
    )
  away = str(config.get('target_map')).startswith('away')
  map_aim = 'leaves the benign one' if away else 'comes close to the target map'
  return (
    f'the class stays the true one (success) while its map {map_aim}. PGD cares about the class '
    f'only{"; map figures are against the benign map, and far from it is what is wanted" * away}'
  )


def _health(results: Results) -> str:
  lines = (*health.sentences(results.health), *health.left_out(results.health))
  found = ''.join(f'<li>{_e(line)}</li>' for line in lines)
  return f'<ul>{found}</ul>' if found else ''


def _cards(results: Results) -> Iterator[str]:
  for interpreter in () if results.radii else results.interpreters:
    attack = 'adv2' if results.row('adv2', interpreter) else 'adv2_joint'
    adv2, pgd = results.row(attack, interpreter), results.row('pgd', interpreter)
    if not adv2:
      continue
    lines = [f'<h3>{_e(interpreter.upper())}</h3>']
    if adv2.get('asr') is not None:
      lines.append(f'<p class="big">{_share(adv2["asr"])}</p><p>of {figures.label(attack)} images')
      target = 'true' if results.config.get('goal') == 'map_only' else 'target'
      lines.append(f' are taken for the {target} class</p>')
    for field, name in (('map_l1', 'map L1'), ('map_iou', 'map IoU')):
      if adv2.get(field) is not None:
        before = f'{_three(pgd[field])} → ' if pgd.get(field) is not None else ''
        lines.append(f'<p class="pair"><span>{name}</span><b>{before}{_three(adv2[field])}</b></p>')
    yield f'<article>{"".join(lines)}</article>'


def _table(results: Results) -> str:
  # What must be 0 is a sentence while it is, and a column when it is not.
  config = results.config
  space = (config.get('framework', 'pgd'), config.get('norm', 'linf'))
  shown = [
    c
    for c in _TABLE
    if any(figures.figure_of(r, c.field) is not None for r in results.rows)
    and (c.field != 'epsilon' or results.radii)
    and space in _ONLY_WITH.get(c.field, (space,))
  ]
  columns = [c for c in shown if c.field not in _ZERO or any(r.get(c.field) for r in results.rows)]
  sound = ''.join(f' {_ZERO[c.field]}' for c in shown if c not in columns)
  if space[0] != 'pgd':
    sound = sound.replace(_ZERO['out_of_set'], 'Every pixel is within [0, 1].')
  head = ''.join(f'<th title="{_e(c.meaning)}">{_e(c.title)}</th>' for c in columns)
  lines = []
  for interpreter in results.interpreters:
    rows = [r for r in results.rows if r['interpreter'] == interpreter]
    for k, row in enumerate(rows):
      attack = str(row['attack'])
      who = f'<th rowspan="{len(rows)}" class="who">{_e(interpreter.upper())}</th>'
      dot = f'<i style="background:{figures.colour(attack)}"></i>'
      cells = ''.join(f'<td>{_cell(c, row)}</td>' for c in columns)
      strong = ' class="strong"' if attack.startswith('adv2') else ''
      name = f'<th>{dot}{_e(figures.label(attack))}</th>'
      lines.append(f'<tr{strong}>{who if k == 0 else ""}{name}{cells}</tr>')
  meanings = ''.join(f'<dt>{_e(c.title)}</dt><dd>{_e(c.meaning)}</dd>' for c in columns)
  return (
    f'<div class="scroll"><table><thead><tr><th></th><th></th>{head}</tr></thead>'
    f'<tbody>{"".join(lines)}</tbody></table></div>'
    '<p class="note">Map figures are means over the successes, of images nobody attacked '
    'over all; those over all images, medians, and top-k, Kendall’s and Pearson’s figures are in '
    f'<a href="metrics.json">metrics.json</a>.{sound}</p>'
    f'<details><summary>What the columns mean</summary><dl>{meanings}</dl></details>'
  )


def _cell(column: _Column, row: Mapping[str, Any]) -> str:
  value = figures.figure_of(row, column.field)
  if value is None:
    return '–'
  text = _e(column.form(value))
  interval = row.get('asr_ci95')
  if column.field == 'asr' and interval:
    text += f'<small>{100 * interval[0]:.1f}–{100 * interval[1]:.1f}</small>'
  if column.field in _WITH_MEDIAN and (median := row.get(f'{column.field}_median')) is not None:
    text += f'<small>{column.form(median)}</small>'
  return text


def _html_gallery(gallery: Gallery) -> str:
  if not gallery.rows or not gallery.columns:
    return ''
  cells = [f'<b>{_e(name)}</b>' for name in gallery.columns]
  for row in gallery.rows:
    for name, panel in zip(gallery.columns, row, strict=True):
      if panel is None:
        cells.append('<figure></figure>')
        continue
      ink = f' style="--ink:{figures.colour(panel.attack)}"' if panel.attack else ''
      caption = f'<figcaption{ink}>{_e(panel.caption)}</figcaption>' if panel.caption else ''
      picture = f'<img loading="lazy" alt="{_e(name)}" src="{_data_uri(panel.image)}">'
      cells.append(f'<figure>{picture}{caption}</figure>')
  return (
    f'<h3>{_e(gallery.interpreter.upper())}</h3><div class="scroll"><div class="gallery" '
    f'style="--columns:{len(gallery.columns)}">{"".join(cells)}</div></div>'
    f'<p class="note">{_e(gallery.choice)}</p>'
  )


def _data_uri(image: np.ndarray) -> str:
  picture = PIL.Image.fromarray(image)
  picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
  small = max(picture.size) <= 96  # PNG keeps small pictures exact; photographs are JPEG
  buffer = io.BytesIO()
  picture.save(buffer, 'PNG') if small else picture.save(buffer, 'JPEG', quality=88)
  kind = 'png' if small else 'jpeg'
  return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def inline_svg(figure: Figure, name: str) -> str:
  """The figure as SVG for the page's body: its ink follows the page's text colour."""
  buffer = io.StringIO()
  figure.savefig(buffer, format='svg', transparent=True, metadata={'Date': None})
  svg = buffer.getvalue()
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  svg = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"', '', svg)
  width = f'style="max-width:{112 * figure.get_figwidth():.0f}px"'  # text of one size everywhere
  svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', rf'<svg {width} \1', svg, count=1)
  svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r'<svg \1', svg, count=1)
  # Ids must be unique on the page.
  svg = re.sub(r'( id="|url\(#|href="#)', rf'\1{name}-', svg)
  return svg.replace(figures.INK, 'currentColor')


def _details(results: Results) -> str:
  def listing(values: Mapping[str, Any]) -> str:
    rows = ''.join(
      f'<tr><th>{_e(k)}</th><td>{_e(v if isinstance(v, str) else json.dumps(v))}</td></tr>'
      for k, v in values.items()
    )
    return f'<div class="scroll"><table class="plain">{rows}</table></div>'

  links = ''.join(
    f'<li><a href="{_e(name)}">{_e(name)}</a></li>'
    for name in (
      *(f'{part_name(epsilon)}/report.html' for epsilon in results.radii),
      'metrics.json',
      'examples.csv',
      'history.json',
      'examples/',
      'maps/',
      'flows/',
      'figures/',
    )
    if (results.path / name).exists()
  )
  return (
    f'<details><summary>Configuration</summary>{listing(results.config)}</details>'
    f'<details open><summary>Environment</summary>{listing(results.environment)}</details>'
    f'<ul class="links">{links}</ul>'
  )


_CSS = """
:root{--bg:#fbfbfd;--fg:#16181d;--soft:#5c6470;--card:#fff;--line:#e3e6ec;--accent:#2f6fd6}
@media(prefers-color-scheme:dark){:root{--bg:#111318;--fg:#e9ebf0;--soft:#a0a8b5;--card:#191c23;
--line:#2b303a;--accent:#7fb0ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.55 system-ui,sans-serif}
main{max-width:1280px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:2rem;line-height:1.2;margin:0 0 .6rem;letter-spacing:-.02em}
h2{font-size:1.3rem;margin:0 0 .8rem;letter-spacing:-.01em}
h3{font-size:1rem;margin:1.2rem 0 .5rem}
.lead{max-width:75ch;color:var(--soft);margin:0}
section{margin-top:2.8rem}
a{color:var(--accent)}
.note,section>p{color:var(--soft);font-size:.9rem;max-width:80ch}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:1rem;
margin-top:1.8rem}
.cards article,.plot,.scroll{background:var(--card);border:1px solid var(--line);
border-radius:14px}
.cards article{padding:1rem 1.2rem}
.cards h3{margin:0;color:var(--soft);font-weight:600;letter-spacing:.06em}
.cards p{margin:0;color:var(--soft);font-size:.9rem}
.cards .big{font-size:2.1rem;font-weight:700;color:var(--fg);line-height:1.25;
letter-spacing:-.02em}
.cards .pair{display:flex;justify-content:space-between;border-top:1px solid var(--line);
padding-top:.35rem;margin-top:.5rem}
.cards b{color:var(--fg);font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .45rem;text-align:right;white-space:nowrap;
border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--soft);font-weight:600;cursor:help;white-space:normal;vertical-align:bottom;
line-height:1.25}
tbody th{text-align:left;font-weight:500}
tbody .who{font-weight:700;vertical-align:top;border-right:1px solid var(--line)}
tbody i{display:inline-block;width:.65rem;height:.65rem;border-radius:50%;margin-right:.5rem}
.strong td,.strong th:not(.who){font-weight:650}
td small{display:block;color:var(--soft);font-weight:400;font-size:.75rem}
.plain td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.plain th{color:var(--soft);width:14rem}
details{margin-top:.8rem}
summary{cursor:pointer;font-weight:600;padding:.2rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.35rem 1.2rem;font-size:.9rem}
dt{font-weight:600}
dd{margin:0;color:var(--soft)}
.gallery{display:grid;gap:.5rem;padding:.9rem;min-width:calc(var(--columns)*104px);
grid-template-columns:repeat(var(--columns),1fr)}
.gallery b{font-size:.82rem;align-self:end}
figure{margin:0}
figure img{display:block;width:100%;border-radius:6px;image-rendering:auto}
figcaption{font-size:.74rem;line-height:1.3;min-height:1.3em;margin-top:.2rem;color:var(--soft);
border-left:3px solid var(--ink,transparent);padding-left:.35rem}
.plot{padding:1rem}
.plot svg{display:block;width:100%;height:auto;margin:auto}
.links{display:flex;flex-wrap:wrap;gap:.4rem 1.2rem;list-style:none;padding:0;font-size:.9rem}
@media(max-width:640px){h1{font-size:1.5rem}main{padding-top:1.5rem}
dl{grid-template-columns:1fr}dd{margin-bottom:.5rem}}
"""
