"""MASK: the smallest part of the image whose blurring destroys the class (Fong & Vedaldi 2017).

The mask m [B,h,w] in [0,1] keeps the image where it is 1 and blurs it where it is 0:

    l_map(m; x) = p_c(φ(x; m)) + λ1 Σ|1 − m| + λ2 Σ (dx² + dy²)^{β/2}
    φ(x; m) = x · u + blur(x) · (1 − u),   u = blur(up-sampled m)

The map is 1 − m*, m* = argmin l_map. All of φ is linear in m and in x, so up-sampling and blurs are
matrices, made once on the host.
"""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adv2_jax import losses
from adv2_jax.interpreters.base import Interpreter, one_per_setting
from adv2_jax.nets.activations import soft_relu
from adv2_jax.types import Array, Image, InputError, Key, Label, Map, PyTree, Unrolled, fold_keys


class MaskConfig(NamedTuple):
  """The objective and its published solver; the defaults are those for 224 px.

  Attributes:
    size: side of the mask, in cells.
    jitter: the image is resized to H + jitter and cropped at offsets 0…jitter−1, drawn per example
      and iteration; 0: used as it is.
    area: λ1, on the sum of |1 − m| over cells.
    smoothness: λ2, on the sum over cells of (dx² + dy²)^{β/2}.
    beta: β.
    blur: width of the image's Gaussian blur, in pixels, odd.
    mask_blur: width of the up-sampled mask's.
    start: m before the first iteration.
    steps: Adam iterations.
    learning_rate: of Adam.
    decay: whether the learning rate falls to 0 over the iterations, as a cosine.
    b1: Adam's decay rate of the first moment, in [0,1).
    b2: of the second.
  """

  size: int = 28
  jitter: int = 4
  area: float = 1e-4
  smoothness: float = 1e-2
  beta: float = 3.0
  blur: int = 21
  mask_blur: int = 11
  start: float = 0.5
  steps: int = 300
  learning_rate: float = 0.1
  decay: bool = False
  b1: float = 0.9
  b2: float = 0.999


CIFAR = MaskConfig(size=8, jitter=2, area=1e-3, smoothness=1e-1, blur=5, mask_blur=3)
# For 64 px, ours: the object is large in the image, so its blur must be wide to destroy the class;
# from an empty mask, the cells that may come back do so. With short memory and a falling rate 50
# iterations suffice (`experiments.mask_curves`). Cells of 5 px, softly joined, need no jitter
# against fine structure: the maps are deterministic.
SCENES = MaskConfig(
  size=12,
  jitter=0,
  area=4e-3,
  smoothness=1e-2,
  blur=41,
  mask_blur=11,
  start=0.0,
  steps=50,
  learning_rate=0.1,
  decay=True,
  b1=0.5,
  b2=0.8,
)


