"""The GPU computes what the CPU does: `JAX_PLATFORMS=cuda,cpu pytest -m gpu`."""

import jax
import numpy as np
import optax
import pytest
import tiny

from adv2_jax import interpreters
from adv2_jax.attacks.loop import adv2
from adv2_jax.attacks.perturbations import linf_ball

pytestmark = pytest.mark.gpu


@pytest.fixture
def devices():
  try:
    return jax.devices('cpu')[0], jax.devices('gpu')[0]
  except RuntimeError as error:
    pytest.skip(f'no GPU: {error}')


@pytest.mark.parametrize('name', ['cam', 'grad'])
def test_logits_and_one_attack_step(devices, name):
  interpreter = interpreters.build(name, tiny.SIZE)
  clf, x, y = tiny.classifier(), tiny.images(4), np.array([1, 2, 0, 3])
  size = jax.eval_shape(interpreter.explain, clf, x, y, jax.random.key(0)).shape
  batch = tiny.batch(x, y, np.random.RandomState(3).rand(*size).astype(np.float32))

  @jax.jit
  def step(clf, batch):
    free = linf_ball(1.0)._replace(project=lambda x0, delta: delta)
    attack = adv2(clf, interpreter, free, optax.sgd(1.0), weight=10.0, key=jax.random.key(0))
    state, snapshot = attack.step(batch, attack.init(batch, None))
    return snapshot.logits, state.delta

  with jax.default_matmul_precision('highest'):
    on_cpu, on_gpu = (step(*jax.device_put((clf, batch), device)) for device in devices)
  assert on_gpu[0].devices() == {devices[1]}
  np.testing.assert_allclose(on_gpu[0], on_cpu[0], rtol=1e-4, atol=1e-5)
  delta = np.asarray(on_cpu[1])
  assert np.linalg.norm(on_gpu[1] - delta) < 1e-3 * np.linalg.norm(delta)
