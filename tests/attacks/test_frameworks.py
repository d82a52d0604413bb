"""Recipes of StAdv, C&W and L2 PGD: the published numbers, what they keep to, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from adv2_jax import api, images, interpreters, losses, metrics
from adv2_jax.attacks import cw, frameworks, goals, mask_alternation, presets, stadv
from adv2_jax.attacks.loop import adv2, run
from adv2_jax.attacks.perturbations import l2_tanh
from adv2_jax.interpreters.masking import MaskConfig
from adv2_jax.types import InputError

CLF = tiny.classifier()
CAM = interpreters.cam()
X = tiny.images(4)
KEY = jax.random.key(0)
LABEL = jnp.argmax(tiny.outputs(CLF, X).logits, -1)
TARGET = losses.runner_up(tiny.outputs(CLF, X).logits, LABEL)
BENIGN = jax.jit(CAM.explain)(CLF, X, LABEL, KEY)
BATCH = tiny.batch(X, TARGET, BENIGN)
STEPS = {'pgd': 40, 'stadv': 40, 'cw': 240}


@functools.cache
def made(framework, norm='linf', epsilon=0.0, **options):
  """(x8, history) of plain and of ADV² on CAM."""
  steps = STEPS[framework]
  given = {'framework': framework, 'norm': norm, **options}
  plain = frameworks.plain('fast', steps, **given)
  joint = frameworks.by_name('fast', 'cam', None, steps, **given)
  return [api.attack_batch(r, CLF, CAM, BATCH, epsilon, KEY) for r in (plain, joint)]


def judged(x8):
  logits = tiny.outputs(CLF, x8).logits
  maps = jax.jit(CAM.explain)(CLF, x8, TARGET, KEY)
  return np.asarray(logits.argmax(-1) == TARGET), np.asarray(metrics.map_l1(maps, BENIGN))


@pytest.mark.parametrize(
  ('framework', 'norm', 'epsilon'),
  [('stadv', 'linf', 0.0), ('cw', 'linf', 0.0), ('pgd', 'l2', 3.0)],
)
def test_each_framework_deceives_and_keeps_the_map_closer_than_the_plain_attack(
  framework, norm, epsilon
):
  (plain, _), (joint, history) = made(framework, norm, epsilon)
  for x8 in (plain, joint):
    np.testing.assert_allclose(x8 * 255, np.round(x8 * 255), atol=1e-4)
    assert 0 <= float(x8.min()) <= float(x8.max()) <= 1
  hit, apart = judged(joint)
  assert judged(plain)[0].all()
  assert hit.all()
  assert apart.mean() < 0.9 * judged(plain)[1].mean()
  assert history.evaluations[-1] == STEPS[framework]


def test_an_l2_attack_stays_in_its_ball():
  for x8, _ in made('pgd', 'l2', 3.0):
    norm = metrics.l2(x8, X)
    assert (norm <= 3 + 0.5 / 255 * X[0].size ** 0.5).all()
    assert (norm > 1).all()


def test_the_first_l2_step_is_the_published_share_of_the_radius():
  recipe = frameworks.plain('authors', 2, norm='l2')

  @jax.jit
  def seen(clf, batch):
    schedule = recipe.schedule(clf, CAM, recipe.perturbation(2.0), KEY)
    return run(schedule, batch, every=1)[1][0]

  inner = tiny.batch(jnp.clip(X, 0.3, 0.7), TARGET)  # or the range would cut the step
  snapshots = seen(CLF, inner)
  moved = metrics.l2(snapshots.x[1], snapshots.x[0])
  np.testing.assert_allclose(moved, 2.0 / 255 / 0.031, rtol=1e-4)


def test_masks_alternation_moves_in_radii_too():
  config = MaskConfig(size=4, jitter=0, blur=5, mask_blur=3, steps=3)
  mask = interpreters.mask(config)
  recipe = frameworks.by_name('authors', 'mask', 2, 3, norm='l2')
  batch = tiny.batch(X, TARGET, jnp.zeros((4, 4, 4)))
  x8, _ = api.attack_batch(recipe, CLF, mask, batch, 0.7, KEY)
  norm = metrics.l2(x8, X)
  assert (norm <= 0.7 + 0.5 / 255 * X[0].size ** 0.5).all()
  assert (norm > 0.05).all()


# --- StAdv ----------------------------------------------------------------------------------------


def test_a_flow_is_delivered_that_makes_the_image():
  for x8, history in made('stadv'):
    assert history.delta.shape == (4, 16, 16, 2)
    warped = images.quantise(images.warp(X, history.delta))
    assert float(jnp.abs(warped - x8).max()) <= 1 / 255 + 1e-6


def test_more_weight_makes_a_smoother_flow():
  rough = [
    images.flow_smoothness(made('stadv', tau=tau)[1][1].delta).mean() for tau in (0.0005, 0.05)
  ]
  assert rough[1] < 0.7 * rough[0]


@pytest.mark.parametrize(
  ('name', 'steps', 'weights'),
  [
    ('cam', [200, 600], {0: 5, 599: 10}),
    ('rts', [200, 600], {0: 5, 599: 10}),
    ('grad', [450, 704], {0: 0.003, 301: 0.01, 502: 0.05, 603: 0.2, 703: 0.2}),
    ('mask', [400, 1000], {0: 500, 999: 500}),
  ],
)
def test_published_steps_and_weights(name, steps, weights):
  recipe = frameworks.by_name('authors', name, framework='stadv')
  interpreter = interpreters.build('mask' if name == 'mask' else 'cam', 16)
  schedule = recipe.schedule(CLF, interpreter, recipe.perturbation(0.0), KEY)
  assert [n for _, n in schedule] == steps
  ends, ramps = presets.stretched(stadv.AUTHORS[name].legs, steps[1])
  found = optax.join_schedules(ramps, ends)
  for step, value in weights.items():
    np.testing.assert_allclose(found(step), value, rtol=1e-5)
  flow = jnp.zeros((1, 16, 16, 2)).at[0, 5, 5, 0].set(1.0)
  tau = 0.004 if name == 'mask' else 0.0005
  penalty = recipe.perturbation(0.0).penalty(flow)
  np.testing.assert_allclose(penalty, tau * images.flow_smoothness(flow), rtol=1e-5)


def test_the_published_loss_and_first_step():
  """CAM: 2·cross-entropy + τ·roughness, by Adam, whose first step is its learning rate."""
  recipe = frameworks.by_name('authors', 'cam', 2, 2, framework='stadv')

  @jax.jit
  def seen(clf, batch):
    return run(recipe.schedule(clf, CAM, recipe.perturbation(0.0), KEY), batch, every=1)

  flow, (first, _) = seen(CLF, BATCH)
  start = recipe.perturbation(0.0).init(X, api.example_keys(KEY, 4))
  assert flow.shape == start.shape
  expected = 2 * losses.targeted_xent(first.logits[0], TARGET)
  np.testing.assert_allclose(first.terms.prediction[0], expected, rtol=1e-5)
  total = first.terms.prediction + first.terms.penalty
  np.testing.assert_allclose(first.terms.total, total, rtol=1e-5)
  assert (first.terms.penalty > 0).all()
  assert float(jnp.abs(flow).max()) <= 0.1 + 4 * 0.0101


def test_plain_stadv_has_300_published_steps():
  recipe = frameworks.plain('authors', framework='stadv')
  ((_, n),) = recipe.schedule(CLF, CAM, recipe.perturbation(0.0), KEY)
  assert n == 300


def test_the_running_mask_follows_the_solver_and_its_maps_have_a_gradient():
  """On an image that stays, the maps tracked come to that of the solver."""
  config = MaskConfig(size=4, jitter=0, blur=5, mask_blur=3, steps=60)
  tracked = mask_alternation.tracked(config, looks=2, renew=50)
  assert mask_alternation.tracked(config, looks=2, renew=50) is tracked
  target_map = jnp.zeros((4, 4, 4))

  @jax.jit
  def look(clf, x):
    carry = tracked.begin(clf, x, TARGET, target_map, KEY)
    for _ in range(2):
      seen = tracked.unroll(clf, x, TARGET, carry, KEY)
      carry = seen.carry
    return seen.maps, carry

  maps, carry = look(CLF, X)
  assert maps.shape == (2, 4, 4, 4)
  np.testing.assert_array_equal(carry.step, 2)
  solved = jax.jit(tracked.explain)(CLF, X, TARGET, KEY)
  assert float(jnp.abs(maps[-1] - solved).mean()) < 0.5 * float(jnp.abs(0.5 - solved).mean())
  pull = jax.jit(jax.grad(lambda x: look(CLF, x)[0].sum()))(X)
  assert np.isfinite(pull).all()
  assert (jnp.abs(pull).max((1, 2, 3)) > 0).any()


# --- C&W ------------------------------------------------------------------------------------------


def test_the_constant_is_halved_where_found_and_multiplied_where_not():
  """A stand-in attack finds its image exactly where c is at least the example's own threshold."""
  threshold = jnp.array([0.5, 3.0, 47.0, 1e9])

  def attack_of(c):
    inner = adv2(CLF, interpreters.base.no_map(), l2_tanh(), optax.adam(0.01), weight=0.0, key=KEY)

    def step(batch, state):
      state, snapshot = inner.step(batch, state)
      return state, snapshot._replace(gradient=c)

    return inner._replace(step=step)

  score = lambda batch, seen: jnp.where(seen.gradient >= threshold, seen.gradient, 2e3)  # noqa: E731
  attack = cw.searched(attack_of, cw.Search(12, 2, 1.0, 0.01), score, every=1, passes=0)

  @jax.jit
  def constants(clf, batch):
    (seen,) = run(((attack, 24),), batch, every=2)[1]
    return seen.gradient

  c = np.asarray(constants(CLF, BATCH))
  np.testing.assert_array_equal(c[:4, 0], [1, 0.5, 0.25, 0.375])
  np.testing.assert_array_equal(c[:4, 1], [1, 10, 5.5, 3.25])
  np.testing.assert_array_equal(c[:4, 2], [1, 10, 100, 55])
  np.testing.assert_allclose(c[:, 3], 10.0 ** np.arange(12), rtol=1e-5)
  np.testing.assert_allclose(c[-1, :3], threshold[:3], rtol=0.1)


