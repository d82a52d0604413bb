"""The convolution and batch norm every net here is made of: torch's numbers, NHWC layout."""

from typing import Any

import flax.linen as nn
import jax
from jax import lax


def conv2d(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
  """Cross-correlation, x [B,H,W,C] with kernel [kh,kw,C,F], zero padding on all sides as torch."""
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


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
    kernel = self.param('kernel', nn.initializers.he_normal(), shape)
    bias = self.param('bias', nn.initializers.zeros, (self.features,)) if self.use_bias else None
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    y = conv2d(x, kernel, self.stride, self.padding)
    return y if bias is None else y + bias.reshape(1, 1, 1, -1)


class BatchNorm(nn.Module):
  """Batch norm as torch's: eps 1e-5, running statistics moved by 0.1 a step when training."""

  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    return nn.BatchNorm(
      use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype, name='norm'
    )(x)
