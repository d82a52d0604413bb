"""What is measured, per example, on what an analyst would receive.

That is the adversarial image rounded to 8 bits, the real network, and a freshly computed map of the
class the analyst sees. Functions are pure and un-jitted (callers jit), take float32 and return one
number per example, [B]; a map is f32[B,h,w] in [0,1], high = important. Means and rates are made on
the host by `aggregate`, from the records of real examples.
"""

import array
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adv2_jax.classifier import Classifier
from adv2_jax.images import upsample
from adv2_jax.interpreters.base import Interpreter
from adv2_jax.interpreters.masking import perturbed, usual
from adv2_jax.losses import log_odds
from adv2_jax.types import (
  AGAIN_STREAM,
  JUDGE_STREAM,
  Array,
  Image,
  InputError,
  Key,
  Label,
  Map,
  example_keys,
  fold_keys,
)

MAP_FIELDS = (
  'map_l1',
  'map_l2',
  'map_mse',
  'map_iou',
  'map_spearman',
  'map_ssim',
  'map_topk',
  'map_kendall',
  'map_pearson',
  'map_centre',
  'patch_iou',
  'two_class_l1',
  'pointing_game',
  'energy_inside',
)
_AGGREGATED = (
  *MAP_FIELDS,
  *('success', 'confidence', 'linf', 'l2', 'out_of_set'),
  *('flow_smoothness', 'flow_max'),
  *('nonfinite', 'zero_gradient', 'nonfinite_gradient', 'flat_map'),
)
_Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


def _check_pair(a: Array, b: Array, what: str = 'maps', rank: int = 3) -> None:
  if a.shape != b.shape or a.ndim != rank:
    expected = '[B,h,w]' if rank == 3 else '[B,H,W,C]'
    raise InputError(
      f'{what} have shapes {tuple(a.shape)} and {tuple(b.shape)}; '
      f'expected two arrays of one shape {expected}: resize or add the batch axis first'
    )


# Distances between maps.


def map_l1(a: Map, b: Map) -> Array:
  """Mean |a − b| over the map's cells, in [0,1]."""
  _check_pair(a, b)
  return jnp.abs(a - b).mean((1, 2))


def map_mse(a: Map, b: Map) -> Array:
  """Mean (a − b)² over the map's cells, in [0,1]."""
  _check_pair(a, b)
  return jnp.square(a - b).mean((1, 2))


def map_l2(a: Map, b: Map) -> Array:
  """√ of the mean of (a − b)² over the map's cells, in [0,1]."""
  return jnp.sqrt(map_mse(a, b))


def _top_cells(m: Map, quantile: float) -> Array:
  """bool[B,n]: cells above the map's quantile; when there are none, those at or above it.

  numpy's linear quantile lies between two neighbouring order statistics and no cell lies strictly
  between these, so `value > quantile` is `value > the lower one`: exact, without interpolation.
  """
  flat = m.reshape(m.shape[0], -1)
  position = int(np.float32(quantile) * np.float32(flat.shape[1] - 1))  # float32, as numpy has it
  threshold = jnp.sort(flat, axis=1)[:, position : position + 1]
  above = flat > threshold
  return jnp.where(above.any(1, keepdims=True), above, flat >= threshold)


def map_iou(a: Map, b: Map, quantile: float = 0.8) -> Array:
  """Intersection over union of the two maps' most important cells, in [0,1].

  Each map is binarised by `value > its own quantile` (numpy's linear one; `≥` if that set is
  empty, as in a constant map, whose set is then all cells).

  Raises:
    InputError: for shapes that differ or a quantile outside [0,1].
  """
  _check_pair(a, b)
  if not 0 <= quantile <= 1:
    raise InputError(f'quantile is {quantile}; expected a share in [0,1], such as 0.8')
  in_a, in_b = _top_cells(a, quantile), _top_cells(b, quantile)
  union = (in_a | in_b).sum(1)
  return (in_a & in_b).sum(1) / jnp.maximum(union, 1).astype(jnp.float32)


