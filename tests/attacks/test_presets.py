"""The published schedules number by number, and what every recipe must keep to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adv2_jax import api, interpreters, losses
from adv2_jax.attacks import presets
from adv2_jax.attacks.loop import run
from adv2_jax.interpreters.base import Interpreter
from adv2_jax.types import InputError, Snapshot, Terms, Unrolled, example_keys

CLF = tiny.linear_classifier(classes=2)
X = tiny.images(3, size=4)
BATCH = tiny.batch(X, [1, 0, 1], jnp.zeros((3, 2, 2)))
KEY = jax.random.key(0)


def confidence_map(params, clf, x, y, carry, keys):
  """2×2 cells that all show p_y: closest to an empty target where the prediction is unsure."""
  del params, keys
  logits = clf(x).logits
  p = jax.nn.softmax(logits)[jnp.arange(len(x)), y]
  maps = jnp.broadcast_to(p.reshape(1, -1, 1, 1), (1, len(x), 2, 2))
  return Unrolled(maps, carry, jnp.zeros(len(x)), logits)


SHOWS_CONFIDENCE = Interpreter((), lambda *_: None, confidence_map, lambda *_: ())


@functools.cache
def ran(recipe, epsilon=0.5):
  """(numbers of steps, delta, per stage the snapshots of every step)."""

  def schedule(clf):
    return recipe.schedule(clf, SHOWS_CONFIDENCE, recipe.perturbation(epsilon), KEY)

  delta, history = jax.jit(lambda clf, batch: run(schedule(clf), batch, every=1))(CLF, BATCH)
  return [n for _, n in schedule(CLF)], delta, history


def weights(snapshots):
  """λ of every step, from total = prediction + λ · interpretation."""
  terms = jax.tree.map(np.float64, snapshots.terms)
  return ((terms.total - terms.prediction) / terms.interpretation)[:, 0]


# --- authors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'steps', 'published'),
  [
    ('cam', [400, 1200], {0: 5, 1199: 10, 599: 5 + 5 * 599 / 1199}),
    ('rts', [300, 1000], {0: 5, 999: 10, 300: 5 + 5 * 300 / 999}),
    ('grad_cam', [400, 1200], {0: 5, 1199: 10}),
    (
      'grad',
      [300, 704],
      {0: 0.001, 300: 0.001, 301: 0.004, 501: 0.004, 502: 0.01, 602: 0.01, 603: 0.05, 703: 0.05},
    ),
  ],
)
def test_published_steps_and_weights(name, steps, published):
  numbers, _, (warm, joint) = ran(presets.authors(name))
  assert numbers == steps
  assert not warm.terms.interpretation.any()
  found = weights(joint)
  assert len(found) == steps[1]
  for step, value in published.items():
    np.testing.assert_allclose(found[step], value, rtol=0.02, err_msg=f'step {step}')


def test_published_losses():
  """CAM: cross-entropy and the mean of squares; GRAD: smoothed targets and the sum."""
  for name, prediction, cells in (
    ('cam', losses.targeted_xent, 1),
    ('grad', losses.smoothed_xent(0.95), 4),
  ):
    _, _, (_, joint) = ran(presets.authors(name))
    logits = joint.logits[::100]
    expected = jax.vmap(lambda z: prediction(z, BATCH.target))(logits)
    np.testing.assert_allclose(joint.terms.prediction[::100], expected, rtol=1e-4, atol=1e-6)
    p = jax.nn.softmax(logits)[:, jnp.arange(3), BATCH.target]
    np.testing.assert_allclose(joint.terms.interpretation[::100], cells * p**2, rtol=1e-4)


def test_published_steps_are_signs_of_one_level():
  _, _, (warm, _) = ran(presets.authors('cam'))
  moved = np.abs(warm.x[1] - warm.x[0])
  inside = (X > 0.01) & (X < 0.99)
  np.testing.assert_allclose(moved[inside], 1 / 255, rtol=1e-4)


def test_legs_stretch_alike():
  numbers, _, (_, joint) = ran(presets.authors('grad', 20, 352))
  assert numbers == [20, 352]
  found = weights(joint)
  for step, value in {
    0: 0.001,
    149: 0.001,
    152: 0.004,
    249: 0.004,
    253: 0.01,
    303: 0.05,
    351: 0.05,
  }.items():
    np.testing.assert_allclose(found[step], value, rtol=0.02, err_msg=f'step {step}')


def test_grad_keeps_the_closest_map_among_tested_iterates_with_confidence_above_08():
  """Each 10th step and the last are tested; the closest map here is that of least confidence."""
  _, delta, (_, joint) = ran(presets.authors('grad'))
  p = np.asarray(jax.nn.softmax(joint.logits)[:, jnp.arange(3), BATCH.target], np.float64)
  last = lambda d: jax.nn.softmax(CLF(jnp.clip(X + d, 0, 1)).logits)[jnp.arange(3), BATCH.target]  # noqa: E731
  kept = np.asarray(last(delta))
  tested = np.where(p[9::10] > 0.8, p[9::10], np.inf).min(0)
  assert (kept > 0.8).all()
  assert (kept <= tested + 1e-5).all()
  # Some step between the tested ones was closer still, or this would show nothing.
  assert (np.where(p > 0.8, p, np.inf).min(0) < tested - 1e-4).any()


def snapshot_of(log_odds, distance):
  logits = jnp.stack([jnp.zeros(3), jnp.asarray(log_odds, jnp.float32)], axis=1)  # of class 0
  terms = Terms(*[jnp.asarray(distance, jnp.float32)] * 4)
  return Snapshot(jnp.int32(0), X, terms, logits, jnp.ones(3, jnp.float32))


def test_the_target_comes_first_then_the_map_and_confidence_has_its_price():
  batch = BATCH._replace(target=jnp.zeros(3, jnp.int32))
  make = functools.partial(presets.closest_map, CLF, SHOWS_CONFIDENCE, KEY, max_log_odds=-2.0)
  snapshot = snapshot_of([-2.1, -1.9, 5.0], [0.9, 0.0, 0.0])
  found = np.asarray(make()(batch, snapshot))
  np.testing.assert_allclose(found[0], 0.9, rtol=1e-6)
  assert found[0] < found[1] < found[2]  # and, of those that miss the target, the nearest to it
  priced = make(wanted_log_odds=-3.0, price=0.1)(batch, snapshot)
  np.testing.assert_allclose(priced[0], 0.9 + 0.1 * 0.9, rtol=1e-5)


def test_a_map_that_is_not_the_real_one_is_made_afresh_to_be_scored():
  clf, x = tiny.classifier(), tiny.images(3)
  interpreter = interpreters.grad(pool=2)
  target_map = jnp.zeros((3, 8, 8))
  batch = tiny.batch(x, [0, 0, 0], target_map)
  snapshot = snapshot_of([-9.0] * 3, [7.0] * 3)._replace(x=x)  # 7: what the surrogate claims
  score = presets.closest_map(clf, interpreter, KEY, max_log_odds=-2.0)
  real = losses.map_rms(jax.jit(interpreter.explain)(clf, x, batch.target, KEY), target_map)
  np.testing.assert_allclose(jax.jit(score)(batch, snapshot), real, rtol=1e-4)


def test_a_random_map_is_scored_with_neither_the_judge_s_numbers_nor_the_last_score_s():
  """The judge of `attack` folds the key with 0…n−1; an iterate must not be chosen for those."""
  draw = lambda params, clf, x, y, keys: jax.vmap(lambda k: jax.random.uniform(k, (2, 2)))(keys)  # noqa: E731
  dice = Interpreter((), draw, confidence_map, lambda *_: (), exact=False, random=True)
  score = jax.jit(presets.closest_map(CLF, dice, KEY, max_log_odds=0.0))
  judged = draw((), CLF, X, BATCH.target, example_keys(KEY, 3))
  batch = BATCH._replace(target=jnp.zeros(3, jnp.int32), target_map=judged)
  snapshot = snapshot_of([-9.0] * 3, [0.0] * 3)
  seen = np.stack([score(batch, snapshot._replace(step=jnp.int32(i))) for i in range(4)])
  assert (seen > 0).all()
  assert len(np.unique(seen)) == seen.size


# --- plain PGD ------------------------------------------------------------------------------------


@pytest.mark.parametrize('preset', ['authors', 'fast'])
def test_the_baseline_delivers_the_iterate_of_lowest_loss(preset):
  numbers, delta, (seen,) = ran(presets.plain_pgd(preset, 40), epsilon=0.05)
  assert numbers == [40]
  assert not seen.terms.interpretation.any()
  final = losses.targeted_xent(CLF(X + delta).logits, BATCH.target)
  assert (final <= seen.terms.prediction.min(0) + 1e-6).all()


def test_the_baseline_s_own_number_of_steps():
  for preset, steps in (('authors', 1200), ('fast', 50), ('thorough', 250)):
    assert ran(presets.plain_pgd(preset))[0] == [steps]


# --- fast -----------------------------------------------------------------------------------------


def test_the_warm_start_is_plain_and_steps_by_one_level():
  numbers, _, (warm, joint) = ran(presets.by_name('fast', 'cam', 2, 3))
  assert numbers == [2, 3]
  assert not warm.terms.interpretation.any()
  assert joint.terms.interpretation.all()
  inside = (X > 0.01) & (X < 0.99)
  np.testing.assert_allclose(np.abs(joint.x[0] - X)[inside], 2 / 255, rtol=1e-4)


@pytest.mark.parametrize('name', interpreters.FACTORIES)
def test_maps_that_must_be_made_afresh_are_checked_rarely(name):
  interpreter = interpreters.build(name)
  assert interpreter.random == (name in ('mask', 'smooth_grad'))
  recipe = presets.by_name('fast', name)
  joint, n = recipe.schedule(CLF, interpreter, recipe.perturbation(0.1), KEY)[-1]
  settings = presets.FAST.get(name, presets.FAST['cam' if interpreter.exact else 'grad'])
  assert n == settings.steps
  check, step, _ = interpreter.passes
  check = {'mask': check // 3}.get(name, check)  # a draft
  checks = 0 if interpreter.exact else 20 // (settings.every * (1 + (name == 'smooth_grad')))
  assert joint.passes(20) == interpreter.begin_passes + 20 * step + checks * check


@pytest.mark.parametrize('name', ['input_x_gradient', 'grad'])
@pytest.mark.parametrize('preset', ['fast', 'authors'])
def test_a_step_keeps_the_type_of_its_state(preset, name):
  """Weak types too: else the host's second chunk would be compiled anew."""
  interpreter = interpreters.build(name, image_size=4)
  for recipe in (presets.by_name(preset, name), presets.plain_pgd(preset)):
    for attack, _ in recipe.schedule(CLF, interpreter, recipe.perturbation(0.1), KEY):
      state = jax.eval_shape(lambda clf, attack=attack: attack.init(BATCH), CLF)
      after = jax.eval_shape(lambda state, attack=attack: attack.step(BATCH, state)[0], state)
      assert jax.tree.map(str, after) == jax.tree.map(str, state)


