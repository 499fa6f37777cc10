"""GhostNetV2: modules against the golden operator files, the deploy form channel by channel, odd and dynamic sizes."""

import json

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import GOLDEN
from golden import fill
from torch import nn
from torch.nn import functional as F

from edgeattn.export import compile_module
from edgeattn.models._channels import Channels
from edgeattn.models.ghostnetv2 import Bottleneck, GhostModule, GhostNetV2
from edgeattn.tensors import Dim

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-6}
