"""Weights of `transformers`, in and out:

python -m lmjax.huggingface import SRC DIR    makes the workdir DIR of config.json and safetensors
python -m lmjax.huggingface export DIR DST    writes them of the newest checkpoint of DIR
"""

import sys

from lmjax import command
from lmjax.errors import UserError


def main() -> None:
  arguments = sys.argv[1:]
  if len(arguments) != 3 or arguments[0] not in ('import', 'export'):
    raise UserError('say `import SRC DIR` or `export DIR DST`')
  from lmjax import huggingface  # imports JAX, which a wrong command need not wait for

  act = {'import': huggingface.to_workdir, 'export': huggingface.from_workdir}[arguments[0]]
  act(*arguments[1:])
  print(f'{arguments[2]} is made of {arguments[1]}')


if __name__ == '__main__':
  if '--help' in sys.argv:
    print(__doc__)
    sys.exit()
  command.run(main, sys.argv[:1])
