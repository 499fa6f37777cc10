"""Validation: a bundle against its PyTorch original, accuracy and latency, promises kept or not, one report."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeattn import accuracy, conditions, contenders, gates, records, report, verdict
from edgeattn.accuracy import Band, Comparison
from edgeattn.bundle import Bundle
from edgeattn.contenders import Contender, attempt
from edgeattn.data import open_data
from edgeattn.errors import EdgeAttnError, MissingError, UnsupportedError, UsageError
from edgeattn.latency import measure, stability, summarise
from edgeattn.packages import EXTRAS
from edgeattn.progress import Progress
from edgeattn.records import Report
from edgeattn.reference import Feeds, Original, Results, Sample, golden
from edgeattn.verdict import Promises
"""placeholder"""
