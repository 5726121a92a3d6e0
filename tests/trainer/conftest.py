"""Small tensors: a second thread costs more than it saves."""

import torch

torch.set_num_threads(1)
