"""Attacks of the literature on classifier and interpreter, as recipes to stand beside ours.

Each is a preset, `preset='adv_edge'` and so on, in the one loop, judged like all others: the 8-bit
image, the real network, a fresh map.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adv2_jax import losses
from adv2_jax.attacks import presets
from adv2_jax.attacks.goals import DECEIVE, Goal
from adv2_jax.attacks.loop import adv2, staged, track_best
from adv2_jax.attacks.perturbations import linf_ball
from adv2_jax.attacks.presets import Recipe
from adv2_jax.classifier import Classifier
from adv2_jax.interpreters.base import Interpreter
from adv2_jax.types import (
  Array,
  Carry,
  Image,
  InputError,
  Key,
  Label,
  Perturbation,
  PyTree,
  Schedule,
  Unrolled,
)


def edges(x: Image, share: float = 0.1) -> Array:
  """bool[B,H,W,1]: where Sobel's gradient of the channels' mean exceeds `share` of its largest."""
  padded = jnp.pad(x.mean(-1), ((0, 0), (1, 1), (1, 1)), mode='edge')
  across = padded[:, :, 2:] - padded[:, :, :-2]
  along = padded[:, 2:] - padded[:, :-2]
  by_column = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
  by_row = along[:, :, :-2] + 2 * along[:, :, 1:-1] + along[:, :, 2:]
  strength = jnp.sqrt(jnp.square(by_column) + jnp.square(by_row))
  return (strength > share * strength.max((1, 2), keepdims=True))[..., None]


def edge_ball(epsilon: float | Array, *, levels: int | None = None) -> Perturbation:
  """`linf_ball` of which only pixels on `edges` of x0 change; off them delta has no effect."""
  ball = linf_ball(epsilon, levels=levels)
  return ball._replace(apply=lambda x0, delta: ball.apply(x0, edges(x0) * delta))


EDGES = presets.LINF._replace(perturbation=edge_ball)


@functools.lru_cache
def adv_edge(
  name: str, steps_s1: int | None = None, steps_s2: int | None = None, goal: Goal = DECEIVE
) -> Recipe:
  """AdvEdge: ADV² by `fast` whose changes are kept to strong edges (Abdukhamidov et al. 2021)."""
  return presets.fast(name, steps_s1, steps_s2, goal, EDGES)


def _nothing(logits: Array, target: Label) -> Array:
  del target
  return jnp.zeros(len(logits), jnp.float32)


@functools.lru_cache
def ghorbani(
  name: str, steps_s1: int | None = None, steps_s2: int | None = None, goal: Goal = DECEIVE
) -> Recipe:
  """Ghorbani, Abid & Zou 2019: sign steps on the top-k or centre loss alone.

  100 steps of 1/255 along the map's loss; of the iterates whose class is still the true one, that
  with the least left of the benign map.

  Differs from the authors' code: GRAD's own surrogate instead of softplus; a fifth of the cells,
  theirs 1000 of 227² pixels; maps within [0,1] before they are summed; the iterate kept is that of
  least mass left, theirs that of smallest intersection.
  """
  _only_map('ghorbani', name, goal, steps_s1, is_away=True)

  def schedule(
    clf: Classifier, interpreter: Interpreter, perturbation: Perturbation, key: Key
  ) -> Schedule:
    tx, distance = optax.sign_sgd(1 / 255), goal.distance(losses.map_rms)
    attack = adv2(
      clf,
      interpreter,
      perturbation,
      tx,
      weight=1.0,
      key=key,
      prediction=_nothing,
      distance=distance,
    )
    return staged((_closest(attack, clf, interpreter, key, goal), steps_s2 or 100))

  return Recipe(functools.partial(linf_ball, levels=255), schedule, goal)


@functools.lru_cache
def dombrowski(
  name: str, steps_s1: int | None = None, steps_s2: int | None = None, goal: Goal = DECEIVE
) -> Recipe:
  """Dombrowski et al. 2019, "Explanations can be manipulated and geometry is to blame".

      min  4000 · mean (m − m_t)² + 1e6 · mean (softmax f(x) − softmax f(x0))²

  on the net with softplus_β for ReLU, β rising from 10 to 100, by 1500 steps of Adam at 2e-4 in
  normalised units (4.5e-5 of the image range). 4000 is the published 1e11 for maps that sum to 1
  in place of our [0,1], at 224 px and a mean of .1. The best iterate by the real net's map.

  Differs from the authors' code: within the L∞ ball, which it lacks; the best iterate, theirs is
  the last; for maps of other sizes 4000 is another share of the two terms.
  """
  _only_map('dombrowski', name, goal, steps_s1, is_away=False)
  n = steps_s2 or 1500

  def schedule(
    clf: Classifier, interpreter: Interpreter, perturbation: Perturbation, key: Key
  ) -> Schedule:
    if interpreter.exact:
      raise InputError(
        f"preset 'dombrowski' smooths ReLUs for maps made of gradients; {name}'s is not: take grad"
      )
    if not clf.takes_act:
      raise InputError(
        "preset 'dombrowski' puts softplus in the place of ReLU, for which the classifier's "
        'surrogate needs an argument: write it as surrogate_fn(params, x, act=soft_relu)'
      )
    attack = adv2(
      clf,
      softplus_net(interpreter, n),
      perturbation,
      optax.adam(4.5e-5),
      weight=4000.0,
      key=key,
      prediction=_nothing,
    )
    return staged((_closest(attack, clf, interpreter, key, goal), n))

  return Recipe(functools.partial(linf_ball, levels=255), schedule, goal)


def softplus_net(interpreter: Interpreter, steps: int) -> Interpreter:
  """The same maps through softplus_β(z) = log(1 + exp βz)/β, β = 10 · 10^(step/steps).

  Its `extra` keeps the outputs where the clean images' are.
  """

  def begin(params: PyTree, clf: Any, x: Image, y: Label, target_map: PyTree, keys: Key) -> Carry:
    inner = interpreter.begin_fn(params, clf, x, y, target_map, keys)
    return inner, jax.nn.softmax(clf(x).logits), jnp.zeros(len(x), jnp.float32)

  def unroll(params: PyTree, clf: Any, x: Image, y: Label, carry: Carry, keys: Key) -> Unrolled:
    inner, clean, step = carry
    beta = 10.0 * 10.0 ** (step.max() / steps)  # of rows that are held the step stands still
    soft = _handed_on(lambda z: jax.nn.softplus(beta * z) / beta)
    net = clf.replace(surrogate_fn=lambda p, v, act=None: clf.surrogate_fn(p, v, act=soft))
    seen = interpreter.unroll_fn(params, net, x, y, inner, keys)
    logits = net.surrogate(x).logits if seen.logits is None else seen.logits
    moved = jnp.mean(jnp.square(jax.nn.softmax(logits) - clean), -1)
    return seen._replace(carry=(seen.carry, clean, step + 1), extra=seen.extra + 1e6 * moved)

  return interpreter.replace(begin_fn=begin, unroll_fn=unroll)


def _handed_on(act: Callable[[Array], Array]) -> Callable[[Array], Array]:
  act.softened = True  # type: ignore[attr-defined]  # blocks that are given it leave it as it is
  return act


def _closest(attack: Any, clf: Any, interpreter: Interpreter, key: Key, goal: Goal) -> Any:
  """Delivers the iterate of closest map that keeps the class, tested as `fast` does."""
  score = presets.closest_map(clf, interpreter, key, max_log_odds=0.0, goal=goal)
  is_exact = interpreter.exact
  every, passes = (1, 0) if is_exact else (5, interpreter.passes[0])
  return track_best(attack, score, every=every, passes=passes)


def _only_map(preset: str, name: str, goal: Goal, steps_s1: int | None, *, is_away: bool) -> None:
  if steps_s1:
    raise InputError(f'steps_s1 is {steps_s1}; preset {preset!r} has no warm-up: leave it out')
  if name in ('mask', 'joint'):
    raise InputError(f'preset {preset!r} is for maps that have a formula; {name} has none')
  if not goal.holds or (goal.away is not None) != is_away:
    aims = 'away or away_centre' if is_away else 'a map to come close to'
    raise InputError(
      f"preset {preset!r} moves the map and holds the class: goal 'map_only' and, as target_map, "
      f'{aims}'
    )


RECIPES: dict[str, Callable[..., Recipe]] = {
  'adv_edge': adv_edge,
  'dombrowski': dombrowski,
  'ghorbani': ghorbani,
}