def spearman(a: Map, b: Map) -> Array:
  """Spearman's rank correlation over cells, ties averaged, in [−1,1].

  A constant map ranks nothing: the correlation with it is defined as 0 (scipy gives NaN).
  """
  _check_pair(a, b)

  def centred_ranks(flat: Array) -> Array:
    ordered = jnp.sort(flat)
    first = jnp.searchsorted(ordered, flat, side='left')
    last = jnp.searchsorted(ordered, flat, side='right')
    # Twice the rank less its mean is an integer, so sums stay accurate in float32.
    return (first + last - flat.size).astype(jnp.float32) / flat.size

  rank_a, rank_b = (jax.vmap(centred_ranks)(m.reshape(m.shape[0], -1)) for m in (a, b))
  scale = jnp.sqrt(jnp.square(rank_a).sum(1) * jnp.square(rank_b).sum(1))
  rho = (rank_a * rank_b).sum(1) / jnp.where(scale > 0, scale, 1.0)
  return jnp.clip(rho, -1.0, 1.0)


def topk_intersection(a: Map, b: Map, k: float = 0.2) -> Array:
  """Share of the k most important cells of each map that both have in common, in [0,1].

  |A ∩ B| / k (Ghorbani, Abid & Zou 2019, "Interpretation of Neural Networks is Fragile"); of cells
  that are equal the first ones count, so that each map has exactly k.

  Args:
    a: the maps, f32[B,h,w].
    b: the same.
    k: how many: a whole number of cells from 1 on (of type int), or a share in (0,1] (float) of
      them all, rounded, 1 at least.

  Raises:
    InputError: for shapes that differ, another k, or more cells than the map has.
  """
  _check_pair(a, b)
  n = a.shape[1] * a.shape[2]
  is_count = isinstance(k, numbers.Integral)
  if isinstance(k, bool) or not (is_count or (isinstance(k, numbers.Real) and 0 < k <= 1)):
    raise InputError(f'k is {k!r}; expected a share in (0,1], such as 0.2, or a number of cells')
  cells = int(k) if is_count else max(1, round(float(k) * n))
  if not 1 <= cells <= n:
    raise InputError(f'k is {k}; expected 1 to {n} cells, as many as the map has, or a share')

  def top(m: Map) -> Array:
    flat = m.reshape(m.shape[0], n)
    threshold = jnp.sort(flat, axis=1)[:, n - cells, None]
    above, equal = flat > threshold, flat == threshold
    left = cells - above.sum(1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=1) <= left))

  return (top(a) & top(b)).sum(1) / jnp.float32(cells)


def kendall(a: Map, b: Map) -> Array:
  """Kendall's τ-b over cells, in [−1,1]: pairs of cells in the same order less those in another.

  Σ sign(a_i − a_j) · sign(b_i − b_j) / √(pairs untied in a · pairs untied in b) (Kendall 1945). All
  n² pairs are compared, exactly, one cell with all others at a time: memory grows with n alone, and
  a map of 56² cells takes 15 ms on one CPU core. 0 for a constant map (scipy gives NaN).
  """
  _check_pair(a, b)
  flat_a, flat_b = (m.reshape(m.shape[0], -1) for m in (a, b))

  def sign(flat: Array, cell: Array) -> Array:
    return (flat > cell[:, None]).astype(jnp.int32) - (flat < cell[:, None]).astype(jnp.int32)

  def one(cells: tuple[Array, Array]) -> Array:
    sign_a, sign_b = sign(flat_a, cells[0]), sign(flat_b, cells[1])
    return jnp.stack([(u * v).sum(1) for u, v in ((sign_a, sign_b), (sign_a,) * 2, (sign_b,) * 2)])

  per_cell = lax.map(one, (flat_a.T, flat_b.T)).astype(jnp.float32)
  both, in_a, in_b = (per_cell / flat_a.shape[1]).sum(0)  # a sum of whole numbers might overflow
  scale = jnp.sqrt(in_a * in_b)
  return jnp.clip(both / jnp.where(scale > 0, scale, 1.0), -1.0, 1.0)


def pearson(a: Map, b: Map) -> Array:
  """Pearson's correlation over cells, in [−1,1]; 0 for a constant map (scipy gives NaN)."""
  _check_pair(a, b)

  def centred(m: Map) -> Array:
    flat = m.reshape(m.shape[0], -1)
    flat = flat - flat.min(1, keepdims=True)  # so a constant map is 0 exactly
    top = flat.max(1, keepdims=True)
    flat = flat / jnp.where(top > 0, top, 1.0)
    return flat - flat.mean(1, keepdims=True)

  u, v = centred(a), centred(b)
  scale = jnp.sqrt(jnp.square(u).sum(1) * jnp.square(v).sum(1))
  return jnp.clip((u * v).sum(1) / jnp.where(scale > 0, scale, 1.0), -1.0, 1.0)


