"""The published alternation on MASK: parts by hand, and that it keeps the map, judged afresh."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from adv2_jax import api, interpreters, losses
from adv2_jax.attacks import presets
from adv2_jax.attacks.loop import pgd, run, staged
from adv2_jax.attacks.mask_alternation import _shortened, adv2_mask
from adv2_jax.attacks.perturbations import linf_ball
from adv2_jax.interpreters import masking as M
from adv2_jax.types import InputError

CONFIG = M.MaskConfig(size=4, jitter=0, area=2e-2, smoothness=1e-1, blur=5, mask_blur=3, steps=40)
CLF = tiny.linear_classifier(size=16)
CLF = CLF.replace(params=0.1 * CLF.params)  # probabilities must not be all or nothing
X = tiny.images(4, seed=3)
Y = tiny.outputs(CLF, X).logits.argmax(-1)
TARGET = (Y + 1) % tiny.CLASSES
KEY = jax.random.key(0)
KEYS = jax.vmap(jax.random.key)(jnp.arange(4))
INTERPRETER = interpreters.mask(CONFIG)
BENIGN = api.explain(CLF, INTERPRETER, X, Y, KEYS)
BATCH = tiny.batch(X, TARGET, BENIGN)
EPSILON = 0.125


def turns(batch=BATCH, config=CONFIG, steps=1, delta=None, **settings):
  """The states after 0…steps steps, and the snapshots."""

  @jax.jit
  def run(clf, batch, delta):
    attack = adv2_mask(clf, config, linf_ball(EPSILON), key=KEY, **settings)
    states, seen = [attack.init(batch, delta)], []
    for _ in range(steps):
      state, snapshot = attack.step(batch, states[-1])
      states, seen = [*states, state], [*seen, snapshot]
    return states, seen, attack.result(batch, states[-1])

  return run(CLF, batch, delta)


def margin(x):
  return losses.margin(tiny.outputs(CLF, x).logits, TARGET)


def fooled():
  """A delta well beyond the border of the target class."""
  w = np.moveaxis(np.asarray(CLF.params), -1, 0)
  push = np.sign(w[TARGET] - w[Y])
  return linf_ball(EPSILON).project(X, jnp.asarray(0.9 * EPSILON * push))


def test_the_moments_are_shortened_and_nothing_else():
  state = jax.jit(M.solve, static_argnames=('config', 'steps'))(CLF, X, Y, KEYS, CONFIG, steps=7)
  found = _shortened(state, CONFIG)
  np.testing.assert_array_equal(found.mask, state.mask)
  is_adam = lambda v: isinstance(v, optax.ScaleByAdamState)  # noqa: E731
  old, new = (jax.tree.leaves(s.opt_state, is_leaf=is_adam)[0] for s in (state, found))
  np.testing.assert_array_equal(new.count, [100] * 4)
  np.testing.assert_allclose(new.mu, old.mu / 2)
  np.testing.assert_allclose(new.nu, old.nu / 4)


def test_without_a_map_step_it_follows_the_margin_s_gradient_at_the_published_length():
  """On a linear classifier that gradient is known: the weights of the rival minus the target's."""
  (_, after), (snapshot,), _ = turns(map_step=0.0, prediction_step=0.5)
  logits = tiny.outputs(CLF, X).logits
  rival = jnp.where(jax.nn.one_hot(TARGET, tiny.CLASSES, dtype=bool), -jnp.inf, logits).argmax(-1)
  w = np.moveaxis(np.asarray(CLF.params), -1, 0)
  pull = w[rival] - w[TARGET]
  pull /= np.linalg.norm(pull.reshape(4, -1), axis=1).reshape(4, 1, 1, 1)
  length = 0.5 * np.sqrt(16 * 16 * 3 / (224 * 224 * 3))
  expected = np.clip(X - length * pull, 0, 1)
  np.testing.assert_allclose(X + after.inner.delta, expected, atol=1e-6)
  np.testing.assert_allclose(snapshot.terms.prediction, margin(X), rtol=1e-5)


