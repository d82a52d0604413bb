"""The attacks of the literature: their sets, losses and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import tiny

import adv2_jax as adv2
from adv2_jax import losses, metrics
from adv2_jax.attacks import baselines, frameworks, goals
from adv2_jax.types import InputError

CLF = tiny.classifier()
CAM, GRAD = adv2.interpreters.cam(), adv2.interpreters.grad(2)
X = tiny.images(3)
LABEL = jnp.argmax(tiny.outputs(CLF, X).logits, -1)
TARGET = (LABEL + 1) % 3
KEY = jax.random.key(0)
MAP_ONLY = goals.find('map_only')


def picture(shape=(2, 24, 20, 3)):
  """Smooth, with one box in it."""
  x = np.full(shape, 0.4, np.float32) + np.linspace(0, 0.01, shape[2])[:, None].astype(np.float32)
  x[:, 6:14, 5:12] += 0.3
  return jnp.asarray(x)


def test_edges_are_those_of_scipys_sobel():
  x = picture()
  grey = np.asarray(x).mean(-1)
  strength = np.stack(
    [np.hypot(*(scipy.ndimage.sobel(g, axis, mode='nearest') for axis in (0, 1))) for g in grey]
  )
  expected = strength > 0.1 * strength.max((1, 2), keepdims=True)
  np.testing.assert_array_equal(baselines.edges(x)[..., 0], expected)
  assert 0 < expected.mean() < 0.5
  assert not baselines.edges(jnp.full((1, 8, 8, 3), 0.5)).any()


def test_adv_edge_changes_edges_alone():
  x = picture((3, *X.shape[1:]))
  label = jnp.argmax(tiny.outputs(CLF, x).logits, -1)
  options = {'label': label, 'target': (label + 1) % 3, 'epsilon': 0.1, 'steps': 8, 'key': KEY}
  result = adv2.attack(CLF, CAM, x, preset='adv_edge', **options)
  x8 = adv2.images.quantise(x)
  on_edge = np.broadcast_to(baselines.edges(x), x.shape)
  changed = np.abs(np.asarray(result.x - x8)) > 0.6 / 255
  assert changed[on_edge].mean() > 0.5
  assert not changed[~on_edge].any()


def test_ghorbani_leaves_the_benign_map_and_keeps_the_class():
  options = {'goal': 'map_only', 'target_map': 'away', 'epsilon': 0.1, 'steps': 12, 'key': KEY}
  benign = CAM.explain(CLF, X, LABEL, KEY)
  result = adv2.attack(CLF, CAM, X, preset='ghorbani', **options)
  assert result.success.all()
  left, before = (losses.top_mass(m, benign) for m in (result.maps, benign))
  assert (left < 0.9 * before).all()


def test_ghorbanis_first_step_is_a_sign_step_on_the_loss():
  goal = goals.find('map_only', 'away_centre')
  recipe = baselines.ghorbani('cam', goal=goal)
  perturbation = recipe.perturbation(0.1)
  ((attack, steps),) = recipe.schedule(CLF, CAM, perturbation, KEY)
  assert steps == 100
  batch = adv2.types.Batch(
    jnp.arange(3), X, LABEL, CAM.explain(CLF, X, LABEL, KEY), jnp.ones(3, bool)
  )

  @jax.jit
  def step(batch):
    state, snapshot = attack.step(batch, attack.init(batch))
    by_x = jax.grad(
      lambda x: losses.centre_kept(CAM.explain(CLF, x, LABEL, KEY), batch.target_map).sum()
    )(snapshot.x)
    return state.inner.delta, by_x

  delta, by_x = step(batch)
  inside = (X > 1 / 255) & (X < 254 / 255) & (jnp.abs(by_x) > 1e-6)
  np.testing.assert_allclose(
    np.asarray(delta)[inside], -np.sign(np.asarray(by_x))[inside] / 255, atol=1e-6
  )


def test_softplus_takes_the_place_of_relu_and_sharpens():
  """β = 10 at first and 100 at last, where maps are close to those of the real net."""
  net = jax.jit(
    lambda step: (
      baselines.softplus_net(GRAD, 10)
      .unroll(CLF, X, LABEL, ((), jnp.zeros((3, 5)), jnp.full(3, step, jnp.float32)), KEY)
      .maps[0]
    )
  )
  real = GRAD.explain(CLF, X, LABEL, KEY)
  apart = [float(metrics.map_l1(net(step), real).mean()) for step in (0.0, 5.0, 10.0, 40.0)]
  assert apart == sorted(apart, reverse=True)
  assert apart[0] > 2 * apart[-1]
  x = tiny.images(1)
  soft = CLF.surrogate(x, lambda z: jax.nn.softplus(10 * z) / 10).logits
  unrolled = baselines.softplus_net(GRAD, 10).unroll(
    CLF, x, LABEL[:1], ((), jax.nn.softmax(soft), jnp.zeros(1)), KEY
  )
  np.testing.assert_allclose(unrolled.logits, soft, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(unrolled.extra, 0, atol=1e-6)  # these are the outputs to be kept
  np.testing.assert_array_equal(unrolled.carry[2], [1])


def test_dombrowski_comes_closer_to_the_target_map():
  wanted = GRAD.explain(CLF, X[::-1], LABEL[::-1], KEY)
  options = {'goal': 'map_only', 'target_map': wanted, 'epsilon': 0.1, 'key': KEY}
  recipe = baselines.dombrowski('grad', steps_s2=400, goal=MAP_ONLY)
  result = adv2.attack(CLF, GRAD, X, preset=recipe, **options)
  assert result.success.all()
  before = metrics.map_l1(GRAD.explain(CLF, X, LABEL, KEY), wanted)
  assert (metrics.map_l1(result.maps, wanted) < 0.9 * before)[::2].all()  # the second is there


@pytest.mark.parametrize(
  ('preset', 'name', 'goal', 'message'),
  [
    ('ghorbani', 'cam', goals.DECEIVE, "holds the class: goal 'map_only' and, as target_map, away"),
    ('ghorbani', 'cam', MAP_ONLY, 'as target_map, away or away_centre'),
    ('ghorbani', 'mask', goals.find('map_only', 'away'), 'maps that have a formula; mask has none'),
    ('dombrowski', 'grad', goals.find('map_only', 'away'), 'a map to come close to'),
    ('dombrowski', 'joint', MAP_ONLY, 'maps that have a formula; joint has none'),
  ],
)
def test_what_they_are_not_for_is_refused(preset, name, goal, message):
  with pytest.raises(InputError, match=message):
    frameworks.by_name(preset, name, goal=goal)


def test_further_refusals():
  with pytest.raises(InputError, match=r"goes with framework 'pgd' and norm 'linf' alone"):
    frameworks.by_name('adv_edge', 'cam', framework='stadv')
  with pytest.raises(InputError, match='steps_s2 is 0'):
    frameworks.by_name('adv_edge', 'cam', steps_s2=0)
  with pytest.raises(InputError, match=r'smooths ReLUs for maps made of gradients; cam.s is not'):
    adv2.attack(CLF, CAM, X, preset='dombrowski', goal='map_only', target_map=np.zeros((3, 8, 8)))
  with pytest.raises(InputError, match=r"steps_s1 is 5; preset 'ghorbani' has no warm-up"):
    frameworks.by_name('ghorbani', 'cam', 5, goal=goals.find('map_only', 'away'))
  deaf = CLF.replace(surrogate_fn=lambda params, x: CLF.surrogate_fn(params, x))
  with pytest.raises(InputError, match='puts softplus in the place of ReLU'):
    adv2.attack(deaf, GRAD, X, preset='dombrowski', goal='map_only', target_map=np.zeros((3, 8, 8)))
  assert frameworks.plain('ghorbani') is frameworks.plain('fast')
