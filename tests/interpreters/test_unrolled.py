"""MASK attacked through its own solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adv2_jax import api, interpreters
from adv2_jax.interpreters import masking as M
from adv2_jax.interpreters.unrolled import thorough_mask
from adv2_jax.types import InputError, example_keys

SMALL = M.MaskConfig(size=4, jitter=0, area=1e-2, smoothness=1e-1, blur=5, mask_blur=3, steps=30)
KEY = jax.random.key(0)


def linear():
  clf = tiny.linear_classifier(size=16)
  return clf.replace(params=0.5 * clf.params)


def test_the_map_is_that_of_the_shortened_solver_and_its_gradient_that_of_differences():
  clf, x, y = linear(), tiny.images(2, seed=4), jnp.array([1, 3])
  interpreter = interpreters.unrolled_mask(SMALL, iterations=6)
  keys = example_keys(KEY, 2)

  @jax.jit
  def maps(x):
    return interpreter.unroll(clf, x, y, (), keys).maps[0]

  quick = M.fast(SMALL)._replace(steps=6)
  solved = M.solve(clf, x, y, keys, quick).mask
  np.testing.assert_allclose(maps(x), 1 - solved, atol=1e-5)
  inside = (solved > 0.02) & (solved < 0.98)
  assert inside.any()
  weight = jax.random.normal(jax.random.key(1), solved.shape, jnp.float32) * inside
  direction = jax.random.normal(jax.random.key(2), x.shape, jnp.float32)
  f = jax.jit(lambda x: jnp.sum(weight * maps(x)))
  slope = float(jnp.sum(jax.grad(f)(x) * direction))
  step = 2e-3
  differences = float(f(x + step * direction) - f(x - step * direction)) / (2 * step)
  assert abs(slope) > 1e-4
  np.testing.assert_allclose(slope, differences, rtol=0.1)


def test_the_solver_is_shortened_at_a_falling_rate():
  assert M.SCENES._replace(steps=25) == interpreters.unrolled.shortened(M.SCENES, 25)
  quick = interpreters.unrolled.shortened(M.CIFAR, 25)
  assert (quick.steps, quick.decay, quick.learning_rate) == (25, True, 2 * M.CIFAR.learning_rate)


# Of empty maps, see the docstring of `unrolled_mask`.
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_the_attack_keeps_any_map():
  """The benign one and a patch, judged by the whole solver; closer than what `mask` imitates."""
  clf, x = linear(), tiny.images(8, seed=3)
  y = tiny.outputs(clf, x).logits.argmax(-1)
  target = (y + 1) % tiny.CLASSES
  given = {'target': target, 'label': y, 'epsilon': 0.2}
  config = SMALL._replace(start=0.0, decay=True, b1=0.5, b2=0.8)
  unrolled, interpreter = interpreters.unrolled_mask(config), interpreters.mask(config)
  keys = example_keys(KEY, 8)
  benign = api.explain(clf, unrolled, x, y, keys)
  np.testing.assert_array_equal(benign, api.explain(clf, interpreter, x, y, keys))
  patch = jnp.zeros((8, 4, 4), jnp.float32).at[:, 1:3, 1:3].set(1)
  for wanted in (benign, patch):
    given |= {'target_map': wanted, 'steps': 30}
    near, far = (
      api.attack(clf, interpreter, x, preset=preset, **given) for preset in ('thorough', 'fast')
    )
    assert near.success.all()
    apart = [float(np.abs(found.maps - wanted).mean()) for found in (near, far)]
    assert apart[0] < 0.95 * apart[1], apart


def test_thorough_attacks_mask_through_its_solver():
  mask, grad = interpreters.mask(SMALL), interpreters.grad()
  assert thorough_mask(mask) is interpreters.unrolled_mask(SMALL)
  assert thorough_mask(grad) is grad
  own = interpreters.unrolled_mask(SMALL, iterations=3)
  assert thorough_mask(own) is own
  for weights, expected in ((None, (4 / 3, 1.0)), ({'g': 2.0, 'm': 0.3}, (2.0, 3.0))):
    joint = interpreters.joint({'m': mask, 'g': grad}, weights)
    changed = thorough_mask(joint)
    assert dict(changed.settings.parts)['m'] == interpreters.unrolled_mask(SMALL)
    np.testing.assert_allclose(changed.settings.weights, expected)
    assert changed.passes[1] == joint.passes[1] + 152 - 10
    assert thorough_mask(changed).settings == changed.settings


def test_refusals():
  with pytest.raises(InputError, match='unrolled_mask iterations is 0; expected at least 1'):
    interpreters.unrolled_mask(SMALL, iterations=0)
  with pytest.raises(InputError, match='mask size is 0'):
    interpreters.unrolled_mask(SMALL._replace(size=0))