@pytest.mark.parametrize(('preset', 'kappa'), [('fast', 0.0), ('fast', 2.0), ('thorough', 0.0)])
def test_a_linear_classifier_s_closest_image_is_found(preset, kappa):
  """The distance to the hyperplane on which the margin is −κ is known."""
  clf = tiny.linear_classifier(classes=2)
  x = 0.5 + 0.1 * jax.random.uniform(KEY, (3, 4, 4, 3), jnp.float32, -1, 1)
  logits = tiny.outputs(clf, x).logits
  label = jnp.argmax(logits, -1)
  w = np.asarray(clf.params)[..., 1] - np.asarray(clf.params)[..., 0]
  apart = (np.abs(np.asarray(logits[:, 1] - logits[:, 0])) + kappa) / np.linalg.norm(w)
  batch = tiny.batch(x, 1 - label, jnp.zeros((3, 1, 1)))
  x8, history = api.attack_batch(cw.plain(preset, kappa=kappa), clf, CAM, batch, 0.0, KEY)
  assert (losses.margin(tiny.outputs(clf, x8).logits, 1 - label) <= -kappa).all()
  assert (tiny.outputs(clf, x8).logits.argmax(-1) == 1 - label).all()
  found = np.asarray(metrics.l2(x8, x))
  assert (found <= {'fast': 1.2, 'thorough': 1.02}[preset] * apart + 0.5 / 255 * 48**0.5).all()
  search = cw.SEARCHES[preset]
  assert history.evaluations[-1] == search.rounds * search.steps


