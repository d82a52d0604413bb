"""`report.html` and `figures/*.png` of a working directory, from the files in it alone."""

import functools
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from adv2_jax import images
from adv2_jax.overlay import overlay
from adv2_jax.workdir import figures, page, store
from adv2_jax.workdir.results import Results, read_results

_GALLERY_ROWS = 6


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
  """Writes `figures/*.png` and `report.html` into a finished run's directory.

  Returns:
    The path of `report.html`.

  Raises:
    StoreError: there is no finished run, or the disk is full.
  """
  results = read_results(workdir)
  results = results._replace(rows=[r for r in results.rows if r.get('n') != 0])
  galleries = {name: _gallery(results, name) for name in results.interpreters}
  pngs, svgs = {}, {}
  for name, draw in _figures(results, galleries).items():
    try:
      with figures.style():
        figure = draw()
        pngs[name] = figures.png(figure)
        if not name.startswith('gallery-'):  # the page has its own
          svgs[name] = page.inline_svg(figure, name)
    except Exception as error:  # whatever a drawing trips over, the table is worth more
      reason = ' '.join(str(error).split())
      print(f'figures/{name}.png could not be drawn: {reason}', file=sys.stderr)
  with store.writing(results.path):
    for name, content in pngs.items():
      images.write_atomic(results.path / 'figures' / f'{name}.png', content)
    text = page.render(results, galleries, svgs)
    images.write_atomic(results.path / 'report.html', text.encode())
  return results.path / 'report.html'


def save_figure(path: pathlib.Path, name: str, figure: Figure) -> None:
  """Writes figures/<name>.png of a working directory, the whole file or nothing."""
  images.write_atomic(path / 'figures' / f'{name}.png', figures.png(figure))


def _figures(
  results: Results, galleries: Mapping[str, page.Gallery]
) -> dict[str, Callable[[], Figure]]:
  """What there is to draw, by the file's name."""
  found: dict[str, Callable[[], Figure]] = {}
  if results.radii:  # each has its own report
    return {'radii': functools.partial(figures.over_radii, results.rows)} if results.rows else {}
  for name, gallery in galleries.items():
    if gallery.rows:
      title = f'{name.upper()}: what the analyst sees'
      found[f'gallery-{name}'] = functools.partial(
        figures.gallery, title, gallery.columns, gallery.rows
      )
  if any(r['attack'] in ('pgd', 'adv2', 'adv2_joint') for r in results.rows):
    found['maps'] = functools.partial(figures.bars, results.rows)
  if results.curves:
    found['curves'] = functools.partial(figures.curves, results.curves, results.rows)
  pairs = {name: _pgd_against_adv2(results, name) for name in results.interpreters}
  if any(len(p) for p in pairs.values()):
    chosen = {name: p for name, p in pairs.items() if len(p)}
    found['scatter'] = functools.partial(figures.scatter, chosen, figures.is_away(results.rows))
  return found


def _pgd_against_adv2(results: Results, interpreter: str) -> np.ndarray:
  """[n,2]: the map L1 of each example that has both."""
  pgd, adv2 = (results.examples.get((a, interpreter)) for a in ('pgd', 'adv2'))
  if pgd is None or adv2 is None:
    return np.empty((0, 2))
  _, a, b = np.intersect1d(pgd['id'], adv2['id'], return_indices=True)
  both = np.stack([pgd['map_l1'][a], adv2['map_l1'][b]], axis=1)
  return both[np.isfinite(both).all(1)]


