"""The report from a made-up but plausible run: complete, self-contained, escaped."""

import base64
import errno
import html.parser
import io
import json
import os
import re
import shutil

import matplotlib
import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
from matplotlib.figure import Figure

from adv2_jax import images, metrics, types
from adv2_jax.overlay import overlay
from adv2_jax.workdir import figures, report, store

NAMES = [f'class <{i}> & "co"' for i in range(10)]
CONFIG = {
  'dataset': 'scenes',
  'model': 'scene_resnet',
  'framework': 'pgd',
  'epsilon': 0.031,
  'interpreters': ['cam', 'grad'],
  'target_map': 'benign',
  'note': '<script>alert("x")</script>',
}


def scene(i, size):
  """A noisy ground with one disc, and the disc's mask."""
  rng = np.random.RandomState(i)
  ground = scipy.ndimage.gaussian_filter(rng.rand(size, size, 3), (size / 12, size / 12, 0))
  ground = (ground - ground.min()) / np.ptp(ground) * 0.7
  rows, columns = np.mgrid[:size, :size]
  centre, radius = rng.uniform(0.3, 0.7, 2) * size, rng.uniform(0.15, 0.25) * size
  mask = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
  return images.to_uint8(np.where(mask[..., None], rng.rand(3), ground)), mask


def attribution(mask, side, noise, rng):
  """A map that follows the mask, and the less so the more noise."""
  m = scipy.ndimage.zoom(
    scipy.ndimage.gaussian_filter(mask.astype(float), len(mask) / 16), side / len(mask), order=1
  )
  m = (1 - noise) * m / m.max() + noise * scipy.ndimage.gaussian_filter(rng.rand(side, side), 1)
  return ((m - m.min()) / np.ptp(m)).astype(np.float32)


def make_run(
  path,
  interpreters=('cam', 'grad'),
  attacks=('benign', 'other', 'pgd', 'adv2'),
  n=6,
  render=scene,
  size=64,
  config=CONFIG,
  class_names=NAMES,
):
  """A finished run whose records are measured on the arrays that are written."""
  workdir = store.Workdir.create(path, config)
  noise = {'benign': 0, 'other': 1, 'pgd': 0.5, 'adv2': 0.06, 'adv2_joint': 0.12}
  rows = []
  for name in interpreters:
    side = {'cam': 8, 'rts': 16}.get(name, 16)
    for attack in attacks:
      rng = np.random.RandomState(len(attack))
      drawn = [render(i, size) for i in range(n)]
      clean = np.stack([image for image, _ in drawn])
      target = np.stack([attribution(m, side, 0, rng) for _, m in drawn])
      masks = [m for _, m in drawn[1:] + drawn[:1]] if attack == 'other' else [m for _, m in drawn]
      maps = np.stack(
        [attribution(m, side, noise[attack] * (0.6 + 0.2 * i), rng) for i, m in enumerate(masks)]
      )
      step = 0 if attack == 'benign' else rng.randint(-8, 9, clean.shape)
      x8 = np.clip(clean.astype(int) + step, 0, 255).astype(np.uint8)
      attacked = attack not in ('benign', 'other')
      hit = np.array([attacked and not (attack == 'adv2' and i == 4) for i in range(n)])
      label = np.arange(n) % 10
      wanted = (label + 3) % 10
      scores = {
        'prediction': np.where(hit, wanted, label),
        'confidence': np.where(hit, 0.97, 0.12) - 0.01 * np.arange(n),
        'success': hit,
        'map_l1': metrics.map_l1(maps, target),
        'map_iou': metrics.map_iou(maps, target),
        'map_spearman': metrics.spearman(maps, target),
        'nonfinite': np.zeros(n, bool),
      }
      if attack != 'other':
        scores |= {
          'linf': np.abs(x8 / 255.0 - clean / 255.0).max((1, 2, 3)),
          'out_of_set': np.zeros(n, bool),
        }
      records = store.as_records(scores, id=10 * np.arange(n), label=label, target=wanted)
      arrays = {}
      if attack != 'other':
        arrays = {
          store.image_folder(attack, name): x8,
          store.map_folder(attack, name): maps,
          store.map_folder('target', name): target,
        }
      fall = np.exp(-np.linspace(0, 4, 11))[:, None] * np.linspace(0.9, 1.1, n)
      curves = (
        {}
        if attack in ('benign', 'other')
        else {
          'step': np.arange(0, 110, 10),
          'success': fall < 0.4,
          'prediction': 8 * fall,
          'interpretation': noise[attack] * fall,
          'total': 9 * fall,
        }
      )
      workdir.write_shard(attack, name, records, arrays, curves=curves)
      rows.append(
        {
          'attack': attack,
          'interpreter': name,
          'n_skipped': 3,
          **metrics.aggregate(records),
          'gradient_evaluations': 100,
          'seconds': 12.3,
        }
      )
  workdir.finish(rows, {'jax': '0.10.2', 'devices': ['cpu:0'], 'commit': 'abc'}, class_names)
  return workdir


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = make_run(tmp_path_factory.mktemp('run'))
  report.write_report(workdir.path)
  return workdir.path


