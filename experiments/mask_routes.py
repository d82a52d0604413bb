r"""Routes through MASK's inner optimisation, on the same images.

    python -m experiments.mask_routes --dataset npz --data_path cifar10_lossless_199.npz \
      --model cifar_resnet20 --weights cifar_resnet20.npz --num_examples 16

Each route is an `Interpreter` or a recipe, driven by the one attack loop. The solver has no jitter
here, so that a route is not judged by its luck; the judge solves afresh on the 8-bit image. Writes
routes.json.
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags

from adv2_jax import api, images, losses, metrics, presets
from adv2_jax.interpreters import masking
from adv2_jax.nets.activations import soft_relu
from adv2_jax.store import check_workdir, default_workdir, plain, writing
from adv2_jax.types import Array, Image, Interpreter, Key, Label, Map, PyTree, Unrolled, fold_keys
from experiments import _flags, _setup, attack

REMEDY = 'choose another --workdir'
TAU = 1e-2  # of the smooth surrogate, through which all routes differentiate twice


def smooth(clf: Any) -> Callable[[Image], Any]:
  """The net with smoothed ReLU derivatives: the second one of a ReLU is 0."""
  return functools.partial(clf.surrogate, act=functools.partial(soft_relu, tau=TAU, form='smooth'))


def _interpreter(
  c: masking.MaskConfig, unroll: Callable[..., Unrolled], begin: Callable[..., PyTree], passes: int
) -> Interpreter:
  def explain(params: PyTree, clf: Any, x: Image, y: Label, keys: Key) -> Map:
    return 1 - masking.solve(clf, x, y, keys, c).mask

  return Interpreter(
    (), explain, unroll, begin, name='mask', passes=(2 * c.steps, passes), exact=False, settings=c
  )


def _mean_square(a: Array, b: Array) -> Array:
  return jnp.mean(jnp.square(a - b), axis=tuple(range(1, a.ndim)))


# --- unrolled -------------------------------------------------------------------------------------


def unrolled(judge: masking.MaskConfig, c: masking.MaskConfig, n: int) -> Interpreter:
  """Differentiates the first n iterations of solver c; all of their masks are to be the clean ones.

  Each iteration is computed again on the way back (`jax.checkpoint`): memory for n masks and one
  network pass.
  """

  def path(net: Any, x: Image, y: Label, keys: Key) -> Array:
    @jax.checkpoint
    def body(state: masking.MaskState, i: Array) -> tuple[masking.MaskState, Array]:
      state = masking.solver_step(net, state, x, y, fold_keys(keys, i), c)
      return state, state.mask

    masks = jax.lax.scan(body, masking.start(c, len(x)), jnp.arange(n))[1]
    return jnp.moveaxis(masks, 0, 1)

  def begin(params, clf, x, y, target_map, keys):
    return path(smooth(clf), x, jnp.argmax(clf(x).logits, axis=-1), keys)

  def unroll(params, clf, x, y, carry, keys):
    masks = path(smooth(clf), x, y, keys)
    apart = jnp.sqrt(_mean_square(masks, carry) + 1e-12)
    return Unrolled(None, carry, jnp.zeros(len(x)), clf(x).logits, apart)

  return _interpreter(judge, unroll, begin, 2 + 8 * n)


# --- implicit differentiation ---------------------------------------------------------------------


class Running(NamedTuple):
  """A solution that follows x: solver state, and steps since it was solved from its start."""

  state: masking.MaskState
  age: Array
  wanted: Map


def implicit_gradient(
  clf: Any, m: Array, x: Image, y: Label, v: Array, c: masking.MaskConfig, n: int, damping: float
) -> Array:
  """What to differentiate by x for −vᵀ H⁻¹ ∂²l/∂m∂x, the derivative of vᵀ m*(x), [B].

  By the implicit function theorem at a solution m of min_{0≤m≤1} l(m; x): cells on the bounds stay
  there, and on the others H dm + ∂²l/∂m∂x dx = 0. (H + damping) w = v by n steps of conjugate
  gradients per example.
  """
  m, here = jax.lax.stop_gradient((m, x))
  free = ((m > 1e-3) & (m < 1 - 1e-3)).astype(m.dtype)
  slope = jax.grad(lambda m, x: jnp.sum(masking.mask_objective(clf, m, x, y, c)))

  def hessian(w: Array) -> Array:  # symmetric, so a gradient will do
    along = jax.grad(lambda m: jnp.vdot(slope(m, here), free * w))(m)
    return free * along + damping * w

  dot = lambda a, b: jnp.sum(a * b, axis=(1, 2), keepdims=True)  # noqa: E731

  def descend(_: Array, s: tuple) -> tuple:
    w, r, p = s
    hp = hessian(p)
    along = dot(p, hp)
    a = jnp.where(along > 1e-12, dot(r, r) / jnp.maximum(along, 1e-12), 0)  # H may be indefinite
    new = r - a * hp
    return w + a * p, new, new + dot(new, new) / jnp.maximum(dot(r, r), 1e-20) * p

  v = free * v
  w = jax.lax.fori_loop(0, n, descend, (jnp.zeros_like(v), v, v))[0]
  return -dot(jax.lax.stop_gradient(w), slope(m, x))[:, 0, 0]


def implicit(
  c: masking.MaskConfig, n: int = 10, damping: float = 0.1, follow: int = 4, renew: int = 10
) -> Interpreter:
  """Implicit differentiation at a running solution, renewed from its start each `renew` steps."""

  def solved(clf: Any, x: Image, y: Label, keys: Key) -> masking.MaskState:
    return masking.solve(clf, x, y, keys, masking.fast(c))

  def begin(params, clf, x, y, target_map, keys):
    state = solved(clf, x, y, keys)
    return Running(state, jnp.zeros(len(x), jnp.int32), target_map)

  def unroll(params, clf, x, y, carry, keys):
    at = jax.lax.stop_gradient(x)
    state = jax.lax.cond(
      carry.age[0] % renew == 0,
      lambda: solved(clf, at, y, keys),
      lambda: masking.solve(clf, at, y, keys, masking.fast(c), carry.state, steps=follow),
    )
    state = jax.lax.stop_gradient(state)
    distance = lambda m: losses.map_rms(1 - m, carry.wanted)  # noqa: E731
    pull = jax.grad(lambda m: jnp.sum(distance(m)))(state.mask)
    moved = implicit_gradient(smooth(clf), state.mask, x, y, pull, c, n, damping)
    apart = distance(state.mask) + moved - jax.lax.stop_gradient(moved)
    carry = carry._replace(state=state, age=carry.age + 1)
    return Unrolled(None, carry, jnp.zeros(len(x)), clf(x).logits, apart)

  per_step = 2 + 6 * n + 6 + 2 * follow + 2 * masking.fast(c).steps // renew
  return _interpreter(c, unroll, begin, per_step)


# --- stationarity ---------------------------------------------------------------------------------


def stationary(c: masking.MaskConfig, eta: float) -> Interpreter:
  """No inner loop: the target mask itself is to satisfy the conditions of optimality.

  ‖P(m_t − η ∇_m l(m_t; x)) − m_t‖, P the projection onto [0,1].
  """

  def begin(params, clf, x, y, target_map, keys):
    return 1 - target_map

  def unroll(params, clf, x, y, carry, keys):
    net = smooth(clf)
    slope = jax.grad(lambda m: jnp.sum(masking.mask_objective(net, m, x, y, c)))(carry)
    apart = jnp.sqrt(_mean_square(jnp.clip(carry - eta * slope, 0, 1), carry) + 1e-12)
    return Unrolled(None, carry, jnp.zeros(len(x)), clf(x).logits, apart)

  return _interpreter(c, unroll, begin, 2 + 6)


# --- the comparison -------------------------------------------------------------------------------


def routes(c: masking.MaskConfig) -> dict[str, tuple[Interpreter, presets.Recipe]]:
  """Name -> (interpreter, recipe). Those in units of maps take GRAD's settings of `fast`."""
  fast, grad = masking.fast(c), presets.fast('grad')
  mask = functools.partial(masking.mask, c)
  return {
    'pgd': (mask(), presets.plain_pgd('fast')),
    'published 100': (mask(), presets.authors('mask', steps_s2=100)),
    'published 1000': (mask(), presets.authors('mask')),
    'published 100, not warmed up': (mask(), presets.authors('mask', 0, 100)),
    'published 400, not warmed up': (mask(), presets.authors('mask', 0, 400)),
    'fast': (mask(), presets.fast('mask')),
    'fast without slopes': (mask(looks=3, slope=0), presets.fast('mask')),
    'unrolled 10': (unrolled(c, fast, 10), grad),
    'unrolled 30': (unrolled(c, fast, 30), grad),
    'unrolled 100': (unrolled(c, fast, 100), presets.fast('grad', steps_s2=50)),
    'implicit': (implicit(c), grad),
    'implicit damped 1': (implicit(c, damping=1.0), grad),
    'implicit damped .01': (implicit(c, damping=0.01), grad),
    'stationary 10': (stationary(c, 10.0), grad),
    'stationary 100': (stationary(c, 100.0), grad),
  }


