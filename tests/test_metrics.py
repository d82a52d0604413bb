"""Metrics against numpy, scipy and closed forms; properties by hypothesis."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adv2_jax import classifier, images, metrics, types
from adv2_jax.interpreters.base import Interpreter

# Values on a coarse grid give ties, which is where ranks and quantiles go wrong.
GRID = st.integers(0, 8).map(lambda i: i / 8)
MAPS = hnp.arrays(np.float32, (3, 4, 5), elements=GRID)


# Jitted, as callers do; one trace each, because the shapes stay.
map_iou = jax.jit(metrics.map_iou, static_argnames='quantile')
spearman = jax.jit(metrics.spearman)
topk = jax.jit(metrics.topk_intersection, static_argnames='k')
kendall, pearson = jax.jit(metrics.kendall), jax.jit(metrics.pearson)
centre_shift = jax.jit(metrics.centre_shift)


def pair(seed, shape=(3, 7, 7)):
  rng = np.random.RandomState(seed)
  return rng.rand(2, *shape).astype(np.float32)


# Distances between maps.


def test_distances_equal_numpy():
  a, b = pair(0)
  d = (a - b).astype(np.float64)
  np.testing.assert_allclose(metrics.map_l1(a, b), np.abs(d).mean((1, 2)), rtol=1e-6)
  np.testing.assert_allclose(metrics.map_mse(a, b), (d**2).mean((1, 2)), rtol=1e-6)
  np.testing.assert_allclose(metrics.map_l2(a, b), np.sqrt((d**2).mean((1, 2))), rtol=1e-6)


def iou_numpy(a, b, quantile):
  def top(m):
    q = np.quantile(m, quantile)
    return m > q if (m > q).any() else m >= q

  return (top(a) & top(b)).sum() / (top(a) | top(b)).sum()


@pytest.mark.parametrize('size', [7, 8, 28, 56])
@pytest.mark.parametrize('quantile', [0.0, 0.5, 0.8, 0.95, 1.0])
def test_iou_equals_numpy_quantile(size, quantile):
  a, b = pair(size, (3, size, size))
  b = 0.7 * a + 0.3 * b
  expected = [iou_numpy(*maps, quantile) for maps in zip(a, b, strict=True)]
  np.testing.assert_allclose(metrics.map_iou(a, b, quantile), expected, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(MAPS, MAPS)
def test_iou_equals_numpy_with_ties(a, b):
  expected = [iou_numpy(*maps, 0.8) for maps in zip(a, b, strict=True)]
  np.testing.assert_allclose(map_iou(a, b), expected, rtol=1e-6)


def test_iou_of_quarters_is_one_third():
  a = np.zeros((1, 10, 10), np.float32)
  a[0, :2] = 1  # 20 cells are on, and the 80 % quantile is 0.2: position 79.2 of sorted 0…99
  b = np.roll(a, 1, axis=1)
  np.testing.assert_allclose(metrics.map_iou(a, b), 10 / 30, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(MAPS, MAPS)
def test_spearman_equals_scipy(a, b):
  rho = np.asarray(spearman(a, b))
  for value, m, t in zip(rho, a, b, strict=True):
    if np.ptp(m) == 0 or np.ptp(t) == 0:
      assert value == 0
    else:
      expected = scipy.stats.spearmanr(m.ravel(), t.ravel()).statistic
      np.testing.assert_allclose(value, expected, atol=2e-6)


def test_spearman_is_accurate_on_large_maps():
  a, b = pair(3, (2, 224, 224))
  b = 0.9 * a + 0.1 * b
  expected = [
    scipy.stats.spearmanr(m.ravel(), t.ravel()).statistic for m, t in zip(a, b, strict=True)
  ]
  np.testing.assert_allclose(spearman(a, b), expected, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(MAPS, MAPS)
def test_spearman_ignores_monotone_transforms(a, b):
  rho = spearman(a, b)
  np.testing.assert_allclose(spearman(np.exp(3 * a), b), rho, atol=1e-6)
  np.testing.assert_allclose(spearman(a, 1 - b**3), -rho, atol=1e-6)


@pytest.mark.parametrize('k', [0.2, 0.5, 1.0, 1, 7, 20, 0.01])
@settings(max_examples=20, deadline=None)
@given(MAPS, MAPS)
def test_topk_equals_sorted_sets(k, a, b):
  """On a coarse grid most cells are tied: of those the first ones count."""
  cells = k if isinstance(k, int) else max(1, round(k * 20))
  first = lambda m: set(sorted(range(20), key=lambda i: -m.ravel()[i])[:cells])  # noqa: E731
  expected = [len(first(m) & first(t)) / cells for m, t in zip(a, b, strict=True)]
  np.testing.assert_allclose(topk(a, b, k), expected, rtol=1e-6)


def test_topk_by_hand():
  a = np.arange(100, dtype=np.float32).reshape(1, 10, 10)
  np.testing.assert_allclose(topk(a, np.roll(a, 1, axis=1), 0.2), 0.5)  # the last two rows, 8 and 9
  assert topk(a, np.zeros_like(a), 20)[0] == 0  # those of a constant map are the first two
  assert topk(a, a[:, ::-1], np.int64(100))[0] == 1


@pytest.mark.parametrize('k', [0, -1, 21, 0.0, -0.5, 1.5, np.nan, True, '5'])
def test_another_k_is_refused(k):
  a = jnp.zeros((3, 4, 5))
  with pytest.raises(types.InputError, match=r'^k is .*expected .* cells'):
    metrics.topk_intersection(a, a, k)


CORRELATIONS = {
  'kendall': (kendall, scipy.stats.kendalltau),
  'pearson': (pearson, scipy.stats.pearsonr),
}


@pytest.mark.parametrize('name', CORRELATIONS)
@settings(max_examples=40, deadline=None)
@given(a=MAPS, b=MAPS)
def test_correlations_equal_scipy_with_ties(name, a, b):
  metric, reference = CORRELATIONS[name]
  found = np.asarray(metric(a, b))
  for value, m, t in zip(found, a, b, strict=True):
    if np.ptp(m) == 0 or np.ptp(t) == 0:
      assert value == 0
    else:
      expected = reference(m.ravel().astype(float), t.ravel().astype(float)).statistic
      np.testing.assert_allclose(value, expected, atol=1e-6)


@pytest.mark.parametrize('name', CORRELATIONS)
def test_correlations_equal_scipy_on_large_maps(name):
  """Half of the cells tied; then the same, small and far from 0, where sums cancel."""
  metric, reference = CORRELATIONS[name]
  a, b = pair(3, (2, 56, 56))
  a, b = a.round(1), np.where(b > 0.5, 0.7 * a + 0.3 * b, 0)
  for m, t, tolerance in ((a, b, 1e-6), (0.5 + a / 1024, 0.25 + b / 512, 1e-5)):
    expected = [
      reference(u.ravel().astype(float), v.ravel().astype(float)).statistic
      for u, v in zip(m, t, strict=True)
    ]
    np.testing.assert_allclose(metric(m, t), expected, atol=tolerance)


def test_kendall_takes_little_memory_at_the_largest_map():
  a = jax.ShapeDtypeStruct((2, 56, 56), jnp.float32)
  used = kendall.lower(a, a).compile().memory_analysis().temp_size_in_bytes
  assert used < 100 * 2 * 56**2  # all pairs would be 3136 times a map, not some 25 times


@pytest.mark.parametrize('value', [0.0, 0.1, 1.0])
def test_constant_maps_correlate_with_nothing(value):
  a, (b, _) = np.full((3, 7, 7), value, np.float32), pair(2)
  for metric in (kendall, pearson):
    assert (np.asarray(metric(a, b)) == 0).all()
    assert (np.asarray(metric(a, a)) == 0).all()


@settings(max_examples=25, deadline=None)
@given(MAPS, MAPS)
def test_centre_equals_scipy(a, b):
  for value, m, t in zip(np.asarray(centre_shift(a, b)), a, b, strict=True):
    if m.sum() == 0 or t.sum() == 0:
      assert value == 0
    else:
      both = np.array([scipy.ndimage.center_of_mass(v.astype(float)) for v in (m, t)]) / m.shape
      expected = np.linalg.norm(both[0] - both[1]) / np.sqrt(2)
      np.testing.assert_allclose(value, expected, atol=2e-6)


def test_centre_by_hand():
  a = np.zeros((3, 4, 8), np.float32)
  b = a.copy()
  a[:, 0, 0], b[0, 3, 6], b[1, 2, 0] = 0.01, 1, 1  # the last of b is empty
  np.testing.assert_allclose(centre_shift(a, b), [0.75, 0.5 / np.sqrt(2), 0], rtol=1e-6)


def ssim_scipy(a, b, size):
  """Wang et al. 2004, by scipy: up-sampling by `zoom`, blur by `gaussian_filter`, interior mean."""

  def grow(m):
    factors = [n / k for n, k in zip(size, m.shape, strict=True)]
    return scipy.ndimage.zoom(m, factors, order=1, mode='nearest', grid_mode=True)

  def blur(z):
    return scipy.ndimage.gaussian_filter(z, 1.5, radius=5)[5:-5, 5:-5]

  a, b = grow(a.astype(np.float64)), grow(b.astype(np.float64))
  mu_a, mu_b = blur(a), blur(b)
  var_a, var_b, cov = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
  top = (2 * mu_a * mu_b + 1e-4) * (2 * cov + 9e-4)
  return (top / ((mu_a**2 + mu_b**2 + 1e-4) * (var_a + var_b + 9e-4))).mean()


@pytest.mark.parametrize(('size', 'image_size'), [(8, (32, 32)), (7, (56, 64)), (16, (64, 64))])
def test_ssim_equals_scipy(size, image_size):
  a, b = pair(size, (3, size, size))
  b[1] = 0.8 * a[1] + 0.2 * b[1]
  expected = [ssim_scipy(*maps, image_size) for maps in zip(a, b, strict=True)]
  ssim = jax.jit(metrics.ssim, static_argnames='image_size')
  np.testing.assert_allclose(ssim(a, b, image_size), expected, atol=2e-5)


def test_ssim_of_constant_maps_is_the_luminance_term():
  a, b = np.full((1, 8, 8), 0.2, np.float32), np.full((1, 8, 8), 0.6, np.float32)
  expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
  np.testing.assert_allclose(metrics.ssim(a, b, (32, 32)), expected, rtol=1e-4)


MAP_METRICS = {  # metric, its value on equal maps, its range
  'l1': (jax.jit(metrics.map_l1), 0, 0, 1),
  'l2': (jax.jit(metrics.map_l2), 0, 0, 1),
  'mse': (jax.jit(metrics.map_mse), 0, 0, 1),
  'iou': (map_iou, 1, 0, 1),
  'spearman': (spearman, 1, -1, 1),
  'ssim': (jax.jit(lambda a, b: metrics.ssim(a, b, (12, 15))), 1, -1, 1),
  'topk': (topk, 1, 0, 1),
  'kendall': (kendall, 1, -1, 1),
  'pearson': (pearson, 1, -1, 1),
  'centre': (centre_shift, 0, 0, 1),
}
RANKED = ('spearman', 'kendall', 'pearson')  # 0 for a constant map


@pytest.mark.parametrize('name', MAP_METRICS)
@settings(max_examples=25, deadline=None)
@given(a=MAPS, b=MAPS)
def test_symmetric_bounded_and_exact_on_equal_maps(name, a, b):
  metric, same, low, high = MAP_METRICS[name]
  # SSIM divides differences of float32 squares by sums from 0.03² on.
  tolerance = 2e-5 if name == 'ssim' else 1e-6
  value = np.asarray(metric(a, b))
  assert np.isfinite(value).all()
  assert (value >= low - tolerance).all()
  assert (value <= high + tolerance).all()
  np.testing.assert_allclose(metric(b, a), value, atol=tolerance)
  ranked = np.ptp(a, axis=(1, 2)) > 0 if name in RANKED else np.ones(3, bool)
  np.testing.assert_allclose(np.asarray(metric(a, a))[ranked], same, atol=tolerance)


@pytest.mark.parametrize('name', MAP_METRICS)
def test_rows_are_independent(name):
  """Permuting the batch permutes the values; a row of NaN or zeros changes no other row."""
  metric = MAP_METRICS[name][0]
  a, b = pair(1, (5, 4, 5))
  value = np.asarray(metric(a, b))
  order = np.array([3, 0, 4, 1, 2])
  np.testing.assert_allclose(metric(a[order], b[order]), value[order], rtol=1e-6)
  for filler in (0, np.nan):
    padded = np.concatenate([a, np.full((3, 4, 5), filler, np.float32)])
    other = np.concatenate([b, np.zeros((3, 4, 5), np.float32)])
    np.testing.assert_allclose(np.asarray(metric(padded, other))[:5], value, rtol=1e-6)


def test_shapes_that_differ_are_refused():
  a = jnp.zeros((2, 7, 7))
  for metric, *_ in MAP_METRICS.values():
    with pytest.raises(types.InputError, match=r'\(2, 7, 7\) and \(2, 8, 7\).*one shape \[B,h,w\]'):
      metric(a, jnp.zeros((2, 8, 7)))
    with pytest.raises(types.InputError, match='batch axis'):
      metric(a[0], a[0])
  with pytest.raises(types.InputError, match='quantile is 80'):
    metrics.map_iou(a, a, quantile=80)
  with pytest.raises(types.InputError, match='11×11'):
    metrics.ssim(a, a, (8, 8))
  with pytest.raises(types.InputError, match=r'images have shapes.*\[B,H,W,C\]'):
    metrics.linf(jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8, 8, 1)))
  with pytest.raises(types.InputError, match=r'masks \(1, 8, 8\)'):
    metrics.pointing_game(a, jnp.zeros((1, 8, 8)))


# Localisation.


def test_localisation_by_hand():
  m = np.zeros((4, 4, 4), np.float32)
  m[0, 1, 2] = 1  # its peak grows to pixels [4:8, 8:12] of 16
  m[1, 0, 0] = m[1, 3, 3] = 0.5  # a tie: the first counts
  mask = np.zeros((4, 16, 16), bool)
  mask[:2, :8, 8:] = True
  mask[2, 0, 0] = True  # a zero map points at its first pixel
  np.testing.assert_array_equal(metrics.pointing_game(m, mask), [1, 0, 1, np.nan])
  np.testing.assert_array_equal(metrics.pointing_game(m, np.flip(mask, 2)), [0, 1, 0, np.nan])
  full = np.asarray(images.upsample(m, (16, 16)), np.float64)
  expected = [(full[i] * mask[i]).sum() / full[i].sum() for i in (0, 1)]
  np.testing.assert_allclose(metrics.energy_inside(m, mask), [*expected, 0, np.nan], rtol=1e-6)
  everything = np.ones_like(mask)
  np.testing.assert_allclose(metrics.energy_inside(m, everything), [1, 1, 0, 0], rtol=1e-6)


def test_upsampling_equals_scipy_zoom():
  m = pair(4, (2, 7, 5))[0]
  expected = [scipy.ndimage.zoom(z, (4, 6), order=1, mode='nearest', grid_mode=True) for z in m]
  np.testing.assert_allclose(images.upsample(m, (28, 30)), expected, atol=1e-6)


# Prediction and perturbation.


def test_success_and_confidence():
  logits = np.array([[0.0, 2, 1], [3, 0, 0], [np.nan, 0, 0], [0, np.inf, 0]], np.float32)
  target = np.array([1, 1, 0, 1])
  np.testing.assert_array_equal(metrics.success(logits, target), [True, False, False, False])
  exp = np.exp(logits[:2].astype(np.float64))
  expected = (exp / exp.sum(1, keepdims=True))[[0, 1], target[:2]]
  np.testing.assert_allclose(metrics.confidence(logits, target)[:2], expected, rtol=1e-6)


def test_flat_maps_are_those_without_contrast():
  maps = np.zeros((3, 4, 4), np.float32)
  maps[1] += 0.5
  maps[2, 0, 0] = 1e-3
  np.testing.assert_array_equal(metrics.flat(jnp.asarray(maps)), [True, True, False])


def test_norms_are_numpys():
  x8, x0 = pair(5, (3, 6, 5, 3))
  d = (x8 - x0).reshape(3, -1).astype(np.float64)
  np.testing.assert_allclose(metrics.linf(x8, x0), np.abs(d).max(1), rtol=1e-6)
  np.testing.assert_allclose(metrics.l2(x8, x0), np.linalg.norm(d, axis=1), rtol=1e-6)


def test_each_example_may_have_its_own_epsilon():
  x0 = jnp.full((2, 1, 1, 3), 0.5)
  outside = metrics.out_of_set(x0 + 0.05, x0, jnp.array([0.06, 0.03]))
  np.testing.assert_array_equal(outside, [False, True])


@pytest.mark.parametrize('epsilon', [0.031, 4 / 255, 8 / 255])
def test_out_of_set_allows_rounding_and_no_more(epsilon):
  """Rounded to 8 bits, ε·255 = 7.9 may become 8 but not 9."""
  largest = math.floor(epsilon * 255 + 0.5)
  x0 = np.full((4, 3, 3, 3), 100 / 255, np.float32)
  x8 = x0.copy()
  x8[0, 1, 1, 1] = np.float32((100 + largest) / 255)
  x8[1, 1, 1, 1] = np.float32((100 - largest - 1) / 255)
  x8[2, 1, 1, 1] = np.nan
  np.testing.assert_array_equal(metrics.out_of_set(x8, x0, epsilon), [False, True, True, False])
  outside = np.array([1.0, 1.001, -0.001], np.float32).reshape(3, 1, 1, 1)
  flags = metrics.out_of_set(outside, np.clip(outside, 0, 1), math.inf)
  np.testing.assert_array_equal(flags, [False, True, True])


# Everything at once, with a real small network.


class Net(nn.Module):
  """Convolution, ReLU, global average pooling, dense."""

  act: object = nn.relu

  def setup(self):
    self.conv = nn.Conv(6, (3, 3))
    self.dense = nn.Dense(4, use_bias=False)

  def __call__(self, x):
    features = self.act(self.conv(x))
    return types.Outputs(self.head(features), {'features': features})

  def head(self, features):
    return self.dense(features.mean((1, 2)))


def cam_like():
  """A class-dependent interpreter, and one that can tell its keys apart (a key per example)."""

  def explain(params, clf, x, y, key):
    features = clf(x).taps['features']
    logits, vjp = jax.vjp(clf.head, features)
    m = (features * vjp(jax.nn.one_hot(y, logits.shape[-1]))[0]).sum(-1)
    low, high = m.min((1, 2), keepdims=True), m.max((1, 2), keepdims=True)
    jitter = jax.vmap(lambda k: jax.random.uniform(k, ()))(key)
    return (m - low) / (high - low) * (0.9 + 0.1 * jitter.reshape(-1, 1, 1))

  return Interpreter((), explain, unroll_fn=lambda *_: None, begin_fn=lambda *_: ())


@pytest.fixture(scope='module')
def bench():
  module = Net()
  x0 = np.random.RandomState(7).randint(0, 256, (5, 16, 16, 3)).astype(np.float32) / 255
  step = np.random.RandomState(8).randint(-8, 9, x0.shape)
  x8 = np.clip(np.round(x0 * 255) + step, 0, 255).astype(np.float32) / 255
  clf = classifier.from_linen(module, module.init(jax.random.key(2), x0))
  y = clf(x0).logits.argmax(-1)
  return clf, cam_like(), jnp.asarray(x0), jnp.asarray(x8), y, (y + 1) % 4


def test_score_is_what_its_parts_say(bench, key):
  clf, interpreter, x0, x8, y, target = bench
  keys = types.example_keys(key, 5)
  target_map = interpreter.explain(clf, x0, y, keys)
  mask = jnp.zeros((5, 16, 16), bool).at[:4, 4:9, 2:12].set(True)
  clean, maps = (metrics.two_class_maps(clf, interpreter, x, y, target, keys) for x in (x0, x8))
  judge = jax.jit(functools.partial(metrics.score, clf, epsilon=0.031))
  scores = judge(x0, x8, target, target_map, clean, maps, mask=mask)

  expected = interpreter.explain(clf, x8, target, keys)
  np.testing.assert_allclose(maps[1], expected, atol=1e-5)
  logits = clf(x8).logits
  np.testing.assert_array_equal(scores['prediction'], logits.argmax(-1))
  np.testing.assert_array_equal(scores['success'], logits.argmax(-1) == target)
  np.testing.assert_allclose(scores['map_l1'], metrics.map_l1(expected, target_map), atol=1e-5)
  two = [
    metrics.map_l1(interpreter.explain(clf, x0, c, keys), interpreter.explain(clf, x8, c, keys))
    for c in (y, target)
  ]
  np.testing.assert_allclose(scores['two_class_l1'], (two[0] + two[1]) / 2, atol=1e-5)
  more = {
    'map_topk': topk,
    'map_kendall': kendall,
    'map_pearson': pearson,
    'map_centre': centre_shift,
  }
  for field, metric in more.items():
    np.testing.assert_allclose(scores[field], metric(maps[1], target_map), atol=1e-5)
  discrepancy = metrics.two_class_discrepancy(clf, interpreter, x0, x8, y, target, key)
  np.testing.assert_allclose(discrepancy, scores['two_class_l1'], atol=1e-5)
  assert not np.any(scores['out_of_set'])
  assert not np.any(scores['nonfinite'])
  assert np.isnan(scores['energy_inside'][4])

  again = judge(x0, x8, target, target_map, clean, maps)
  assert 'pointing_game' not in again


def test_clean_image_scores_as_itself(bench, key):
  clf, interpreter, x0, _, y, target = bench
  keys = types.example_keys(key, 5)
  target_map = interpreter.explain(clf, x0, y, keys)
  maps = metrics.two_class_maps(clf, interpreter, x0, y, target, keys)
  judge = jax.jit(functools.partial(metrics.score, clf, epsilon=0.031))
  scores = judge(x0, x0, target, target_map, maps, maps, attacked=False)
  assert not np.any(scores['success'])  # it is y that is predicted, not the target
  for name, value in {'map_l1': 0, 'two_class_l1': 0, 'linf': 0, 'map_iou': 1}.items():
    np.testing.assert_allclose(scores[name], value, atol=1e-5)
  as_target = judge(x0, x0, target, target_map, maps, maps, attacked=True)
  np.testing.assert_allclose(as_target['map_l1'], metrics.map_l1(maps[1], maps[0]), atol=1e-5)
  assert judge._cache_size() == 1  # attacked or not, it is one program


def test_judge_keys_belong_to_examples_and_seeds():
  data = jax.random.key_data
  keys = metrics.judge_keys(3, [5, 9, 5])
  np.testing.assert_array_equal(data(keys[1]), data(metrics.judge_keys(3, np.array([9]))[0]))
  np.testing.assert_array_equal(data(keys[0]), data(keys[2]))
  assert len({tuple(np.asarray(data(k))) for k in [*keys, *metrics.judge_keys(4, [5, 9])]}) == 4


def test_score_is_equivariant_and_marks_nonfinite(bench, key):
  clf, interpreter, x0, x8, y, target = bench
  keys = types.example_keys(key, 5)
  target_map = interpreter.explain(clf, x0, y, keys)

  @jax.jit
  def judge(x0, x8, y, target, target_map, keys):
    two = [metrics.two_class_maps(clf, interpreter, x, y, target, keys) for x in (x0, x8)]
    return metrics.score(clf, x0, x8, target, target_map, *two, epsilon=0.031)

  arrays = (x0, x8, y, target, target_map, keys)
  scores = judge(*arrays)
  order = jnp.array([4, 2, 0, 1, 3])
  moved = judge(*(a[order] for a in arrays))
  for name, value in scores.items():
    np.testing.assert_allclose(moved[name], value[order], atol=1e-5, err_msg=name)

  broken = x8.at[2, 0, 0, 0].set(jnp.nan)
  marked = judge(x0, broken, *arrays[2:])
  np.testing.assert_array_equal(marked['nonfinite'], [False, False, True, False, False])
  assert not marked['success'][2]
  others = np.array([0, 1, 3, 4])
  for name, value in scores.items():
    np.testing.assert_allclose(marked[name][others], value[others], atol=1e-5, err_msg=name)


# On the host.


@pytest.mark.parametrize(('k', 'n'), [(0, 10), (10, 10), (1, 1), (37, 64), (499, 500)])
def test_wilson_solves_its_equation(k, n):
  """The bounds are the rates p with |k/n − p| = z·√(p(1−p)/n); scipy agrees."""
  low, high = metrics.wilson_interval(k, n)
  exact = scipy.stats.binomtest(k, n).proportion_ci(0.95, method='wilson')
  np.testing.assert_allclose([low, high], exact, atol=1e-12)
  for p in (low, high):
    if 0 < p < 1:
      z = scipy.stats.norm.ppf(0.975)
      np.testing.assert_allclose(abs(k / n - p), z * math.sqrt(p * (1 - p) / n), rtol=1e-9)


def row(success, confidence, map_l1, **more):
  return {
    'success': success,
    'confidence': confidence,
    'map_l1': map_l1,
    'nonfinite': False,
    **more,
  }


def test_aggregate_by_hand():
  rows = [
    row(True, 0.9, 0.1, linf=0.03, l2=1.0, out_of_set=False, pointing_game=1.0),
    row(True, 0.7, 0.2, linf=0.01, l2=2.0, out_of_set=True, pointing_game=None),
    row(False, 0.2, 0.6, linf=0.02, l2=3.0, out_of_set=False, pointing_game=0.0),
    row(False, None, None, nonfinite=True, linf=None, l2=None, out_of_set=True, pointing_game=None),
  ]
  rows[3]['nonfinite'] = True
  figures = metrics.aggregate(rows)
  assert (figures['n'], figures['asr'], figures['out_of_set'], figures['nonfinite']) == (
    4,
    0.5,
    2,
    1,
  )
  np.testing.assert_allclose(figures['mc'], 0.8)
  np.testing.assert_allclose(figures['map_l1'], 0.15)
  np.testing.assert_allclose(figures['map_l1_all'], 0.3)
  np.testing.assert_allclose(figures['map_l1_median'], 0.15)
  assert (figures['pointing_game'], figures['pointing_game_all']) == (1.0, 0.5)
  assert (figures['linf_max'], figures['l2_mean']) == (0.03, 2.0)
  assert figures['energy_inside'] is None
  assert figures['flat_maps'] is None
  clean = [row(False, 0.1, v, flat_map=v == 0.5) for v in (0.1, 0.2, 0.9, 0.5, 0.5)]
  figures = metrics.aggregate(iter(clean), attacked=False)
  assert (figures['map_l1_median'], figures['flat_maps']) == (0.5, 2)


def test_aggregate_without_success_or_rows():
  figures = metrics.aggregate([row(False, 0.1, 0.5)])
  assert (figures['asr'], figures['mc'], figures['map_l1'], figures['map_l1_all']) == (
    0,
    None,
    None,
    0.5,
  )
  assert figures['asr_ci95'][1] > 0.5
  assert figures['out_of_set'] is None
  clean = metrics.aggregate([row(False, 0.1, 0.5)], attacked=False)
  assert (clean['asr'], clean['map_l1'], clean['map_l1_all']) == (0, 0.5, 0.5)
  empty = metrics.aggregate([])
  assert (empty['n'], empty['asr'], empty['asr_ci95'], empty['map_l1_all']) == (0, None, None, None)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), GRID, GRID), min_size=1, max_size=12), st.randoms())
def test_aggregate_ignores_order(values, random):
  rows = [row(*v) for v in values]
  shuffled = random.sample(rows, len(rows))
  assert metrics.aggregate(rows) == metrics.aggregate(shuffled)


# What a map is worth.


def test_faithfulness_of_maps_that_mark_all_nothing_and_the_decisive_place():
  """The classifier sees whether the upper left corner has contrast; blurring takes that away."""

  def contrast(w, x, act=None):
    corner = x[:, :6, :6].std((1, 2, 3))
    return types.Outputs(w * jnp.stack([corner - 0.15, 0 * corner], axis=-1), {'features': x})

  clf = classifier.from_fn(
    jnp.float32(40.0), contrast, lambda w, a: contrast(w, a).logits, contrast
  )
  checks = np.indices((32, 32)).sum(0) % 2
  x = jnp.broadcast_to(jnp.float32(checks)[None, :, :, None], (3, 32, 32, 3))
  y = jnp.zeros(3, jnp.int32)
  maps = jnp.zeros((3, 8, 8)).at[1].set(1).at[2, :3, :3].set(1)
  found = jax.jit(metrics.faithfulness)(clf, x, y, maps, jax.random.key(0))
  np.testing.assert_allclose(found['marked'], [0, 1, 9 / 64])
  np.testing.assert_allclose(found['p_removed'], [1, 0, 0], atol=0.01)
  np.testing.assert_allclose(found['p_random'], [1, 0, 1], atol=0.01)
  np.testing.assert_allclose(found['p_kept'], [0, 1, 1], atol=0.01)


def test_correlation_between_the_maps_of_different_images():
  a, b = pair(5)
  flat = np.concatenate([a, b]).reshape(6, -1)
  pairs = [scipy.stats.pearsonr(p, q)[0] for i, p in enumerate(flat) for q in flat[:i]]
  maps = np.concatenate([a, b, np.ones((1, 7, 7), np.float32)])  # a flat one is left out
  np.testing.assert_allclose(metrics.mean_correlation(maps), np.mean(pairs), rtol=1e-4)
  assert metrics.mean_correlation(maps[-1:]) == 1