def centre_shift(a: Map, b: Map) -> Array:
  """Distance of the maps' centres of mass as a share of the diagonal, in [0,1].

  The centre is (Σ m·row / (h·Σ m), Σ m·column / (w·Σ m)), the distance is divided by √2; 0 where
  either map is empty, for it has no centre (Ghorbani, Abid & Zou 2019).

  Differs from the authors' code: that leaves out the division by Σ m.
  """
  _check_pair(a, b)

  def centre(m: Map) -> tuple[Array, Array, Array]:
    total = m.sum((1, 2))
    row, column = (jnp.arange(n, dtype=jnp.float32) / n for n in m.shape[1:])
    scale = jnp.where(total > 0, total, 1.0)
    return (m.sum(2) * row[None]).sum(1) / scale, (m.sum(1) * column[None]).sum(1) / scale, total

  row_a, column_a, total_a = centre(a)
  row_b, column_b, total_b = centre(b)
  distance = jnp.sqrt((jnp.square(row_a - row_b) + jnp.square(column_a - column_b)) / 2)
  return jnp.where((total_a > 0) & (total_b > 0), distance, 0.0)


def ssim(a: Map, b: Map, image_size: tuple[int, int]) -> Array:
  """Structural similarity (Wang et al. 2004) of the maps up-sampled to image size, in [−1,1].

  Gaussian window 11×11, σ 1.5, K1 .01, K2 .03, data range 1, population variances, averaged over
  the positions where the window fits.

  Raises:
    InputError: for shapes that differ or an image smaller than the window.
  """
  _check_pair(a, b)
  if min(image_size) < 11:
    raise InputError(f'image_size is {image_size}; SSIM needs at least 11×11 pixels')
  a, b = upsample(a, image_size), upsample(b, image_size)
  window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
  window = (window / window.sum()).astype(np.float32)

  def blur(z: Array) -> Array:
    # Shifted sums: on CPU 27 times faster than a one-channel convolution, and nowhere rounded to
    # half precision, which the differences below would not survive.
    height, width = z.shape[1] - 10, z.shape[2] - 10
    z = sum(w * z[:, k : k + height] for k, w in enumerate(window))
    return sum(w * z[:, :, k : k + width] for k, w in enumerate(window))

  n = a.shape[0]
  moments = blur(jnp.concatenate([a, b, a * a, b * b, a * b]))
  mean_a, mean_b, aa, bb, ab = (moments[i * n : (i + 1) * n] for i in range(5))
  c1, c2 = 0.01**2, 0.03**2
  luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
  variance = jnp.maximum(aa - mean_a**2, 0) + jnp.maximum(bb - mean_b**2, 0)
  structure = (2 * (ab - mean_a * mean_b) + c2) / (variance + c2)
  return (luminance * structure).mean((1, 2))


def patch_iou(m: Map, patch: Array) -> Array:
  """Intersection over union of the patch's cells P and the |P| most important ones of m, in [0,1].

  Of cells that are equal the first ones count; NaN for an empty patch.

  Args:
    m: the maps, f32[B,h,w].
    patch: bool[B,h,w].
  """
  _check_pair(m, patch)
  flat, inside = m.reshape(len(m), -1), patch.reshape(len(m), -1).astype(bool)
  cells = inside.sum(1, keepdims=True)
  rank = jnp.argsort(jnp.argsort(-flat, axis=1, stable=True), axis=1)
  common = (inside & (rank < cells)).sum(1).astype(jnp.float32)
  return common / (2 * cells[:, 0] - common)


# Maps of the true and of the target class.


def two_class_maps(
  clf: Classifier, interpreter: Interpreter, x: Image, y: Label, target: Label, key: Key
) -> Array:
  """f32[2,B,h,w]: fresh maps of the true class y and of the target class, in this order.

  One explanation after the other, so that it is compiled once and memory is that of one.
  """
  return lax.map(lambda c: interpreter.explain(clf, x, c, key), jnp.stack([y, target]))


def two_class_discrepancy(
  clf: Classifier,
  interpreter: Interpreter,
  x0: Image,
  x8: Image,
  y: Label,
  target: Label,
  key: Key,
) -> Array:
  """Mean over c ∈ {y, target} of the L1 between the maps of x0 and of x8 for class c, in [0,1].

  Boopathy et al. 2020, "Proper Network Interpretability Helps Adversarial Robustness in
  Classification": an attack can hide its traces in one class's map, hardly in both.
  """
  clean = two_class_maps(clf, interpreter, x0, y, target, key)
  return _mean_l1(clean, two_class_maps(clf, interpreter, x8, y, target, key))


