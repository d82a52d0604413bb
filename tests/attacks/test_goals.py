"""Goals: what counts as success, which class is explained, and where the map goes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import adv2_jax as adv2
from adv2_jax import losses, metrics
from adv2_jax.attacks import goals, presets
from adv2_jax.attacks.loop import adv2 as joint
from adv2_jax.attacks.loop import run

CLF = tiny.classifier()
CAM = adv2.interpreters.cam()
X = tiny.images(3)
LOGITS = tiny.outputs(CLF, X).logits
LABEL = jnp.argmax(LOGITS, -1)
KEY = jax.random.key(0)
EXPLAIN = jax.jit(CAM.explain)
BENIGN = EXPLAIN(CLF, X, LABEL, KEY)
l1 = jax.jit(metrics.map_l1)


@functools.cache
def attacked(goal, target_map=None, epsilon=0.1, **options):
  """30 steps; the images differ only in what is wanted of them."""
  if target_map == 'corner':
    target_map = np.zeros(BENIGN.shape, np.float32)
    target_map[:, :4, :4] = 1
  return adv2.attack(
    CLF, CAM, X, goal=goal, target_map=target_map, epsilon=epsilon, steps=30, key=KEY, **options
  )


def test_map_only_moves_the_map_and_holds_the_class():
  result = attacked('map_only', 'corner')
  assert result.success.all()
  np.testing.assert_array_equal(jnp.argmax(result.logits, -1), LABEL)
  np.testing.assert_array_equal(result.target, LABEL)
  corner = np.zeros(BENIGN.shape, np.float32)
  corner[:, :4, :4] = 1
  assert (l1(result.maps, corner) < 0.8 * l1(BENIGN, corner)).all()
  np.testing.assert_allclose(result.maps, EXPLAIN(CLF, result.x, LABEL, KEY), atol=1e-5)
  assert not result.health.already_at_target.any()  # and no warning, which would be an error


@pytest.mark.parametrize('away', goals.AWAY)
def test_away_leads_further_from_the_benign_map_than_noise(away):
  """Signs at random, of the same ε; the figures are against the benign map."""
  result = attacked('map_only', away)
  assert result.success.all()
  noise = 0.1 * jax.random.rademacher(KEY, X.shape, jnp.float32)
  random = EXPLAIN(CLF, jnp.clip(X + noise, 0, 1), LABEL, KEY)
  further = l1(result.maps, BENIGN) / l1(random, BENIGN)
  assert further.min() > 1
  assert further.mean() > 1.4
  apart = jnp.square(result.maps - BENIGN).mean((1, 2))
  np.testing.assert_allclose(result.terms.interpretation, apart, atol=1e-5)
  assert (goals.AWAY[away](result.maps, BENIGN) < goals.AWAY[away](random, BENIGN)).all()


def test_untargeted_success_is_any_other_class():
  result = attacked('deceive')
  seen = jnp.argmax(result.logits, -1)
  assert result.success.all()
  assert (seen != LABEL).all()
  np.testing.assert_array_equal(result.target, seen)
  np.testing.assert_allclose(result.maps, EXPLAIN(CLF, result.x, seen, KEY), atol=1e-5)
  before = EXPLAIN(CLF, X, losses.runner_up(LOGITS, LABEL), KEY)
  assert (l1(result.maps, BENIGN) < 0.9 * l1(before, BENIGN)).all()
  p = jax.nn.softmax(result.logits)[jnp.arange(3), seen]
  np.testing.assert_allclose(jnp.exp(-result.terms.prediction), p, rtol=1e-4)
  # A look at the class that leads, 30 steps and a last look.
  assert result.history.passes[-1] == 1 + 2 * 30 + 1


def test_class_only_is_plain_pgd():
  """With a target and without one; the map does what it will."""
  target = losses.runner_up(LOGITS, LABEL)
  plain = adv2.attack(
    CLF, CAM, X, target=target, preset=presets.plain_pgd('fast', 30), epsilon=0.1, key=KEY,
    goal='deceive',
  )  # fmt: skip
  found = adv2.attack(CLF, CAM, X, target=target, goal='class_only', epsilon=0.1, steps=30, key=KEY)
  np.testing.assert_array_equal(found.x, plain.x)
  anything = attacked('class_only')
  assert anything.success.all()
  assert (jnp.argmax(anything.logits, -1) != LABEL).all()


@pytest.mark.parametrize(
  ('goal', 'logits', 'hit', 'explained'),
  [
    (goals.DECEIVE, [0.0, 3.0, 1.0], True, 1),
    (goals.DECEIVE, [0.0, 1.0, 3.0], False, 1),
    (goals.Goal('map_only'), [0.0, 3.0, 1.0], True, 1),
    (goals.Goal(untargeted=True), [0.0, 3.0, 1.0], False, 2),
    (goals.Goal(untargeted=True), [0.0, 1.0, 3.0], True, 2),
    (goals.Goal(untargeted=True), [0.5, 0.4, 0.3], True, 0),
  ],
)
def test_success_and_the_class_explained(goal, logits, hit, explained):
  """The target is class 1; untargeted, that is the class to leave."""
  logits, target = jnp.float32([logits]), jnp.array([1])
  assert bool(goal.success(logits, target)[0]) is hit
  assert int(goal.explained(logits, target)[0]) == explained
  loss = goal.prediction(losses.log_odds)(logits, target)[0]
  assert hit or loss > 0


def test_an_untargeted_step_explains_the_class_that_led_at_the_one_before():
  """And a map of another class than the one that leads counts as none."""
  clf = tiny.linear_classifier(classes=5)
  x = tiny.images(8, size=4)
  goal = goals.Goal(untargeted=True)
  label = jnp.argmax(tiny.outputs(clf, x).logits, -1)

  def shows_class(params, clf, x, y, keys):
    logits = clf(x).logits
    picked = jax.nn.one_hot(y, 5) + 0 * logits
    return jnp.broadcast_to(picked[:, None], (len(x), 2, 5)), logits

  interpreter = adv2.interpreters.from_map(shows_class)
  batch = tiny.batch(x, label, jnp.zeros((8, 2, 5)))

  @jax.jit
  def snapshots(clf, batch):
    attack = joint(
      clf, interpreter, adv2.perturbations.linf_ball(0.5), adv2.optimisers.sign_momentum(0.05),
      weight=0.0, key=KEY, prediction=lambda z, y: -losses.log_odds(z, y), follow=goal.explained,
      distance=lambda m, _: jnp.argmax(m[:, 0], -1).astype(jnp.float32),
    )  # fmt: skip
    (seen,) = run(((attack, 8),), batch, every=1)[1]
    score = presets.closest_map(clf, interpreter, KEY, max_log_odds=99.0, goal=goal)
    return seen, jax.vmap(lambda s: score(batch, s))(seen)

  seen, scores = snapshots(clf, batch)
  leads = np.stack([losses.runner_up(z, label) for z in seen.logits])
  assert (leads[1:] != leads[:-1]).any()
  np.testing.assert_array_equal(seen.explained[0], leads[0])
  np.testing.assert_array_equal(seen.explained[1:], leads[:-1])
  np.testing.assert_array_equal(seen.terms.interpretation, seen.explained)
  np.testing.assert_array_equal(scores > 1e5, np.asarray(seen.explained) != leads)


def test_schedules_that_hold_the_class_have_no_warm_start():
  for name in ('cam', 'mask'):
    steps = lambda recipe: [n for _, n in schedule(recipe)]  # noqa: E731

    def schedule(recipe, name=name):
      interpreter = adv2.interpreters.build(name, 32)
      perturbation = recipe.perturbation(0.1)
      return recipe.schedule(CLF, interpreter, perturbation, KEY)

    warm, total = steps(presets.by_name('authors', name))
    assert warm == 400
    assert steps(presets.by_name('authors', name, goal=goals.Goal('map_only'))) == [0, total]
    again = presets.by_name('authors', name, 5, goal=goals.Goal('map_only'))
    assert steps(again) == [5, total]


def test_the_callback_sees_the_real_images(capsys):
  seen = []
  on_step = lambda *given: seen.append(given)  # noqa: E731
  options = {'steps': 23, 'epsilon': 0.1, 'key': KEY, 'pad_to': 5}
  result = adv2.attack(CLF, CAM, X, progress=True, on_step=on_step, **options)
  assert [(done, total) for done, total, _ in seen] == [(10, 23), (20, 23), (23, 23)]
  np.testing.assert_array_equal([hit for *_, hit in seen], result.history.success)
  bar = capsys.readouterr().err
  assert '23/23' in bar
  assert f'success {np.mean(seen[-1][2]):.2f}' in bar

  def stop(*_):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    adv2.attack(CLF, CAM, X, on_step=stop, **options)
