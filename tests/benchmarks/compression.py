"""Bits per byte of the quick start's validation text: xz -9, order-0 entropy, and the run's GPT.

python tests/benchmarks/compression.py [WORKDIR]
"""

import collections
import json
import lzma
import math
import pathlib
import sys

from lmjax.data import sources


def main(workdir: str = '/tmp/lmjax/quickstart') -> None:
  source = sources.open_source('python#validation')
  text = ''.join(source[i] for i in range(len(source))).encode()
  counts = collections.Counter(text)
  result = json.loads((pathlib.Path(workdir) / 'result.json').read_text())
  print(
    json.dumps(
      {
        'bytes': len(text),
        'order_0_entropy': -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values()),
        'xz_9': 8 * len(lzma.compress(text, preset=9)) / len(text),
        'gpt': result['metrics']['eval/validation/bits_per_byte'],
      },
      indent=2,
    )
  )


if __name__ == '__main__':
  main(*sys.argv[1:])