def test_the_map_step_stops_where_the_margin_would_leave_its_bound_for_each_example():
  delta = fooled()
  kappa = float(np.median(-margin(X + delta)))  # two examples are beyond it, two are not
  far = {'prediction_step': 0.0, 'kappa': kappa, 'map_step': 20.0}
  (_, after), (snapshot,), _ = turns(delta=delta, **far)
  had_room = np.asarray(margin(snapshot.x)) < -kappa
  assert 0 < had_room.sum() < 4
  moved = np.abs(np.asarray(X + after.inner.delta - snapshot.x)).max((1, 2, 3)) > 1e-6
  assert moved[had_room].any()  # all but those whose mask has settled at its bounds
  now = np.asarray(margin(X + after.inner.delta))
  assert (now[moved] <= -kappa + 1e-4).all()
  assert (now[had_room & moved] > -kappa - 0.2).any()  # it was as long as that allows
  assert snapshot.terms.interpretation.all()


def test_a_step_along_the_look_ahead_gradient_lowers_the_distance():
  """The same state again: from where the step led, the look ahead is closer to the target map."""
  delta = fooled()
  settings = {'prediction_step': 0.0, 'map_step': 2.0, 'kappa': -100.0}
  _, seen, _ = turns(delta=delta, steps=6, **settings)
  distance = np.stack([s.terms.interpretation for s in seen])
  assert (distance[-1] < 0.95 * distance[0]).sum() >= 3, distance


def test_the_look_ahead_s_direction_against_finite_differences():
  """The masks that each look starts from are held as they were, the moments are not."""
  config = CONFIG._replace(area=0.0, smoothness=1e-3, steps=3)  # few cells are at a bound
  settings = {'prediction_step': 0.0, 'map_step': 1e-2, 'kappa': -100.0}
  with jax.enable_x64(True):
    double = lambda v: jnp.asarray(v, jnp.float64)  # noqa: E731
    clf = jax.tree.map(double, tiny.classifier(act=nn.softplus))
    x = double(0.25 + X / 2)
    target = tiny.outputs(clf, x).logits.argmax(-1)
    batch = BATCH._replace(x=x, target=target, target_map=double(BENIGN))

    @jax.jit
    def two_steps(clf, batch):
      attack = adv2_mask(clf, config, linf_ball(1.0), key=KEY, **settings)
      first, _ = attack.step(batch, attack.init(batch, None))
      return first.inner, attack.step(batch, first)[0].inner

    before, after = two_steps(clf, batch)
    moved = np.asarray(before.delta - after.delta)
    x = batch.x + before.delta
    one = jax.jit(lambda clf, m, x: M.solver_step(clf, m, x, target, KEYS, config))
    m = before.carry
    for _ in range(4):
      m = one(clf, m, x)
    held = [m]
    for _ in range(3):
      held.append(one(clf, held[-1], x))

    def distance(x):
      state, found = held[0], 0.0
      for start in held:
        state = one(clf, state._replace(mask=start.mask), x)
        found = found + losses.map_sse(1 - state.mask, batch.target_map) / 4
      return np.asarray(found)

    rng, h = np.random.RandomState(1), 1e-5
    directions = [rng.randn(*x.shape) for _ in range(12)]
    slopes = np.stack([distance(x + h * d) - distance(x - h * d) for d in directions]) / (2 * h)
  predicted = np.stack([(moved * d).sum((1, 2, 3)) for d in directions])
  norms = np.linalg.norm(slopes, axis=0), np.linalg.norm(predicted, axis=0)
  assert min(map(np.min, norms)) > 1e-4
  assert ((slopes * predicted).sum(0) / np.prod(norms, axis=0) > 0.9999).all()


def test_the_solution_is_renewed_and_the_best_success_is_delivered():
  states, _, delivered = turns(delta=fooled(), steps=5, renew=2)
  counts = [
    int(jax.tree.leaves(s.inner.carry.opt_state)[0][0]) for s in states[1:]
  ]  # 100 at a renewal, and 8 iterations per step
  assert counts == [108, 116, 108, 116, 108]
  scores = np.stack([s.score for s in states])
  assert np.isinf(scores[0]).all()
  assert (np.diff(scores[1:], axis=0) <= 0).all()
  x8 = jnp.round((X + delivered) * 255) / 255
  maps = api.explain(CLF, INTERPRETER, x8, TARGET, KEYS)  # no jitter: the key does not matter
  assert (margin(x8) < 0).all()
  assert (losses.map_rms(maps, BENIGN) <= scores[-1] + 1e-3).all()


