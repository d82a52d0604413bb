"""StAdv recipes: pixels move instead of changing colour (Xiao et al. 2018).

The set is `perturbations.flow_field`: a displacement of each pixel, priced at τ · its roughness.
`authors` runs the published legs, `fast` is the one of `presets` with steps in pixels.
"""

import functools
from typing import NamedTuple

import optax

from adv2_jax import losses
from adv2_jax.attacks import optimisers, presets
from adv2_jax.attacks.goals import DECEIVE, Goal
from adv2_jax.attacks.loop import adv2, pgd, staged, track_best
from adv2_jax.attacks.mask_alternation import tracked
from adv2_jax.attacks.perturbations import flow_field
from adv2_jax.attacks.presets import Fast, Recipe, Space
from adv2_jax.classifier import Classifier
from adv2_jax.interpreters.base import Interpreter
from adv2_jax.interpreters.masking import MaskConfig
from adv2_jax.types import (
  Array,
  InputError,
  Key,
  Label,
  MapDistance,
  Perturbation,
  PredictionLoss,
  Schedule,
)


class Published(NamedTuple):
  """The authors' settings for an interpreter.

  Attributes:
    warm: steps on the prediction alone.
    legs: (steps, λ at their start, λ at their end); the optimiser restarts at each.
    prediction: l_prd.
    distance: l_int.
    learning_rate: of amsgrad, in pixels.
    tau: τ.
    every: how often the iterate is scored; 0: the last one is delivered.
  """

  warm: int
  legs: tuple[tuple[int, float, float], ...]
  prediction: PredictionLoss = losses.targeted_xent
  distance: MapDistance = losses.map_mse
  learning_rate: float = 0.01
  tau: float = 0.0005
  every: int = 0


def _double_xent(logits: Array, target: Label) -> Array:
  return 2 * losses.targeted_xent(logits, target)


AUTHORS = {
  'cam': Published(200, ((600, 5.0, 10.0),), _double_xent),
  'rts': Published(200, ((600, 5.0, 10.0),)),
  'grad': Published(
    450,
    ((301, 0.003, 0.003), (201, 0.01, 0.01), (101, 0.05, 0.05), (101, 0.2, 0.2)),
    losses.smoothed_xent(0.95),
    losses.map_sse,
    every=10,
  ),
  'mask': Published(
    400, ((1000, 500.0, 500.0),), losses.margin, learning_rate=0.005, tau=0.004, every=50
  ),
}
AUTHORS_PLAIN = 300


@functools.lru_cache
def authors(
  name: str,
  steps_s1: int | None = None,
  steps_s2: int | None = None,
  goal: Goal = DECEIVE,
  tau: float | None = None,
) -> Recipe:
  """The published schedule for an interpreter of that name: prediction alone, then both losses.

  torch's amsgrad, begun anew at each leg. What our sources do not tell is as in the L∞ attack: λ of
  CAM and RTS (5 to 10), the steps of GRAD's legs, its smoothed target and best iterate; the l_int
  of MASK is a mean over cells. MASK's running mask is `tracked`, and the closest of the images met
  each 50th step is delivered. `steps_s2` stretches all legs alike; other interpreters are as CAM.
  """
  published = AUTHORS.get(name, AUTHORS['cam'])
  warm = (0 if goal.holds else published.warm) if steps_s1 is None else steps_s1
  total = sum(n for n, *_ in published.legs) if steps_s2 is None else steps_s2
  ends, ramps = presets.stretched(published.legs, total)

  def schedule(
    clf: Classifier, interpreter: Interpreter, perturbation: Perturbation, key: Key
  ) -> Schedule:
    if name == 'mask':
      if not isinstance(interpreter.settings, MaskConfig):
        raise InputError("preset 'authors' for MASK needs an interpreter from interpreters.mask(…)")
      interpreter = tracked(interpreter.settings)
    tx = optimisers.torch_amsgrad(published.learning_rate)
    prediction = goal.prediction(published.prediction)
    joint = adv2(
      clf,
      interpreter,
      perturbation,
      optimisers.restarted(tx, ends),
      weight=optax.join_schedules(ramps, ends),
      key=key,
      prediction=prediction,
      distance=goal.distance(published.distance),
      follow=goal.explained if goal.untargeted else None,
    )
    if published.every:
      least = 0.0 if name == 'mask' else -1.3863  # p > 0.8
      score = presets.closest_map(clf, interpreter, key, max_log_odds=least, goal=goal)
      passes = interpreter.passes[0]
      joint = track_best(joint, score, every=published.every, passes=passes)
    first = pgd(clf, perturbation, tx, key=key, prediction=prediction)
    return staged((first, warm), (joint, total))

  return Recipe(lambda _: flow_field(tau or published.tau), schedule, goal)


@functools.lru_cache
def plain(
  preset: str, steps: int | None = None, goal: Goal = DECEIVE, tau: float | None = None
) -> Recipe:
  """StAdv on the class alone; delivers the iterate of lowest cross-entropy.

  authors: 300 steps of torch's amsgrad. fast, thorough: 50 and 250 steps as those of `fast`.
  """
  if preset != 'authors':
    return presets.plain_pgd(preset, steps, goal, space(tau))
  published = Published(0, ())
  n = AUTHORS_PLAIN if steps is None else steps

  def schedule(
    clf: Classifier, interpreter: Interpreter, perturbation: Perturbation, key: Key
  ) -> Schedule:
    del interpreter
    tx = optimisers.torch_amsgrad(published.learning_rate)
    prediction = goal.prediction(losses.targeted_xent)
    attack = pgd(clf, perturbation, tx, key=key, prediction=prediction)
    return staged((track_best(attack, presets.lowest_loss), n))

  return Recipe(lambda _: flow_field(tau or published.tau), schedule, goal)


def _adam(n: int, first: float) -> optax.GradientTransformation:
  return optax.adam(optax.cosine_decay_schedule(first, n, exponent=2), 0.9, 0.99)


FAST = {
  'cam': Fast(100, 30.0, first_step=0.15),
  'rts': Fast(100, 100.0, first_step=0.1),
  'grad': Fast(200, 100.0, first_step=0.06, every=5),
  'mask': Fast(100, 30.0, first_step=0.1, every=10),
  'unrolled_mask': Fast(100, 100.0, first_step=0.1, every=10),
}


@functools.lru_cache
def space(tau: float | None = None) -> Space:
  """Flows, as a place for the recipes of `presets`; lengths are in pixels."""
  return Space(
    lambda _, levels=None: flow_field(tau or 0.0005, levels=levels),
    optimisers.torch_amsgrad,
    _adam,
    functools.partial(presets.settings_in, FAST),
    plain_step=0.1,
  )
