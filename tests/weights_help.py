"""What tests of weights share: shapes of the zoo's nets, and the one line of a refusal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import nets
from adv2_jax.types import InputError
from adv2_jax.weights import zoo


def zoo_shapes(name, **fields):
  module = nets.build(name, **fields)
  x = jnp.zeros((1, 32, 32, 3))
  return zoo.tensor_shapes(jax.eval_shape(module.init, jax.random.key(0), x))


def assert_same(actual, expected):
  assert actual.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


def refusal(call, *args, **kwargs):
  """The message of the InputError that the call must raise: always one line."""
  with pytest.raises(InputError) as caught:
    call(*args, **kwargs)
  assert '\n' not in str(caught.value)
  return str(caught.value)