def _mean_l1(a: Array, b: Array) -> Array:
  return jnp.abs(a - b).mean((0, 2, 3))


# Localisation.


def _check_mask(m: Map, mask: Array) -> None:
  if m.ndim != 3 or mask.ndim != 3 or m.shape[0] != mask.shape[0]:
    raise InputError(
      f'maps have shape {tuple(m.shape)} and masks {tuple(mask.shape)}; '
      'expected [B,h,w] and [B,H,W], one object mask at image size per map'
    )


def pointing_game(m: Map, mask: Array) -> Array:
  """1 where the up-sampled map's maximum (first in case of ties) lies inside the mask, else 0.

  Args:
    m: the maps, f32[B,h,w].
    mask: bool[B,H,W], the true object at image size.

  Returns:
    f32[B]; NaN where the mask is empty, because there is nothing to point at.

  Source: Zhang et al. 2016, "Top-down Neural Attention by Excitation Backprop"; no tolerance
  margin around the mask here.
  """
  _check_mask(m, mask)
  n = m.shape[0]
  inside = mask.astype(bool).reshape(n, -1)
  peak = upsample(m, (mask.shape[1], mask.shape[2])).reshape(n, -1).argmax(1)
  hit = jnp.take_along_axis(inside, peak[:, None], axis=1)[:, 0].astype(jnp.float32)
  return jnp.where(inside.any(1), hit, jnp.nan)


def energy_inside(m: Map, mask: Array) -> Array:
  """Share of the up-sampled map's sum that lies inside the mask, in [0,1].

  0 for a map that is zero everywhere; NaN where the mask is empty, as in `pointing_game`.
  """
  _check_mask(m, mask)
  inside = mask.astype(bool)
  full = upsample(m, (mask.shape[1], mask.shape[2]))
  total = full.sum((1, 2))
  share = jnp.where(inside, full, 0.0).sum((1, 2)) / jnp.where(total > 0, total, 1.0)
  return jnp.where(inside.any((1, 2)), share, jnp.nan)


# What a map is worth.


def faithfulness(clf: Classifier, x: Image, y: Label, maps: Map, key: Key) -> dict[str, Array]:
  """What the class loses with what the map marks, each [B] (Fong & Vedaldi 2017, deletion).

  φ(x; m) = x · u + blur(x) · (1 − u), u = m up-sampled and softened, as MASK does for images of
  that size. Fields: marked, the mean of the map; p_y of φ at 1 − map (p_removed), at the map itself
  (p_kept), and at 1 − a map of the same shape elsewhere: rolled by a quarter to three quarters of
  its side, drawn per example (p_random).
  """
  config = usual(x.shape[1])

  def p_y(m: Array) -> Array:
    return jax.nn.sigmoid(-log_odds(clf(perturbed(x, m, config)).logits, y))

  def elsewhere(m: Array, k: Key) -> Array:
    low, high = (jnp.array(m.shape, jnp.int32) * part // 4 for part in (1, 3))
    return jnp.roll(m, jax.random.randint(k, (2,), low, high + 1, jnp.int32), (0, 1))

  keys = fold_keys(example_keys(key, len(x)), 1)
  rolled = jax.vmap(elsewhere)(maps, keys)
  return {
    'marked': jnp.mean(maps, axis=(1, 2)),
    'p_removed': p_y(1 - maps),
    'p_random': p_y(1 - rolled),
    'p_kept': p_y(maps),
  }


# Prediction and perturbation.


def flat(maps: Map) -> Array:
  """bool[B]: the map is the same everywhere, so that it explains nothing and compares well."""
  return maps.max((1, 2)) - maps.min((1, 2)) <= 1e-6


def success(logits: Array, target: Label) -> Array:
  """bool[B]: the target is predicted; never where a logit is not finite."""
  return (logits.argmax(-1) == target) & jnp.isfinite(logits).all(-1)


def confidence(logits: Array, target: Label) -> Array:
  """f32[B]: the probability of the target class."""
  probabilities = jax.nn.softmax(logits)
  return jnp.take_along_axis(probabilities, target[:, None], axis=-1)[:, 0]


def linf(x8: Image, x0: Image) -> Array:
  """Largest |x8 − x0| over pixels and channels."""
  _check_pair(x8, x0, 'images', 4)
  return jnp.abs(x8 - x0).max((1, 2, 3))


def l2(x8: Image, x0: Image) -> Array:
  """Euclidean norm of x8 − x0 over pixels and channels."""
  _check_pair(x8, x0, 'images', 4)
  return jnp.sqrt(jnp.square(x8 - x0).sum((1, 2, 3)))


def out_of_set(
  x8: Image, x0: Image, epsilon: float | Array, l2_radius: float | Array = math.inf
) -> Array:
  """bool[B]: any |x8 − x0| above ε + 0.5/255 (rounding to 8 bits), or a pixel outside [0,1].

  With an `l2_radius` also: ‖x8 − x0‖₂ above that + 0.5/255·√(HWC), which rounding may add.

  A pixel that is not a number is outside. 1e-6 is allowed for float32. ε is one number, or one per
  example, [B]; frameworks without an L∞ bound give inf.
  """
  _check_pair(x8, x0, 'images', 4)
  allowed = jnp.reshape(jnp.float32(epsilon), (-1, 1, 1, 1)) + 0.5 / 255 + 1e-6
  near = jnp.abs(x8 - x0) <= allowed
  rounding = 0.5 / 255 * math.sqrt(x0[0].size) + 1e-4
  far = l2(x8, x0) > jnp.float32(l2_radius) + rounding
  return far | ~(near & (x8 >= 0) & (x8 <= 1)).all((1, 2, 3))


# Everything at once.


def judge_keys(seed: int, ids: Array | np.ndarray, again: bool = False) -> Key:
  """The fixed key of each example [B] under which all its image states are explained.

  `again`: another one, to see how far a map depends on it.
  """
  base = jax.random.fold_in(jax.random.key(seed), AGAIN_STREAM if again else JUDGE_STREAM)
  return jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.asarray(ids))


