"""The published attack on MASK: image and running mask move in turns (read `loop.py` first).

MASK's map depends on x through an optimisation. Each step of x is therefore taken against a running
solution m, which follows x by a few of the solver's own iterations:

    1. every 50th step: x to 8 bits, m solved afresh and scored, its moments shortened
    2. x ← x − a · ∇margin/‖∇margin‖₂
    3. four iterations on m, no gradient kept
    4. four more, each looking one step ahead; l_int = mean of the four ‖(1 − m) − m_t‖²
    5. x ← x − s · ∇l_int/‖∇l_int‖₂, s the largest that keeps the margin below −κ; into P(x0)

`adv2_mask` is an `Attack` like any other: same driver, history and resume. `interpreters.mask`
takes another, cheaper way to the same end; `presets` has both.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adv2_jax import images, losses
from adv2_jax.attacks.goals import DECEIVE, Goal
from adv2_jax.attacks.loop import BestState, largest, where
from adv2_jax.classifier import Classifier
from adv2_jax.interpreters import masking
from adv2_jax.interpreters.base import Interpreter, one_per_setting
from adv2_jax.interpreters.masking import MaskConfig, MaskState
from adv2_jax.types import (
  Array,
  Attack,
  AttackState,
  Batch,
  Image,
  InputError,
  Key,
  Label,
  Map,
  Perturbation,
  PyTree,
  Snapshot,
  Terms,
  Unrolled,
  fold_keys,
  step_keys,
)

PIXELS = 224 * 224 * 3  # the published step lengths are for images of so many values


def adv2_mask(
  clf: Classifier,
  config: MaskConfig,
  perturbation: Perturbation,
  *,
  key: Key,
  kappa: float = 1.0,
  prediction_step: float = 0.05,
  map_step: float = 0.08,
  halve_at: int = 900,
  halvings: int = 10,
  looks: int = 4,
  renew: int = 50,
  goal: Goal = DECEIVE,
) -> Attack:
  """The alternating attack on classifier and MASK; delivers the best of the renewed solutions.

  Differs from the authors' code: x is rounded to 8 bits, not truncated; each example has its own
  step (theirs is one for the batch, and asks the sum of margins to stay below −10, or −5 for shape
  targets); x is kept in P(x0) after both of its moves; of the renewed solutions that are successes
  the one of smallest √mse to the target map is delivered. m follows at the solver's first rate.

  Where the class survives every blur, so that the solved mask is 1 in all cells, the clip to [0,1]
  has no derivative and x is not moved for its map: start from images not too sure of the target.

  Args:
    clf: the classifier f.
    config: of the solver that will judge.
    perturbation: a set of differences x − x0, as `Perturbation.invert` takes them.
    key: one key; an example's numbers come from it, its `example_id` and the step.
    kappa: what the margin max_{j≠t} z_j − z_t must stay below, negated.
    prediction_step: a, the L2 length at 224 px; below that scaled by √(HWC/150528).
    map_step: upper bound of s, likewise.
    halve_at: the step from which `map_step` is halved.
    halvings: of the bisection.
    looks: iterations of m in 3 and in 4.
    renew: steps between fresh solutions.
    goal: what it is after; an untargeted attack explains, at each step, the wrong class that leads.

  Raises:
    InputError: looks, renew or halvings under 1; at `init`, settings that do not fit the images.
  """
  for name, value in (('looks', looks), ('renew', renew), ('halvings', halvings)):
    if value < 1:
      raise InputError(f'adv2_mask {name} is {value}; expected at least 1')
  follow = config._replace(decay=False)  # at the end of a falling rate nothing would move

  def margin(x: Image, batch: Batch) -> tuple[Array, Array]:
    logits = clf(x).logits
    return goal.prediction(losses.margin)(logits, batch.target), logits

  def look(m: MaskState, x: Image, batch: Batch, keys: Key) -> tuple[MaskState, Array]:
    m, maps = looked_ahead(clf, m, x, batch.target, keys, follow, looks)
    apart = jax.vmap(goal.distance(losses.map_sse), (0, None))(maps, batch.target_map)
    return m, apart.mean(0)

  def solved(state: BestState, batch: Batch) -> BestState:
    """Takes x to 8 bits and m to its solution, and keeps x if that is the best so far."""
    inner = state.inner
    x = images.quantise(perturbation.apply(batch.x, inner.delta))
    delta = perturbation.project(batch.x, perturbation.invert(batch.x, x))
    missed, logits = margin(x, batch)
    target = goal.explained(logits, batch.target)
    fresh = masking.solve(clf, x, target, step_keys(key, batch.example_id, inner.step), config)
    distance = goal.distance(losses.map_rms)(1 - fresh.mask, batch.target_map)
    score = jnp.where(missed < 0, distance, 1e6 + missed)
    best = where(score < state.score, (delta, score), (state.delta, state.score))
    inner = _held(inner, inner._replace(delta=delta, carry=_shortened(fresh, follow)))
    return BestState(inner, *best)

  def step(batch: Batch, state: BestState) -> tuple[BestState, Snapshot]:
    state = jax.lax.cond(
      state.inner.step % renew == 0, lambda s: solved(s, batch), lambda s: s, state
    )
    inner = state.inner
    # Beyond those that a solution afresh draws its jitter from.
    x0 = batch.x
    keys = fold_keys(step_keys(key, batch.example_id, inner.step), config.steps)
    scale = min(1.0, (x0[0].size / PIXELS) ** 0.5)
    longest = map_step * scale * jnp.where(inner.step >= halve_at, 0.5, 1.0)

    x = start = perturbation.apply(x0, inner.delta)

    def move(x: Image, length: float | Array, direction: Array) -> Image:
      length = jnp.broadcast_to(length, len(x)).reshape(-1, 1, 1, 1)
      delta = perturbation.invert(x0, x - length * direction)
      return perturbation.apply(x0, perturbation.project(x0, delta))

    # 2. towards the target class
    (l_prd, logits), to_class = _with_gradient(lambda v: margin(v, batch), x)
    x = move(x, prediction_step * scale, _unit(to_class))
    # 3. the mask follows
    shown = batch._replace(target=goal.explained(logits, batch.target))
    m = followed(clf, inner.carry, x, shown.target, keys, follow, looks)
    # 4. and looks ahead
    (l_int, m), to_map = _with_gradient(lambda v: look(m, v, shown, keys)[::-1], x)
    # 5. towards the target map, as far as the class allows
    direction = _unit(to_map)

    def halve(i: Array, s: Array) -> Array:
      tried = s + longest * 0.5 ** (i + 1.0)
      return jnp.where(margin(move(x, tried, direction), batch)[0] < -kappa, tried, s)

    length = jax.lax.fori_loop(0, halvings, halve, jnp.zeros(len(x), jnp.float32))
    x = move(x, length, direction)

    terms = Terms(l_prd + l_int, l_prd, l_int, jnp.zeros_like(l_prd))
    snapshot = Snapshot(inner.step, start, terms, logits, largest((to_class, to_map)))
    done = inner.done | ~jnp.isfinite(snapshot.gradient)
    moved = AttackState(perturbation.invert(x0, x), (), m, done, inner.step + 1)
    return state._replace(inner=_held(inner, moved)), snapshot

  def init(batch: Batch, delta: PyTree | None = None) -> BestState:
    masking.check_fits(config, *batch.x.shape[1:3])
    if delta is None:
      delta = perturbation.init(batch.x, step_keys(key, batch.example_id, 0))
    m = masking.start(follow, batch.x)
    inner = AttackState(delta, (), m, ~batch.is_real, jnp.int32(0))
    return BestState(inner, delta, jnp.full(len(batch.x), jnp.inf, batch.x.dtype))

  def result(batch: Batch, state: BestState) -> PyTree:
    return solved(state, batch).delta

  # An iteration is a forward and a backward pass; looked through, it is run twice, and backwards.
  each = 2 + 2 * looks + 6 * looks + halvings
  renewal = 2 * config.steps + 1
  spent = lambda n: n * each + -(-n // renew) * renewal  # noqa: E731
  evaluations = lambda n: 2 * n  # margin and l_int  # noqa: E731
  return Attack(init, step, result, spent, renewal, evaluations=evaluations)


def followed(
  clf: Classifier, m: MaskState, x: Image, y: Label, keys: Key, config: MaskConfig, n: int
) -> MaskState:
  """The running mask after n iterations of the solver on x."""
  step = lambda i, m: masking.solver_step(clf, m, x, y, fold_keys(keys, i), config)  # noqa: E731
  return jax.lax.fori_loop(0, n, step, m)


def looked_ahead(
  clf: Classifier, m: MaskState, x: Image, y: Label, keys: Key, config: MaskConfig, n: int
) -> tuple[MaskState, Map]:
  """The next n iterations, that a loss can be differentiated through, and their maps [n,B,h,w].

  m is cut between them, its moments are not: each mask depends on x through its own iteration's
  gradient, and through those that the moments remember.
  """

  @jax.checkpoint  # or each iteration's activations of the whole net would be kept
  def one(m: MaskState, i: Array) -> tuple[MaskState, Map]:
    m = m._replace(mask=jax.lax.stop_gradient(m.mask))
    m = masking.solver_step(clf, m, x, y, fold_keys(keys, n + i), config)
    return m, 1 - m.mask

  return jax.lax.scan(one, m, jnp.arange(n, dtype=jnp.int32))


class Running(NamedTuple):
  """The mask that follows the image, and the steps since the start, i32[B]."""

  mask: MaskState
  step: Array


@one_per_setting
def tracked(config: MaskConfig, *, looks: int = 4, renew: int = 50) -> Interpreter:
  """MASK for attacks on all losses at once: the maps of 4 above, of a running mask as in 1 and 3.

  What `adv2_mask` does in turns, where moves of the image itself are not what the set is made of
  (StAdv: a flow). `explain` is the solver's own.
  """
  follow = config._replace(decay=False)

  def begin(params, clf, x, y, target_map, keys) -> Running:
    del params, clf, y, target_map, keys
    masking.check_fits(config, *x.shape[1:3])
    return Running(masking.start(follow, x), jnp.zeros(len(x), jnp.int32))

  def unroll(
    params: PyTree, clf: Classifier, x: Image, y: Label, carry: Running, keys: Key
  ) -> Unrolled:
    del params
    still = jax.lax.stop_gradient(x)

    def solved() -> MaskState:
      return _shortened(masking.solve(clf, images.quantise(still), y, keys, config), follow)

    m = jax.lax.cond(jnp.max(carry.step) % renew == 0, solved, lambda: carry.mask)
    keys = fold_keys(keys, config.steps)  # beyond those that a solution draws its jitter from
    m = followed(clf, m, still, y, keys, follow, looks)
    m, maps = looked_ahead(clf, m, x, y, keys, follow, looks)
    carry = Running(jax.lax.stop_gradient(m), carry.step + 1)
    return Unrolled(maps, carry, jnp.zeros(len(x), jnp.float32))

  renewal = 2 * config.steps // renew  # on the average
  return masking.mask(config).replace(
    unroll_fn=unroll,
    begin_fn=begin,
    passes=(2 * config.steps, 2 + 2 * looks + 6 * looks + renewal, 1 + 4 * looks + renewal),
    begin_passes=0,
    shares_pass=False,
    draft_fn=None,  # the published attack compares whole solutions
    draft_passes=None,
  )


def _held(old: AttackState, new: AttackState) -> AttackState:
  """`new`, but image and mask are the old ones where it is done."""
  kept = where(new.done, (old.delta, old.carry), (new.delta, new.carry))
  return new._replace(delta=kept[0], carry=kept[1])


def _shortened(m: MaskState, config: MaskConfig) -> MaskState:
  """Adam's mean halved, its variance quartered, its count at 100: warm, but not set in its ways.

  The first, cold iteration of Adam is lr · sign(g), which has no derivative to speak of. The state
  is one for `config`, whose rate may be another than that of the solver that left m.
  """
  is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
  (old,) = filter(is_adam, jax.tree.leaves(m.opt_state, is_leaf=is_adam))
  warm = optax.ScaleByAdamState(
    jnp.full_like(old.count, 100),
    jax.tree.map(lambda v: v / 2, old.mu),
    jax.tree.map(lambda v: v / 4, old.nu),
  )
  fresh = masking.start(config, m.mask, m.mask).opt_state
  put = lambda node: warm if is_adam(node) else node  # noqa: E731
  return MaskState(m.mask, jax.tree.map(put, fresh, is_leaf=is_adam))


def _with_gradient(
  f: Callable[[Image], tuple[Array, PyTree]], x: Image
) -> tuple[tuple[Array, PyTree], Array]:
  """((f(x)[0] per example, f(x)[1]), gradient of its sum)."""

  def total(x: Image) -> tuple[Array, tuple]:
    value, aux = f(x)
    return jnp.sum(value), (value, aux)

  gradient, seen = jax.grad(total, has_aux=True)(x)
  return seen, gradient


def _unit(v: Array) -> Array:
  """v / ‖v‖₂ per example; 0 stays 0."""
  largest = jnp.max(jnp.abs(v), axis=(1, 2, 3), keepdims=True)
  v = v / jnp.where(largest > 0, largest, 1)  # or the squares of small values would be 0
  norm = jnp.sqrt(jnp.sum(jnp.square(v), axis=(1, 2, 3), keepdims=True))
  return v / jnp.maximum(norm, 1)
