"""The attack loop. This is the file to read.

ADV² looks for an image that the classifier f takes for class t, and that the interpreter g explains
with a map of the attacker's choice:

    min_x  l_prd(f(x), t) + λ · l_int(g(x; f, t), m_t)   subject to   x ∈ P(x0)

`adv2` puts that into two functions: `init` makes a state, `step` evaluates the state's image, takes
the gradient of the loss, lets optax turn it into an update and projects back into P(x0). All else
is composed around them:

    attack   = adv2(clf, interpreter, perturbation, tx, weight=λ(step), key=key)
    attack   = track_best(attack, score)                 # deliver the best image met, not the last
    schedule = staged((pgd(...), 300), (attack, 1200))   # a warm start, then the joint loss
    delta, history = run(schedule, batch, every=10)      # all steps in one program

Nothing here is jitted and nothing is reduced over the batch: each example has its own loss, its own
optimiser state (optax is vmapped), its own random numbers, and can stop on its own. Call these
functions inside one `jax.jit` with classifier, interpreter, batch and key as arguments.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adv2_jax import losses
from adv2_jax.classifier import Classifier
from adv2_jax.interpreters.base import Interpreter, no_map
from adv2_jax.types import (
  Array,
  Attack,
  AttackState,
  Batch,
  Key,
  Label,
  MapDistance,
  Perturbation,
  PredictionLoss,
  PyTree,
  Schedule,
  Snapshot,
  Terms,
  Unrolled,
  step_keys,
)

# (batch, snapshot) -> bool[B]: this example needs no further step.
Stop = Callable[[Batch, Snapshot], Array]
# (logits f32[B,K], target i32[B]) -> i32[B]: the class to explain.
Follow = Callable[[Array, Label], Label]
# (batch, snapshot) -> f32[B]: how bad this iterate is; +inf is worse than anything.
Score = Callable[[Batch, Snapshot], Array]


def never(batch: Batch, snapshot: Snapshot) -> Array:
  """The `stop` that never stops."""
  del snapshot
  return jnp.zeros_like(batch.is_real)


def success(batch: Batch, snapshot: Snapshot) -> Array:
  """Whether the target is predicted, bool[B]."""
  return jnp.argmax(snapshot.logits, axis=-1) == batch.target


def adv2(
  clf: Classifier,
  interpreter: Interpreter,
  perturbation: Perturbation,
  tx: optax.GradientTransformation,
  *,
  weight: optax.ScalarOrSchedule,
  key: Key,
  prediction: PredictionLoss = losses.targeted_xent,
  distance: MapDistance = losses.map_mse,
  balance: Callable[[Array], Array] = jnp.ones_like,
  follow: Follow | None = None,
  stop: Stop = never,
) -> Attack:
  """The joint attack on classifier and interpreter, equation (1) of ADV².

  Args:
    clf: the classifier f.
    interpreter: the interpreter g; `no_map` for an attack on f alone.
    perturbation: the set P(x0).
    tx: the optimiser, vmapped over examples; PGD is `optax.sign_sgd(1/255)`.
    weight: λ, a number or a function of the step; the same for all, or one per example, [B].
    key: one key; an example's numbers come from it, its `example_id` and the step.
    prediction: l_prd.
    distance: l_int, on maps [B,h,w].
    balance: l_prd [B] -> factor of λ [B], so that λ follows what binds for each example.
    follow: which class to explain at the next step, where it is not the target: an untargeted
      attack's is the wrong class that leads. The first one takes a forward pass of its own.
    stop: which examples need no further step; their state is held from there on.
  """
  schedule = weight if callable(weight) else lambda _: weight

  def init(batch: Batch, delta: PyTree | None = None) -> AttackState:
    keys = step_keys(key, batch.example_id, 0)
    if delta is None:
      delta = perturbation.init(batch.x, keys)
    explained = follow and follow(clf(perturbation.apply(batch.x, delta)).logits, batch.target)
    wanted = batch.target if explained is None else explained
    carry = interpreter.begin(clf, batch.x, wanted, batch.target_map, keys)
    opt_state = jax.vmap(tx.init)(delta)
    return AttackState(delta, opt_state, carry, ~batch.is_real, jnp.int32(0), explained)

  def loss(delta: PyTree, batch: Batch, state: AttackState) -> tuple[Array, tuple]:
    x = perturbation.apply(batch.x, delta)
    keys = step_keys(key, batch.example_id, state.step + 1)
    explained = batch.target if state.explained is None else state.explained
    seen = interpreter.unroll(clf, x, explained, state.carry, keys)
    logits = clf(x).logits if seen.logits is None else seen.logits
    l_prd = prediction(logits, batch.target)
    l_int = _map_loss(seen, batch, distance)
    penalty = perturbation.penalty(delta) + perturbation.price(batch.x, x)
    lam = schedule(state.step) * balance(jax.lax.stop_gradient(l_prd))
    total = l_prd + lam * l_int + seen.extra + penalty
    terms = Terms(total, l_prd, l_int, penalty)
    return jnp.sum(total), (x, terms, logits, seen.carry)  # a sum: each has its own gradient

  def step(batch: Batch, state: AttackState) -> tuple[AttackState, Snapshot]:
    grads, (x, terms, logits, carry) = jax.grad(loss, has_aux=True)(state.delta, batch, state)
    snapshot = Snapshot(state.step, x, terms, logits, largest(grads), state.explained)
    updates, opt_state = jax.vmap(tx.update)(grads, state.opt_state, state.delta)
    delta = perturbation.project(batch.x, optax.apply_updates(state.delta, updates))
    # A NaN would never leave again.
    done = state.done | stop(batch, snapshot) | ~jnp.isfinite(snapshot.gradient)
    explained = follow and follow(logits, batch.target)
    held = (state.delta, state.opt_state, state.carry, state.explained)
    delta, opt_state, carry, explained = where(done, held, (delta, opt_state, carry, explained))
    return AttackState(delta, opt_state, carry, done, state.step + 1, explained), snapshot

  _, with_gradient, alone = interpreter.passes
  first = interpreter.begin_passes + (follow is not None)
  spent = lambda n: first + n * with_gradient  # noqa: E731
  return Attack(init, step, lambda _, state: state.delta, spent, look_passes=alone)


def pgd(
  clf: Classifier,
  perturbation: Perturbation,
  tx: optax.GradientTransformation,
  *,
  key: Key,
  prediction: PredictionLoss = losses.targeted_xent,
  stop: Stop = never,
) -> Attack:
  """The attack on the classifier alone: `adv2` without an interpreter (Madry et al. 2018)."""
  return adv2(
    clf, no_map(), perturbation, tx, weight=0.0, key=key, prediction=prediction, stop=stop
  )


class BestState(NamedTuple):
  """An attack's state, and the best iterate so far with its score."""

  inner: AttackState
  delta: PyTree
  score: Array  # f32[B]

  @property
  def done(self) -> Array:
    """bool[B]."""
    return self.inner.done


