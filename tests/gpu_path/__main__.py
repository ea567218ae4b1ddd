"""python -m tests.gpu_path"""

from tests.gpu_path import sampling, training

print(sampling.table(), training.table(), sep="\n\n")
