"""Packaging of adv2_jax; `make attack` and `make test` install it for you."""

import pathlib

import setuptools

setuptools.setup(
  name='adv2_jax',
  version='0.1.0',
  description='Attack and defend image classifiers together with their interpreters, in JAX.',
  long_description=pathlib.Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  # The built-in weights live in checkpoints/ in the tree and in adv2_jax/_builtin once installed.
  packages=[
    *setuptools.find_packages(include=['adv2_jax', 'adv2_jax.*', 'experiments', 'experiments.*']),
    'adv2_jax._builtin',
  ],
  package_dir={'adv2_jax._builtin': 'checkpoints'},
  package_data={'adv2_jax._builtin': ['*.safetensors', '*.json']},
  install_requires=[
    'jax>=0.10',
    'jaxlib>=0.10',
    'flax>=0.12',
    'optax>=0.2.8',
    'chex>=0.1.90',
    'numpy>=2.0',
    'absl-py>=2.1',
    'tensorflow-datasets>=4.9.9',
    'safetensors>=0.5',
    'huggingface_hub>=1.0',
    'orbax-checkpoint>=0.12',
    'pillow>=11.0',
    'matplotlib>=3.9',
    'tqdm>=4.66',
  ],
  extras_require={
    'test': [
      'pytest>=8',
      'pytest-xdist>=3.6',
      'hypothesis>=6.100',
      'scipy>=1.13',
      'scikit-learn>=1.5',
      'equinox>=0.13',
      'ruff>=0.15',
      'mypy>=1.15',
    ],
    'convert': ['torch>=2.6'],
    'bench': ['torch>=2.6'],
    'tfds': ['tensorflow>=2.18'],
    'tpu': ['jax[tpu]'],
    'cuda': ['jax[cuda12]'],
  },
)