@pytest.mark.parametrize(
  ('name', 'steps'), [('cam', 250), ('grad', 250), ('mask', 100), ('smooth_grad', 250)]
)
def test_thorough_is_fast_with_more_steps(name, steps):
  interpreter = interpreters.build(name)
  fast, thorough = (presets.by_name(preset, name) for preset in ('fast', 'thorough'))
  ((_, none), (attack, n)) = thorough.schedule(CLF, interpreter, thorough.perturbation(0.1), KEY)
  assert (none, n) == (0, steps)
  usual, _ = fast.schedule(CLF, interpreter, fast.perturbation(0.1), KEY)[-1]
  if name == 'mask':
    unrolled = interpreters.unrolled_mask(interpreter.settings)
    assert attack.passes(20) == 20 * unrolled.passes[1] + 2 * interpreter.passes_of_draft
  else:
    assert attack.passes(20) == usual.passes(20)


# --- all recipes ----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', interpreters.FACTORIES)
@pytest.mark.parametrize('preset', ['fast', 'thorough', 'authors'])
def test_the_same_settings_give_the_same_recipe(preset, name):
  """A recipe is static under jit: a new one for each call would compile each time."""
  for steps in ((None, None), (3, 7)):
    assert presets.by_name(preset, name, *steps) is presets.by_name(preset, name, *steps)
  assert presets.by_name(preset, name) is not presets.by_name(preset, name, None, 7)


