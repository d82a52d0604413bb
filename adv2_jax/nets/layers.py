"""The convolution and batch norm every net here is made of: torch's numbers, NHWC layout.

Why `conv2d` does not stop at `lax.conv_general_dilated`: XLA's CPU backend brings a convolution
into the layout of its fast kernel only in a program's entry computation. Inside `lax.scan`, where
attacks live, the convolutions that autodiff makes (swapped kernel, reversed window) fall to a naive
loop, 5 times slower by the input and up to 75 times by the kernel; besides, the fast kernel runs
most 1×1 and many 3×3 shapes on one core only. So on CPU each convolution and each of its
derivatives is written as what runs fast there:

    1×1                               one matrix product
    3×3, stride 1, ≥ 32 channels      Winograd's: 16 products in place of 36
    others, ≥ 32 channels deep        one product, after or before moving pixels
    few channels; by the kernel       XLA's, in the layout of its fast kernel

ResNet-50 at 224 pixels, batch 4, two cores, in a scan: a first-order attack step takes 0.4 of the
processor time it took with XLA's convolutions, and 0.8 of what eager PyTorch takes. On other
platforms it is XLA's convolution that is lowered, derivatives included.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

_DIMS = ('NHWC', 'HWIO', 'NHWC')
_EPS = 1e-5  # of batch norm
_MAX_COLUMNS = 2**27  # numbers in the intermediate of a matrix form (512 MB); above, XLA's form


def conv2d(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
  """Cross-correlation, zero padding on all sides as torch.

  Differentiable to any order in reverse mode; not in forward mode (`jax.jvp`).

  Args:
    x: [B,H,W,C].
    kernel: [kh,kw,C,F].
    stride: of both axes.
    padding: of both axes, on both ends.

  Returns:
    [B,h,w,F], h = ⌊(H + 2·padding − kh) / stride⌋ + 1.
  """
  (_, h, w, _), (kh, kw, _, _) = x.shape, kernel.shape
  shape = Geometry(stride, padding, (h, w), (kh, kw))
  return _forward(shape, x, kernel)


# --- one trilinear form, three maps ---------------------------------------------------------------
# ⟨conv(x, k), g⟩ = ⟨x, by_input(g, k)⟩ = ⟨k, by_kernel(x, g)⟩ is linear in each of x, k, g, so the
# derivatives of each of the three maps are the other two: closed under differentiation.


class Geometry(NamedTuple):
  """What a convolution needs to know beside its operands; static."""

  stride: int
  padding: int
  image: tuple[int, int]
  window: tuple[int, int]


# Tracing both platforms' forms takes Python longer than all the rest of a net: once for each shape.
_traced_once = functools.partial(jax.jit, static_argnums=0, inline=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@_traced_once
def _forward(shape: Geometry, x: jax.Array, k: jax.Array) -> jax.Array:
  plain = functools.partial(_plain, shape)
  return lax.platform_dependent(x, k, cpu=functools.partial(_forward_cpu, shape), default=plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@_traced_once
def _by_input(shape: Geometry, g: jax.Array, k: jax.Array) -> jax.Array:
  x = jax.ShapeDtypeStruct((g.shape[0], *shape.image, k.shape[2]), g.dtype)

  def plain(g: jax.Array, k: jax.Array) -> jax.Array:
    return jax.linear_transpose(lambda x: _plain(shape, x, k), x)(g)[0]

  return lax.platform_dependent(g, k, cpu=functools.partial(_by_input_cpu, shape), default=plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@_traced_once
def _by_kernel(shape: Geometry, x: jax.Array, g: jax.Array) -> jax.Array:
  k = jax.ShapeDtypeStruct((*shape.window, x.shape[3], g.shape[3]), x.dtype)

  def plain(x: jax.Array, g: jax.Array) -> jax.Array:
    return jax.linear_transpose(lambda k: _plain(shape, x, k), k)(g)[0]

  return lax.platform_dependent(x, g, cpu=functools.partial(_by_kernel_cpu, shape), default=plain)


def _derivatives(of: jax.custom_vjp, by_first: Callable, by_second: Callable) -> None:
  """Registers the derivatives of of(shape, a, b): by_first(c, b) and by_second(a, c)."""
  of.defvjp(
    lambda shape, a, b: (of(shape, a, b), (a, b)),
    lambda shape, ab, c: (by_first(shape, c, ab[1]), by_second(shape, ab[0], c)),
  )


_derivatives(_forward, _by_input, _by_kernel)
_derivatives(_by_input, _forward, lambda shape, g, c: _by_kernel(shape, c, g))
_derivatives(_by_kernel, lambda shape, c, g: _by_input(shape, g, c), _forward)


def _plain(shape: Geometry, x: jax.Array, k: jax.Array) -> jax.Array:
  return _xla(x, k, (shape.stride,) * 2, [(shape.padding,) * 2] * 2)


def _xla(x, k, stride, padding, dilate_x=(1, 1), dilate_k=(1, 1)) -> jax.Array:
  return lax.conv_general_dilated(x, k, stride, padding, dilate_x, dilate_k, _DIMS)


# --- the forms for CPU ----------------------------------------------------------------------------


def _forward_cpu(shape: Geometry, x: jax.Array, k: jax.Array) -> jax.Array:
  (kh, kw, c, _), s, p = k.shape, shape.stride, shape.padding
  if (kh, kw) == (1, 1) and not p:
    return _matmul(x[:, ::s, ::s], k[0, 0], 0)
  if s == 1 and _suits_winograd(x, k):
    return _winograd(x, k, [(p, p)] * 2)
  if _pays(c, x.size // s**2 * kh * kw):
    return _gather(x, k, s, [(p, p)] * 2)
  return _plain(shape, x, k)


def _by_input_cpu(shape: Geometry, g: jax.Array, k: jax.Array) -> jax.Array:
  (kh, kw, c, f), s, p = k.shape, shape.stride, shape.padding
  # What g, spread by the stride, lacks at either end to give back the whole image.
  ends = [
    (n - 1 - p, size + p - (m - 1) * s - 1)
    for n, size, m in zip(shape.window, shape.image, g.shape[1:3], strict=True)
  ]
  if s == 1 and _suits_winograd(g, k):
    return _winograd(g, k[::-1, ::-1].swapaxes(2, 3), ends)
  if (kh, kw) == (1, 1) or _pays(f, g.size // f * kh * kw * c):
    return _scatter(g, k, s, ends)
  return _xla(g, k[::-1, ::-1].swapaxes(2, 3), (1, 1), ends, dilate_x=(s, s))


def _by_kernel_cpu(shape: Geometry, x: jax.Array, g: jax.Array) -> jax.Array:
  (kh, kw), s, p = shape.window, shape.stride, shape.padding
  if (kh, kw) == (1, 1) and not p:
    axes = ((0, 1, 2), (0, 1, 2))
    return lax.dot_general(x[:, ::s, ::s], g, (axes, ((), ())))[None, None]
  # Channels for batch and batch for channels: the kernel is what x and g correlate to.
  ends = [
    (p, n + (m - 1) * s - size - p)
    for n, size, m in zip(shape.window, shape.image, g.shape[1:3], strict=True)
  ]
  k = _xla(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), (1, 1), ends, dilate_k=(s, s))
  return k.transpose(1, 2, 0, 3)


def _pays(depth: int, columns: int) -> bool:
  """Whether a product over `depth` channels outweighs writing its `columns` numbers to memory."""
  return depth >= 32 and columns <= _MAX_COLUMNS


def _suits_winograd(x: jax.Array, k: jax.Array) -> bool:
  """Whether the products it saves outweigh the sums, and the image's transform the kernel's."""
  (kh, kw, c, f), pieces = k.shape, x.size // x.shape[3] // 4
  return (kh, kw) == (3, 3) and min(c, f) >= 32 and pieces * (c + f) >= c * f


def _winograd(x: jax.Array, k: jax.Array, ends: list[tuple[int, int]]) -> jax.Array:
  """3×3 correlation of stride 1, 2×2 outputs at a time, with 16 products in place of 36.

  Y = Aᵀ [(G k Gᵀ) ⊙ (Bᵀ d B)] A on each 4×4 piece d of the image, ⊙ summed over channels: 16 matrix
  products (Lavin & Gray 2016, arXiv 1509.09308). As exact as the direct sum in float32.
  """
  dtype = x.dtype
  wide = jnp.promote_types(dtype, jnp.float32)
  x, k = x.astype(wide), k.astype(wide)
  h, w = (size + sum(end) - 2 for size, end in zip(x.shape[1:3], ends, strict=True))
  rows, columns = -(-h // 2), -(-w // 2)
  to_even = [(low, high + n % 2, 0) for (low, high), n in zip(ends, (h, w), strict=True)]
  x = lax.pad(x, jnp.zeros((), wide), [(0, 0, 0), *to_even, (0, 0, 0)])

  pieces = [
    [x[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2] for j in range(4)]
    for i in range(4)
  ]
  image = _both_axes(lambda a, b, c, d: (a - c, b + c, c - b, b - d), pieces)
  kernel = _both_axes(lambda a, b, c: (a, (a + b + c) / 2, (a - b + c) / 2, c), k)
  product = [[_matmul(image[i][j], kernel[i][j], 0) for j in range(4)] for i in range(4)]
  out = _both_axes(lambda a, b, c, d: (a + b + c, b - c - d), product)
  y = jnp.stack([jnp.stack(row, axis=3) for row in out], axis=2)  # [B,rows,2,columns,2,F]
  return y.reshape(len(x), 2 * rows, 2 * columns, -1)[:, :h, :w].astype(dtype)


def _both_axes(transform: Callable[..., tuple], grid: Any) -> list[tuple]:
  """The 1-D transform along either axis of a grid [n][n] of arrays; gives [m][m]."""
  across = [transform(*row) for row in grid]
  down = [transform(*column) for column in zip(*across, strict=True)]
  return list(zip(*down, strict=True))


def _gather(x: jax.Array, k: jax.Array, stride: int, ends: list[tuple[int, int]]) -> jax.Array:
  """Each output's window laid out in a row (im2col), then one product."""
  kh, kw, c, f = k.shape
  x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*e, 0) for e in ends), (0, 0, 0)])
  h, w = ((size - n) // stride for size, n in zip(x.shape[1:3], (kh, kw), strict=True))
  taps = [
    x[:, i : i + h * stride + 1 : stride, j : j + w * stride + 1 : stride]
    for i in range(kh)
    for j in range(kw)
  ]
  return _matmul(jnp.concatenate(taps, axis=-1), k.reshape(kh * kw * c, f), 0)


def _scatter(x: jax.Array, k: jax.Array, spread: int, ends: list[tuple[int, int]]) -> jax.Array:
  """One product for all taps, then their sum, each shifted to its place.

  The convolution (with a flipped window) of x [B,h,w,C], its pixels spread apart and padded by
  `ends`, with k [kh,kw,F,C].
  """
  kh, kw, f, c = k.shape
  wide = jnp.promote_types(x.dtype, jnp.float32)
  taps = _matmul(x, k.reshape(kh * kw * f, c), 1, wide)
  zero = jnp.zeros((), wide)

  def place(i: int, j: int) -> jax.Array:
    tap = taps[..., (i * kw + j) * f :][..., :f]
    rows, columns = (
      (low - (n - 1 - at), high - at, spread - 1)
      for (low, high), n, at in zip(ends, (kh, kw), (i, j), strict=True)
    )
    return lax.pad(tap, zero, [(0, 0, 0), rows, columns, (0, 0, 0)])

  y = functools.reduce(jnp.add, [place(i, j) for i in range(kh) for j in range(kw)])
  return y.astype(x.dtype)


def _matmul(x: jax.Array, k: jax.Array, axis: int, dtype: Any = None) -> jax.Array:
  """x [...,C] times k along its `axis`."""
  return lax.dot_general(x, k, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=dtype)


# --- layers ---------------------------------------------------------------------------------------


class Conv(nn.Module):
  """`conv2d` with its parameters: kernel f32[k,k,C,features] and, if asked, bias f32[features]."""

  features: int
  kernel_size: int
  stride: int = 1
  padding: int = 0
  use_bias: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = self._stored('kernel', nn.initializers.he_normal(), shape)
    bias = self._stored('bias', nn.initializers.zeros, shape[3:]) if self.use_bias else None
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    y = conv2d(x, kernel, self.stride, self.padding)
    return y if bias is None else y + bias.reshape(1, 1, 1, -1)

  def _stored(self, name: str, init: Callable, shape: tuple[int, ...]) -> Any:
    """`self.param`, which traces `init` each time, where that is needed: made, or refused."""
    value: Any = self.get_variable('params', name)
    return value if getattr(value, 'shape', None) == shape else self.param(name, init, shape)


class BatchNorm(nn.Module):
  """Batch norm as torch's: eps 1e-5, running statistics moved by 0.1 a step when training."""

  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    if not train and self.has_variable('batch_stats', 'norm') and not self.is_initializing():
      given: Any = self.get_variable('params', 'norm')
      seen: Any = self.get_variable('batch_stats', 'norm')
      if x.shape[-1:] == given['scale'].shape == seen['mean'].shape:  # else: flax's message
        return _normalised(self.dtype, x, seen['mean'], seen['var'], given['scale'], given['bias'])
    return nn.BatchNorm(
      use_running_average=not train, momentum=0.9, epsilon=_EPS, dtype=self.dtype, name='norm'
    )(x)


@_traced_once
def _normalised(
  dtype: Any, x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
  """What `nn.BatchNorm` computes when it is not training, operation by operation."""
  mean, var = (jnp.expand_dims(v, (0, 1, 2)) for v in (mean, var))
  y = x - mean
  mul = lax.rsqrt(var + _EPS)
  mul *= scale.reshape(1, 1, 1, -1)
  y *= mul
  y += bias.reshape(1, 1, 1, -1)
  return y.astype(nn.dtypes.canonicalize_dtype(x, scale, bias, dtype=dtype))