class Page(html.parser.HTMLParser):
  """Collects tags with attributes and text; checks that tags are closed in order."""

  VOID = frozenset({'meta', 'img', 'br'})

  def __init__(self, text):
    super().__init__()
    self.tags, self.text, self.open = [], [], []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def test_page_loads_nothing_from_elsewhere(run):
  text = (run / 'report.html').read_text()
  assert not re.search(r"""https?:|["'(]//|@import|<script|<link|<iframe""", text)
  page = Page(text)
  for tag, attributes in page.tags:
    for name in ('src', 'href', 'xlink:href'):
      value = attributes.get(name, '#')
      assert value.startswith(('data:image/', '#')) or (tag == 'a' and (run / value).exists())


def test_ids_are_unique_and_referenced_ones_exist(run):
  text = (run / 'report.html').read_text()
  ids = re.findall(r' id="([^"]+)"', text)
  assert len(ids) == len(set(ids))
  references = set(re.findall(r'xlink:href="#([^"]+)"|url\(#([^)]+)\)', text))
  assert references
  assert {a or b for a, b in references} <= set(ids)


def test_text_is_escaped_and_readable(run):
  page = Page((run / 'report.html').read_text())
  text = ' '.join(page.text)
  assert '<script>alert("x")</script>' in text
  assert {'class <0> & "co"', 'class <3> & "co" 97%'} <= set(page.text)
  assert 'script' not in {tag for tag, _ in page.tags}
  for column in ('success', 'map L1', 'map IoU', 'rank corr.', 'max change', 'gradients'):
    assert column in text
  assert 'No image breaks the perturbation limit. Every value is a finite number.' in text
  assert 'pointing' not in text  # nothing was measured with masks, so no empty column


def test_table_says_what_metrics_say(run):
  page = (run / 'report.html').read_text()
  rows = json.loads((run / 'metrics.json').read_text())['rows']
  body = re.search(r'<tbody>(.*?)</tbody>', page, re.DOTALL).group(1)
  lines = re.findall(r'<tr.*?</tr>', body, re.DOTALL)
  assert len(lines) == len(rows) == 8
  for line, row in zip(lines, rows, strict=True):
    cells = re.findall(r'<td>(.*?)</td>', line)
    assert cells[0] == str(row['n'])
    assert cells[1].startswith(f'{100 * row["asr"]:.1f} %')
    shown = row['map_l1'] if row['asr'] else row['map_l1_all']
    median = f'<small>{row["map_l1_median"]:.3f}</small>' if row['asr'] else ''
    assert cells[3] == f'{shown:.3f}{median}'
  adv2 = next(r for r in rows if (r['attack'], r['interpreter']) == ('adv2', 'cam'))
  assert f'<b>{rows[2]["map_l1"]:.3f} → {adv2["map_l1"]:.3f}</b>' in page


def test_pictures_are_the_stored_ones(run):
  page = Page((run / 'report.html').read_text())
  pictures = [a for tag, a in page.tags if tag == 'img']
  assert len(pictures) == 2 * 6 * 7  # interpreters × examples × (3 images + 3 maps + change)
  decoded = [
    np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(a['src'].partition(',')[2]))))
    for a in pictures[:7]
  ]
  kinds = ['benign image', 'benign map', 'PGD image', 'PGD map', 'ADV² image', 'ADV² map']
  assert [a['alt'] for a in pictures[:6]] == kinds
  clean = images.read_image(run / 'examples/benign/000000.png')
  adv2 = images.read_image(run / 'examples/adv2/cam/000000.png')
  np.testing.assert_array_equal(decoded[0], clean)
  np.testing.assert_array_equal(decoded[4], adv2)
  heat = overlay(adv2, np.load(run / 'maps/adv2/cam/000000.npy'))
  np.testing.assert_array_equal(decoded[5], heat)
  # The change is amplified as far as it fits: 127 // 8.
  assert pictures[6]['alt'] == 'change ×15'
  expected = 128 + 15.0 * (adv2.astype(float) - clean)
  np.testing.assert_array_equal(decoded[6], np.clip(expected, 0, 255))