@pytest.mark.parametrize('epsilon', [0.031, 0.004])
@pytest.mark.parametrize(
  'make',
  [
    pytest.param(lambda: presets.by_name('fast', 'cam', None, 9), id='fast cam'),
    pytest.param(lambda: presets.by_name('fast', 'grad', 4, 5), id='fast grad'),
    pytest.param(lambda: presets.by_name('thorough', 'cam', None, 9), id='thorough cam'),
    pytest.param(lambda: presets.by_name('authors', 'cam', 4, 5), id='authors cam'),
    pytest.param(lambda: presets.by_name('authors', 'grad', 4, 5), id='authors grad'),
    pytest.param(lambda: presets.plain_pgd('fast', 9), id='pgd'),
  ],
)
def test_every_recipe_stays_in_the_declared_set_and_moves(make, epsilon):
  x8, history = api.attack_batch(make(), CLF, SHOWS_CONFIDENCE, BATCH, epsilon, KEY)
  assert float(jnp.abs(x8 - X).max()) <= epsilon + 0.5 / 255 + 1e-6
  assert float(x8.min()) >= 0
  assert float(x8.max()) <= 1
  assert (jnp.abs(x8 - X).max((1, 2, 3)) > 0).all()
  assert history.evaluations[-1] == 9


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('quick', 'cam'), "preset 'quick' is unknown; expected 'fast', 'thorough' or 'authors'"),
    (('authors', 'cam', -1), 'steps_s1 is -1'),
    (('authors', 'cam', 3, 0), 'steps_s2 is 0'),
  ],
)
def test_bad_settings(arguments, message):
  with pytest.raises(InputError, match=message):
    presets.by_name(*arguments)
