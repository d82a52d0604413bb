"""conv2d against XLA's own convolution: values, gradients, second derivatives, in every setting."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from adv2_jax.nets import layers
from adv2_jax.nets.layers import BatchNorm, conv2d


def reference(x, kernel, stride=1, padding=0):
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def operands(image, window, c, f, batch=2, seed=0):
  r = np.random.RandomState(seed)
  x = r.randn(batch, *image, c).astype('f')
  return jnp.asarray(x), jnp.asarray(r.randn(*window, c, f).astype('f') / np.sqrt(c * window[0]))


def first_and_second_order(conv, stride, padding):
  """Value, both gradients of a non-linear loss, and both gradients of a loss of those."""

  def loss(x, k):
    return jnp.sum(jnp.sin(conv(x, k, stride, padding)))

  def of_gradients(x, k):
    by_x, by_k = jax.grad(loss, (0, 1))(x, k)
    return jnp.sum(by_x**2) + jnp.sum(by_k**2)

  def everything(x, k):
    second = jax.grad(of_gradients, (0, 1))(x, k)
    return conv(x, k, stride, padding), *jax.grad(loss, (0, 1))(x, k), *second

  return jax.jit(everything)


def assert_equal(conv_results, reference_results):
  for a, b in zip(conv_results, reference_results, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


# Each form and its borders: 1×1, strided, padded 1×1; Winograd, gathered, scattered and XLA's own,
# by shape; the stems; odd sizes, even windows, more padding than window.
CASES = [
  ((6, 5), (1, 1), 40, 24, 1, 0),
  ((7, 6), (1, 1), 5, 7, 2, 0),
  ((6, 6), (1, 1), 5, 7, 2, 1),
  ((32, 33), (3, 3), 32, 16, 1, 1),
  ((9, 8), (3, 3), 48, 64, 1, 1),
  ((7, 7), (3, 3), 32, 40, 1, 3),
  ((10, 6), (3, 3), 40, 32, 1, 0),
  ((9, 8), (3, 3), 64, 32, 2, 1),
  ((8, 8), (3, 3), 8, 48, 2, 1),
  ((8, 7), (3, 3), 16, 16, 1, 1),
  ((20, 21), (7, 7), 3, 64, 2, 3),
  ((16, 16), (5, 5), 3, 16, 2, 2),
  ((9, 7), (5, 3), 8, 36, 3, 4),
  ((9, 9), (2, 2), 40, 33, 1, 2),
  ((3, 3), (3, 3), 33, 40, 1, 0),
]


@pytest.mark.parametrize(('image', 'window', 'c', 'f', 'stride', 'padding'), CASES)
def test_equals_xla_to_second_order(image, window, c, f, stride, padding):
  x, k = operands(image, window, c, f)
  assert_equal(
    first_and_second_order(conv2d, stride, padding)(x, k),
    first_and_second_order(reference, stride, padding)(x, k),
  )


def test_the_cases_reach_every_form(monkeypatch):
  reached = set()
  for name in ('_winograd', '_gather', '_scatter', '_xla'):
    form = getattr(layers, name)

    def spy(*args, form=form, name=name, **kwargs):
      reached.add((name, where))
      return form(*args, **kwargs)

    monkeypatch.setattr(layers, name, spy)
  for image, window, c, f, stride, padding in CASES:
    x, k = operands(image, window, c, f)
    shape = layers.Geometry(stride, padding, image, window)
    where = 'forward'
    g = jax.eval_shape(functools.partial(layers._forward_cpu, shape), x, k)
    where = 'by_input'
    jax.eval_shape(functools.partial(layers._by_input_cpu, shape), g, k)
  assert reached == {
    *((name, 'forward') for name in ('_winograd', '_gather', '_xla')),
    *((name, 'by_input') for name in ('_winograd', '_scatter', '_xla')),
  }


@settings(max_examples=8, deadline=None)
@given(
  height=st.integers(4, 9),
  width=st.integers(4, 9),
  window=st.integers(1, 4),
  c=st.sampled_from([1, 3, 32]),
  f=st.sampled_from([2, 33]),
  stride=st.integers(1, 3),
  padding=st.integers(0, 4),
)
def test_any_stride_and_padding(height, width, window, c, f, stride, padding):
  x, k = operands((height, width), (window, window), c, f)

  def results(conv):
    def loss(x, k):
      return jnp.sum(jnp.sin(conv(x, k, stride, padding)))

    return jax.jit(jax.grad(loss, (0, 1)))(x, k)

  assert_equal(results(conv2d), results(reference))


def test_large_intermediates_fall_back_to_xla(monkeypatch):
  x, k = operands((9, 8), (3, 3), 64, 64)
  plain = first_and_second_order(reference, 2, 1)(x, k)
  monkeypatch.setattr(layers, '_MAX_COLUMNS', 100)
  monkeypatch.delattr(layers, '_gather')
  monkeypatch.delattr(layers, '_scatter')
  assert_equal(first_and_second_order(conv2d, 2, 1)(x, k), plain)


def test_gradient_is_that_of_the_function():
  x, k = operands((5, 6), (3, 3), 32, 3)
  jax.test_util.check_grads(
    lambda x, k: conv2d(x, k, 2, 1), (x, k), order=2, modes=['rev'], atol=2e-2, rtol=2e-2
  )


def test_under_vmap_and_scan():
  x, k = operands((8, 7), (3, 3), 32, 40)
  kernels = jnp.stack([k, 2 * k, -k])
  by_kernel = jax.vmap(lambda k: conv2d(x, k, 2, 1))(kernels)
  per_example = jax.vmap(lambda x: conv2d(x[None], k, 2, 1)[0])(x)
  _, in_scan = lax.scan(lambda _, k: (None, conv2d(x, k, 2, 1)), None, kernels)
  expected = jnp.stack([reference(x, k, 2, 1) for k in kernels])
  assert_equal([by_kernel, in_scan, per_example], [expected, expected, expected[0]])


def test_bfloat16_sums_in_float32():
  x, k = operands((8, 8), (3, 3), 64, 32)
  x, k = x.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
  exact = reference(x.astype(jnp.float32), k.astype(jnp.float32), 1, 1)
  y = conv2d(x, k, 1, 1)
  assert y.dtype == jnp.bfloat16
  # One rounding to bfloat16 at the end: half a unit in the last of 8 bits.
  np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-3)
  by_x = jax.grad(lambda x: jnp.sum(conv2d(x, k, 1, 1).astype(jnp.float32)))(x)
  assert by_x.dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ('window', 'c', 'f', 'stride'), [(1, 16, 32, 1), (3, 32, 32, 1), (3, 32, 64, 2), (3, 16, 16, 1)]
)
def test_batch_sharded_over_devices_needs_no_collective(window, c, f, stride):
  x, k = operands((8, 8), (window, window), c, f, batch=8)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  across = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))
  k = jax.device_put(k, NamedSharding(mesh, PartitionSpec()))

  def by_input(x, k):
    return jax.grad(lambda x: jnp.sum(jnp.sin(conv2d(x, k, stride, window // 2))))(x)

  compiled = jax.jit(by_input).lower(across, k).compile()
  text = compiled.as_text()
  assert not any(op in text for op in ('all-reduce', 'all-gather', 'all-to-all', 'permute'))
  assert_equal([compiled(across, k)], [jax.jit(by_input)(x, jax.device_put(k, jax.devices()[0]))])


@pytest.mark.parametrize('order', [1, 2])
def test_no_convolution_in_a_scan_is_left_to_the_naive_loop(order):
  """XLA's fast CPU kernel wants NHWC, HWIO, no reversed window; autodiff's own are not that."""
  x, k = operands((16, 16), (3, 3), 16, 16)

  def loss(x, k):
    return jnp.sum(jnp.sin(conv2d(x, k, 1, 1)))

  def second(x, k):
    by_x, by_k = jax.grad(loss, (0, 1))(x, k)
    return jnp.sum(by_x**2) + jnp.sum(by_k**2)

  def loop(x, k):
    step = lambda xk, _: (jax.grad((loss, second)[order - 1], (0, 1))(*xk), None)  # noqa: E731
    return lax.scan(step, (x, k), length=2)[0]

  text = jax.jit(loop).lower(x, k).compile().as_text()
  lines = [line for line in text.splitlines() if ' convolution(' in line]
  assert lines
  assert all('dim_labels=b01f_01io->b01f' in line for line in lines)
  assert not any('rhs_reversal' in line for line in lines)


def test_other_platforms_get_xlas_convolution():
  x, k = operands((8, 8), (3, 3), 64, 64)
  traced = jax.jit(jax.grad(lambda x: jnp.sum(conv2d(x, k, 1, 1) ** 2))).trace(x)
  on_gpu = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert on_gpu.count('stablehlo.convolution') == 2
  assert 'dot_general' not in on_gpu


def test_batch_norm_in_training_moves_its_statistics_as_torch_does(key):
  x = 3 + 2 * jax.random.normal(key, (4, 5, 6, 7))
  norm = BatchNorm()
  variables = norm.init(key, x)
  y, moved = norm.apply(variables, x, train=True, mutable=['batch_stats'])
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  np.testing.assert_allclose(
    y, (x - mean[None, None, None]) / jnp.sqrt(var + 1e-5)[None, None, None], atol=1e-5
  )
  stats = moved['batch_stats']['norm']
  np.testing.assert_allclose(stats['mean'], 0.1 * mean, rtol=1e-5)
  np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * var, rtol=1e-5)
