"""Interpreters: factories that return an `Interpreter`; a new one is `from_map` and a formula."""

from collections.abc import Callable
from typing import Any

from adv2_jax.interpreters.base import Interpreter, avg_pool, from_map, min_max
from adv2_jax.interpreters.cam import cam, grad_cam
from adv2_jax.interpreters.gradient import grad, input_x_gradient, integrated_gradients, smooth_grad
from adv2_jax.interpreters.joint import joint
from adv2_jax.interpreters.masking import CIFAR as CIFAR_MASK
from adv2_jax.interpreters.masking import SCENES as SCENES_MASK
from adv2_jax.interpreters.masking import MaskConfig, mask, mask_objective, usual
from adv2_jax.interpreters.masking import fast as fast_mask
from adv2_jax.interpreters.rts import Decoder, rts
from adv2_jax.interpreters.unrolled import unrolled_mask
from adv2_jax.types import InputError

FACTORIES: dict[str, Callable[..., Interpreter]] = {
  'grad': grad,
  'cam': cam,
  'grad_cam': grad_cam,
  'input_x_gradient': input_x_gradient,
  'integrated_gradients': integrated_gradients,
  'smooth_grad': smooth_grad,
  'mask': mask,
}
NAMES = (*FACTORIES, 'rts')  # RTS is trained: `build` needs its decoder


def build(
  name: str, image_size: int = 224, form: str = 'printed', decoder: Decoder | None = None
) -> Interpreter:
  """The interpreter of that name with the settings usual for that image size (px).

  `form` is that of GRAD's smoothed ReLU derivative; maps do not depend on it, attacks do. `decoder`
  is what RTS needs; see `zoo.load_decoder`.
  """
  if name not in NAMES:
    raise InputError(f'interpreter {name!r} is unknown; expected one of {", ".join(NAMES)}')
  if name == 'rts':
    if decoder is None:
      raise InputError('interpreter rts needs a trained decoder: load_decoder(…), or --decoder')
    return rts(decoder)
  takes_pool = name in ('grad', 'input_x_gradient', 'integrated_gradients', 'smooth_grad')
  options: dict[str, Any] = {'pool': 4 if image_size > 64 else 2} if takes_pool else {}
  if name == 'grad':
    options['form'] = form
  if name == 'mask':
    options['config'] = usual(image_size)
  return FACTORIES[name](**options)


__all__ = [
  'CIFAR_MASK',
  'FACTORIES',
  'NAMES',
  'SCENES_MASK',
  'Decoder',
  'MaskConfig',
  'avg_pool',
  'build',
  'cam',
  'fast_mask',
  'from_map',
  'grad',
  'grad_cam',
  'input_x_gradient',
  'integrated_gradients',
  'joint',
  'mask',
  'mask_objective',
  'min_max',
  'rts',
  'smooth_grad',
  'unrolled_mask',
]
