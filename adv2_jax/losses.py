"""Prediction losses and map distances, f32[B]; small is good for the attacker.

Computed in float32 at least, whatever logits and maps come in: 1e-10 is 0 in half precision.
"""

import jax
import jax.numpy as jnp
import optax

from adv2_jax.types import Array, Label, Map, PredictionLoss, widened


def _others(logits: Array, target: Label) -> tuple[Array, Array]:
  """(logits with the target's own set to −inf, the target's logit [B])."""
  logits = widened(logits)
  is_target = jax.nn.one_hot(target, logits.shape[-1], dtype=bool)
  z_t = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
  return jnp.where(is_target, -jnp.inf, logits), z_t


def log_odds(logits: Array, target: Label) -> Array:
  """u = log Σ_{j≠t} exp z_j − z_t = log((1 − p_t)/p_t), [B]; its gradient never vanishes."""
  others, z_t = _others(logits, target)
  return jax.nn.logsumexp(others, axis=-1) - z_t


def targeted_xent(logits: Array, target: Label) -> Array:
  """Cross-entropy −log p_t = softplus(log_odds), [B]; without cancellation when p_t is near 1."""
  return jax.nn.softplus(log_odds(logits, target))


def margin(logits: Array, target: Label) -> Array:
  """max_{j≠t} z_j − z_t, [B]; negative when the target is predicted (Carlini & Wagner 2017)."""
  others, z_t = _others(logits, target)
  return jnp.max(others, axis=-1) - z_t


def hinged(loss: PredictionLoss, floor: float) -> PredictionLoss:
  """max(loss, floor) − floor: no more pull once the loss is below `floor`."""
  return lambda logits, target: jax.nn.relu(loss(logits, target) - floor)


def smoothed_xent(confidence: float = 0.95) -> PredictionLoss:
  """Cross-entropy to the target with probability `confidence`, the rest spread over the others."""

  def loss(logits: Array, target: Label) -> Array:
    k = logits.shape[-1]
    rest = (1 - confidence) / (k - 1)
    labels = rest + (confidence - rest) * jax.nn.one_hot(target, k, dtype=jnp.float32)
    return optax.losses.softmax_cross_entropy(widened(logits), labels)

  return loss


def _squares(maps: Map, target_map: Map) -> Array:
  return jnp.square(widened(maps) - widened(target_map))


def map_mse(maps: Map, target_map: Map) -> Array:
  """Mean over cells of (m − m_t)², [B]. The authors' form for CAM and RTS."""
  return jnp.mean(_squares(maps, target_map), axis=(-2, -1))


def map_sse(maps: Map, target_map: Map) -> Array:
  """Sum over cells of (m − m_t)², [B]. The authors' form for GRAD."""
  return jnp.sum(_squares(maps, target_map), axis=(-2, -1))


def map_rms(maps: Map, target_map: Map) -> Array:
  """√(mean (m − m_t)²), [B]; keeps its pull near the solution, where the square has none."""
  return jnp.sqrt(map_mse(maps, target_map) + 1e-10)