def _gallery(results: Results, interpreter: str) -> page.Gallery:
  """A few examples, not chosen ones: benign, PGD, ADV² image and map.

  The first ones; of a shuffled run some from all over the data set, which may be sorted by class.
  """
  present = {a for a, name in results.examples if name == interpreter}
  attacks = [a for a in ('benign', 'pgd', 'adv2', 'adv2_joint') if a in present]
  ids, choice = results.ids(interpreter), 'The first {} images in data-set order, not chosen ones.'
  if results.config.get('shuffle'):
    ids, choice = ids[:: max(1, len(ids) // _GALLERY_ROWS)], '{} images, evenly spaced in the data.'
  ids = ids[:_GALLERY_ROWS]
  pictures: dict[str, list[np.ndarray | None]] = {
    a: [results.image(a, interpreter, i) for i in ids] for a in attacks
  }

  columns: dict[str, list[figures.Panel | None]] = {}
  for attack in attacks:
    columns[f'{figures.label(attack)} image'] = [
      None
      if image is None
      else figures.Panel(image, _seen(results, attack, interpreter, i), attack)
      for image, i in zip(pictures[attack], ids, strict=True)
    ]
    columns[f'{figures.label(attack)} map'] = _heat(results, attack, interpreter, ids, pictures)
    own = str(results.config.get('target_map', 'benign')).startswith(('benign', 'away'))
    if attack == 'benign' and not own:
      columns['target map'] = _heat(results, 'target', interpreter, ids, pictures)
  if len(attacks) > 1 and attacks[0] == 'benign':
    columns |= _change(pictures['benign'], pictures[attacks[-1]])
    columns['displacement'] = _displacement(results, attacks[-1], interpreter, ids)
  columns = {name: panels for name, panels in columns.items() if any(panels)}
  rows = list(zip(*columns.values(), strict=True))
  return page.Gallery(interpreter, list(columns), rows, choice.format(len(rows)))


def _seen(results: Results, attack: str, interpreter: str, i: int) -> str:
  """The class that is predicted, with p(target)."""
  example = results.example(attack, interpreter, i)
  name, p = results.class_name(example.get('prediction')), example.get('confidence')
  if p is None or attack == 'benign':
    return name
  hit = example.get('prediction') == example.get('target')
  return f'{name} {p:.0%}' if hit else f'{name} (target {p:.0%})'


def _heat(
  results: Results,
  attack: str,
  interpreter: str,
  ids: Sequence[int],
  pictures: Mapping[str, Sequence[np.ndarray | None]],
) -> list[figures.Panel | None]:
  """The maps over the images they belong to; how far they are from the target map."""
  under = pictures.get('benign' if attack == 'target' else attack, [None] * len(ids))
  maps = [results.map(attack, interpreter, i) for i in ids]
  both = [k for k, m in enumerate(maps) if m is not None and under[k] is not None]
  panels: list[figures.Panel | None] = [None] * len(ids)
  if not both:
    return panels
  heats = overlay(np.stack([under[k] for k in both]), np.stack([maps[k] for k in both]))  # type: ignore[misc]
  for k, heat in zip(both, heats, strict=True):
    example = results.example(attack, interpreter, ids[k])
    text = ''
    if attack not in ('benign', 'target') and {'map_l1', 'map_iou'} <= example.keys():
      text = f'L1 {example["map_l1"]:.3f} · IoU {example["map_iou"]:.2f}'
    panels[k] = figures.Panel(heat, text, attack if attack in figures.COLOURS else '')
  return panels


def _displacement(
  results: Results, attack: str, interpreter: str, ids: Sequence[int]
) -> list[figures.Panel | None]:
  """How far StAdv moved each pixel: black not at all, white as far as the farthest shown."""
  folder = results.path / store.flow_folder(attack, interpreter)
  files = [folder / f'{i:06d}.npy' for i in ids]
  far = [
    np.sqrt(np.square(np.load(f, allow_pickle=False)).sum(-1)) if f.exists() else None
    for f in files
  ]
  largest = max((float(v.max()) for v in far if v is not None), default=0.0) or 1.0
  return [
    None
    if v is None
    else figures.Panel(
      np.repeat((255 * v / largest).astype(np.uint8)[..., None], 3, -1), f'up to {v.max():.1f} px'
    )
    for v in far
  ]


def _change(
  clean: Sequence[np.ndarray | None], attacked: Sequence[np.ndarray | None]
) -> dict[str, list[figures.Panel | None]]:
  """What was added, around mid-grey, amplified as far as the largest change shown allows."""
  changes = [
    None if a is None or b is None else a.astype(int) - b
    for a, b in zip(attacked, clean, strict=True)
  ]
  largest = max((int(np.abs(d).max()) for d in changes if d is not None), default=0)
  gain = max(1, 127 // max(1, largest))
  panels = [
    d if d is None else figures.Panel(np.clip(128 + gain * d, 0, 255).astype(np.uint8), '')
    for d in changes
  ]
  return {f'change ×{gain}': panels}
