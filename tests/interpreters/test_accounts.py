"""The network passes that are claimed, against the operations that XLA compiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adv2_jax import interpreters
from adv2_jax.attacks.loop import adv2
from adv2_jax.attacks.mask_alternation import adv2_mask
from adv2_jax.attacks.perturbations import linf_ball
from adv2_jax.classifier import from_fn
from adv2_jax.nets import soft_relu
from adv2_jax.types import Batch

WIDTH, LAYERS, CELL = 256, 3, 8
# One iteration: XLA counts the body of a loop once.
MASK = interpreters.MaskConfig(size=2, jitter=0, blur=3, mask_blur=3, steps=1)
ALL = {
  'cam': interpreters.cam(),
  'grad_cam': interpreters.grad_cam(),
  'grad': interpreters.grad(),
  'input_x_gradient': interpreters.input_x_gradient(),
  'integrated_gradients': interpreters.integrated_gradients(steps=1),
  'smooth_grad': interpreters.smooth_grad(samples=1),
  'mask': interpreters.mask(MASK, looks=4),
  'mask, no slope': interpreters.mask(MASK, slope=0),
  'unrolled_mask': interpreters.unrolled_mask(MASK, iterations=1),
  'mask, jittered': interpreters.mask(MASK._replace(jitter=2)),
}


@functools.cache
def net():
  """Layers of equal cost, so that every pass through it, forward or backward, costs the same."""
  rng = np.random.RandomState(0)
  draw = lambda *shape: jnp.asarray(0.1 * rng.randn(*shape), jnp.float32)  # noqa: E731
  params = {'first': draw(CELL * CELL * 3, WIDTH), 'layers': draw(LAYERS, WIDTH, WIDTH)}
  params['last'] = draw(WIDTH, 5)

  def apply(p, x, act=jax.nn.relu):
    b, h, w, c = x.shape
    cells = x.reshape(b, h // CELL, CELL, w // CELL, CELL, c).swapaxes(2, 3)
    z = act(cells.reshape(b, h // CELL, w // CELL, -1) @ p['first'])
    for layer in p['layers']:
      z = act(z @ layer)
    return head(p, z), {'features': z}

  def head(p, features):
    return features.mean((1, 2)) @ p['last']

  return from_fn(params, apply, head, lambda p, x, act=soft_relu: apply(p, x, act))


ALL['joint'] = interpreters.joint({k: ALL[k] for k in ('cam', 'grad', 'grad_cam', 'mask')})
X = jnp.asarray(np.random.RandomState(1).rand(2, 16, 16, 3), jnp.float32)
Y = jnp.array([1, 2])
KEY = jax.random.key(0)
CLEAN_BATCH = Batch(jnp.arange(2), X, Y, None, jnp.ones(2, bool))


def operations(f, *arguments):
  return jax.jit(f).lower(*arguments).compile().cost_analysis()['flops']


@functools.cache
def forward():
  return operations(lambda clf, x: clf(x).logits, net(), X)


def parts_of(make, batch):
  """Operations, in forward passes, of a step of the attack, and of one without its gradient."""
  state = jax.eval_shape(lambda clf, batch: make(clf).init(batch, None), net(), batch)
  move = lambda clf, batch, state: make(clf).step(batch, state)[0]  # noqa: E731

  def look(clf, batch, state):
    _, seen = make(clf).step(batch, state)
    return seen.terms, seen.logits

  return [operations(f, net(), batch, state) / forward() for f in (move, look)]


@pytest.mark.parametrize('name', ALL)
def test_passes_are_those_compiled(name):
  interpreter = ALL[name]
  explain = operations(lambda clf, x: interpreter.explain(clf, x, Y, KEY), net(), X) / forward()
  drawn = jax.eval_shape(interpreter.explain, net(), X, Y, KEY)
  wanted = jax.tree.map(lambda v: jnp.zeros(v.shape, jnp.float32), drawn)
  make = lambda clf: adv2(clf, interpreter, linf_ball(0.1), optax.sgd(1.0), weight=1.0, key=KEY)  # noqa: E731
  step, look = parts_of(make, CLEAN_BATCH._replace(target_map=wanted))
  draft = operations(lambda clf, x: interpreter.draft(clf, x, Y, KEY), net(), X) / forward()
  if name == 'joint':  # XLA merges equal forward passes of its parts: no more than claimed
    assert 0.6 * interpreter.passes[0] < explain < 1.15 * interpreter.passes[0]
    assert draft < 1.15 * interpreter.passes_of_draft
    explain, draft = interpreter.passes[0], interpreter.passes_of_draft
  np.testing.assert_allclose(draft, interpreter.passes_of_draft, rtol=0.15)
  np.testing.assert_allclose((explain, step, look), interpreter.passes, rtol=0.15)
  attack = make(net())
  assert attack.passes(3) - attack.passes(2) == interpreter.passes[1]
  assert attack.look_passes == interpreter.passes[2]


def test_passes_of_the_alternation_are_those_compiled():
  make = lambda clf: adv2_mask(clf, MASK, linf_ball(0.1), key=KEY, looks=1, halvings=1, renew=99)  # noqa: E731
  batch = CLEAN_BATCH._replace(target_map=jnp.zeros((2, 2, 2), jnp.float32))
  step, _ = parts_of(make, batch)
  attack = make(net())
  renewal = attack.result_passes  # that a step may begin with one is compiled in
  np.testing.assert_allclose(step, attack.passes(3) - attack.passes(2) + renewal, rtol=0.15)
