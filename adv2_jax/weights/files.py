"""Files of weights, read and written: npz, safetensors, orbax directories, the hub; never a pickle.

Each reader gives what is stored, or an InputError that names the file and the remedy.
`zoo` knows what the tensors mean.
"""

import hashlib
import os
import pathlib
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from adv2_jax import images
from adv2_jax.types import InputError, PyTree

Tensors = dict[str, np.ndarray]

PICKLES = ('.pth', '.pt', '.th', '.pkl', '.pickle', '.bin', '.ckpt', '.tar')
# Besides these, zipfile raises RuntimeError for an encrypted member: a flipped bit looks like one.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


def read_npz(path: pathlib.Path) -> Tensors:
  """The arrays of an .npz archive."""
  try:
    with zipfile.ZipFile(path) as archive:
      members = archive.namelist()
    if any(member.endswith('data.pkl') for member in members):
      raise pickle_error(path)
    with np.load(path, allow_pickle=False) as arrays:
      return {name: arrays[name] for name in arrays.files}
  except InputError:
    raise
  except (*_ZIP_ERRORS, ValueError, OSError, EOFError) as e:
    raise _broken(path, 'an .npz archive of plain arrays', e) from e


def read_safetensors(path: pathlib.Path) -> Tensors:
  """The tensors of a safetensors file."""
  try:
    with safetensors.safe_open(path, 'numpy') as file:
      for name in file.keys():  # noqa: SIM118  # it is no mapping
        stored = file.get_slice(name).get_dtype()
        if stored.startswith('F') and stored not in ('F16', 'F32', 'F64'):  # F8_E4M3, …
          raise dtype_error(path, name, stored)
    return safetensors.numpy.load_file(path)
  except InputError:
    raise
  except (safetensors.SafetensorError, OSError, ValueError, KeyError) as e:
    raise _broken(path, 'a safetensors file', e) from e


def read_orbax(path: pathlib.Path) -> PyTree:
  """The Flax variables that orbax wrote into a directory; of a manager's root, the newest step."""
  path = _newest_step(path)
  import orbax.checkpoint.experimental.v1 as ocp  # slow to import, and the only import of it

  wanted = ('params', 'batch_stats')
  try:
    tree = ocp.metadata(path.absolute()).metadata
    if 'params' in tree:
      # Asking for NumPy leaves makes loading independent of the devices that wrote the checkpoint.
      leaves = {
        name: (lambda a: np.empty(a.shape, a.dtype))
        if name in wanted
        else (lambda _: ocp.PLACEHOLDER)
        for name in tree
      }
      tree = ocp.load(
        path.absolute(), {name: jax.tree.map(leaves[name], tree[name]) for name in tree}
      )
  except Exception as e:  # orbax documents no exception types; whatever it says becomes one line
    raise _broken(path, 'an orbax checkpoint', e) from e
  if 'params' not in tree:
    raise InputError(f'{path}: the checkpoint has no "params"; save {{params, batch_stats}}')
  return {name: tree[name] for name in wanted if name in tree}


def _newest_step(path: pathlib.Path) -> pathlib.Path:
  """The directory itself, or, where it holds a manager's steps, the one with the largest number."""
  inside = [p.name for p in path.iterdir()]
  if not inside:
    raise InputError(f'{path}: not an orbax checkpoint, the directory is empty')
  numbered = [(re.fullmatch('(?:.*_)?([0-9]+)', name), name) for name in inside]
  steps = {int(m[1]): name for m, name in numbered if m and (path / name).is_dir()}
  if not steps or {'_METADATA', '_CHECKPOINT_METADATA'} & {*inside}:
    return path
  newest = path / steps[max(steps)]
  warnings.warn(f'{path} holds {len(steps)} steps; {newest.name} is read', stacklevel=2)
  return newest


def download(source: str) -> pathlib.Path:
  """The local copy of hf://owner/name[/FILE]; FILE defaults to model.safetensors."""
  import huggingface_hub
  from huggingface_hub import errors

  owner, name, file = [*source.removeprefix('hf://').split('/', 2), '', ''][:3]
  if not (owner and name):
    raise InputError(f'weights {source!r} name no repository; expected hf://owner/name[/FILE]')
  file = file or 'model.safetensors'
  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(f'{owner}/{name}', file))
  except errors.RemoteEntryNotFoundError as e:
    raise InputError(f'cannot get {source}: the repository has no file {file!r}') from e
  except (OSError, ValueError) as e:  # the hub's own errors are among these
    raise InputError(f'cannot get {source}: {_one_line(e)}') from e


def hub_sha256(path: pathlib.Path) -> str | None:
  """The hub's cache names a large file by its sha256, which the client does not check."""
  blob = path.resolve().name
  return blob if re.fullmatch(r'[0-9a-f]{64}', blob) else None


def sha256(content: bytes) -> str:
  """The digest in hexadecimal."""
  return hashlib.sha256(content).hexdigest()


def _one_line(e: Exception) -> str:
  return next(iter(str(e).strip().splitlines()), '') or type(e).__name__


def _broken(path: pathlib.Path, expected: str, e: Exception) -> InputError:
  with path.open('rb') if path.is_file() else open(os.devnull, 'rb') as file:
    head = file.read(2)
  if head[:1] == b'\x80' and head[1:] in (b'\x02', b'\x03', b'\x04', b'\x05'):
    return pickle_error(path)
  return InputError(f'{path}: not {expected}, or only part of one ({_one_line(e)}); get it again')


def dtype_error(source: str | os.PathLike, name: str, dtype: Any) -> InputError:
  """The refusal of a tensor that is not of a usual float dtype."""
  remedy = 'NumPy writes bfloat16 so' if str(dtype).endswith('V2') else 'not quantised ones'
  return InputError(
    f'{source}: tensor {name!r} is {dtype}; expected float32, float16, bfloat16 or float64 '
    f'({remedy}): save it as float32'
  )


def pickle_error(path: str | os.PathLike) -> InputError:
  """The refusal of a pickle, with the command that converts it."""
  text = os.fspath(path)
  file = pathlib.PurePath(text.rpartition('/')[2] if text.startswith('hf://') else text)
  return InputError(
    f'{text} is a pickle, which can run code when opened, and is refused; convert it first: '
    f'python -m experiments.convert {file} {file.with_suffix(".safetensors")}'
  )


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> str:
  """Writes the tensors, the whole file or nothing, and returns the file's sha256."""
  content = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in tensors.items()})
  images.write_atomic(path, content)
  return sha256(content)
