"""python -m tests.gpu_path"""

from tests.gpu_path import sampling

print(sampling.table())
