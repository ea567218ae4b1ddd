"""python -m tests.gpu_path [memory]"""

import sys

from tests.gpu_path import memory, sampling, training

if sys.argv[1:] == ["memory"]:
    memory.print_table()
else:
    print(sampling.table(), training.table(), sep="\n\n")
