"""No draw depends on JAX's default types, and none on the key of another."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adv2_jax import metrics
from adv2_jax.types import example_keys, fold_keys, step_keys

TREE = pathlib.Path(__file__).parents[1] / 'adv2_jax'
# Where the dtype stands among positional arguments.
MAKERS = {'zeros': 1, 'ones': 1, 'full': 2, 'empty': 1, 'eye': 3, 'arange': 3, 'linspace': 5}
DRAWS = {'uniform': 2, 'normal': 2, 'randint': 4, 'truncated_normal': 4, 'gumbel': 2}


def undecided(tree):
  """Arrays and draws whose type JAX_ENABLE_X64 would decide."""
  for node in ast.walk(tree):
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
      continue
    owner, name = ast.unparse(node.func.value), node.func.attr
    place = {'jnp': MAKERS, 'jax.random': DRAWS}.get(owner, {}).get(name)
    named = any(k.arg == 'dtype' for k in node.keywords)
    if place is not None and len(node.args) <= place and not named:
      yield f'line {node.lineno}: {ast.unparse(node)}'


def test_every_array_and_draw_has_a_type():
  found = {f.name: list(undecided(ast.parse(f.read_text()))) for f in TREE.rglob('*.py')}
  assert not {name: calls for name, calls in found.items() if calls}
  assert list(undecided(ast.parse('jnp.zeros(3); jax.random.normal(k, s)')))  # it can fail


def data(keys):
  return {tuple(row) for row in np.asarray(jax.random.key_data(keys)).reshape(-1, 2).tolist()}


def test_no_key_of_one_stream_is_one_of_another():
  """Attack steps, the judge, the judge's other numbers: for the same seed, ids and steps."""
  key, ids = jax.random.key(3), jnp.arange(12)
  streams = [
    set.union(*(data(step_keys(key, ids, step)) for step in range(12))),
    data(metrics.judge_keys(3, ids)),
    data(metrics.judge_keys(3, ids, again=True)),
    data(example_keys(key, 12)),  # of a call in Python
    set.union(*(data(fold_keys(metrics.judge_keys(3, ids), i)) for i in range(12))),
  ]
  assert sum(map(len, streams)) == len(set.union(*streams)) == 12 * (12 + 3 + 12)


@pytest.mark.parametrize('step', [0, 7])
def test_an_example_s_own_key_does_not_depend_on_its_place(step):
  own = jax.random.split(jax.random.key(1), 3)
  keys = step_keys(own, jnp.arange(3), step)
  turned = step_keys(own[::-1], jnp.arange(3), step)
  assert (jax.random.key_data(keys) == jax.random.key_data(turned[::-1])).all()
  assert len(data(keys)) == 3
