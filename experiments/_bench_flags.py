"""Flags of experiments.bench."""

from absl import flags


def define_bench_flags() -> None:
  """Declares what experiments.bench reads; call once, before app.run."""
  flags.DEFINE_enum('model', 'resnet50', ['resnet18', 'resnet34', 'resnet50', 'resnet101'], 'Net.')
  flags.DEFINE_string('weights', None, 'As in experiments.attack; default: random ones.')
  flags.DEFINE_list('batch_sizes', ['4', '16'], 'Images per step, one table row each.')
  flags.DEFINE_list('steps', ['cam', 'grad'], 'Which attack steps.')
  flags.DEFINE_integer('repeats', 5, 'Measurements of each, the sides taking turns.')
  flags.DEFINE_integer('image_size', 224, 'Side in pixels.')
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of the computation.')
  flags.DEFINE_string('out', None, 'Write the figures to this JSON file.')


def all_flags() -> list[flags.Flag]:
  """The flags declared here."""
  return flags.FLAGS.flags_by_module_dict()[__name__]