def score(
  clf: Classifier,
  x0: Image,
  x8: Image,
  target: Label,
  target_map: Map,
  clean_maps: Array,
  maps: Array,
  *,
  epsilon: float | Array,
  l2_radius: float | Array = math.inf,
  attacked: bool | Array = True,
  mask: Array | None = None,
  patch: Array | None = None,
) -> dict[str, Array]:
  """Judges 8-bit images by the real network and fresh maps; every field of a record.

  Args:
    clf: the classifier.
    x0: the clean images on the 8-bit grid, f32[B,H,W,C].
    x8: the images to judge, on the same grid.
    target: the class the attack wants.
    target_map: the map the analyst is to see.
    clean_maps: `two_class_maps` of x0.
    maps: the same of x8, with the same labels.
    epsilon: L∞ bound of the perturbation set; inf where it has none.
    l2_radius: its L2 bound.
    attacked: whether the analyst sees the target explained, and not the true class, as for an image
      that was not attacked. Success and confidence are always of the target. May be traced.
    mask: bool[B,H,W], the true object, for the localisation fields.
    patch: bool[B,h,w], the cells where the target map has a patch, for `patch_iou`.

  Returns:
    {field: [B]}. Fields: prediction, confidence, success, the map fields, linf, l2, out_of_set,
    flat_map and nonfinite. nonfinite marks a logit, pixel or map value that is not a number or
    infinite; such an example is never a success.
  """
  target_map, clean_maps, maps = (v.astype(jnp.float32) for v in (target_map, clean_maps, maps))
  fresh = jnp.where(attacked, maps[1], maps[0])
  logits = clf(x8).logits.astype(jnp.float32)
  nonfinite = ~(
    jnp.isfinite(logits).all(-1) & jnp.isfinite(x8).all((1, 2, 3)) & jnp.isfinite(fresh).all((1, 2))
  )
  scores = {
    'prediction': logits.argmax(-1),
    'confidence': confidence(logits, target),
    'success': success(logits, target) & ~nonfinite,
    'map_l1': map_l1(fresh, target_map),
    'map_l2': map_l2(fresh, target_map),
    'map_mse': map_mse(fresh, target_map),
    'map_iou': map_iou(fresh, target_map),
    'map_spearman': spearman(fresh, target_map),
    'map_ssim': ssim(fresh, target_map, (x0.shape[1], x0.shape[2])),
    'map_topk': topk_intersection(fresh, target_map),
    'map_kendall': kendall(fresh, target_map),
    'map_pearson': pearson(fresh, target_map),
    'map_centre': centre_shift(fresh, target_map),
    'two_class_l1': _mean_l1(clean_maps, maps),
    'linf': linf(x8, x0),
    'l2': l2(x8, x0),
    'out_of_set': out_of_set(x8, x0, epsilon, l2_radius),
    'flat_map': flat(fresh),
    'nonfinite': nonfinite,
  }
  if mask is not None:
    scores |= {
      'pointing_game': pointing_game(fresh, mask),
      'energy_inside': energy_inside(fresh, mask),
    }
  if patch is not None:
    scores['patch_iou'] = patch_iou(fresh, patch)
  return scores


