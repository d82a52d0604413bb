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


def untargeted(loss: PredictionLoss) -> PredictionLoss:
  """The loss of "any class but this one", [B]: between the leading one of the others and this one.

  log_odds becomes log(p_y / max_{j≠y} p_j), which is below 0 exactly where y is not predicted,
  targeted_xent its softplus. (−log(1 − p_y) feeds all other classes alike: on a tiny net fewer
  images flip, and on scenes they end less sure.)
  """

  def away(logits: Array, target: Label) -> Array:
    others, z_y = _others(logits, target)
    pair = jnp.stack([jnp.max(others, axis=-1), z_y], axis=-1)
    return loss(pair, jnp.zeros_like(target))

  return away


def runner_up(logits: Array, label: Label) -> Label:
  """i32[B]: the most probable class but `label`; what is predicted where that is wrong."""
  return jnp.argmax(_others(logits, label)[0], axis=-1).astype(jnp.int32)


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


# How far a map is from the benign one: for attacks that make it as different as they can. The
# `target_map` is the benign one; both are in [0,1], and small is good for the attacker.


def top_mass(maps: Map, target_map: Map, k: float = 0.2) -> Array:
  """Share of the sum of `maps` in the round(k·n) most important cells of the benign map, [B].

  The top-k loss of Ghorbani, Abid & Zou 2019 ("Interpretation of Neural Networks is Fragile"),
  whose maps sum to 1. Ties by cell order; 0 for a map that is 0 everywhere.
  """
  m, flat = (v.reshape(len(v), -1) for v in (widened(maps), target_map))
  cells = max(1, round(k * flat.shape[1]))
  top = jax.lax.top_k(flat, cells)[1]
  return jnp.take_along_axis(m, top, axis=1).sum(1) / (m.sum(1) + 1e-10)


def centre_of_mass(maps: Map) -> Array:
  """(Σ m·(row, column)) / Σ m with places in shares of the map's sides, in [0,1], [B,2].

  A cell lies at its middle: row i of h at (i + ½)/h. A map that is 0 everywhere has its centre
  at 0. Differs from the published code, which leaves out the division.
  """
  m = widened(maps)
  h, w = m.shape[1:]
  row, column = ((jnp.arange(n, dtype=m.dtype) + 0.5) / n for n in (h, w))
  along = jnp.stack([m.sum(2) @ row, m.sum(1) @ column], axis=-1)
  return along / (m.sum((1, 2)) + 1e-10)[:, None]


def centre_kept(maps: Map, target_map: Map) -> Array:
  """1 − ‖c(m) − c(target_map)‖/√2, c the centre of mass, [B]: that loss of Ghorbani et al. 2019.

  At the benign map the distance has no derivative, and an attack that starts there would stay. So
  it is measured from a point 0.001 off the benign centre, on the side where less room is left: the
  first step leads to the other one.
  """
  start = centre_of_mass(target_map)
  start += 1e-3 * jnp.where(start < 0.5, -1, 1).astype(start.dtype)
  apart = jnp.square(centre_of_mass(maps) - jax.lax.stop_gradient(start)).sum(1)
  return 1 - jnp.sqrt(apart / 2)
