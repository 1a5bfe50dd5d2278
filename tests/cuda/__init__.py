"""What only a GPU can show; everywhere else these tests are skipped."""

import pytest
import torch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