# On the host.


def mean_correlation(maps: np.ndarray) -> float:
  """Mean Pearson correlation between the maps of different images; flat ones are left out.

  (‖Σ v‖² − n) / (n² − n) for the n maps as v, each of mean 0 and norm 1.
  """
  flat = maps.reshape(len(maps), -1).astype(np.float64)
  flat = flat[flat.std(1) > 1e-6]
  n = len(flat)
  if n < 2:
    return 1.0
  v = flat - flat.mean(1, keepdims=True)
  v /= np.linalg.norm(v, axis=1, keepdims=True)
  return float((np.sum(v.sum(0) ** 2) - n) / (n * n - n))


def wilson_interval(successes: int, n: int) -> tuple[float, float] | None:
  """Wilson's 95 % interval of a rate (Wilson 1927); None when n is 0."""
  if n == 0:
    return None
  rate, z2 = successes / n, _Z95**2
  centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
  half = _Z95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
  return (0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def aggregate(rows: Iterable[Mapping[str, Any]], attacked: bool = True) -> dict[str, Any]:
  """The figures of one (attack, interpreter) from its examples' records.

  Args:
    rows: the records, gone through once.
    attacked: False for clean and other images; there is no success to select by, so all their map
      figures are over all examples.

  Returns:
    n, asr, asr_ci95 (Wilson), mc (mean p(target) over successes), mc_all (over all); the map
    fields as means over successes, `…_median` likewise (not of the yes and no of the pointing
    game), `…_all` as means over all; linf_max, l2_mean; flow_smoothness (mean) and flow_max;
    out_of_set, nonfinite, zero_gradient, nonfinite_gradient and flat_maps as counts. A figure with
    no example to go by (no success; no mask; a perturbation norm where none is defined; a gradient
    that nobody took; no flow) is None. Examples that are not finite count as failures and are left
    out of the means.
  """
  columns = {field: array.array('d') for field in _AGGREGATED}
  for row in rows:
    for field, column in columns.items():
      value = row.get(field)
      column.append(math.nan if value is None else value)
  table = {field: np.array(column) for field, column in columns.items()}
  everything = np.ones(len(table['success']), bool)
  finite = table['nonfinite'] != 1
  successes = finite & (table['success'] == 1)
  selected = successes if attacked else finite
  n = len(everything)

  def values(chosen: np.ndarray, field: str) -> np.ndarray:
    return table[field][chosen & ~np.isnan(table[field])]

  def mean(chosen: np.ndarray, field: str) -> float | None:
    found = values(chosen, field)
    return math.fsum(found) / len(found) if len(found) else None

  def median(field: str) -> float | None:
    found = values(selected, field)
    return float(np.median(found)) if len(found) else None

  def count(field: str) -> int | None:
    found = values(everything, field)
    return int(found.sum()) if len(found) or not n else None

  return {
    'n': n,
    'asr': mean(everything, 'success'),
    'asr_ci95': wilson_interval(int(successes.sum()), n),
    'mc': mean(successes, 'confidence'),
    'mc_all': mean(finite, 'confidence'),
    **{field: mean(selected, field) for field in MAP_FIELDS},
    **{f'{field}_median': median(field) for field in MAP_FIELDS if field != 'pointing_game'},
    **{f'{field}_all': mean(finite, field) for field in MAP_FIELDS},
    'linf_max': max(values(finite, 'linf').tolist(), default=None),
    'l2_mean': mean(finite, 'l2'),
    'flow_smoothness': mean(everything, 'flow_smoothness'),
    'flow_max': max(values(everything, 'flow_max').tolist(), default=None),
    'out_of_set': count('out_of_set'),
    'nonfinite': count('nonfinite'),
    'zero_gradient': count('zero_gradient'),
    'nonfinite_gradient': count('nonfinite_gradient'),
    'flat_maps': count('flat_map'),
  }