@pytest.mark.parametrize(
  ('shuffle', 'expected', 'said'),
  [(False, [0, 1, 2, 3, 4, 5], 'The first 6 images'), (True, [0, 2, 4, 6, 8, 10], 'evenly spaced')],
)
def test_a_gallery_of_a_shuffled_run_is_from_all_over(tmp_path, shuffle, expected, said):
  make_run(tmp_path, ('cam',), n=13, config={**CONFIG, 'shuffle': shuffle})
  results = report.read_results(tmp_path)
  found = report._gallery(results, 'cam')
  shown = [row[0].image for row in found.rows]
  np.testing.assert_array_equal(shown, [results.image('benign', 'cam', 10 * i) for i in expected])
  assert said in found.choice


def test_figures_are_written_and_not_blank(run):
  names = {p.name for p in (run / 'figures').iterdir()}
  assert names == {'gallery-cam.png', 'gallery-grad.png', 'maps.png', 'curves.png', 'scatter.png'}
  for name in names:
    picture = images.read_image(run / 'figures' / name)
    assert min(picture.shape[:2]) > 300
    assert (picture < 250).any(-1).mean() > 0.02


def test_report_is_the_same_every_time(run):
  before = (run / 'report.html').read_bytes()
  report.write_report(run)
  assert (run / 'report.html').read_bytes() == before


@pytest.mark.parametrize(
  ('interpreters', 'attacks'),
  [
    (('cam',), ('benign', 'adv2')),
    (('grad',), ('pgd',)),
    (('cam', 'rts'), ('benign', 'adv2_joint')),
  ],
)
def test_whatever_is_missing_is_left_out(tmp_path, interpreters, attacks):
  make_run(tmp_path, interpreters, attacks, n=2)
  (tmp_path / 'history.json').unlink()
  page = Page(report.write_report(tmp_path).read_text())
  headings = {h.split(':')[0] for h in page.text}
  assert {name.upper() for name in interpreters} <= headings
  shown = {a['alt'].rpartition(' ')[0] for tag, a in page.tags if tag == 'img'} - {'change'}
  assert shown == {figures.label(a) for a in attacks}
  assert not (tmp_path / 'figures' / 'scatter.png').exists()
  assert not (tmp_path / 'figures' / 'curves.png').exists()


def test_other_target_map_and_failures_are_shown(tmp_path):
  make_run(tmp_path, ('cam',), ('benign', 'adv2'), config={**CONFIG, 'target_map': 'random_patch'})
  page = Page(report.write_report(tmp_path).read_text())
  assert [a['alt'] for t, a in page.tags if t == 'img'][2] == 'target map'
  assert 'class <4> & "co" (target 8%)' in page.text


def test_unfinished_run_is_refused(tmp_path):
  store.Workdir.create(tmp_path, CONFIG)
  with pytest.raises(store.StoreError, match=r'has no metrics\.json: the run is not finished'):
    report.write_report(tmp_path)


def test_a_full_disk_is_one_line(run, monkeypatch):
  def replace(source, target):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  before = (run / 'report.html').read_bytes()
  monkeypatch.setattr(os, 'replace', replace)
  with pytest.raises(store.StoreError, match=r'cannot write .*: No space left on device'):
    report.write_report(run)
  assert (run / 'report.html').read_bytes() == before


def failing(*_, **__):
  raise ValueError('no\nfont')


@pytest.fixture
def undrawn(run, tmp_path, monkeypatch):
  """A copy of the run, of which no figure can be drawn; write() -> the page with other metrics."""
  shutil.copytree(run, tmp_path / 'run')
  for name in ('gallery', 'bars', 'curves', 'scatter'):
    monkeypatch.setattr(figures, name, failing)

  def write(**changes):
    file = tmp_path / 'run/metrics.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return Page(report.write_report(tmp_path / 'run').read_text())

  return write


