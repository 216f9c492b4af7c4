import pytest
from conversion_cases import GOLDEN

from modeling_llava.conversion import convert_original_to_hf


@pytest.fixture(scope="session")
def golden_hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "out"
    convert_original_to_hf(GOLDEN / "llava_v15_tiny", folder, check=False)
    return folder