def test_the_mask_follows_also_where_the_solver_s_rate_falls_to_zero():
  """And the jitter of an example is its own, not that of its place in the batch."""
  config = CONFIG._replace(decay=True, jitter=2)
  settings = {'prediction_step': 0.0, 'map_step': 2.0, 'kappa': -100.0}
  (_, after), (snapshot,), _ = turns(delta=fooled(), config=config, **settings)
  still = M.solve(CLF, snapshot.x, TARGET, jax.random.split(KEY, 4), config).mask
  assert np.abs(after.inner.carry.mask - still).max() > 0.01
  assert (np.abs(X + after.inner.delta - snapshot.x).max((1, 2, 3)) > 1e-4).sum() >= 3
  order = np.array([2, 0, 3, 1])
  moved = BATCH._replace(
    example_id=BATCH.example_id[order],
    x=X[order],
    target=TARGET[order],
    target_map=BENIGN[order],
  )
  (_, other), _, _ = turns(moved, delta=fooled()[order], config=config, **settings)
  np.testing.assert_allclose(other.inner.delta, after.inner.delta[order], atol=1e-4)


def test_padding_rows_stay_as_they_are_and_do_not_matter():
  real = jnp.array([True, True, False, True])
  (_, after), _, _ = turns(BATCH._replace(is_real=real))
  (_, whole), _, _ = turns()
  assert not after.inner.delta[2].any()
  np.testing.assert_array_equal(after.inner.delta[real], whole.inner.delta[real])


def test_it_keeps_the_map_better_than_pgd():
  @jax.jit
  def run_turns(clf, batch):
    ball = linf_ball(EPSILON)
    sign = optax.sign_sgd(1 / 255)
    lengths = {'prediction_step': 1.0, 'map_step': 2.0, 'kappa': 0.5, 'renew': 10}
    first = pgd(clf, ball, sign, key=KEY, prediction=losses.margin)
    second = adv2_mask(clf, CONFIG, ball, key=KEY, **lengths)
    return run(staged((first, 20), (second, 60)), batch, every=10)[0]

  x8 = jnp.round((X + run_turns(CLF, BATCH)) * 255) / 255
  plain, _ = api.attack_batch(presets.plain_pgd('fast'), CLF, INTERPRETER, BATCH, EPSILON, KEY)
  assert (margin(x8) < 0).all()
  far, near = (
    np.abs(api.explain(CLF, INTERPRETER, v, TARGET, KEYS) - BENIGN).mean() for v in (plain, x8)
  )
  assert near < 0.6 * far, (near, far)


def test_authors_warms_up_on_the_margin_and_then_takes_turns():
  recipe = presets.by_name('authors', 'mask', 3, 7)
  x8, history = api.attack_batch(recipe, CLF, INTERPRETER, BATCH, EPSILON, KEY)
  assert history.evaluations[-1] == 3 + 2 * 7
  assert 0 < float(jnp.abs(x8 - X).max()) <= EPSILON + 0.5 / 255
  turn, renewal = 2 + 2 * 4 + 6 * 4 + 10, 2 * 40 + 1
  assert history.passes[-1] == 3 * 2 + 7 * turn + renewal + renewal
  margins = np.stack(history.terms.prediction)[:, 0]
  assert margins[1] < margins[0]


@pytest.mark.parametrize('name', ['looks', 'renew', 'halvings'])
def test_counts_of_zero_are_refused(name):
  perturbation = linf_ball(0.03)
  with pytest.raises(InputError, match=f'adv2_mask {name} is 0; expected at least 1'):
    adv2_mask(CLF, CONFIG, perturbation, key=KEY, **{name: 0})


def test_authors_needs_to_know_the_solver():
  blind = INTERPRETER.replace(settings=None)
  with pytest.raises(InputError, match=r'needs an interpreter from interpreters\.mask'):
    api.attack_batch(presets.by_name('authors', 'mask'), CLF, blind, BATCH, EPSILON, KEY)
