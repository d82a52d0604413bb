"""Recipes: complete schedules, by name.

`authors` is what the paper's scripts ran. `fast` is ours, and `thorough` the same with more steps.

A recipe is static under jit and compared by identity, so the factories here are cached: the same
settings give the same recipe, and no second trace.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adv2_jax import losses
from adv2_jax.attacks import optimisers
from adv2_jax.attacks.goals import DECEIVE, Goal
from adv2_jax.attacks.loop import Follow, Score, adv2, pgd, staged, track_best
from adv2_jax.attacks.mask_alternation import adv2_mask
from adv2_jax.attacks.perturbations import in_radii, l2_ball, linf_ball
from adv2_jax.classifier import Classifier
from adv2_jax.interpreters.base import Interpreter
from adv2_jax.interpreters.masking import MaskConfig
from adv2_jax.interpreters.unrolled import thorough_mask
from adv2_jax.types import (
  Array,
  Batch,
  InputError,
  Key,
  Perturbation,
  Schedule,
  Snapshot,
  step_keys,
)


class Recipe(NamedTuple):
  """All that is chosen before an attack meets a model.

  Attributes:
    perturbation: epsilon -> the set P(x0) that every stage searches.
    schedule: (clf, interpreter, perturbation, key) -> the stages.
    goal: what it is after.
  """

  perturbation: Callable[[float | Array], Perturbation]
  schedule: Callable[[Classifier, Interpreter, Perturbation, Key], Schedule]
  goal: Goal = DECEIVE


class Space(NamedTuple):
  """Where an attack moves, and by which steps; `LINF` is the one of the papers, see `L2`, `stadv`.

  Attributes:
    perturbation: (epsilon, levels) -> the set P(x0).
    step: length -> steps of that length along the gradient alone.
    decaying: (n, first) -> n steps with momentum, the first of that length, the last of none.
    settings: (an interpreter's name, whether it is exact) -> those of `fast`.
    plain_step: the first step of plain `fast`.
  """

  perturbation: Callable[..., Perturbation]
  step: Callable[[float], optax.GradientTransformation]
  decaying: Callable[[int, float], optax.GradientTransformation]
  settings: Callable[[str, bool], 'Fast'] = lambda name, is_exact: _usual(name, is_exact)
  plain_step: float = 4 / 255


def _decay(first: float, n: int) -> optax.Schedule:
  return optax.cosine_decay_schedule(first, n, exponent=2)


LINF = Space(
  linf_ball,
  optax.sign_sgd,
  lambda n, first: optimisers.sign_momentum(_decay(first, n), 0.6),
)
# A step is the same share of ε there as in the published L∞ ball of .031.
L2 = Space(
  lambda epsilon, levels=None: in_radii(l2_ball(epsilon, levels=levels), epsilon),
  lambda length: optimisers.l2_momentum(length / 0.031, 0.0),
  lambda n, first: optimisers.l2_momentum(_decay(first / 0.031, n), 0.6),
)

AUTHORS_STEP = 1 / 255
# Steps of `thorough`.
THOROUGH = {'mask': 100, 'unrolled_mask': 100, 'joint': 300}
THOROUGH_ELSE = 250
PLAIN = {'authors': 1200, 'fast': 50, 'thorough': THOROUGH_ELSE}  # steps on the class alone
AUTHORS_MASK = (400, 1000)  # steps on the margin, and of the alternation
# Interpreter -> warm-up steps, and legs of (steps, λ at their start, λ at their end, distance).
AUTHORS = {
  'cam': (400, ((1200, 5.0, 10.0),), losses.map_mse),
  'rts': (300, ((1000, 5.0, 10.0),), losses.map_mse),
  'grad': (
    300,
    ((301, 0.001, 0.001), (201, 0.004, 0.004), (101, 0.01, 0.01), (101, 0.05, 0.05)),
    losses.map_sse,
  ),
}


def lowest_loss(batch: Batch, snapshot: Snapshot) -> Array:
  """The score of plain PGD: the prediction loss, [B]."""
  del batch
  return snapshot.terms.prediction


def closest_map(
  clf: Classifier,
  interpreter: Interpreter,
  key: Key,
  *,
  max_log_odds: float,
  wanted_log_odds: float = 0.0,
  price: float = 0.0,
  goal: Goal = DECEIVE,
) -> Score:
  """The score of the joint attack: how far the map is, once the target is predicted, [B].

  d + price · max(0, u − wanted) for iterates with u = log((1 − p_t)/p_t) ≤ max_log_odds; all others
  come after these. d is the attack's own map distance, which should be √mse; of several maps it is
  their sum. Where `unroll` differs from `explain` (GRAD, MASK), the map is made afresh on the real
  net, by the interpreter's draft if it has one; where it is random, with the step's own random
  numbers, which no judge uses: an iterate is not kept for its luck with them. An untargeted
  attack's t is the wrong class that leads, and a map of another one does not count.
  """

  def score(batch: Batch, snapshot: Snapshot) -> Array:
    target = goal.explained(snapshot.logits, batch.target)
    odds = losses.log_odds(snapshot.logits, target)
    fits = odds <= max_log_odds
    if interpreter.exact:
      distance = snapshot.terms.interpretation
      fits &= snapshot.explained is None or snapshot.explained == target
    else:
      keys = step_keys(key, batch.example_id, snapshot.step)
      maps = interpreter.draft(clf, snapshot.x, target, keys)
      apart = jax.tree.map(goal.distance(losses.map_rms), maps, batch.target_map)
      distance = jax.tree.reduce(jnp.add, apart)
    cost = distance + price * jax.nn.relu(odds - wanted_log_odds)
    return jnp.where(fits, cost, 1e6 + odds)

  return score


@functools.lru_cache
def authors(
  name: str,
  steps_s1: int | None = None,
  steps_s2: int | None = None,
  goal: Goal = DECEIVE,
  space: Space = LINF,
) -> Recipe:
  """The published schedule for an interpreter of that name: warm start, then the joint loss.

  Sign steps of 1/255. CAM, RTS: λ from 5 to 10 on the mean of squares, the last iterate. GRAD: four
  legs of rising λ on the sum of squares, label-smoothed target, and per example the best iterate,
  tested each 10th step on the real net, with p_t > 0.8. MASK: `adv2_mask`. Other interpreters use
  CAM's schedule. `steps_s2` shortens or stretches all legs alike. Where the class is to stay what
  it is, there is no warm start, unless `steps_s1` asks for one.
  """
  if goal.holds and steps_s1 is None:
    steps_s1 = 0
  if name == 'mask':
    warm, total = AUTHORS_MASK
    return _authors_mask(
      warm if steps_s1 is None else steps_s1, total if steps_s2 is None else steps_s2, goal, space
    )
  warm, legs, distance = AUTHORS.get(name, AUTHORS['cam'])
  smoothed = losses.smoothed_xent(0.95) if name == 'grad' else losses.targeted_xent
  warm = warm if steps_s1 is None else steps_s1
  total = sum(n for n, *_ in legs) if steps_s2 is None else steps_s2

  def schedule(
    clf: Classifier, interpreter: Interpreter, perturbation: Perturbation, key: Key
  ) -> Schedule:
    tx = space.step(AUTHORS_STEP)
    ends, ramps = stretched(legs, total)
    joint = adv2(
      clf,
      interpreter,
      perturbation,
      tx,
      weight=optax.join_schedules(ramps, ends),
      key=key,
      prediction=goal.prediction(smoothed),
      distance=goal.distance(distance),
      follow=_follow(goal),
    )
    if name == 'grad':
      log_odds_at_08 = -1.3863  # log(0.2/0.8)
      score = closest_map(clf, interpreter, key, max_log_odds=log_odds_at_08, goal=goal)
      joint = track_best(joint, score, every=10, passes=interpreter.passes_of_draft)
    prediction = goal.prediction(losses.targeted_xent)
    return staged(
      (pgd(clf, perturbation, tx, key=key, prediction=prediction), warm), (joint, total)
    )

  return Recipe(space.perturbation, schedule, goal)


def stretched(
  legs: Sequence[tuple[int, float, float]], total: int
) -> tuple[list[int], list[optax.Schedule]]:
  """Where legs of (steps, λ at their start, λ at their end) end but the last, and λ in each."""
  stretch = total / sum(n for n, *_ in legs)
  ends = [round(stretch * sum(n for n, *_ in legs[: i + 1])) for i in range(len(legs) - 1)]
  ramps = [optax.linear_schedule(a, b, max(1, round(stretch * n) - 1)) for n, a, b in legs]
  return ends, ramps


def _follow(goal: Goal) -> Follow | None:
  return goal.explained if goal.untargeted else None


def _authors_mask(warm: int, total: int, goal: Goal, space: Space) -> Recipe:
  def schedule(
    clf: Classifier, interpreter: Interpreter, perturbation: Perturbation, key: Key
  ) -> Schedule:
    if not isinstance(interpreter.settings, MaskConfig):
      raise InputError("preset 'authors' for MASK needs an interpreter from interpreters.mask(…)")
    tx = space.step(AUTHORS_STEP)
    first = pgd(clf, perturbation, tx, key=key, prediction=goal.prediction(losses.margin))
    halve_at = round(0.9 * total)
    turns = adv2_mask(
      clf, interpreter.settings, perturbation, key=key, halve_at=halve_at, goal=goal
    )
    return staged((first, warm), (turns, total))

  return Recipe(space.perturbation, schedule, goal)


@functools.lru_cache
def plain_pgd(
  preset: str, steps: int | None = None, goal: Goal = DECEIVE, space: Space = LINF
) -> Recipe:
  """The baseline that attacks the classifier alone; delivers the iterate of lowest cross-entropy.

  authors: 1200 sign steps of 1/255. fast, thorough: 50 and 250 steps as those of `fast`.
  """
  n = steps or PLAIN[preset]

  def schedule(
    clf: Classifier, interpreter: Interpreter, perturbation: Perturbation, key: Key
  ) -> Schedule:
    del interpreter
    tx = space.step(AUTHORS_STEP) if preset == 'authors' else space.decaying(n, space.plain_step)
    prediction = goal.prediction(losses.targeted_xent)
    attack = pgd(clf, perturbation, tx, key=key, prediction=prediction)
    return staged((track_best(attack, lowest_loss), n))

  return Recipe(space.perturbation, schedule, goal)


@functools.lru_cache
def fast(
  name: str,
  steps_s1: int | None = None,
  steps_s2: int | None = None,
  goal: Goal = DECEIVE,
  space: Space = LINF,
  thorough: bool = False,
) -> Recipe:
  """Ours: sign momentum with cosine-decayed steps; what it keeps is chosen as it will be judged.

  Both losses pull from the first step on. What binds differs between examples, so each has its own
  λ = λ0 · exp(−l_prd), with l_prd = max(0, u + 4) and u = log((1 − p_t)/p_t): an image that is
  surely taken for the target (p_t > 0.98) is moved for its map alone, one that is not gives the map
  up until it is. The image is rounded to 8 bits inside the loop (gradients pass straight through),
  so that the iterate kept is the very image delivered; a bit of confidence may be given up for a
  closer map. There is no warm start, unless `steps_s1` asks for so many sign steps of 1/255 on the
  prediction alone.

  `thorough` takes more steps (`THOROUGH`), and leads MASK through its own solver (`unrolled_mask`).
  """

  def schedule(
    clf: Classifier, interpreter: Interpreter, perturbation: Perturbation, key: Key
  ) -> Schedule:
    interpreter = thorough_mask(interpreter) if thorough else interpreter
    settings = space.settings(interpreter.name, interpreter.exact)
    usual = THOROUGH.get(name, THOROUGH_ELSE) if thorough else settings.steps
    n = usual if steps_s2 is None else steps_s2
    tx = space.step(AUTHORS_STEP)
    to_class = goal.prediction(losses.targeted_xent)
    warm = pgd(clf, perturbation, tx, key=key, prediction=to_class)
    attack = adv2(
      clf,
      interpreter,
      perturbation,
      space.decaying(n, settings.first_step),
      weight=settings.weight,
      key=key,
      prediction=goal.prediction(losses.hinged(losses.log_odds, -4.0)),
      balance=lambda l_prd: jnp.exp(-l_prd),
      distance=goal.distance(losses.map_rms),
      follow=_follow(goal),
    )
    score = closest_map(
      clf, interpreter, key, max_log_odds=-0.1, wanted_log_odds=-3.0, price=0.02, goal=goal
    )
    passes = 0 if interpreter.exact else interpreter.passes_of_draft
    rare = interpreter.random and not interpreter.exact and interpreter.draft_fn is None
    every = settings.every * (2 if rare else 1)
    best = track_best(attack, score, every=every, passes=passes)
    return staged((warm, steps_s1 or 0), (best, n))

  return Recipe(functools.partial(space.perturbation, levels=255), schedule, goal)


class Fast(NamedTuple):
  """Settings of `fast` for an interpreter.

  Attributes:
    steps: how many.
    weight: λ0.
    first_step: its length, before the decay.
    every: how often the iterate is scored, where an inexact map is made afresh for that; half as
      often where that map is random and has no draft.
  """

  steps: int
  weight: float
  first_step: float = 4 / 255
  every: int = 1


def settings_in(table: Mapping[str, Fast], name: str, is_exact: bool) -> Fast:
  """Those of an interpreter; without its own, as GRAD where the map must be made afresh."""
  return table.get(name, table['cam' if is_exact else 'grad'])


FAST = {
  'cam': Fast(100, 300.0),
  'grad': Fast(100, 100.0, first_step=3 / 255, every=5),
  'mask': Fast(100, 30.0, every=10),
  'unrolled_mask': Fast(50, 300.0, every=10),
  'joint': Fast(300, 300.0, first_step=5 / 255, every=10),
}


def _usual(name: str, is_exact: bool) -> Fast:
  return settings_in(FAST, name, is_exact)


def check_steps(steps_s1: int | None, steps_s2: int | None) -> None:
  """InputError for numbers of steps that are none."""
  for flag, value in (('steps_s1', steps_s1), ('steps_s2', steps_s2)):
    if value is not None and value < (0 if flag == 'steps_s1' else 1):
      raise InputError(f'{flag} is {value}; expected a positive number of steps')


def by_name(
  preset: str,
  name: str,
  steps_s1: int | None = None,
  steps_s2: int | None = None,
  *,
  goal: Goal = DECEIVE,
) -> Recipe:
  """The recipe of that preset ('fast', 'thorough' or 'authors') for an interpreter's name."""
  check_steps(steps_s1, steps_s2)
  if preset == 'authors':
    if name == 'joint':
      raise InputError(
        "preset 'authors' has no joint attack, nobody published one: take preset 'fast'"
      )
    return authors(name, steps_s1, steps_s2, goal)
  if preset in ('fast', 'thorough'):
    if goal.away and (name == 'joint' or (preset, name) == ('fast', 'mask')):
      raise InputError(
        f'{name} under preset {preset!r} comes close to target maps, and goes away from none: '
        + ("take preset 'thorough' for that" if name == 'mask' else 'attack one after the other')
      )
    return fast(name, steps_s1, steps_s2, goal, thorough=preset == 'thorough')
  raise InputError(f"preset {preset!r} is unknown; expected 'fast', 'thorough' or 'authors'")
