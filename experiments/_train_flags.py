"""Flags of experiments.train."""

from absl import flags

TASKS = ('classifier',)


def define_train_flags() -> None:
  """Declares what experiments.train reads; call once, before app.run."""
  flags.DEFINE_enum('task', 'classifier', TASKS, 'What to train.')
  flags.DEFINE_string('dataset', 'scenes', 'Training data; see adv2_jax.data.NAMES.')
  flags.DEFINE_string('data_path', None, 'Folder or file of the training data.')
  flags.DEFINE_string('test_path', None, 'The same for held-out data; default: scenes draw their '
                      'test split, tfds sets use theirs, others hold out a tenth.')  # fmt: skip
  flags.DEFINE_string('label_key', 'y', 'Array of a packed file that holds the labels.')
  flags.DEFINE_integer(
    'image_size', None, 'Resize and crop to this side; default: as stored.', lower_bound=1
  )
  flags.DEFINE_integer(
    'num_examples', None, 'Train on the first N; default: all (scenes: 16000).', lower_bound=1
  )
  flags.DEFINE_string('model', 'scene_resnet', 'A name of adv2_jax.nets.ZOO.')
  flags.DEFINE_string('weights', None, 'Start from these weights; default: from random ones.')
  flags.DEFINE_list('mean', None, "Channel means for normalisation; default: ImageNet's.")
  flags.DEFINE_list('std', None, "Channel deviations; default: ImageNet's.")
  flags.DEFINE_string('workdir', None, 'Where to write; default: runs/train-<task>-<model>.')
  flags.DEFINE_bool('resume', False, 'Go on where the run in workdir stopped.')
  flags.DEFINE_integer('seed', 0, 'Of initial weights, order and augmentation; never of the data.')
  flags.DEFINE_integer('batch_size', 64, 'Images per step.', lower_bound=1)
  flags.DEFINE_integer('epochs', 12, 'Passes over the training data.', lower_bound=1)
  flags.DEFINE_integer('steps', None, 'Steps in all; overrides epochs.', lower_bound=1)
  flags.DEFINE_enum('optimiser', 'sgd', ('sgd', 'adamw'), 'sgd: with Nesterov momentum.')
  flags.DEFINE_float('learning_rate', 0.1, 'Peak of the one-cycle schedule.')
  flags.DEFINE_float('weight_decay', 5e-4, 'On kernels only.')
  flags.DEFINE_float('label_smoothing', 0.02, 'Share of the target spread over all classes.')


def all_flags() -> list[flags.Flag]:
  """The flags declared here."""
  return flags.FLAGS.flags_by_module_dict()[__name__]
