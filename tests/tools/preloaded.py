"""What every child of the fork server inherits instead of importing or reading it."""

# ruff: noqa: F401
import copy

import omegaconf
import safetensors.torch
import timm
import torch
import torch._dynamo

import evaluation.networks
import run.compare
import run.convert
import run.edit
import run.estimate
import run.evaluate
import run.evaluate_generator
import run.latent_stats
import run.linear_probe
import run.make_reference
import run.pretokenize
import run.quickstart
import run.reconstruct
import run.sample
import run.sweep
import run.train

_lite0 = evaluation.networks.load_efficientnet_lite0()
# Where networks are only laid out, as --check does, on the meta device.
evaluation.networks.load_efficientnet_lite0 = lambda pretrained=True: copy.deepcopy(_lite0).to(
    torch.get_default_device()
)