def test_a_closer_map_is_asked_for_by_within():
  wide = cw.by_name('fast', 'cam', 240, within=0.5)
  tight = cw.by_name('fast', 'cam', 240, within=0.1)
  (a, _), (b, _) = (api.attack_batch(r, CLF, CAM, BATCH, 0.0, KEY) for r in (wide, tight))
  assert judged(a)[0].all()
  assert judged(b)[0].all()
  assert judged(b)[1].mean() < judged(a)[1].mean()
  assert metrics.l2(b, X).mean() > metrics.l2(a, X).mean()


@pytest.mark.parametrize('framework', ['stadv', 'cw'])
def test_the_one_call_gives_the_same(framework):
  given = {'target': TARGET, 'target_map': BENIGN, 'key': KEY, 'steps': STEPS[framework]}
  result = api.attack(CLF, CAM, X, framework=framework, **given)
  x8, history = made(framework)[1]
  np.testing.assert_array_equal(result.x, x8)
  np.testing.assert_array_equal(result.history.delta, history.delta)
  assert result.success.all()


# --- all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('framework', ['stadv', 'cw'])
def test_padding_rows_are_inert(framework):
  padded = BATCH._replace(is_real=jnp.array([True, True, False, False]))
  recipe = frameworks.by_name('fast', 'cam', None, STEPS[framework], framework=framework)
  x8, history = api.attack_batch(recipe, CLF, CAM, padded, 0.0, KEY)
  whole, other = made(framework)[1]
  np.testing.assert_array_equal(x8[:2], whole[:2])
  np.testing.assert_array_equal(history.delta[:2], other.delta[:2])
  start = recipe.perturbation(0.0).init(X, mask_alternation.step_keys(KEY, BATCH.example_id, 0))
  np.testing.assert_array_equal(history.delta[2:], start[2:])