def track_best(attack: Attack, score: Score, *, every: int = 1, passes: int = 0) -> Attack:
  """Delivers, per example, the iterate of lowest `score` instead of the last one.

  Every iterate is scored as it is evaluated, so this costs nothing when the score needs only the
  snapshot. A score with network passes of its own (`passes`, for the accounts) can be asked for
  every n-th step only. The last iterate is scored by `result`, forward and without a gradient.
  """

  def keep(batch: Batch, state: BestState, snapshot: Snapshot) -> tuple[PyTree, Array]:
    now = score(batch, snapshot)
    better = now < state.score
    return where(better, (state.inner.delta, now), (state.delta, state.score))

  def init(batch: Batch, delta: PyTree | None = None) -> BestState:
    inner = attack.init(batch, delta)
    return BestState(inner, inner.delta, jnp.full(len(batch.x), jnp.inf, jnp.float32))

  def step(batch: Batch, state: BestState) -> tuple[BestState, Snapshot]:
    inner, snapshot = attack.step(batch, state.inner)
    if every == 1:
      best = keep(batch, state, snapshot)
    else:
      best = jax.lax.cond(
        (state.inner.step + 1) % every == 0,
        lambda: keep(batch, state, snapshot),
        lambda: (state.delta, state.score),
      )
    return BestState(inner, *best), snapshot

  def result(batch: Batch, state: BestState) -> PyTree:
    _, snapshot = attack.step(batch, state.inner)  # its gradient is unused, so XLA drops it
    return keep(batch, state, snapshot)[0]

  spent = lambda n: attack.passes(n) + n // every * passes  # noqa: E731
  judged = attack.look_passes + passes
  return Attack(init, step, result, spent, judged, attack.look_passes, attack.evaluations)


def staged(*stages: tuple[Attack, int]) -> Schedule:
  """Stages of (attack, number of steps); each starts from what the one before delivers."""
  return stages


def run_chunk(
  attack: Attack, batch: Batch, state: PyTree, n: int | Array
) -> tuple[PyTree, Snapshot]:
  """n steps in one loop; returns the state and the last step's snapshot. n may be traced."""
  step = jax.jit(functools.partial(attack.step, batch), inline=True)  # traced once for both
  blank = jax.tree.map(jnp.zeros_like, jax.eval_shape(step, state)[1])
  body = lambda _, carry: step(carry[0])  # noqa: E731
  return jax.lax.fori_loop(0, n, body, (state, blank))


def run(schedule: Schedule, batch: Batch, *, every: int) -> tuple[PyTree, list[Snapshot]]:
  """All stages in one traced program; a snapshot each `every` steps.

  Returns:
    delta of the last stage, and per stage its snapshots stacked on a leading axis.
  """
  delta, history = None, []
  for attack, steps in schedule:
    state = attack.init(batch, delta)

    def chunk(state: PyTree, _: None, attack: Attack = attack) -> tuple[PyTree, Snapshot]:
      return run_chunk(attack, batch, state, every)

    state, snapshots = jax.lax.scan(chunk, state, length=steps // every)
    if steps % every:
      state, _ = run_chunk(attack, batch, state, steps % every)
    delta = attack.result(batch, state)
    history.append(snapshots)
  return delta, history


def where(condition: Array, a: PyTree, b: PyTree) -> PyTree:
  """Per example: `a` where the condition [B] holds, else `b`; every leaf has the batch first."""
  pick = lambda u, v: jnp.where(condition.reshape(-1, *[1] * (u.ndim - 1)), u, v)  # noqa: E731
  return jax.tree.map(pick, a, b)


def largest(tree: PyTree) -> Array:
  """f32[B]: the largest |v| of each example, NaN or ∞ where one is; leaves have the batch first."""
  leaves = [jnp.abs(v).reshape(len(v), -1).max(1) for v in jax.tree.leaves(tree)]
  return jnp.stack(leaves).max(0).astype(jnp.float32)


def _map_loss(seen: Unrolled, batch: Batch, distance: MapDistance) -> Array:
  """Mean over the T look-ahead maps, sum over interpreters, [B]."""
  if seen.distance is not None:
    return seen.distance
  over_time = jax.vmap(distance, in_axes=(0, None))
  per_map = jax.tree.map(lambda m, t: over_time(m, t).mean(0), seen.maps, batch.target_map)
  return jax.tree.reduce(jnp.add, per_map)