def fast(config: MaskConfig) -> MaskConfig:
  """A third of the iterations, a rate falling from twice as high, shorter memory: about as low.

  As low an objective or lower on most images: see `experiments.mask_curves`.
  """
  rate = 2 * config.learning_rate
  return config._replace(
    steps=max(1, config.steps // 3), learning_rate=rate, decay=True, b1=0.5, b2=0.9
  )


def usual(image_size: int) -> MaskConfig:
  """The settings for images of that side: CIFAR's up to 32 px, `SCENES` up to 64, else 224 px's."""
  return CIFAR if image_size <= 32 else SCENES if image_size <= 64 else MaskConfig()


class MaskState(NamedTuple):
  """A solution in progress: the mask [B,h,w] and Adam's state, per example."""

  mask: Array
  opt_state: PyTree


def gaussian_matrix(size: int, width: int) -> np.ndarray:
  """f32[size,size]: the Gaussian blur of `width` pixels along one axis, padded by reflection.

  σ = 0.3 · ((width − 1)/2 − 1) + 0.8, OpenCV's rule.
  """
  if width % 2 == 0 or not 1 <= width <= 2 * size - 1:
    raise InputError(f'a blur is {width} px wide; expected an odd width of 1 to {2 * size - 1}')
  radius = width // 2
  sigma = 0.3 * (radius - 1) + 0.8
  kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
  kernel /= kernel.sum()
  matrix = np.zeros((size, size))
  for offset, weight in zip(range(-radius, radius + 1), kernel, strict=True):
    source = np.arange(size) + offset
    source = np.abs(source)
    source = np.where(source >= size, 2 * (size - 1) - source, source)
    matrix[np.arange(size), source] += weight
  return matrix.astype(np.float32)


def bilinear_matrix(size: int, new_size: int) -> np.ndarray:
  """f32[new_size,size]: bilinear resampling along one axis, half-pixel centres, clamped edges."""
  place = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
  low = np.minimum(place.astype(int), max(size - 2, 0))
  high = np.minimum(low + 1, size - 1)
  matrix = np.zeros((new_size, size))
  rows = np.arange(new_size)
  np.add.at(matrix, (rows, low), 1 - (place - low))
  np.add.at(matrix, (rows, high), place - low)
  return matrix.astype(np.float32)


def _both_axes(rows: np.ndarray, columns: np.ndarray, v: Array) -> Array:
  """rows · v · columnsᵀ on axes 1 and 2 of [B,h,w] or [B,h,w,C]."""
  return jnp.einsum('ih,bhw...,jw->bij...', rows, v, columns)


def perturbed(x: Image, m: Array, config: MaskConfig) -> Image:
  """φ(x; m): x where m is 1, its blur where m is 0; x [B,H,W,C], m [B,h,w]."""
  height, width = x.shape[1:3]
  blurred = _both_axes(gaussian_matrix(height, config.blur), gaussian_matrix(width, config.blur), x)
  soften = lambda n, cells: gaussian_matrix(n, config.mask_blur) @ bilinear_matrix(cells, n)  # noqa: E731
  u = _both_axes(soften(height, m.shape[1]), soften(width, m.shape[2]), m)
  return blurred + u[..., None] * (x - blurred)


def jittered(x: Image, keys: Key, jitter: int) -> Image:
  """x resized to H + jitter and cropped back to H, at offsets 0…jitter−1 from each key."""
  if not jitter:
    return x
  height, width = x.shape[1:3]
  larger = _both_axes(
    bilinear_matrix(height, height + jitter), bilinear_matrix(width, width + jitter), x
  )

  def crop(image: Array, key: Key) -> Array:
    top, left = jax.random.randint(key, (2,), 0, jitter, jnp.int32)
    start = (top, left, jnp.zeros_like(top))
    return jax.lax.dynamic_slice(image, start, (height, width, image.shape[-1]))

  return jax.vmap(crop)(larger, keys)


def regulariser(m: Array, config: MaskConfig) -> Array:
  """λ1 Σ|1 − m| + λ2 Σ (dx² + dy² + 1e-8)^{β/2}, [B]; dx, dy of the same cell.

  Differs from the authors' code: theirs transposes dx, and so pairs different cells.
  """
  dy = (m[:, 1:] - m[:, :-1])[:, :, :-1]
  dx = (m[:, :, 1:] - m[:, :, :-1])[:, :-1]
  roughness = jnp.sum((dx**2 + dy**2 + 1e-8) ** (config.beta / 2), axis=(1, 2))
  return config.area * jnp.sum(jnp.abs(1 - m), axis=(1, 2)) + config.smoothness * roughness


def mask_objective(clf: Any, m: Array, x: Image, y: Label, config: MaskConfig) -> Array:
  """l_map(m; x) [B] of masks m [B,h,w] (1 = keep) on the images at their own size.

  p_y(φ(x; m)) + λ1 Σ|1 − m| + λ2 Σ (dx² + dy²)^{β/2}; jitter is the solver's, not done here.
  """
  p = jax.nn.softmax(clf(perturbed(x, m, config)).logits)
  p_y = jnp.take_along_axis(p, y[:, None], axis=-1)[:, 0]
  return p_y + regulariser(m, config)


def _adam(config: MaskConfig) -> optax.GradientTransformation:
  rate = config.learning_rate
  if config.decay:
    rate = optax.cosine_decay_schedule(rate, config.steps)
  # eps_root keeps the derivative of the root finite where the second moment is 0.
  return optax.adam(rate, config.b1, config.b2, eps_root=1e-16)


def start(config: MaskConfig, x: Image, mask: Array | None = None) -> MaskState:
  """The state before the first iteration on images x; from masks [B,h,w] where given (warm)."""
  if mask is None:
    mask = jnp.full((len(x), config.size, config.size), config.start, x.dtype)
  return MaskState(mask, jax.vmap(_adam(config).init)(mask))


def solver_step(
  clf: Any, state: MaskState, x: Image, y: Label, keys: Key, config: MaskConfig
) -> MaskState:
  """One Adam iteration on l_map, clipped to [0,1]; differentiable in x and in the state."""
  x = jittered(x, keys, config.jitter)
  return _adam_step(lambda m: mask_objective(clf, m, x, y, config), state, config)


def _adam_step(
  objective: Callable[[Array], Array], state: MaskState, config: MaskConfig
) -> MaskState:
  gradient = jax.grad(lambda m: jnp.sum(objective(m)))(state.mask)
  updates, opt_state = jax.vmap(_adam(config).update)(gradient, state.opt_state)
  return MaskState(jnp.clip(state.mask + updates, 0, 1), opt_state)


def solve(
  clf: Any,
  x: Image,
  y: Label,
  keys: Key,
  config: MaskConfig,
  state: MaskState | None = None,
  steps: int | None = None,
) -> MaskState:
  """`steps` iterations from `state` (default: the config's, from its start); keys [B].

  A state goes on where it was, also in a falling rate, at the end of which nothing moves; `start`
  makes a fresh one from a mask. The jitter is drawn from `keys` alone: to go on, give others.
  """
  check_fits(config, *x.shape[1:3])
  state = start(config, x) if state is None else state

  def body(i: Array, state: MaskState) -> MaskState:
    return solver_step(clf, state, x, y, fold_keys(keys, i), config)

  return jax.lax.fori_loop(0, config.steps if steps is None else steps, body, state)


class View(NamedTuple):
  """What the solver sees of an image at a mask m, per example.

  Attributes:
    u: f32[B], the log-odds log((1 − p_c)/p_c) of φ(x; m).
    slope: f32[B,h,w], ∂u/∂m; None where it is not asked for.
  """

  u: Array
  slope: Array | None


class Landscape(NamedTuple):
  """What the attack imitates: what the solver sees on a way that ends at the target map.

  Attributes:
    path: f32[B,n,h,w], its masks.
    views: what it sees at them, [B,n]; None where that is random and must be looked at afresh.
    x: the clean images.
    label: i32[B], the class that they show.
    evidence: f32[B,h,w], see `linear_view`.
    own: bool[B], the way over the clean image is taken, not the one over `linear_view`.
  """

  path: Array
  views: View | None
  x: Image
  label: Label
  evidence: Array
  own: Array


# Log-odds of a class whose evidence is kept, and of one whose evidence is gone.
SURE, GONE = -6.0, 12.0


def evidence_of(target_map: Map) -> Array:
  """e = m_t² / Σ m_t², [B,h,w]: squared, as what is weak in a map costs more area than it is worth.

  0 everywhere for an empty map.
  """
  squares = jnp.square(target_map)
  return squares / jnp.maximum(jnp.sum(squares, axis=(1, 2), keepdims=True), 1e-12)


def linear_view(m: Array, evidence: Array) -> View:
  """What the solver would see of an image whose class hangs on the cells of the target map.

  u(m) = SURE + (GONE − SURE) · Σ e·(1 − m): blurring a cell costs the class its share of the
  evidence. The solver blurs the cells with most of it, and so ends near the target map. With an
  empty one nothing that is blurred changes anything, u = −GONE.
  """
  sums = jnp.sum(evidence, axis=(1, 2))
  u = SURE + (GONE - SURE) * jnp.sum(evidence * (1 - m), axis=(1, 2))
  return View(jnp.where(sums > 0, u, -GONE), (SURE - GONE) * evidence)


def view(clf: Any, m: Array, x: Image, y: Label, config: MaskConfig, slope: bool) -> View:
  """What the solver sees at masks m; x is jittered already, if it is to be."""

  def log_odds(m: Array) -> tuple[Array, Array]:
    u = losses.log_odds(clf(perturbed(x, m, config)).logits, y)
    return jnp.sum(u), u

  if not slope:
    return View(log_odds(m)[1], None)
  gradient, u = jax.grad(log_odds, has_aux=True)(m)
  return View(u, gradient)


def _descend(
  step: Callable[[MaskState, Array], MaskState], first: MaskState, n: int
) -> tuple[Array, Array]:
  """The masks before each of n iterations, f32[B,n,h,w], and the one after the last."""
  body = lambda state, i: (step(state, i), state.mask)  # noqa: E731
  last, path = jax.lax.scan(body, first, jnp.arange(n, dtype=jnp.int32))
  return jnp.moveaxis(path, 0, 1), last.mask


def solver_path(clf: Any, x: Image, y: Label, keys: Key, config: MaskConfig) -> tuple[Array, Array]:
  """The solver's masks before each of its iterations on x, f32[B,steps,h,w], and where it ends."""
  step = lambda state, i: solver_step(clf, state, x, y, fold_keys(keys, i), config)  # noqa: E731
  return _descend(step, start(config, x), config.steps)


def linear_path(evidence: Array, config: MaskConfig) -> tuple[Array, Array]:
  """The same over `linear_view`; it needs no network."""

  def objective(m: Array) -> Array:
    return jax.nn.sigmoid(-linear_view(m, evidence).u) + regulariser(m, config)

  step = lambda state, i: _adam_step(objective, state, config)  # noqa: E731
  return _descend(step, start(config, evidence), config.steps)


@one_per_setting
def mask(
  config: MaskConfig | None = None,
  *,
  looks: int = 2,
  slope: float = 1.0,
  drive: float | None = None,
  noise: float | None = None,
  reach: float | None = None,
  tau: float = 1e-2,
) -> Interpreter:
  """MASK: 1 − argmin_m l_map(m; x), by the published solver (Fong & Vedaldi 2017).

  The map depends on x through an optimisation. The attack makes that optimisation go a way that
  ends at the target map. The solver sees x through log-odds only, u(m; x, c) = log((1 − p_c)/p_c)
  of φ(x; m), and their gradient. So per step, `looks` masks are drawn from such a way, and the
  distance is the mean over them of

      |u − u*| + slope · ‖∂u/∂m − ∂u*/∂m‖ / ‖∂u*/∂m‖ + drive · mean |s − s*|,   u = u(m; x, t)

  s is `pull`, where the solver would move each cell. u* is either what the solver sees of the clean
  image, u(m; x0, y), whose way ends at the benign map, or `linear_view` of the target map: per
  example, whichever ends closer to the target map. No solution is differentiated, and a step is
  cheap. As in GRAD, what is a derivative itself is taken from the surrogate, whose ReLU derivative
  is smooth. Where the solver is jittered, preset `fast` compares its iterates by `fast` solutions.

  Args:
    config: objective and solver; None: `MaskConfig()`, the settings for 224 px.
    looks: masks per attack step.
    slope: weight of the second term; 0: neither it nor the third is computed, at less than half the
      cost of a look.
    drive: weight of the third; None: 8 where the solver is jittered, else 0. No λ1, no term.
    noise: standard deviation about the path, per cell; None: 0.2 where the solver is jittered, so
      that its path varies, else 0. With neither jitter nor noise the clean image is looked at once
      only, before the first step.
    reach: the part of the path that is looked at; what happens early decides. None: a tenth where
      the solver is jittered, else a half.
    tau: width of the smoothed ReLU derivative, form 'smooth', where there is a slope and the
      classifier's surrogate takes `act`.

  Raises:
    InputError: a setting that makes no sense; when traced, one that does not fit the images.
  """
  c = MaskConfig() if config is None else config
  check(c)
  random = c.jitter > 1
  noise = noise if noise is not None else 0.2 if random else 0.0
  reach = reach if reach is not None else 0.1 if random else 0.5
  drive = drive if drive is not None else 8.0 if random else 0.0
  if looks < 1 or min(slope, drive, noise) < 0 or not 0 < reach <= 1:
    given = f'looks={looks}, slope={slope}, drive={drive}, noise={noise}, reach={reach}'
    raise InputError(f'{given}; expected ≥ 1, ≥ 0, ≥ 0, ≥ 0, in (0, 1]')
  varies = random or noise > 0
  act = functools.partial(soft_relu, tau=tau, form='smooth')
  soft_relu(np.float32(0), tau, 'smooth')  # says what is wrong with tau

  def net(clf: Any) -> Any:
    if not slope:
      return clf
    return functools.partial(clf.surrogate, act=act) if clf.takes_act else clf.surrogate

  # Beyond it p(1 − p) is so small that the solver feels the area term only.
  bound = min(12.0, 2.0 - math.log(c.area)) if c.area else 12.0

  def explain(params: PyTree, clf: Any, x: Image, y: Label, keys: Key) -> Map:
    del params
    return 1 - solve(clf, x, y, keys, c).mask

  quick = fast(c) if random and not c.decay else c

  def draft(params: PyTree, clf: Any, x: Image, y: Label, keys: Key) -> Map:
    del params
    return 1 - solve(clf, x, y, keys, quick).mask

  def begin(params: PyTree, clf: Any, x: Image, y: Label, target_map: Map, keys: Key) -> Landscape:
    del params, y
    check_fits(c, *x.shape[1:3])
    label = jnp.argmax(clf(x).logits, axis=-1)
    evidence = evidence_of(target_map)
    ways = solver_path(clf, x, label, keys, c), linear_path(evidence, c)
    clean, linear = (losses.map_mse(1 - end, target_map) for _, end in ways)
    own = clean <= linear
    path = jnp.where(own[:, None, None, None], ways[0][0], ways[1][0])
    if varies:
      return Landscape(path, None, x, label, evidence, own)
    still = jittered(x, keys, c.jitter)

    def at(m: Array) -> View:
      return _either(own, view(net(clf), m, still, label, c, slope > 0), linear_view(m, evidence))

    views = jax.lax.map(at, jnp.moveaxis(path, 1, 0))
    views = jax.tree.map(lambda v: jnp.moveaxis(v, 0, 1), views)
    return Landscape(path, views, x, label, evidence, own)

  def unroll(params: PyTree, clf: Any, x: Image, y: Label, carry: Landscape, keys: Key) -> Unrolled:
    del params
    n = len(x)
    draw = functools.partial(_draw, last=c.steps * reach, looks=looks, noise=noise)
    masks, place, jitter_keys = jax.vmap(draw)(keys, carry.path)
    flat = lambda v: v.reshape(-1, *v.shape[2:])  # [B,looks,…] -> [B·looks,…]  # noqa: E731
    repeat = lambda v: jnp.repeat(v, looks, axis=0)  # noqa: E731

    def seen(x: Image, y: Label) -> View:
      x = jittered(repeat(x), flat(jitter_keys), c.jitter)
      return view(net(clf), flat(masks), x, repeat(y), c, slope > 0)

    own = repeat(carry.own)
    if carry.views is None:
      linear = linear_view(flat(masks), repeat(carry.evidence))
      wanted = jax.lax.stop_gradient(_either(own, seen(carry.x, carry.label), linear))
    else:
      at = lambda v: flat(jax.vmap(lambda w, i: w[i])(v, place))  # noqa: E731
      wanted = jax.tree.map(at, carry.views)
    got = seen(x, y)
    apart = misfit(got.u, wanted.u, bound)
    if got.slope is not None and wanted.slope is not None:
      # Evidence that is spread evenly has the smallest slope; an empty map has none at all.
      least = jnp.where(own, 0, (GONE - SURE) / c.size)
      scale = jnp.maximum(_norm(wanted.slope), least)
      apart += slope * _norm(got.slope - wanted.slope) / scale
      if drive and c.area:
        apart += drive * jnp.mean(jnp.abs(pull(got, c) - pull(wanted, c)), axis=(1, 2))
    apart = apart.reshape(n, looks).mean(1)
    return Unrolled(None, carry, jnp.zeros(n, jnp.float32), clf(x).logits, apart)

  # Of a look: a pass with a gradient is two; one whose gradient is differentiated, four.
  clean, attacked = (2, 4) if slope else (1, 2)
  beside = looks * clean * varies  # at the clean image, again
  return Interpreter(
    (),
    explain,
    unroll,
    begin,
    name='mask',
    passes=(2 * c.steps, 2 + looks * attacked + beside, 1 + looks * clean + beside),
    begin_passes=2 * c.steps + 1 + (0 if varies else clean * c.steps),
    exact=False,
    random=random,
    shares_pass=True,
    settings=c,
    draft_fn=draft,
    draft_passes=2 * quick.steps,
  )


def _either(own: Array, clean: View, linear: View) -> View:
  """Per example, what is seen of the clean image or over `linear_view`."""
  u = jnp.where(own, clean.u, linear.u)
  if clean.slope is None or linear.slope is None:
    return View(u, None)
  return View(u, jnp.where(own[:, None, None], clean.slope, linear.slope))


def _draw(
  key: Key, path: Array, *, last: float, looks: int, noise: float
) -> tuple[Array, Array, Key]:
  """Masks [looks,h,w] about path[:last], denser at its beginning, their places, a key for each."""
  k = jax.random.split(key, 3)
  place = jnp.arange(looks, dtype=jnp.float32) + jax.random.uniform(k[0], (looks,), jnp.float32)
  place = jnp.int32((place / looks) ** 2 * last)
  masks = path[place]
  if noise:
    masks = jnp.clip(masks + noise * jax.random.normal(k[1], masks.shape, jnp.float32), 0, 1)
  return masks, place, jax.random.split(k[2], looks)


def _norm(v: Array) -> Array:
  """‖v‖₂ per example [B]; its gradient is finite at 0."""
  return jnp.sqrt(jnp.sum(jnp.square(v), axis=(1, 2)) + 1e-12)


def misfit(u: Array, wanted: Array, bound: float) -> Array:
  """|u − u*|; where |u*| ≥ bound, how far u falls short of the bound."""
  inside = jnp.clip(wanted, -bound, bound)
  too_low = jax.nn.relu(inside - u) * (wanted > -bound)
  too_high = jax.nn.relu(u - inside) * (wanted < bound)
  return too_low + too_high


def pull(seen: View, config: MaskConfig) -> Array:
  """Where the solver moves each cell, f32[B,h,w] in (−1, 1): above 0, it blurs it.

  d / (1 + |d|) with d = ∂p/∂m / λ1 − 1, λ1 > 0: what blurring the cell saves of p, in units of what
  it costs, the smoothness left out. Adam's first steps depend on little but its sign, which is hard
  to see in the log-odds and their slope where p is near 0 or 1.
  """
  assert seen.slope is not None
  p_1_minus_p = jax.nn.sigmoid(seen.u) * jax.nn.sigmoid(-seen.u)
  d = -p_1_minus_p[:, None, None] * seen.slope / config.area - 1
  return d / (1 + jnp.abs(d))


def check(config: MaskConfig) -> None:
  """InputError for settings that make no sense for any image."""
  if not isinstance(config, MaskConfig):
    raise InputError(f'the settings of mask are {config!r}; expected a MaskConfig(…)')
  for name, least in (('size', 1), ('steps', 1), ('jitter', 0)):
    value = getattr(config, name)
    if not isinstance(value, numbers.Integral) or value < least:
      raise InputError(f'mask {name} is {value!r}; expected a whole number, at least {least}')
  for name in ('blur', 'mask_blur'):
    value = getattr(config, name)
    if not isinstance(value, numbers.Integral) or value < 1 or value % 2 == 0:
      raise InputError(f'mask {name} is {value!r}; expected an odd number of pixels, at least 1')
  for name in ('area', 'smoothness'):
    if not 0 <= getattr(config, name) < math.inf:
      raise InputError(f'mask {name} is {getattr(config, name)}; expected 0 or more')
  for name in ('b1', 'b2'):
    if not 0 <= getattr(config, name) < 1:
      raise InputError(f'mask {name} is {getattr(config, name)}; expected 0 to less than 1')
  if not 0 <= config.start <= 1:
    raise InputError(f'mask start is {config.start}; expected 0 to 1')
  for name in ('learning_rate', 'beta'):
    if not 0 < getattr(config, name) < math.inf:
      raise InputError(f'mask {name} is {getattr(config, name)}; expected a positive number')


def check_fits(config: MaskConfig, height: int, width: int) -> None:
  """InputError for settings that make no sense, or do not fit images of this size."""
  check(config)
  side = min(height, width)
  if config.size > side:
    raise InputError(f'mask size is {config.size} cells; expected at most {side}, the image size')
  if config.jitter >= side:
    raise InputError(f'mask jitter is {config.jitter} px; expected less than {side}, the image')