@pytest.mark.parametrize('framework', ['stadv', 'cw'])
def test_untargeted_and_map_only(framework):
  away = frameworks.by_name(
    'fast', 'cam', None, STEPS[framework], goal=goals.Goal(untargeted=True), framework=framework
  )
  x8, _ = api.attack_batch(away, CLF, CAM, BATCH._replace(target=LABEL), 0.0, KEY)
  assert (tiny.outputs(CLF, x8).logits.argmax(-1) != LABEL).all()
  corner = jnp.zeros_like(BENIGN).at[:, :4, :4].set(1)
  held = frameworks.by_name(
    'fast', 'cam', None, STEPS[framework], goal=goals.Goal('map_only'), framework=framework
  )
  batch = BATCH._replace(target=LABEL, target_map=corner)
  x8, _ = api.attack_batch(held, CLF, CAM, batch, 0.0, KEY)
  assert (tiny.outputs(CLF, x8).logits.argmax(-1) == LABEL).all()
  moved = metrics.map_l1(jax.jit(CAM.explain)(CLF, x8, LABEL, KEY), corner)
  assert (moved < metrics.map_l1(BENIGN, corner)).all()


@pytest.mark.parametrize('name', ['grad', 'cam', 'mask', 'rts', 'grad_cam'])
@pytest.mark.parametrize('preset', ['fast', 'thorough', 'authors'])
@pytest.mark.parametrize(('framework', 'norm'), [('stadv', 'linf'), ('cw', 'linf'), ('pgd', 'l2')])
def test_a_step_keeps_the_type_of_its_state_and_the_same_settings_give_the_same_recipe(
  framework, norm, preset, name
):
  get = functools.partial(frameworks.by_name, preset, name, framework=framework, norm=norm)
  plain = functools.partial(frameworks.plain, preset, framework=framework, norm=norm)
  assert get() is get()
  assert plain() is plain()
  if name == 'rts':
    return
  interpreter = interpreters.build(name, 16)
  shape = jax.eval_shape(interpreter.explain, CLF, X, TARGET, KEY).shape
  batch = tiny.batch(X, TARGET, jnp.zeros(shape))
  for attack, _ in get().schedule(CLF, interpreter, get().perturbation(0.1), KEY):
    state = jax.eval_shape(lambda clf, attack=attack: attack.init(batch), CLF)
    after = jax.eval_shape(lambda state, attack=attack: attack.step(batch, state)[0], state)
    assert jax.tree.map(str, after) == jax.tree.map(str, state)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'framework': 'fgsm'}, "framework is 'fgsm'; expected one of pgd, stadv, cw"),
    ({'norm': 'l1'}, "norm is 'l1'; expected one of linf, l2"),
    ({'framework': 'cw', 'norm': 'l2'}, "norm 'l2' goes with framework 'pgd'; cw is in L2 by"),
    ({'framework': 'stadv', 'norm': 'l2'}, "norm 'l2' goes with framework 'pgd'; stadv moves"),
    ({'tau': 0.1}, "tau is 0.1 for framework 'pgd'; expected a positive weight"),
    ({'framework': 'stadv', 'tau': -1.0}, "tau is -1.0 for framework 'stadv'"),
    ({'framework': 'stadv', 'tau': float('nan')}, 'tau is nan'),
    ({'framework': 'stadv', 'kappa': 1.0}, "kappa is 1.0 for framework 'stadv'; expected a conf"),
    ({'framework': 'cw', 'kappa': -1.0}, "kappa is -1.0 for framework 'cw'"),
    ({'framework': 'cw', 'goal': goals.Goal('map_only', away=losses.top_mass)}, "can't lead away"),
  ],
)
def test_bad_settings(given, message):
  with pytest.raises(InputError, match=message):
    frameworks.by_name('fast', 'cam', **given)
  if 'goal' not in given:
    with pytest.raises(InputError, match=message):
      frameworks.plain('fast', **given)


def test_epsilon_goes_with_balls():
  with pytest.raises(InputError, match='epsilon is the radius of pgd; stadv has none'):
    frameworks.check('stadv', has_epsilon=True)
  with pytest.raises(InputError, match='epsilon is the radius of pgd; cw has none'):
    frameworks.check('cw', has_epsilon=True)
  with pytest.raises(InputError, match="norm 'l2' without epsilon"):
    frameworks.check(norm='l2', has_epsilon=False)
  with pytest.raises(InputError, match='within is 0'):
    cw.by_name('fast', 'cam', within=0)
