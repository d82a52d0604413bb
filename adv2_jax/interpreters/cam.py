"""Representation interpreters: CAM and Grad-CAM, both from the head's own derivative."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adv2_jax.interpreters.base import (
  Interpreter,
  class_logit,
  from_map,
  min_max,
  one_per_setting,
)
from adv2_jax.types import Array, Image, InputError, Key, Label, Map, Outputs, PyTree


def _features(out: Outputs) -> Array:
  if 'features' not in out.taps:
    raise InputError(
      f"taps hold {sorted(out.taps)}; CAM and Grad-CAM need 'features', the head's input [B,h,w,F]"
    )
  return out.taps['features']


def _head_gradient(clf: Any, features: Array, y: Label) -> Array:
  """∂z_y/∂A, f32[B,h,w,F] whatever the net computes in."""
  g = jax.grad(lambda a: jnp.sum(class_logit(clf.head(a), y)))(features)
  return g.astype(jnp.float32)


def _is_even(g: Array) -> bool:
  """Whether a gradient [B,h,w,F] is the same at every place, or not finite, so that who knows."""
  values = np.asarray(g, np.float64)
  if not np.isfinite(values).all():
    return True
  uneven = np.abs(values - values.mean(axis=(1, 2), keepdims=True)).max()
  rounding = 1e-4 if g.dtype == jnp.float32 else 2e-2
  return bool(uneven <= rounding * np.abs(values).max())


@functools.lru_cache(maxsize=64)
def _pools_globally(
  head_fn: Callable[[PyTree, Array], Array],
  treedef: Any,
  leaves: tuple,
  feature_shape: tuple[int, ...],
  feature_dtype: Any,
) -> bool:
  """Whether ∂z/∂A is the same at every place, tried on made-up parameters and features.

  Made-up, because the true ones may be tracers; a head that pools globally does so with any. They
  have both signs, else a ReLU before the pooling would not show. One that gives no finite
  derivative with such is asked with positive ones, for a batch norm's variances are among them; one
  that gives none then either cannot be told, and passes.
  """

  def gradient(lowest: float) -> Array:
    features = _made_up((1, *feature_shape), feature_dtype, -1.0)
    params = jax.tree.unflatten(
      treedef, [_made_up(shape, dtype, lowest) for shape, dtype in leaves]
    )
    logits, by_features = jax.vjp(lambda a: head_fn(params, a), features)
    return by_features(_made_up(logits.shape, logits.dtype, -1.0))[0]

  with jax.ensure_compile_time_eval():
    tried = [gradient(-1.0), gradient(1.0)]
  return all(map(_is_even, tried))


def _made_up(shape: tuple[int, ...], dtype: Any, lowest: float) -> Array:
  """Numbers from `lowest` to `lowest` + 2, mixed so that no axis sees the same ones again."""
  if jnp.issubdtype(dtype, jax.dtypes.prng_key):  # NNX keeps those of its dropout
    return jnp.broadcast_to(jax.random.key(0), shape)
  if not jnp.issubdtype(dtype, jnp.floating):
    return jnp.zeros(shape, dtype)
  return jnp.asarray(np.resize(lowest + 1 + np.cos(np.arange(1, 8192) ** 2), shape), dtype)


def _require_global_pooling(clf: Any, features: Array) -> None:
  leaves, treedef = jax.tree.flatten(clf.params)
  shapes = tuple((np.shape(v), jnp.result_type(v)) for v in leaves)
  if not _pools_globally(clf.head_fn, treedef, shapes, features.shape[1:], features.dtype):
    raise InputError(
      'CAM needs a head that averages the features over all places (global average pooling) before '
      'anything else; this head treats places differently: give the activations that it averages '
      "as taps['features'], or use interpreters.grad_cam()"
    )


@one_per_setting
def cam() -> Interpreter:
  """CAM: m = minmax(Σ_k w_{y,k} A_k), A = taps['features'] (Zhou et al. 2016).

  The weights come from the head's derivative, ∂z_y/∂A_k = w_{y,k}/(h·w), not from a layer's name;
  the factor cancels in min-max. Raises InputError when the head does not pool globally.
  """

  def explain(params: PyTree, clf: Any, x: Image, y: Label, keys: Key) -> tuple[Map, Array]:
    del params, keys
    out = clf(x)
    features = _features(out)
    _require_global_pooling(clf, features)
    return min_max(jnp.sum(_head_gradient(clf, features, y) * features, axis=-1)), out.logits

  return from_map(explain, name='cam', passes=(1, 2), shares_pass=True)


@one_per_setting
def grad_cam() -> Interpreter:
  """Grad-CAM: m = r / max r with r = ReLU(Σ_k ᾱ_k A_k) (Selvaraju et al. 2017).

  ᾱ_k is the mean over places of ∂z_y/∂A_k and A = taps['features']. Any head will do. A map
  without positive evidence is zero.
  """

  def explain(params: PyTree, clf: Any, x: Image, y: Label, keys: Key) -> tuple[Map, Array]:
    del params, keys
    out = clf(x)
    features = _features(out)
    weights = jnp.mean(_head_gradient(clf, features, y), axis=(1, 2), keepdims=True)
    evidence = jax.nn.relu(jnp.sum(weights * features, axis=-1))
    top = jnp.max(evidence, axis=(1, 2), keepdims=True)
    return jnp.where(top > 0, evidence / jnp.where(top > 0, top, 1.0), 0.0), out.logits

  return from_map(explain, name='grad_cam', passes=(1, 2), shares_pass=True)
