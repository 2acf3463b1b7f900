"""`import dsv3`: quick, and everything it names is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dsv3


def test_importing_dsv3_does_not_import_torch() -> None:
    code = "import sys, dsv3; dsv3.ModelConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_everything_it_names_is_there() -> None:
    from dsv3.checkpoint.pretrained import DeepseekV3
    from dsv3.engine.llm import LLM, RequestOutput
    from dsv3.engine.sampling import SamplingParams

    assert (dsv3.LLM, dsv3.SamplingParams, dsv3.RequestOutput) == (LLM, SamplingParams, RequestOutput)
    assert dsv3.DeepseekV3 is DeepseekV3
    assert set(dsv3.__all__) <= set(dir(dsv3))
    assert dsv3.__version__[0].isdigit()


def test_what_it_does_not_name_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLAMA'"):
        _ = dsv3.LLAMA
