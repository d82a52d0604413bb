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
from adv2_jax.types import Array, Image, InputError, Key, Label, Map, PyTree


def _head_gradient(clf: Any, features: Array, y: Label) -> Array:
  """∂z_y/∂A, [B,h,w,F]."""
  return jax.grad(lambda a: jnp.sum(class_logit(clf.head(a), y)))(features)


@functools.lru_cache(maxsize=64)
def _pools_globally(
  head_fn: Callable[[PyTree, Array], Array], treedef: Any, leaves: tuple, feature_shape: tuple
) -> bool:
  """Whether ∂z_y/∂A is the same at every place, tried on made-up parameters and features.

  Made-up, because the true ones may be tracers; a head that pools globally does so with any. One
  that gives no finite derivative with them cannot be told, and passes.
  """
  with jax.ensure_compile_time_eval():
    params = jax.tree.unflatten(treedef, [_made_up(*leaf) for leaf in leaves])
    features = np.resize(1 + np.sin(np.arange(1, 4097)), (1, *feature_shape)).astype(np.float32)
    g = jax.grad(lambda a: head_fn(params, a)[0, 0])(jnp.asarray(features))
  g = np.asarray(g, np.float64)
  if not np.isfinite(g).all():
    return True
  return bool(np.abs(g - g.mean(axis=(1, 2), keepdims=True)).max() <= 1e-4 * np.abs(g).max())


def _made_up(shape: tuple[int, ...], dtype: Any) -> Array:
  if jnp.issubdtype(dtype, jax.dtypes.prng_key):  # NNX keeps those of its dropout
    return jnp.broadcast_to(jax.random.key(0), shape)
  if not jnp.issubdtype(dtype, jnp.floating):
    return jnp.zeros(shape, dtype)
  # Positive, for a batch norm's variances are among them.
  return jnp.asarray(np.resize(1.5 + 0.5 * np.cos(np.arange(1, 8192)), shape), dtype)


def _require_global_pooling(clf: Any, features: Array) -> None:
  leaves, treedef = jax.tree.flatten(clf.params)
  shapes = tuple((np.shape(v), jnp.result_type(v)) for v in leaves)
  if not _pools_globally(clf.head_fn, treedef, shapes, features.shape[1:]):
    raise InputError(
      'CAM needs a head that averages the features over all places (global average pooling) '
      'before its weights; this head treats places differently: use interpreters.grad_cam()'
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
    features = out.taps['features']
    _require_global_pooling(clf, features)
    return min_max(jnp.sum(_head_gradient(clf, features, y) * features, axis=-1)), out.logits

  return from_map(explain, name='cam', passes=(1, 2))


@one_per_setting
def grad_cam() -> Interpreter:
  """Grad-CAM: m = r / max r with r = ReLU(Σ_k ᾱ_k A_k) (Selvaraju et al. 2017).

  ᾱ_k is the mean over places of ∂z_y/∂A_k and A = taps['features']. Any head will do. A map
  without positive evidence is zero.
  """

  def explain(params: PyTree, clf: Any, x: Image, y: Label, keys: Key) -> tuple[Map, Array]:
    del params, keys
    out = clf(x)
    features = out.taps['features']
    weights = jnp.mean(_head_gradient(clf, features, y), axis=(1, 2), keepdims=True)
    evidence = jax.nn.relu(jnp.sum(weights * features, axis=-1))
    top = jnp.max(evidence, axis=(1, 2), keepdims=True)
    return jnp.where(top > 0, evidence / jnp.where(top > 0, top, 1.0), 0.0), out.logits

  return from_map(explain, name='grad_cam', passes=(1, 2))
