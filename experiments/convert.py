"""Turns a PyTorch checkpoint into safetensors, once, so that nothing else ever opens a pickle.

  python -m experiments.convert resnet50.pth resnet50.safetensors

Needs the `convert` extra (`pip install '.[convert]'`). The pickle is read by torch with
`weights_only=True`, which builds tensors and containers and calls nothing else.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from adv2_jax import validate
from adv2_jax.types import InputError
from adv2_jax.weights import files as weight_files
from adv2_jax.weights import zoo

# Keys under which training scripts keep the state dict.
_WRAPPERS = ('state_dict', 'model_state_dict', 'model', 'net', 'module', 'params')


def convert(source: pathlib.Path, target: pathlib.Path) -> zoo.Tensors:
  """Writes the tensors of a torch checkpoint to `target`, under this project's names.

  Unwraps what training scripts put around a state dict: an outer 'state_dict' or 'model', prefixes
  such as 'module.'.

  Raises:
    InputError: no torch, nothing to read, not a state dict, tensors that are no floats, or a target
      that exists already.
  """
  source, target = validate.user_path(source), validate.user_path(target)
  if target.suffix != '.safetensors':
    raise InputError(f'output {target} must end in .safetensors')
  if target.exists():
    raise InputError(f'{target} exists already; remove it or choose another name')
  if not target.parent.is_dir():
    raise InputError(f'{target.parent} is not a directory; create it first')
  if not source.is_file():
    raise InputError(f'no file at {source}; expected a PyTorch checkpoint')
  try:
    import torch
  except ImportError as e:
    raise InputError(f'torch is not installed ({e}); run: pip install ".[convert]"') from e
  try:
    content = torch.load(source, map_location='cpu', weights_only=True)
  except Exception as e:  # torch raises pickle, zip, runtime and other errors
    first = next(iter(str(e).strip().splitlines()), type(e).__name__)
    raise InputError(f'{source}: not a checkpoint of tensors alone ({first})') from e
  tensors = {}
  floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
  for name, tensor in _state_dict(content, source).items():
    if not torch.is_tensor(tensor) or name.endswith('num_batches_tracked'):
      continue
    if tensor.dtype not in floats:
      raise weight_files.dtype_error(source, name, tensor.dtype)
    tensors[name] = tensor.detach().float().numpy()
  if not tensors:
    raise InputError(f'{source}: holds no tensors; expected a state dict')
  tensors = zoo.canonical(tensors, source)
  weight_files.write_safetensors(target, tensors)
  return tensors


def _state_dict(content: Any, source: pathlib.Path) -> Mapping[str, Any]:
  inside = content
  while isinstance(inside, Mapping):
    content = inside
    inside = next((content[k] for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
  if not isinstance(content, Mapping):
    raise InputError(f'{source}: holds a {type(content).__name__}; expected a state dict')
  return content


def main(argv: Sequence[str] | None = None) -> None:
  """Parses the two paths, converts, and says what the tensors fit."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.convert',
    description='Turns a PyTorch checkpoint (.pth) into safetensors; never overwrites.',
  )
  parser.add_argument('source', metavar='IN.pth', type=pathlib.Path)
  parser.add_argument('target', metavar='OUT.safetensors', type=pathlib.Path)
  args = parser.parse_args(argv)
  try:
    tensors = convert(args.source, args.target)
  except (InputError, OSError) as e:
    sys.exit(f'error: {e}')
  net = zoo.identify(tensors)
  fits = f'use it with --model {net}' if net else 'no net of the zoo has these tensors'
  print(f'{args.target}: {len(tensors)} tensors; {fits}')


if __name__ == '__main__':
  main()
