"""C&W recipes: the closest image in L2 (Carlini & Wagner 2017), with the map inside the loss.

    min_w  ‖x − x0‖₂² + c · (m + λ · max(0, d − .9 ρ)),   x = (tanh w + 1)/2

m = max(margin, −κ) + κ, and d is the distance to the target map. The constant c is searched for
each example by halving, in rounds: an image counts as found once it is a success with confidence κ
*and* its map lies within ρ of the target map; then a smaller c is tried, else a larger one. The
closest of the images found is delivered; where none was, the success of closest map.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adv2_jax import losses
from adv2_jax.attacks.goals import DECEIVE, Goal
from adv2_jax.attacks.loop import BestState, Score, adv2, staged, track_best, where
from adv2_jax.attacks.perturbations import l2_tanh
from adv2_jax.attacks.presets import Recipe
from adv2_jax.classifier import Classifier
from adv2_jax.interpreters.base import Interpreter, no_map
from adv2_jax.interpreters.unrolled import thorough_mask
from adv2_jax.types import (
  Array,
  Attack,
  Batch,
  InputError,
  Key,
  Perturbation,
  PyTree,
  Schedule,
  Snapshot,
  step_keys,
)

NOT_FOUND = 1e3  # scores from here on are of images that do not count as found
FREE = 0.9  # the share of ρ below which the map pulls no more


class Search(NamedTuple):
  """How c is searched.

  Attributes:
    rounds: how many values of c are tried.
    steps: of each round.
    first: the first c; times ten until an image is found.
    learning_rate: of Adam, on w.
    decay: whether it falls to 0 within a round.
  """

  rounds: int
  steps: int
  first: float
  learning_rate: float
  decay: bool = False


AUTHORS = Search(9, 1000, 1e-3, 0.01)  # Carlini & Wagner's; nobody published one with a map
FAST = Search(6, 50, 1.0, 0.05, decay=True)
THOROUGH = Search(8, 150, 1.0, 0.05, decay=True)
SEARCHES = {'authors': AUTHORS, 'fast': FAST, 'thorough': THOROUGH}
# ρ (√mse), λ, and how often an inexact map is made afresh; chosen on scenes.
MAPS = {
  'cam': (0.25, 10.0, 1),
  'rts': (0.18, 100.0, 1),
  'grad': (0.12, 10.0, 5),
  'mask': (0.25, 0.3, 10),
}
THOROUGH_MAPS = {
  'cam': (0.2, 10.0, 1),
  'rts': (0.225, 100.0, 1),
  'grad': (0.105, 10.0, 5),
  'unrolled_mask': (0.22, 10.0, 10),
}


class SearchState(NamedTuple):
  """The round in progress, the best of the rounds before it, and the c of each example, [B]."""

  round: BestState
  delta: PyTree
  score: Array
  constant: Array
  low: Array
  high: Array

  @property
  def done(self) -> Array:
    """bool[B]."""
    return self.round.done


def searched(
  attack_of: Callable[[Array], Attack], search: Search, score: Score, *, every: int, passes: int
) -> Attack:
  """`attack_of(c)` with c by binary search; each round starts anew from x0.

  Args:
    attack_of: c [B] -> the attack.
    search: rounds, steps and first value.
    score: below `NOT_FOUND` for what is looked for; the lowest is delivered.
    every: how often it is asked for.
    passes: network passes of it.
  """

  def best_of(c: Array) -> Attack:
    return track_best(attack_of(c), score, every=every, passes=passes)

  def init(batch: Batch, delta: PyTree | None = None) -> SearchState:
    c = jnp.full(len(batch.x), search.first, jnp.float32)
    first = best_of(c).init(batch, delta)
    return SearchState(first, first.delta, first.score, c, jnp.zeros_like(c), first.score)

  def merged(state: SearchState) -> tuple[PyTree, Array]:
    better = state.round.score < state.score
    return where(better, (state.round.delta, state.round.score), (state.delta, state.score))

  def renewed(batch: Batch, state: SearchState) -> SearchState:
    delta, best = merged(state)
    found, c = state.round.score < NOT_FOUND, state.constant
    low = jnp.where(found, state.low, jnp.maximum(state.low, c))
    high = jnp.where(found, jnp.minimum(state.high, c), state.high)
    c = jnp.where(jnp.isinf(high), 10 * c, (low + high) / 2)
    fresh, old = best_of(c).init(batch, None), state.round.inner
    moved = where(old.done, (old.delta, old.opt_state), (fresh.delta, fresh.inner.opt_state))
    inner = old._replace(delta=moved[0], opt_state=moved[1], explained=fresh.inner.explained)
    return SearchState(BestState(inner, fresh.delta, fresh.score), delta, best, c, low, high)

  def step(batch: Batch, state: SearchState) -> tuple[SearchState, Snapshot]:
    current, snapshot = best_of(state.constant).step(batch, state.round)
    state = state._replace(round=current)
    is_last = current.inner.step % search.steps == 0
    return jax.lax.cond(is_last, lambda s: renewed(batch, s), lambda s: s, state), snapshot

  def result(batch: Batch, state: SearchState) -> PyTree:
    del batch
    return merged(state)[0]

  whole = best_of(jnp.ones(1, jnp.float32))
  return Attack(init, step, result, whole.passes, 0, whole.look_passes)


def closest_image(
  clf: Classifier,
  interpreter: Interpreter,
  key: Key,
  *,
  kappa: float,
  within: float,
  goal: Goal = DECEIVE,
) -> Score:
  """‖x − x0‖₂ of what is looked for; then successes by their map, then the others by log-odds."""

  def score(batch: Batch, snapshot: Snapshot) -> Array:
    target = goal.explained(snapshot.logits, batch.target)
    if interpreter.exact:
      distance = snapshot.terms.interpretation + FREE * within
    else:
      keys = step_keys(key, batch.example_id, snapshot.step)
      apart = jax.tree.map(
        losses.map_rms, interpreter.explain(clf, snapshot.x, target, keys), batch.target_map
      )
      distance = jax.tree.reduce(jnp.maximum, apart)
    hit = goal.success(snapshot.logits, batch.target)
    sure = goal.prediction(losses.margin)(snapshot.logits, batch.target) <= -kappa
    norm = jnp.sqrt(jnp.sum(jnp.square(snapshot.x - batch.x), (1, 2, 3)))
    odds = losses.log_odds(snapshot.logits, target)
    if interpreter.exact and snapshot.explained is not None:  # that map was of another class
      distance += (snapshot.explained != target) * NOT_FOUND
    other = jnp.where(hit, NOT_FOUND + distance, 1e6 + odds)
    return jnp.where(hit & sure & (distance <= within), norm, other)

  return score


def _recipe(
  search: Search,
  name: str | None,
  steps: int | None,
  goal: Goal,
  kappa: float,
  within: float | None,
  thorough: bool = False,
) -> Recipe:
  if not 0 <= kappa < float('inf'):
    raise InputError(f'kappa is {kappa}; expected a confidence of 0 or more, in logits, such as 0')
  if within is not None and not 0 < within < float('inf'):
    raise InputError(f'within is {within}; expected a positive distance between maps, such as 0.1')
  if goal.away:
    raise InputError(
      "framework 'cw' looks for the closest image whose map lies near the target map, and so can't "
      "lead away from one: take framework 'pgd' or 'stadv'"
    )
  if steps is not None:
    search = search._replace(steps=-(-steps // search.rounds))
  total = search.rounds * search.steps if steps is None else steps

  def schedule(
    clf: Classifier, interpreter: Interpreter, perturbation: Perturbation, key: Key
  ) -> Schedule:
    if name is None:
      interpreter = no_map()
    maps = THOROUGH_MAPS if thorough else MAPS
    if thorough:
      interpreter = thorough_mask(interpreter)
    usual = maps['cam' if interpreter.exact else 'grad']
    default, weight, every = maps.get(interpreter.name, usual)
    rho = default if within is None else within
    rate: optax.ScalarOrSchedule = search.learning_rate
    if search.decay:
      rate = optax.cosine_decay_schedule(search.learning_rate, search.steps)

    def attack_of(c: Array) -> Attack:
      # Adam is blind to the scale of the loss: the price is divided by c, not the rest multiplied.
      priced = perturbation._replace(price=lambda x0, x: perturbation.price(x0, x) / c)
      return adv2(
        clf,
        interpreter,
        priced,
        optax.adam(rate),
        weight=weight,
        key=key,
        prediction=goal.prediction(losses.hinged(losses.margin, -kappa)),
        distance=lambda m, t: jax.nn.relu(losses.map_rms(m, t) - FREE * rho),
        follow=goal.explained if goal.untargeted else None,
      )

    score = closest_image(clf, interpreter, key, kappa=kappa, within=rho, goal=goal)
    passes = 0 if interpreter.exact else interpreter.passes[0]
    return staged((searched(attack_of, search, score, every=every, passes=passes), total))

  return Recipe(lambda _: l2_tanh(levels=255), schedule, goal)


@functools.lru_cache
def by_name(
  preset: str,
  name: str,
  steps: int | None = None,
  goal: Goal = DECEIVE,
  kappa: float = 0.0,
  within: float | None = None,
) -> Recipe:
  """C&W on class and map; `steps` are those of all rounds together.

  authors: the schedule of Carlini & Wagner, 9 rounds of 1000 steps. fast: ours, 6 rounds of 50 with
  falling steps; thorough: 8 of 150, and MASK through its own solver. The image is rounded to 8 bits
  inside the loop, as it will be delivered.
  """
  return _recipe(SEARCHES[preset], name, steps, goal, kappa, within, preset == 'thorough')


@functools.lru_cache
def plain(
  preset: str, steps: int | None = None, goal: Goal = DECEIVE, kappa: float = 0.0
) -> Recipe:
  """C&W on the class alone."""
  return _recipe(SEARCHES[preset], None, steps, goal, kappa, None)
