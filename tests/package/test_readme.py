"""The Python that README.md shows runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_there_is_something_to_run():
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_block(block):
    """Its loader is the reader's own: here one batch of two images."""
    loader = [(torch.randn(2, 3, 224, 224), torch.tensor([1, 2]))]
    state = {"loader": loader, "images": loader[0][0], "targets": loader[0][1]}
    exec(compile(block, README.name, "exec"), state)
    for name in ("losses", "logits"):
        if name in state and name in block:
            values = state[name] if name == "logits" else torch.stack([state[name].full, *state[name].subnets])
            assert values.isfinite().all(), name