def test_a_figure_that_fails_does_not_cost_the_report(undrawn, capsys):
  page = undrawn()
  assert 'Results' in page.text
  assert 'Image by image' not in page.text
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 5
  assert 'figures/curves.png could not be drawn: no font' in said


def test_what_is_wrong_with_a_run_stands_on_its_page(undrawn):
  assert 'Worth knowing' not in undrawn(health={'zero_gradient': 0, 'files_left_out': {}}).text
  text = ' '.join(undrawn(health={'flat_maps': 3, 'files_left_out': {'hidden': ['._<a>']}}).text)
  assert re.search('Worth knowing examples with a map .*: 3 .* left out, hidden: ._<a>', text)


def test_rows_of_no_example_are_left_out(undrawn, run):
  rows = json.loads((run / 'metrics.json').read_text())['rows']
  rows[1] = {'interpreter': 'cam', 'attack': 'other', **metrics.aggregate([])}
  assert undrawn(rows=rows).text.count('another image') == 1  # that of grad


def test_no_text_is_mathematics_and_no_setting_of_the_user_s_is_seen():
  """A dollar sign is one; TeX, other fonts and tight boxes are for the user's own figures."""
  picture = np.zeros((8, 8, 3), np.uint8)
  texts = ('0 Ba$$in', '$5 & $6_^', 'caf\udce9', '犬', 'a name that is very long indeed 97%')

  def drawn():
    with figures.style():
      return figures.png(
        figures.gallery('$a_b$', ['$c$'], [[figures.Panel(picture, t)] for t in texts])
      )

  plain = drawn()
  own = {
    'text.usetex': True, 'savefig.bbox': 'tight', 'figure.dpi': 30, 'savefig.dpi': 40,
    'font.size': 30, 'axes.facecolor': 'red', 'image.origin': 'lower', 'font.family': 'cursive',
  }  # fmt: skip
  with matplotlib.rc_context(own):
    assert drawn() == plain


@pytest.mark.parametrize(
  ('low', 'high'), [(0.012, 0.018), (1.1e-3, 0.06), (1e-3, 10), (3, 3.1), (0.2, 0.2), (1, 300)]
)
def test_a_logarithmic_axis_has_two_numbers_at_least(low, high):
  with figures.style():
    axis = Figure().subplots()
    axis.plot([0, 1], [low, high])
    figures.log_axis(axis.yaxis)
    first, last = axis.get_ylim()
    labels = [t.get_text() for t in axis.get_yticklabels()]
  assert first <= low <= high <= last
  shown = [v for v in axis.get_yticks() if first <= v <= last]
  assert 2 <= len(shown) < 10
  assert {f'{v:g}' for v in shown} <= set(labels)


def test_the_success_of_what_is_delivered_is_a_dot(run):
  results = report.read_results(run)
  rows = [{'attack': 'adv2', 'interpreter': 'cam', 'asr': 0.625}]
  with figures.style():
    axis = figures.curves(results.curves, rows).axes[0]
  dots = [line.get_xydata().tolist() for line in axis.lines if line.get_marker() == 'o']
  assert dots == [[[100, 0.625]]]
  assert 'delivered' in axis.get_title(loc='left')


# The overlay.


def test_overlay_shows_grey_where_cold_and_the_colour_map_where_hot():
  x = np.full((16, 16, 3), 0.5, np.float32)
  m = np.zeros((2, 2), np.float32)
  m[0, 0] = 1
  heat = overlay(x, m)
  assert heat.shape == (16, 16, 3)
  np.testing.assert_array_equal(heat[-1, -1], [round(0.375 * 255)] * 3)
  top = np.array([252, 255, 164])  # the end of 'inferno'
  np.testing.assert_allclose(heat[0, 0], 0.85 * top + 0.15 * 0.375 * 255, atol=1.5)


def test_overlay_of_a_batch_and_of_8_bits():
  rng = np.random.RandomState(0)
  x, m = rng.randint(0, 256, (3, 12, 10, 3)).astype(np.uint8), rng.rand(3, 4, 5)
  batch = overlay(x, m)
  for i in range(3):
    np.testing.assert_array_equal(batch[i], overlay(images.from_uint8(x[i]), m[i]))
  with pytest.raises(types.InputError, match=r'image has shape \(3, 12, 10, 3\) and map \(4, 5\)'):
    overlay(x, m[0])
