"""The routes of `experiments.mask_routes` against finite differences of the solved map."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adv2_jax.interpreters import masking as M
from experiments import mask_routes as R

CONFIG = M.MaskConfig(
  size=4, jitter=0, area=3e-3, smoothness=1e-1, blur=5, mask_blur=3, steps=600, decay=True
)
Y = jnp.array([0, 3, 4])
KEYS = jax.vmap(jax.random.key)(jnp.arange(3))


def test_the_implicit_gradient_is_that_of_the_solved_map():
  step = 1e-4
  with jax.enable_x64(True):
    clf, x = jax.tree.map(
      lambda v: jnp.asarray(v, jnp.float64), (tiny.classifier(act=nn.softplus), tiny.images(3))
    )
    wanted = jnp.asarray(np.random.RandomState(0).rand(3, 4, 4))
    solved = jax.jit(lambda clf, x: M.solve(clf, x, Y, KEYS, CONFIG).mask)
    m = solved(clf, x)

    @jax.jit
    def gradient(clf, x):
      return jax.grad(
        lambda x: R.implicit_gradient(clf, m, x, Y, 2 * (m - wanted), CONFIG, 16, 0.0).sum()
      )(x)

    g = gradient(clf, x)
    distance = lambda x: float(jnp.sum((solved(clf, x) - wanted) ** 2))  # noqa: E731
    rng = np.random.RandomState(1)
    directions = [jnp.asarray(rng.randn(*g.shape)) for _ in range(12)]
    measured = np.array(
      [(distance(x + step * d) - distance(x - step * d)) / 2 / step for d in directions]
    )
    predicted = np.array([float(jnp.vdot(g, d)) for d in directions])
  norms = np.linalg.norm(predicted), np.linalg.norm(measured)
  assert predicted @ measured / np.prod(norms) > 0.95
  assert norms[0] / norms[1] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize('route', ['unrolled', 'stationary'])
def test_a_route_descends_what_it_says(route, monkeypatch):
  """The gradient of its distance is that of the distance, written down and measured here."""
  monkeypatch.setattr(R, 'smooth', lambda clf: clf)  # the test's net is smooth as it is
  few, step, eta = CONFIG._replace(steps=5, decay=False), 1e-5, 2.0
  with jax.enable_x64(True):
    clf, x = jax.tree.map(
      lambda v: jnp.asarray(v, jnp.float64), (tiny.classifier(act=nn.softplus), tiny.images(3))
    )
    wanted = jnp.asarray(np.random.RandomState(0).rand(3, 4, 4))
    net = clf

    def apart_by_hand(x):
      if route == 'stationary':
        slope = jax.grad(lambda m: M.mask_objective(net, m, x, Y, few).sum())(1 - wanted)
        off = jnp.clip(1 - wanted - eta * slope, 0, 1) - (1 - wanted)
        return jnp.sqrt((off**2).mean((1, 2))).sum()
      masks = [M.solve(net, x, Y, KEYS, few, steps=n).mask for n in range(1, 6)]
      return jnp.sqrt(((jnp.stack(masks, 1) - wanted[:, None]) ** 2).mean((1, 2, 3))).sum()

    if route == 'unrolled':
      interpreter, carry = R.unrolled(few, few, 5), jnp.repeat(wanted[:, None], 5, axis=1)
    else:
      interpreter, carry = R.stationary(few, eta), 1 - wanted
    apart = lambda x: interpreter.unroll(clf, x, Y, carry, KEYS).distance.sum()  # noqa: E731
    g = jax.jit(jax.grad(apart))(x)
    by_hand = jax.jit(apart_by_hand)
    assert float(apart(x)) == pytest.approx(float(by_hand(x)), rel=1e-6)
    rng = np.random.RandomState(1)
    directions = [jnp.asarray(rng.randn(*g.shape)) for _ in range(8)]
    measured = np.array(
      [float(by_hand(x + step * d) - by_hand(x - step * d)) / 2 / step for d in directions]
    )
    predicted = np.array([float(jnp.vdot(g, d)) for d in directions])
  np.testing.assert_allclose(predicted, measured, atol=0.01 * abs(measured).max())