def run(flags: dict[str, Any]) -> pathlib.Path:
  """The whole command, once the flags are known."""
  wanted = absl_flags.FLAGS.routes
  config = flags | {'target_label': 'random', 'target_map': 'benign', 'interpreters': ['mask']}
  _flags.check(config)
  path = pathlib.Path(flags['workdir'] or default_workdir(flags))
  check_workdir(path, flags, resume=False, remedy=REMEDY)
  setup = _setup.load(config)
  examples = _setup.select(setup)
  c = masking.usual(_setup.image_size(config))._replace(jitter=0)
  chosen = routes(c)
  rows = []
  for name in wanted or chosen:
    interpreter, recipe = chosen[name]
    found: list[dict[str, np.ndarray]] = []
    seconds = 0.0
    for shard in _setup.shards(setup, examples, np.arange(len(examples.id))):
      clean = api.explain(setup.clf, interpreter, shard.batch.x, shard.label, shard.keys)
      batch = shard.batch._replace(target_map=clean)
      times: list[tuple[int, float]] = []
      tick = lambda done, total, hit, times=times: times.append((done, time.perf_counter()))  # noqa: E731
      x8, history = api.attack_batch(
        recipe, setup.clf, interpreter, batch, 0.031, jax.random.key(0), on_chunk=tick
      )
      jax.block_until_ready(x8)
      (first, t0), (last, t1) = times[-min(len(times), 5)], times[-1]
      seconds += (t1 - t0) / max(last - first, 1) * last  # without compilation
      maps = api.explain(setup.clf, interpreter, x8, batch.target, shard.keys)
      logits = jax.jit(lambda clf, x: clf(x).logits)(setup.clf, x8)
      one = {
        'success': metrics.success(logits, batch.target),
        'l1': metrics.map_l1(maps, clean),
        'iou': metrics.map_iou(maps, clean),
        'passes': np.full(len(maps), history.passes[-1]),
        'empty': jnp.max(clean, axis=(1, 2)) < 0.1,
      }
      found.append({k: np.asarray(v)[shard.is_real] for k, v in one.items()})
    whole = {k: np.concatenate([f[k] for f in found]) for k in found[0]}
    hit = whole['success'].astype(bool)
    row = {
      'route': name,
      'n': len(hit),
      'asr': hit.mean(),
      'map_l1': whole['l1'][hit].mean(),
      'map_iou': whole['iou'][hit].mean(),
      'map_iou_not_empty': whole['iou'][hit & ~whole['empty']].mean(),
      'empty': int(whole['empty'].sum()),
      'passes': int(whole['passes'][0]),
      'seconds_per_image': seconds / len(hit),
    }
    rows.append({k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()})
    print(rows[-1], flush=True)
  report = {'config': flags, 'environment': attack.environment(config), 'rows': rows}
  with writing(path, REMEDY):
    images.write_atomic(path / 'routes.json', json.dumps(plain(report), indent=1).encode())
  print(path)
  return path


if __name__ == '__main__':
  _flags.define_data_flags()
  _flags.define_example_flags()
  absl_flags.DEFINE_multi_string('routes', None, 'Which; default: all.')
  _flags.start(run)
